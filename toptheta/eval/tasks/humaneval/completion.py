"""HumanEval: what the model is asked, and how its reply becomes a program."""

import ast
import re
import textwrap
import warnings

# What ends a base model's completion: the five of Chen et al. 2021, section 2.1, and three usual since.
STOP_SEQUENCES = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\nassert", "\n```")
FENCE = "```"


def chat_message(prompt: str) -> str:
    """What a user would write to an instruction-tuned model to have the function completed."""
    return (
        "Complete the following Python function. Answer with the complete function, including its imports, "
        f"in one {FENCE}python code block.\n\n{FENCE}python\n{prompt.strip()}\n{FENCE}"
    )


def completion_from_reply(reply: str, prompt: str, entry_point: str) -> str:
    """The text that makes the prompt a program, out of a chat reply.

    The first code block that defines the function counts, else the longest, else the reply as it is. A whole
    function comes after the prompt's own, which has only its docstring then, and replaces it; statements that
    only show its use are left out. A body is indented as the prompt's. What a token limit cut off, or the
    prose after code without a block, goes as far as the rest is Python."""
    blocks = _code_blocks(reply)
    defining = [block for block in blocks if _defines(block[0], entry_point)]
    if blocks:
        code, closed = defining[0] if defining else max(blocks, key=lambda block: len(block[0]))
    else:
        code, closed = reply, False
    code = textwrap.dedent(code) if blocks else code
    indent = _indentation(prompt, entry_point)
    if _defines(code, entry_point):
        if not blocks:
            code = _from_first_code_line(code)
        if not closed:
            code = _longest_valid(code)
        return f"{_stub(prompt, indent)}\n{_without_uses(code, entry_point)}\n"
    bodies = [body + "\n" for body in _indented(code, indent)]
    for body in bodies:
        if _parses(prompt + body):
            return body
    if closed:
        return bodies[0]
    longest = max((_longest_valid(prompt + body) for body in bodies), key=len)[len(prompt) :]
    return longest + "\n" if longest.strip() else bodies[0]


def truncate_base_completion(text: str) -> str:
    """A base model's continuation of the prompt, up to the first stop sequence."""
    ends = [text.find(stop) for stop in STOP_SEQUENCES]
    text = text[: min((end for end in ends if end >= 0), default=len(text))]
    # Decoding on its own takes the first space off a SentencePiece text (Llama 2).
    return f" {text}" if re.match(r" {3}\S", text) else text


def _code_blocks(reply: str) -> list[tuple[str, bool]]:
    """Fenced blocks in order, and whether each is closed."""
    blocks: list[tuple[str, bool]] = []
    current: list[str] | None = None
    for line in reply.replace("\r\n", "\n").split("\n"):
        if current is None:
            if line.lstrip().startswith(FENCE) and not line.strip().endswith(FENCE, 3):
                current = []
        elif line.rstrip().endswith(FENCE):
            rest = line.rstrip().rstrip("`")
            blocks.append(("\n".join([*current, rest] if rest.strip() else current), True))
            current = None
        else:
            current.append(line)
    if current is not None and ("\n".join(current).strip() or blocks):
        blocks.append(("\n".join(current), False))
    elif current is not None:  # a single fence, behind the code
        before = reply.replace("\r\n", "\n").rstrip().removesuffix(FENCE)
        if before.strip():
            blocks.append((before, True))
    return blocks


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^def\s+{re.escape(name)}\s*\(", textwrap.dedent(code), re.MULTILINE) is not None


def _parses(code: str) -> bool:
    return _syntax_error_line(code) is None


def _syntax_error_line(code: str) -> int | None:
    """The line of the first syntax error, from 1 on; None: it is Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes like "\\d"
            compile(
                code, "<reply>", "exec", dont_inherit=True
            )  # sees a stray return, which ast.parse lets pass
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, RecursionError, MemoryError):  # null bytes; nesting too deep for the parser
        return 1
    return None


def _longest_valid(code: str) -> str:
    """The code up to its first error, cut line by line until the rest is Python; '' where nothing is."""
    lines = code.split("\n")
    while lines:
        error = _syntax_error_line("\n".join(lines))
        if error is None:
            break
        lines = lines[: min(error, len(lines)) - 1]
    return "\n".join(lines)


def _from_first_code_line(code: str) -> str:
    match = re.search(r"^(import |from \w|def |class |@)", code, re.MULTILINE)
    return code[match.start() :] if match else code


def _stub(prompt: str, indent: str) -> str:
    """What makes the prompt a program on its own: nothing where it ends with a docstring."""
    newline = "" if prompt.endswith("\n") else "\n"
    return newline if _parses(prompt) else f"{newline}{indent}pass\n"


def _indentation(prompt: str, entry_point: str) -> str:
    match = re.search(
        rf"^def\s+{re.escape(entry_point)}\b.*?:\s*\n([ \t]+)", prompt, re.MULTILINE | re.DOTALL
    )
    return match[1] if match else "    "


def _indented(code: str, indent: str) -> list[str]:
    """Readings of a body: indented alike, with the first line's indentation lost, or right as it is."""
    code = code.strip("\n").rstrip()
    first, _, rest = code.partition("\n")
    return [
        textwrap.indent(textwrap.dedent(code), indent),
        textwrap.indent(f"{first.strip()}\n{textwrap.dedent(rest)}", indent),
        code,
    ]


def _without_uses(code: str, entry_point: str) -> str:
    """The code without its examples, so that a wrong or slow example is not held against the function."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code
    lines, functions = code.split("\n"), {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
        if _is_use(node, entry_point, functions):
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
    without = "\n".join(lines)
    return without if _parses(without) else code


def _is_use(node: ast.stmt, entry_point: str, functions: dict[str, ast.FunctionDef]) -> bool:
    """Whether a statement only shows the function's use, or cannot stand in the middle of a program.
    functions: those defined above it."""
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__"
    if isinstance(node, (ast.Import, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return False
    if isinstance(node, ast.Assert):
        return True
    if (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
    ):
        # print(...), main(), test(), but not sys.setrecursionlimit(...), nor what prepares a table.
        called = functions.get(node.value.func.id)
        return called is None or node.value.func.id == entry_point or _shows(called, entry_point)
    return _shows(node, entry_point)


def _shows(node: ast.stmt, entry_point: str) -> bool:
    """Whether a statement, or a function, calls the function of the task, prints or tests."""
    for child in ast.walk(node):
        if isinstance(child, ast.Assert) or isinstance(child, ast.Name) and child.id == "__name__":
            return True
        if isinstance(child, ast.Call):
            called = child.func
            if isinstance(called, ast.Name) and called.id in {entry_point, "print", "input"}:
                return True
            if isinstance(called, ast.Attribute) and called.attr in {"main", "testmod"}:
                return True
    return False

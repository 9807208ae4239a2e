"""Build the Triton kernels as a package for the kernels hub: `python -m hub.build DIR`.

DIR/build/torch-universal is what the loader of the package `kernels` imports: the modules of toptheta that
toptheta/kernels/triton/functional.py needs, and nothing else. They name each other relatively, and their
operators carry a name made of their content, so that several versions live in one process. See hub/README.md.
"""

import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

from toptheta.eval.cli import Parser
from toptheta.util.errors import UsageError
from toptheta.util.files import write_json, write_text
from toptheta.util.program import run_main

ROOT = Path(__file__).resolve().parents[1] / "toptheta"
ENTRY = "kernels/triton/functional.py"
NAME, VERSION = "toptheta-attention", 1
ABSOLUTE = re.compile(r"^(\s*)from toptheta(?:\.([\w.]+))? import ", re.MULTILINE)
INIT = '''"""Top-theta and Top-k attention as Triton kernels: `attention` (arXiv 2502.08363)."""

from .kernels.triton.functional import attention

__all__ = ["attention"]
'''


def modules(entry: str = ENTRY) -> dict[str, str]:
    """The sources that `entry` needs, itself included, by their paths in toptheta/."""
    found: dict[str, str] = {}
    todo = [entry]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found[name] = (ROOT / name).read_text()
        todo += [f"{parent}/__init__.py" for parent in Path(name).parents if parent != Path(".")]
        for node in ast.walk(ast.parse(found[name])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "toptheta":
                path = "/".join(str(node.module).split(".")[1:])
                parts = [f"{path}.py", *(f"{path}/{one.name}.py".lstrip("/") for one in node.names)]
                todo += [part for part in parts if (ROOT / part).is_file()]
    return found


def relative(name: str, source: str) -> str:
    """A module's source with relative imports in place of absolute ones."""
    dots = "." * len(Path(name).parts)
    return ABSOLUTE.sub(lambda found: f"{found[1]}from {dots}{found[2] or ''} import ", source)


def build(folder: Path) -> Path:
    """Write the package into `folder`; returns the folder of its only variant. Raises UsageError for a folder
    that holds something else."""
    variant = folder / "build" / "torch-universal"
    if folder.exists() and {file.name for file in folder.iterdir()} - {"build", "README.md"}:
        raise UsageError(f"DIR {folder} holds other files: name an empty folder, or one of an earlier build.")
    shutil.rmtree(folder / "build", ignore_errors=True)
    sources = {name: relative(name, source) for name, source in modules().items()}
    digest = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:12]
    unique = f"_toptheta_attention_{digest}"
    for name, source in sources.items():
        write_text(variant / name, source.replace('"toptheta::', f'"{unique}::'))
    write_text(variant / "__init__.py", INIT)
    # Earlier loaders import a folder of the package's name.
    write_text(variant / NAME.replace("-", "_") / "__init__.py", "from .. import *  # noqa: F403\n")
    metadata = {
        "id": unique,
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    write_json(variant / "metadata.json", metadata)
    shutil.copy(Path(__file__).with_name("README.md"), folder)
    return variant


def main() -> None:
    parser = Parser(prog="python -m hub.build", description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR", help="the folder to write")
    print(build(Path(parser.parse_args().folder)))


if __name__ == "__main__":
    run_main(main)

"""Every command and snippet of the documentation: those in docs/ are run, on a model of two layers and few
questions; those of the pages in OTHERS, which want hours or other models, are read by the scripts that they
name."""

import re
import shlex
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import topk_llama
from tests.helpers.paths import ROOT

OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "reproduce.md", "docs/scripts.md")]
PAGES = sorted({path for path in (ROOT / "docs").glob("*.md") if "```" in path.read_text()} - set(OTHERS))
SMALL = {"num_samples": 2, "num_fewshot": 1, "calib_samples": 2, "num_tasks": 2, "device": "cpu"}
SCRIPTS = ("test_llama.py", "gen_llama.py")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order; of several languages in their order on the page."""
    found = re.findall(rf"^```({language})\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text if "|" not in language else f"{name}\n{text}" for name, text in found]


def commands(text: str) -> list[list[str]]:
    """The command lines of a block, as words without comments and prompts."""
    lines = text.replace("\\\n", " ").replace("; python", "\npython").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def indented_commands(page: Path) -> list[list[str]]:
    return [
        words
        for line in re.findall(r"^    (.+)$", page.read_text(), re.MULTILINE)
        for words in commands(line)
    ]


def latest_run() -> Path:
    """The newest run that finished a cell."""
    return max(path for path in Path("products").iterdir() if list(path.rglob("results.json")))


def parsed(words: list[str]) -> Any:
    """The settings of a command of one of the two scripts. Raises UsageError as the script would."""
    import gen_llama
    import test_llama
    from toptheta.eval.cli import parse_settings
    from toptheta.eval.settings import GenSettings, QASettings

    module, kind = {"test_llama.py": (test_llama, QASettings), "gen_llama.py": (gen_llama, GenSettings)}[
        words[1]
    ]
    arguments = module.make_parser().parse_args(words[2:])
    return parse_settings(kind, arguments)  # type: ignore[type-var]


def run_command(words: list[str], folder_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert words[0] == "python", words
    words = [
        word.replace("products/<timestamp>", str(latest_run())) if "<" in word else word for word in words
    ]
    if words[1] in SCRIPTS:
        from toptheta.eval.runner import evaluate

        settings = parsed(words)
        known = {field.name for field in fields(settings)}
        small = {name: value for name, value in SMALL.items() if name in known}
        if settings.calib_load_path:
            del small["calib_samples"]
        if "text" in known and settings.text:
            small["max_seq_len"] = 200
        evaluate(replace(settings, llama=folder_model, **small))
    elif words[1] == "compare.py":
        from toptheta.report.compare import compare_runs

        compare_runs(words[2:])
    elif words[1:3] == ["-m", "toptheta.report"]:
        from toptheta.report.__main__ import main

        monkeypatch.setattr("sys.argv", ["report", *words[3:]])
        with pytest.raises(SystemExit, match="^0$"):
            main()
    else:
        raise AssertionError(f"{shlex.join(words)}: a page's commands must be run, say here how.")


def run_snippet(text: str, page: Path, names: dict[str, Any]) -> None:
    if "products/<timestamp>" in text:
        text = text.replace("products/<timestamp>", str(latest_run()))
    exec(compile(text, str(page), "exec"), names)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, folder_model: str) -> str:
    """Whatever model a snippet names, it gets the one of two layers."""
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda name, **more: load(folder_model, **more)
    )
    return folder_model


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs(page: Path, tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toptheta.methods import base

    monkeypatch.setattr(base, "REGISTRY", dict(base.registered()))  # an example's method does not stay
    names: dict[str, Any] = {"__name__": page.stem}
    Path("my_text.txt").write_text("The hills were green, and the town below slept. " * 200)
    for block in blocks(page, "bash|python"):
        language, _, text = block.partition("\n")
        if language == "python":
            run_snippet(text, page, names)
        else:
            for words in commands(text):
                run_command(words, tiny, monkeypatch)


def test_the_snippets_of_the_readme_run(
    tiny: str, here: Path, small_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other; in place of the hub there is the folder that a snippet saved."""
    load = topk_llama.load_calibration
    monkeypatch.setattr(topk_llama, "push_calibration", lambda model, name: None)
    monkeypatch.setattr(topk_llama, "load_calibration", lambda model, name: load(model, "thresholds"))
    prompts = [small_tokenizer("The hills were green. " * 30, return_tensors="pt") for _ in range(2)]
    names = {"prompts": prompts, "held_out_ids": prompts[0]["input_ids"]}
    snippets = blocks(ROOT / "README.md", "python")
    assert snippets
    for text in snippets:
        run_snippet(text, ROOT / "README.md", names)


def all_commands() -> list[list[str]]:
    found = [words for page in OTHERS for block in blocks(page, "bash") for words in commands(block)]
    found += [words for page in OTHERS for words in indented_commands(page)]
    return [words for words in found if words[0] in ("python", "make", ".venv/bin/python")]


def test_the_commands_of_the_readme_are_understood(here: Path) -> None:
    """Flags are read and checked as the scripts do it; files that they name are there."""
    for name in ("FILE", "frankenstein.txt", "gov_report.txt"):
        Path(name).write_text("text\n")
    Path("DIR").mkdir()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    found = all_commands()
    assert len(found) > 20
    for words in found:
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), words
        elif words[1] in SCRIPTS and not {"--resume", "--score", "--help"} & set(words):
            parsed([word.replace("NAME", "streaming_llm") for word in words])
        elif words[1] == "-m":
            assert find_spec(words[2]) is not None, words
            assert all((ROOT / path).exists() for path in words[3:] if path.startswith("tests/")), words
        else:
            source = (ROOT / words[1]).read_text()
            flags = [word for word in words[2:] if word.startswith("--")]
            package = "\n".join(path.read_text() for path in (ROOT / "toptheta").rglob("*.py"))
            missing = [flag for flag in flags if flag not in source and flag.strip("-") not in package]
            assert not missing, f"{shlex.join(words)}: {words[1]} has no {missing}"

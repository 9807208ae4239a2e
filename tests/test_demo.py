"""The demo from end to end, on a model of two layers and a short text."""

import re
from pathlib import Path

import pytest

import demo
from toptheta.report import load
from toptheta.util.errors import UsageError


def test_demo(
    folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small = {"MODEL": folder_model, "K": 16, "WINDOW": 128, "WINDOWS": 2, "PREFILLS": 1, "STEPS": 2}
    for name, value in (small | {"PROGRAM_TOKENS": 200}).items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr("sys.argv", ["demo.py"])
    demo.main()
    shown = capsys.readouterr().out
    report = re.search(r"A report on all of this, to open in a browser: (\S+)$", shown.strip())
    assert report is not None and Path(report[1]).stat().st_size < 5_000_000
    run = load(*Path(report[1]).parent.glob("*/"))
    assert set(run.cells["task"]) == {"perplexity", "everyday_science", "openai_humaneval"}
    assert run.cells["kl"].dropna().count() == 4 and (run.cells["kl"].dropna() >= 0).all()
    question = run.answers.query("task == 'everyday_science'").iloc[0]["question"]
    assert question.removesuffix("Answer:").strip() in shown and shown.count("  Top-theta budget K=16: ") == 4
    assert "  Top-theta budget K=16, fails its tests:" in shown
    stock = re.search(r"^\| stock sdpa +\| \d+ +\| 1.00 +\| \d+ +\| 1.00 +\|$", shown, re.MULTILINE)
    assert stock is not None and "% of the KV bytes read" in shown


def test_flags(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """--help explains the demo; anything else is refused; neither starts it."""
    monkeypatch.setattr("sys.argv", ["demo.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 0 and "how close to dense attention" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["demo.py", "--k", "8"])
    with pytest.raises(UsageError, match="arguments: --k 8; demo.py --help lists every flag"):
        demo.main()
    assert not list(here.iterdir())

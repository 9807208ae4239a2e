"""toptheta-calibration: calibrations to share from runs and from th.txt, and th.txt from them."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.eval.helpers import calibrating_settings, only_run
from tests.helpers.paths import ROOT
from topk_llama import load_calibration, update_model
from toptheta.calibration.tables import read_tables
from toptheta.eval import commands
from toptheta.eval.runner import evaluate
from toptheta.models.control import get_params, tables_of
from toptheta.models.loading import find_model, load_model
from toptheta.report.results import CellResult, Metric
from toptheta.util.files import write_json

EXAMPLE = ROOT / "products" / "examples" / "questions"


def calibration(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["toptheta-calibration", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        commands.calibration()
    return ended.value.code


def test_a_run_becomes_a_calibration_and_text_again(folder_model: str, here: Path, monkeypatch) -> None:
    settings = calibrating_settings(folder_model, sdc="offline-calibrated", layerk={0: 12}, calib_tac=True)
    evaluate(replace(settings, calibrate_only=True))
    run = only_run(here / "products")
    assert calibration(monkeypatch, run, "shared", "--to", "calibration", "--text", "everyday questions") == 0
    config = json.loads(Path("shared/config.json").read_text())
    assert config["params"]["K"] == [12, 16] and config["params"]["sdc"] == "offline-calibrated"
    assert config["calibrated_with"]["calib_tac"] == "True" and config["text"] == "everyday questions"
    assert config["base_model"] == "tiny-llama" and config["num_kv_heads"] == 2
    model = update_model(load_model(find_model(folder_model)))
    load_calibration(model, "shared")
    assert get_params(model).k_per_layer(2) == (12, 16) and get_params(model).sdc == "offline-calibrated"

    assert calibration(monkeypatch, "shared", "text", "--to", "text") == 0
    assert {file.name for file in Path("text").iterdir()} == {"th.txt", "sdc.txt"}
    for name in ("th.txt", "sdc.txt"):
        assert (Path("text") / name).read_text() == (run / name).read_text()

    # And from text alone, as the published project leaves it: the same tables.
    flags = ["--to", "calibration", "--placement", "pre-softmax", "--base_model", "owner/tiny"]
    assert calibration(monkeypatch, "text", "again", *flags) == 0
    other = update_model(load_model(find_model(folder_model)))
    load_calibration(other, "again", strict=False)
    assert get_params(other).sdc == "offline-calibrated"
    for kind in ("theta", "sdc"):
        for layer, table in getattr(tables_of(model), kind).items():
            found, known = getattr(tables_of(other), kind)[layer], table.samples > 0
            assert (found.samples == table.samples).all()
            assert (found.values[known] == table.values[known]).all()


def test_what_a_run_measured_is_on_the_card(here: Path, monkeypatch) -> None:
    shutil.copytree(EXAMPLE, "run")
    rows = {"phase": "prefill", "k": 64, "rows": 900, "mean": 61.25, "p5": 20.0, "p50": 60.0, "p95": 99.0}
    result = CellResult(
        "Top-theta K=64",
        metrics={"kl": Metric(0.0123, 0.0021, 8), "same_top": Metric(0.935, 0.01, 8)},
        effective_k=[rows | {"layers": [{"layer": 0}]}],
        missed_keys=0.0123,
    )
    write_json("run/results.json", result.to_json())
    assert calibration(monkeypatch, "run", "shared", "--to", "calibration") == 0
    card = Path("shared/README.md").read_text()
    for words in (
        "| effective K, prefill, K = 64 (900 rows) | mean 61.2, 5 to 95 % of the rows 20 to 99 |",
        "nats a token | 0.0123 ± 0.0021, 8 other texts |",
        "93.5 %",
        "| keys that the copy of K misses, of those that rows should keep | 1.23 % |",
        "| base model | SmolLM2-135M-Instruct |",
        "| vmc | True |",
    ):
        assert words in card
    assert read_tables("shared").num_layers == 30  # the example has half of them


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((EXAMPLE, "out"), "--to"),
        ((EXAMPLE, "out", "--to", "json"), "invalid choice: 'json'"),
        (("nowhere", "out", "--to", "calibration"), "not a folder"),
        (
            ("nowhere", "out", "--to", "text"),
            "cannot be reached|neither a folder nor a hub id|cannot be loaded",
        ),
        (("empty", "out", "--to", "text"), "neither th.txt nor sdc.txt"),
        (("text", "out", "--to", "calibration"), "--placement is needed"),
        (("sdc", "out", "--to", "calibration", "--placement", "pre-softmax"), "does not contain K"),
        (("text", "out", "--to", "calibration", "--placement", "post-softmax", "--sdc", "exact"), "--sdc"),
        (("text", "out", "--to", "calibration", "--placement", "post-softmax"), "text: .* go down to -0.25"),
        (
            (
                "text",
                "out",
                "--to",
                "calibration",
                "--placement",
                "pre-softmax",
                "--sdc",
                "offline-calibrated",
            ),
            "text: the SDC table lacks layer 0",
        ),
        (
            ("text", "out", "--to", "calibration", "--placement", "pre-softmax", "--num_layers", "0"),
            "--num_layers 0 has no effect, because FROM text has 1 layers",
        ),
        ((EXAMPLE, "out", "--to", "calibration", "--num_layers", "0"), "--num_layers has no effect here"),
        (("damaged", "out", "--to", "calibration"), "config.json is damaged"),
        ((EXAMPLE, "file", "--to", "text"), "DIR file is a file"),
        ((EXAMPLE, "a run", "--to", "calibration"), "DIR a run has a config.json, which would be replaced"),
        ((EXAMPLE, "out", "--to", "calibration", "--placement", "pre-softmax"), "--placement has no effect"),
        ((EXAMPLE, "out", "--to", "text", "--vmc"), "--vmc has no effect"),
        ((EXAMPLE, "/proc/x", "--to", "calibration"), "/proc/x: no folder can be created there"),
        ((EXAMPLE, "/proc/x", "--to", "text"), "/proc/x: no folder can be created there"),
    ],
)
def test_refusals(arguments: tuple, words: str, here: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("toptheta.models.sharing.hub_reachable", lambda: False)
    for folder in ("empty", "text", "sdc", "damaged", "a run"):
        Path(folder).mkdir()
    Path("text/th.txt").write_text("L0_H0:65 -0.25 8 64\n")
    Path("sdc/sdc.txt").write_text("L0_H0:65 0.25 8\n")
    Path("damaged/th.txt").write_text("L0_H0:65 0.25 8 64\n")
    Path("damaged/config.json").write_text("{}")
    Path("file").write_text("")
    Path("a run/config.json").write_text('{"settings": {}}')
    assert calibration(monkeypatch, *arguments) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not Path("out").exists()


def test_a_calibration_is_none_to_convert_into_one(here: Path, monkeypatch, capsys) -> None:
    assert calibration(monkeypatch, EXAMPLE, "shared", "--to", "calibration") == 0
    assert calibration(monkeypatch, "shared", "again", "--to", "calibration") == 2
    assert "already is a calibration in that format" in capsys.readouterr().err

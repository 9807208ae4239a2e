"""lm-eval's own command line with `--model toptheta`: the numbers of test_llama.py, and one sentence for what
is wrong."""

import json
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from lm_eval import tasks

from tests.eval.helpers import calibrating_settings, only_run
from toptheta.eval import commands
from toptheta.eval.runner import evaluate
from toptheta.eval.settings import BUNDLED_TASK
from toptheta.eval.tasks.lm_eval_tasks import task_configs
from toptheta.report.results import ANSWERS
from toptheta.util.errors import UsageError


@pytest.fixture
def task_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The bundled task, as a file that lm-eval's --tasks takes; without the index of all its tasks, which
    takes 10 seconds to read."""
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    (here / "task.yaml").write_text(yaml.safe_dump(task_configs(BUNDLED_TASK, None, False)[0]))
    return "task.yaml"


def lm_eval(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["toptheta-eval", *arguments])
    commands._lm_eval()


def test_the_small_model_answers_as_in_test_llama(
    task_file: str, here: Path, monkeypatch: pytest.MonkeyPatch, small_tokenizer
) -> None:
    """Calibrated and evaluated by test_llama.py, then evaluated by lm-eval with those thresholds: the same
    likelihoods to the last digit."""
    settings = calibrating_settings("smollm2", k=(24,), sdc="exact", vmc=True, num_fewshot=1, calib_samples=2)
    (result,) = evaluate(settings)
    cell = only_run(here / "products")
    indices = sorted(random.Random(settings.seed).sample(range(100), 2))
    options = ["--num_fewshot", "1", "--seed", str(settings.seed), "--log_samples", "--output_path", "out"]
    lm_eval(
        monkeypatch,
        *("run", "--model", "toptheta", "--model_args", f"pretrained=smollm2,thresholds={cell}"),
        *("--tasks", task_file, "--samples", json.dumps({BUNDLED_TASK: indices}), *options),
    )
    (found_file,) = Path("out").rglob("results_*.json")
    found = json.loads(found_file.read_text())["results"][BUNDLED_TASK]
    for metric in ("acc", "acc_norm"):
        assert found[f"{metric},none"] == result.metrics[metric].value
    (samples_file,) = Path("out").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in samples_file.read_text().splitlines()]
    likelihoods = [[float(one[0]) for one in sample["filtered_resps"]] for sample in samples]
    answers = [json.loads(line) for line in (cell / ANSWERS).read_text().splitlines()]
    assert likelihoods == [answer["loglikelihoods"] for answer in answers]
    assert [sample["doc_id"] for sample in samples] == indices


def test_thresholds_of_every_kind(folder_model: str, here: Path) -> None:
    """A run's folder, a calibration to share, and th.txt alone put the model into the same state."""
    from toptheta.eval.calibration_files import of_run
    from toptheta.eval.harness_model import TopThetaHarnessLM
    from toptheta.models.control import get_params, tables_of

    evaluate(replace(calibrating_settings(folder_model, sdc="exact", vmc=True), calibrate_only=True))
    run = only_run(here / "products")
    of_run(str(run), {}).save("shared")
    Path("text").mkdir()
    (run / "th.txt").rename("text/th.txt")
    for arguments in (
        {"thresholds": str(run)},
        {"thresholds": "shared"},
        {"thresholds": "text", "sdc": "exact", "vmc": True, "k": 16, "method": "top_theta"},
    ):
        lm = TopThetaHarnessLM(pretrained=folder_model, **arguments)
        params, tables = get_params(lm.model), tables_of(lm.model)
        assert (params.method.spec, params.placement, params.sdc, params.vmc) == (
            "top_theta",
            "pre-softmax",
            "exact",
            True,
        )
        assert params.k_per_layer(2) == (16, 16) and tables is not None and set(tables.theta) == {0, 1}
        assert lm.model.model.layers[0].self_attn.toptheta.theta is not None
    without = TopThetaHarnessLM(pretrained=folder_model, method="streaming_llm:sinks=2", k=16)
    assert get_params(without.model).method.spec == "streaming_llm:sinks=2"
    assert without.model.model.layers[0].self_attn.toptheta.spec.k == 16
    assert not get_params(TopThetaHarnessLM(pretrained=folder_model).model).sparse


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pretrained": ""}, "names no model"),
        ({"pretrained": "9-9"}, "--model_args pretrained '9-9' is neither an alias"),
        ({"method": "top_j"}, "--model_args method is 'top_j': choose one of"),
        ({"method": "top_theta"}, "needs calibrated tables: add thresholds="),
        ({"method": "top_k", "sdc": "offline-calibrated"}, "needs calibrated tables"),
        ({"method": "top_k", "k": "many"}, "--model_args k is 'many': give whole numbers"),
        ({"method": "top_k", "placement": "before"}, "--model_args placement is 'before'"),
        ({"method": "top_k", "vmc": True}, "vmc"),
        ({"thresholds": "owner/name/extra"}, "neither a folder nor a hub id"),
        ({"thresholds": "."}, "neither th.txt nor sdc.txt"),
        ({"methd": "top_k"}, "--model_args has methd, which neither toptheta nor lm-eval accepts"),
        ({"batch_size": "auto"}, "--batch_size is auto"),
    ],
)
def test_wrong_arguments(arguments: dict, words: str, folder_model: str, here: Path, monkeypatch) -> None:
    from toptheta.eval.harness_model import TopThetaHarnessLM

    monkeypatch.setattr("toptheta.models.sharing.hub_reachable", lambda: False)
    with pytest.raises(UsageError) as caught:
        TopThetaHarnessLM(**({"pretrained": folder_model} | arguments))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--tasks", "no_such_task"], "error: Tasks not found: no_such_task"),
        (["--num_fewshot", "0"], "error: No tasks specified"),
        (["--tasks", "task.yaml", "--model_args", "k=8"], "error: --model_args names no model"),
    ],
)
def test_one_sentence_and_exit_code_2(
    wrong: list[str], words: str, task_file: str, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sys, "argv", ["toptheta-eval", "run", "--model", "toptheta", *wrong])
    with pytest.raises(SystemExit) as caught:
        commands.lm_eval()
    assert caught.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub (OfflineModeIsEnabled)"),
        OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nCheck your connection."),
    ],
    ids=["data", "model"],
)
def test_without_a_network(error: OSError, folder_model: str, monkeypatch, capsys) -> None:
    """What the libraries of the hub raise is one sentence."""
    monkeypatch.setattr("datasets.load_dataset", Mock(side_effect=error))
    flags = ["--tasks", "arc_easy", "--model_args", f"pretrained={folder_model}"]
    monkeypatch.setattr(sys, "argv", ["toptheta-eval", "run", "--model", "toptheta", *flags])
    with pytest.raises(SystemExit) as caught:
        commands.lm_eval()
    said = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and said.startswith("error: ") and said.endswith("on this machine.")

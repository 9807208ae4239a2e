"""Bad input: one sentence and exit code 2, before anything is loaded where that can be known before."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from toptheta.eval.cli import parse_settings, settings_flags, settings_from_json
from toptheta.eval.settings import GenSettings, QASettings, Settings, label
from toptheta.eval.tasks.lm_eval_tasks import TASKS, check_task, task_configs
from toptheta.models.loading import find_model
from toptheta.util.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent


def parse(flags: str) -> Settings:
    parser = argparse.ArgumentParser()
    settings_flags(parser, Settings)
    return parse_settings(Settings, parser.parse_args(flags.split()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mode two", "--mode is 'two': give a whole number"),
        ("--mode 0 --k 0", "--k 0 keeps nothing"),
        ("--mode 1 --k 64,-2", "--k -2 keeps nothing"),
        ("--mode 1 --layerk 3=4", "--layerk is '3=4'"),
        ("--mode 1 --layerk 3:-4", "--layerk takes K of at least 0"),
        ("--mode 1 --vmc", "--vmc has nothing to compensate"),
        ("--vmc", "--vmc has no effect on dense attention"),
        ("--capk", "--capk has no effect on dense attention"),
        ("--mode 1 --capk", "--capk is for thresholds"),
        ("--mode 1,3 --calib_tac", "--calib_tac is for thresholds"),
        ("--mode 1 --sdc exp-threshold", "--sdc exp-threshold needs a threshold"),
        ("--mode 0,1 --sdc exp-threshold", "--sdc exp-threshold needs a threshold"),
        ("--sdc exact", "--sdc has no effect on dense"),
        ("--mode 0 --sdc some", "--sdc is 'some': choose one of none, exact"),
        ("--mode 0 --placement before", "--placement is 'before'"),
        ("--mode 1 --placement post-softmax --sdc exact", "needs --placement pre-softmax"),
        ("--mode 0 --calib_sample_frac 1.5", "--calib_sample_frac is 1.5"),
        ("--mode 0 --calib_load_path /nowhere", "there is no such folder"),
        ("--mode 1 --calib_load_path /nowhere", "serves --mode 0"),
        ("--mode 1 --calibrate_only", "needs something to calibrate"),
        ("--mode 0 --calib_samples 2.5", "give a count, or a share"),
        ("--dtype float8", "--dtype is 'float8'"),
        ("--device gpu", "--device is 'gpu'"),
        ("--batch_size 0", "--batch_size is 0"),
        ("--batch_size many", "--batch_size is 'many'"),
        ("--sdc_scale x", "--sdc_scale is 'x': give a number"),
        ("--vrow_popularity --no_statistics", "needs statistics"),
    ],
)
def test_flags_that_make_no_sense(flags: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(flags)


def test_cells() -> None:
    settings = parse("--mode 0,1,3 --k 32,64 --sdc exact --vmc --calib_tac --capk --layerk {0:512,1:0}")
    cells = settings.cells()
    assert [label(cell) for cell in cells] == [
        "Top-theta K=32",
        "Top-theta K=64",
        "Top-k K=32",
        "Top-k K=64",
        "dense",
    ]
    assert [getattr(cell.method, "capk", False) for cell in cells] == [True, True, False, False, False]
    assert settings.layer_ks(cells[0], 4) == (512, 0, 32, 32)
    with pytest.raises(UsageError, match="--layerk names layer 1, but the model has layers 0 to 0"):
        settings.layer_ks(cells[0], 1)
    assert [label(cell) for cell in parse("--mode 0 --placement none").cells()] == ["dense"]
    again = settings_from_json(Settings, settings.to_json())
    assert again == settings


def test_settings_of_each_script() -> None:
    with pytest.raises(UsageError, match="add --do_sample"):
        settings_from_json(GenSettings, GenSettings(num_samples_per_task=3).to_json())
    with pytest.raises(UsageError, match="does not fit this script"):
        settings_from_json(QASettings, GenSettings().to_json())


def test_models(tmp_path: Path) -> None:
    assert find_model("3-8").location == "meta-llama/Meta-Llama-3-8B"
    assert find_model("3-8").name == "Llama-3-8B"
    assert find_model("owner/name").location == "owner/name"
    for name, message in (
        ("3-9", "no alias"),
        ("a/b/c", "no alias"),
        (str(tmp_path / "x.gguf"), "no such file"),
        (str(tmp_path), "no config.json"),
    ):
        with pytest.raises(UsageError, match=message):
            find_model(name)


def test_tasks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        check_task("arc_easy", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="has no folder 'arc_easy'"):
        check_task("arc_easy", str(tmp_path))
    (tmp_path / "arc_easy").mkdir()
    with pytest.raises(UsageError, match="holds no test.jsonl"):
        task_configs("arc_easy", str(tmp_path), False)
    for name in TASKS:
        for config, twin in zip(task_configs(name, None, False), task_configs(name, None, True)):
            assert twin["task"] == config["task"] + "_calibration"
            assert twin["test_split"] != (config.get("test_split") or config.get("validation_split"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("test_llama.py --no_such_flag", "no_such_flag"),
        ("test_llama.py --llama 9-9", "no alias"),
        ("test_llama.py --mode 1 --k 64 --layerk 99:64", "--layerk names layer 99"),
        ("test_llama.py --task hellaswagg", "near it are hellaswag"),
        ("test_llama.py --resume /nowhere", "no run.json"),
        ("test_llama.py --llama owner/model-that-is-not-here", "cannot be reached|no such model"),
        ("test_llama.py --task arc_easy", "data of task arc_easy cannot be loaded"),
        ("test_llama.py --mod 0", "--mod 0"),
        ("gen_llama.py --dataset code", "--dataset is 'code'"),
        ("gen_llama.py --max_seq_len 5", "--max_seq_len is 5"),
        ("gen_llama.py --score /nowhere", "add --allow_code_execution"),
        ("gen_llama.py --score /nowhere --allow_code_execution", "no samples.jsonl"),
    ],
)
def test_scripts_exit_with_2(command: str, message: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        # No network, and nothing downloaded before.
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert result.returncode == 2, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("error: ") == 1


def test_not_a_llama(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_embd=8, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    command = [sys.executable, "test_llama.py", "--llama", str(tmp_path / "gpt2")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "of type 'gpt2'" in result.stderr and "Traceback" not in result.stderr


def test_sigterm_is_an_interrupt() -> None:
    """A cluster's notice before it kills a job: the job saves what it has, as at Ctrl-C."""
    script = (
        "import os, signal, time\n"
        "from toptheta.eval.cli import run_main\n"
        "def main():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(10)\n"
        "    except KeyboardInterrupt:\n"
        "        print('saved', flush=True)\n"
        "        raise\n"
        "run_main(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 130 and done.stdout == "saved\n"

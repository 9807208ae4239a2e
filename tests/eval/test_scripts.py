"""The scripts as processes: bad input is one sentence and exit code 2, and flags reach the job."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import run_script


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("test_llama.py --no_such_flag", "no_such_flag"),
        ("test_llama.py --llama 9-9", "neither an alias"),
        ("test_llama.py --mode 1 --k 64 --layerk 99:64", "--layerk names layer 99"),
        ("test_llama.py --task hellaswagg", "choose for example hellaswag"),
        ("test_llama.py --resume /nowhere", "no run.json"),
        ("test_llama.py --mod 0", "--mod 0"),
        ("gen_llama.py --dataset code", "--dataset is 'code'"),
        ("gen_llama.py --max_seq_len 5", "--max_seq_len is 5"),
        ("gen_llama.py --score /nowhere", "add --allow_code_execution"),
        ("gen_llama.py --score /nowhere --allow_code_execution", "no samples.jsonl"),
    ],
)
def test_scripts_exit_with_2(command: str, message: str, tmp_path: Path) -> None:
    check(run_script([sys.executable, *command.split()], tmp_path, cwd=ROOT), message)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("test_llama.py --llama owner/model-that-is-not-here", "cannot be reached|no such model"),
        ("test_llama.py --task arc_easy", "data of task arc_easy cannot be loaded"),
    ],
)
def test_without_a_network(command: str, message: str, tmp_path: Path) -> None:
    # The hub's library reads these when it is imported; nothing was downloaded before.
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command_line = [sys.executable, *command.split()]
    run = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=120, env=env)
    check(run, message)


def check(run: subprocess.CompletedProcess, message: str) -> None:
    """One sentence, with `message`, and exit code 2."""
    assert run.returncode == 2, run.stderr
    assert re.search(message, run.stderr), run.stderr
    assert "Traceback" not in run.stderr and run.stderr.count("error: ") == 1


def test_not_a_llama(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_embd=8, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    command = [sys.executable, "test_llama.py", "--llama", str(tmp_path / "gpt2")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "of type 'gpt2'" in result.stderr and "Traceback" not in result.stderr


def test_script(folder_model: str, here_with_text: Path) -> None:
    """The flags reach the job; a wrong list is one sentence and exit code 2."""
    command = [sys.executable, str(ROOT / "gen_llama.py"), "--dataset", "needle", "--llama", folder_model]
    command += [
        "--max_seq_len",
        "160",
        "--needle_lengths",
        "160",
        "--mode",
        "1",
        "--k",
        "8",
        "--device",
        "cpu",
    ]
    run = run_script([*command, "--needle_depths", "50", "--prefill_chunk", "50"], here_with_text)
    assert run.returncode == 0 and "found %" in run.stdout, run.stderr
    bad = run_script([*command, "--needle_depths", "half"], here_with_text)
    assert bad.returncode == 2 and "--needle_depths is 'half': give a whole number" in bad.stderr

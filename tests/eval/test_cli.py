"""Flags that make no sense are one sentence before anything is loaded; SIGTERM is an interrupt."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gen_llama
import test_llama
from tests.eval.helpers import parse
from tests.helpers.paths import ROOT
from toptheta.eval.cli import parse_settings, resumed_settings, settings_flags, settings_from_json
from toptheta.eval.run import check_resume
from toptheta.eval.settings import GenSettings, QASettings, Settings
from toptheta.eval.table_cells import answer_key
from toptheta.util.errors import UsageError
from toptheta.util.options import to_flags


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--mode 0 --calib_interp cubic", "--calib_interp is 'cubic'"),
        ("--mode 0 --calib_smooth -2", "--calib_smooth is -2"),
        ("--mode 0 --calib_smooth wide", "--calib_smooth is 'wide'"),
        ("--mode 1 --calib_interp fit", "--calib_interp has no effect without calibration"),
        ("--calib_smooth 4", "--calib_smooth has no effect without calibration"),
        ("--mode 3 --calib_dump_samples", "--calib_dump_samples has no effect without thresholds"),
        ("--mode 0 --calib_load_path . --calib_dump_samples", "has no effect with --calib_load_path"),
        ("--mode 1 --sdc offline-calibrated --calib_dump_samples", "leave it out, or add --mode 0"),
    ],
)
def test_bad_flags(flags: str, message: str) -> None:
    parser = argparse.ArgumentParser()
    settings_flags(parser, Settings)
    with pytest.raises(UsageError, match=message):
        parse_settings(Settings, parser.parse_args(flags.split()))


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
        ("--capk", "--capk has no effect without thresholds"),
        ("--mode 1 --capk", "--capk has no effect without thresholds"),
        ("--mode 1,3 --calib_tac", "--calib_tac has no effect without thresholds"),
        ("--mode 1 --sdc exp-threshold", "--sdc exp-threshold needs a threshold"),
        ("--mode 0,1 --sdc exp-threshold", "--sdc exp-threshold needs a threshold"),
        ("--sdc exact", "--sdc has no effect on dense"),
        ("--layerk 0:3", "--layerk has no effect on methods without a K"),
        ("--method dense,top_p --layerk 0:3", "--layerk has no effect on methods without a K"),
        ("--mode 0 --sdc some", "--sdc is 'some': choose one of none, exact"),
        ("--mode 0 --placement before", "--placement is 'before'"),
        ("--mode 1 --placement post-softmax --sdc exact", "needs --placement pre-softmax"),
        ("--mode 0 --calib_sample_frac 1.5", "--calib_sample_frac is 1.5"),
        ("--mode 0 --calib_load_path /nowhere", "there is no such folder"),
        ("--mode 1 --calib_load_path /nowhere", "is used by --mode 0"),
        ("--mode 1 --calibrate_only", "needs something to calibrate"),
        ("--mode 0 --calib_samples 2.5", "give a count, or a share"),
        ("--dtype float8", "--dtype is 'float8'"),
        ("--device gpu", "--device is 'gpu'"),
        ("--batch_size -1", "--batch_size is -1"),
        ("--batch_size many", "--batch_size is 'many'"),
        ("--mode 0 --when_slower fast", "--when_slower is 'fast': choose one of sparse, dense"),
        ("--when_slower dense", "--when_slower has no effect on methods"),
        ("--sdc_scale x", "--sdc_scale is 'x': give a number"),
        ("--vrow_popularity --no_statistics", "needs statistics"),
        ("--mode 0 --calib_add_sigma nan", "--calib_add_sigma is nan: give a finite number"),
        ("--mode 1 --sdc exact --sdc_scale inf", "--sdc_scale is inf: give a finite number"),
        ("--mode 0 --calib_samples nan", "--calib_samples is nan: give a finite number"),
        ("--seed -1", "--seed is -1: give at least 0"),
        ("--seed 4294967296", "--seed is 4294967296: give a finite number below"),
        ("--mode 1 --k 99999999999999999999", "--k is 99999999999999999999"),
        ("--mode 1 --layerk 0:4,0:9", "--layerk is '0:4,0:9', which names 0 twice"),
        (f"--output_dir {__file__}", "is not a folder; name another one"),
        (f"--output_dir {__file__}/below/it", "is not a folder; name another one"),
    ],
)
def test_flags_that_make_no_sense(flags: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(flags)


@pytest.mark.parametrize(
    ("script", "flags", "refused"),
    [
        ("qa", "--k 64", "--k has no effect on methods without a K"),
        ("qa", "--method dense,top_p --k 256", "--k has no effect on methods without a K"),
        ("qa", "--method dense,top_k --k 64", ""),
        ("qa", "--mode 0 --placement none --k 64", ""),
        ("qa", "--placement post-softmax", "--placement has no effect on dense attention"),
        ("qa", "--placement none", ""),
        ("qa", "--method top_k:placement=pre-softmax --placement post-softmax", "--placement has no effect"),
        ("qa", "--mode 1 --sdc_scale 0.5", "--sdc_scale has no effect where no cell has SDC"),
        ("qa", "--method top_k,top_k:sdc=exact --sdc_scale 0.5", ""),
        ("qa", "--mode 1 --when_slower dense", "--when_slower has no effect"),
        ("qa", "--method top_theta:key_copy=int8 --when_slower dense", "--when_slower has no effect"),
        ("qa", "--mode 0,1 --when_slower dense", ""),
        (
            "gen",
            f"--dataset perplexity --text {__file__} --calib_text {__file__} --mode 3",
            "--calib_text has no effect without calibration",
        ),
        (
            "gen",
            f"--dataset perplexity --text {__file__} --calib_seq_len 64 --mode 3",
            "--calib_seq_len has no effect without",
        ),
        ("qa", "--mode 1 --calib_samples 4", "--calib_samples has no effect without calibration"),
        ("qa", "--mode 1 --calib_sample_frac 0.1", "--calib_sample_frac has no effect without calibration"),
        ("qa", "--mode 1 --sdc offline-calibrated --calib_add_sigma 1", "--calib_add_sigma has no effect"),
        ("qa", "--mode 1 --sdc offline-calibrated --calib_samples 4", ""),
        ("qa", "--mode 0 --calib_load_path . --calib_samples 4", "no effect with --calib_load_path"),
        ("gen", "--dataset perplexity --text setup.txt --calib_samples 4", ""),  # so many are left out
        ("gen", "--dataset perplexity --text setup.txt --calib_samples 4 --calib_task x", "--calib_"),
        ("qa", "--mode 0 --calibrate_only --num_samples 5", "--num_samples has no effect with --calibrate_o"),
        ("qa", "--mode 0 --calibrate_only --no_statistics", "--no_statistics has no effect with --calibrate"),
        ("qa", "--mode 0 --calibrate_only --calib_interp fit", "--calib_interp has no effect with --calibr"),
        ("qa", "--mode 0 --calibrate_only --num_fewshot 2 --batch_size 2", ""),
        ("gen", "--mode 0 --calibrate_only --allow_code_execution", "--allow_code_execution has no effect"),
        ("gen", "--mode 0 --calibrate_only --num_tasks 3", ""),  # of which the calibrated ones are the first
        ("gen", "--mode 0 --calibrate_only --num_tasks 3 --dataset longbench_qmsum", "--num_tasks has no"),
        ("qa", "--data_dir .", "--data_dir has no effect on everyday_science"),
        ("qa", "--data_dir . --calib_task arc_easy --mode 0", ""),
        ("qa", "--data_dir . --task everyday_science,arc_easy", ""),
        ("gen", "--data_dir .", "--data_dir has no effect on openai_humaneval"),
        ("gen", "--data_dir . --dataset longbench_qmsum", ""),
    ],
)
def test_flags_without_effect(script: str, flags: str, refused: str, here: Path) -> None:
    """As they are given, even if it is the default; a list of methods needs one that uses the flag."""
    Path("setup.txt").write_text("text")
    kind, main = {"qa": (QASettings, test_llama), "gen": (GenSettings, gen_llama)}[script]
    arguments = main.make_parser().parse_args(flags.split())
    if not refused:
        settings = parse_settings(kind, arguments)
        assert settings_from_json(kind, settings.to_json()) == settings
        return
    with pytest.raises(UsageError, match=refused):
        parse_settings(kind, arguments)


def test_saved_runs_may_have_flags_without_effect() -> None:
    """Those of earlier versions, which accepted them."""
    earlier = QASettings(k=(64,), calib_samples=4, data_dir=".")
    assert settings_from_json(QASettings, earlier.to_json()) == earlier
    assert answer_key(earlier, earlier.cells()[0]) == answer_key(QASettings(), QASettings().cells()[0])


@pytest.mark.parametrize("number", ["nan", "inf", "1e400", "-1", "0", "1.5"])
def test_numbers_of_samples(number: str) -> None:
    from test_llama import make_parser

    with pytest.raises(UsageError, match="--num_samples is"):
        parse_settings(QASettings, make_parser().parse_args(["--num_samples", number]))


@pytest.mark.parametrize("flags", ["--k 8", "--no_statistics", "--allow_code_execution", "--seed 42"])
def test_flags_that_resuming_ignores(flags: str) -> None:
    from gen_llama import make_parser

    arguments = make_parser().parse_args(["--resume", "x", "--timestamps", *flags.split()])
    with pytest.raises(UsageError, match=f"leave out {flags.split()[0]}"):
        resumed_settings(GenSettings, GenSettings().to_json(), arguments)
    alone = make_parser().parse_args(["--resume", "x", "--timestamps"])
    assert resumed_settings(GenSettings, GenSettings().to_json(), alone) == GenSettings()


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("test_llama.py", ["--resume", ""], "--resume is empty"),
        ("gen_llama.py", ["--score", ""], "--score is empty"),
        (
            "gen_llama.py",
            ["--score", "x", "--k", "5"],
            "--score takes all settings from its folder",
        ),
        ("gen_llama.py", ["--score", "x", "--resume", "y"], "--score takes all .* leave out --resume"),
        ("gen_llama.py", ["--score", "x", "--slurm", "y"], "--score takes all .* leave out --slurm"),
        ("gen_llama.py", ["--mode", "0", "--calib_load_path", ""], "--calib_load_path is empty"),
        ("test_llama.py", ["--output_dir", " "], "--output_dir is empty"),
        ("test_llama.py", ["--k", "64", "--mode", "1", "--k=32"], "--k is given 2 times"),
        ("reproduce.py", ["--dry_run"], "--dry_run has no effect without --table"),
        ("reproduce.py", ["--data_dir", ""], "--data_dir is empty"),
        ("compare.py", ["", "b"], r"RUN\[/CELL\] is empty: give a value\."),
        ("compare.py", ["a", "b", "--output_dir", ""], "--output_dir is empty"),
        (
            "gen_llama.py",
            ["--dataset", "perplexity", "--text", "words " * 60],
            "words .*File name too long",
        ),
        ("compare.py", ["a" * 300, "b"], "aaa.*: File name too long"),
    ],
)
def test_folders_that_are_none(script: str, flags: list[str], words: str, tmp_path: Path) -> None:
    """An unset variable, flags that would be ignored, a text in place of its file's name."""
    allowed = ["--allow_code_execution"] * ("--score" in flags)
    command = [sys.executable, ROOT / script, *flags, *allowed]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and re.match(f"error: .*{words}", done.stderr), done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_bytes_that_are_no_text() -> None:
    from gen_llama import make_parser

    with pytest.raises(UsageError, match="is not UTF-8 text"):
        make_parser().parse_args(["--text", b"M\xfcller".decode("utf-8", "surrogateescape")])
    make_parser().parse_args(["--prompt_prefix", "Ünïcode 漢字\n"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[]", "Expected object, got array"),
        (b"", "Expecting value, line 1"),
        (b'{"script": "test_llama.py"}', "missing required field settings"),
        (b'{"script": 3, "settings": {}}', "Expected str, got int - at $.script"),
        (b'{"script": "test_llama.py", "settings": []}', "Expected object, got array - at $.settings"),
        (b'{"script": "gen_llama.py", "settings": {}}', "a run of gen_llama.py, not of test_llama.py"),
        (b'{"script": "test_llama.py", "settings": {"seed": "seven"}}', "its seed is 'seven'"),
        (b'{"script": "test_llama.py", "settings": {"sdc_scale": NaN}}', "NaN is not a finite number"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_damaged_run(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UsageError) as found:
        settings_from_json(QASettings, check_resume(str(tmp_path), "test_llama.py"))
    assert reason in str(found.value) and "--resume" in str(found.value)


def test_sigterm_is_an_interrupt() -> None:
    """A cluster's notice before it kills a job: the job saves what it has, as at Ctrl-C."""
    script = (
        "import os, signal, time\n"
        "from toptheta.util.program import run_main\n"
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


@pytest.mark.parametrize(
    ("script", "flags", "package"),
    [
        ("test_llama.py", [], "torch"),
        ("gen_llama.py", [], "torch"),
        ("reproduce.py", [], "torch"),
        ("demo.py", [], "torch"),
        ("compare.py", ["a", "b"], "numpy"),
        ("plot_th_llama.py", ["-d", "."], "pandas"),
        ("plot_gen_llama.py", ["-d", "."], "matplotlib"),
        ("toptheta/report/__main__.py", ["."], "pandas"),
    ],
)
def test_ctrl_c_during_an_import(script: str, flags: list[str], package: str, tmp_path: Path) -> None:
    code = (
        "import os, runpy, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the tests may run in the background
        "class Interrupt:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name == {package!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt)\n"
        "sys.argv = sys.argv[1:]\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / script), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr == "\nInterrupted.\n", done.stderr


def test_a_run_keeps_the_command_that_starts_it_again() -> None:
    flags = (
        "--method dense,top_theta:capk=true,streaming_llm:sinks=2 --k 16,32 --layerk 0:8 --calib_samples 0.5"
    )
    settings = parse(flags)
    assert parse(" ".join(to_flags(settings))) == settings


@pytest.mark.parametrize("script", ["test_llama.py", "gen_llama.py"])
def test_help_by_topic(script: str) -> None:
    """--help names every flag on one screen; --help TOPIC explains those of one topic, --help all those of
    all."""

    def shown(*arguments: str) -> str:
        command = [sys.executable, script, "--help", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    screen, everything = shown(), shown("all")
    assert len(screen.splitlines()) <= 40 and all(len(line) <= 80 for line in screen.splitlines()[:-2])
    flags = set(re.findall(r"^  (--\w+)", everything, re.MULTILINE))
    assert len(flags) > 30 and flags <= set(re.findall(r"--\w+", screen))
    topic = shown("calibration")
    assert "--calib_tac " in topic and "recommended" in topic and "--llama" not in topic
    wrong = subprocess.run([sys.executable, script, "--help", "x"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and "choose a topic from method, calibration, model" in wrong.stderr

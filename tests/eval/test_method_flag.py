"""--method beside --mode, and run.json files of before it."""

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tests.eval.helpers import parse
from toptheta.eval.cell_params import CellParams
from toptheta.eval.cli import settings_from_json
from toptheta.eval.rules import check_settings
from toptheta.eval.run import Run, product_folder
from toptheta.eval.settings import GenSettings, QASettings, Settings
from toptheta.methods.params import MethodOptions
from toptheta.methods.top_theta import TopTheta
from toptheta.util.errors import UsageError
from toptheta.util.options import options_of, to_flags

ROOT = Path(__file__).resolve().parents[2]


def test_methods_by_name_are_those_by_number() -> None:
    numbers = parse("--mode 0,1,3 --k 32,64 --sdc exact --vmc --calib_tac")
    names = parse("--method top_theta,top_k,dense --k 32,64 --sdc exact --vmc --calib_tac")
    assert names.method == ("top_theta", "top_k", "dense") and names.cells() == numbers.cells()
    assert [cell.folder for cell in names.cells()] == [
        "mode0_k32",
        "mode0_k64",
        "mode1_k32",
        "mode1_k64",
        "mode3",
    ]
    assert [cell.k for cell in names.cells()] == [32, 64, 32, 64, None]
    assert settings_from_json(Settings, names.to_json()) == names


def test_options_of_a_method() -> None:
    settings = parse("--method top_theta:capk,top_theta,dense --k 8")
    assert settings.methods()[:2] == [TopTheta(capk=True), TopTheta()]
    assert [cell.label for cell in settings.cells()] == ["Top-theta capk K=8", "Top-theta K=8", "dense"]
    assert len({cell.folder for cell in settings.cells()}) == 3
    # The flag is for all methods that have the option.
    assert parse("--method top_theta,top_k --capk").methods()[0] == TopTheta(capk=True)


def test_cells_take_every_option_of_sparse_attention(tmp_path: Path) -> None:
    flags = (
        f"--mode 0 --placement pre-softmax --sdc offline-calibrated --sdc_scale 0.5 --vmc --calib_tac "
        f"--calib_add_sigma 0.5 --calib_sample_frac 1 --calib_interp fit --calib_smooth 3 "
        f"--calib_load_path {tmp_path}"
    )
    budget = (
        "--mode 0 --placement post-softmax --calib_to budget --calib_layers sensitivity --when_slower dense"
    )
    given = set()
    for settings in (parse(flags), parse(budget)):
        (cell,) = settings.cells()
        for f in fields(MethodOptions):
            assert getattr(cell, f.name) == getattr(settings, f.name)
            if getattr(cell, f.name) != f.default:
                given.add(f.name)
    assert given == {f.name for f in fields(MethodOptions)}
    dense = parse("--mode 0,3 --vmc --sdc exact").cells()[1]
    assert dense == CellParams(method=dense.method, placement="none") and dense.method.is_dense
    # What serves thresholds alone stays with them.
    topk = parse(f"--mode 0,1 --calib_tac --calib_load_path {tmp_path}").cells()[1]
    assert not topk.calib_tac and not topk.calib_load_path


def test_flags_of_one_method() -> None:
    """They hold in place of the flags, for this method alone, and are in its name and folder."""
    text = (
        "dense,top_k:vmc,sdc=exact,top_theta:calib_to=budget,placement=post-softmax,key_copy=int4,top_theta,"
        "streaming_llm:sinks=2,top_theta:placement=post-softmax"
    )
    settings = parse(f"--method {text} --sdc_scale 0.5 --calib_tac --k 8,16")
    assert settings.method == (
        "dense",
        "top_k:sdc=exact,vmc=True",
        "top_theta:key_copy=int4,placement=post-softmax,calib_to=budget",
        "top_theta",
        "streaming_llm:sinks=2",
        "top_theta:placement=post-softmax",
    )
    assert settings_from_json(Settings, settings.to_json()) == settings == parse(" ".join(to_flags(settings)))
    cells = settings.cells()
    assert [cell.label for cell in cells[:8:2]] == [
        "dense",
        "Top-k sdc=exact vmc K=16",
        "Top-theta budget key_copy=int4 K=16",
        "Top-theta K=16",
    ]
    assert [cell.folder for cell in cells[:8:2]] == [
        "mode3",
        "top_k_sdcexact_vmc_k16",
        "top_theta_key_copyint4_placementpost-softmax_calib_tobudget_k16",
        "mode0_k16",
    ]
    assert len({cell.folder for cell in cells}) == len({cell.label for cell in cells}) == len(cells) == 11
    assert [(cell.sdc, cell.placement, cell.calib_to) for cell in (cells[1], cells[5], cells[9])] == [
        ("exact", "pre-softmax", "k"),
        ("none", "pre-softmax", "k"),
        ("none", "post-softmax", "k"),
    ]
    offline = parse("--method top_k:sdc=offline-calibrated,calib_sample_frac=0.5,calib_smooth=3").cells()[0]
    assert (offline.calib_sample_frac, offline.calib_smooth) == (0.5, 3)
    twice = "--placement post-softmax --method top_theta:calib_to=k,top_theta,top_theta:placement=none,dense"
    assert [cell.label for cell in parse(twice).cells()] == ["Top-theta K=256", "dense", "dense"]
    assert cells[3].calib_tac and not cells[1].calib_tac and cells[1].vmc and not cells[5].vmc
    assert {cell.sdc_scale for cell in cells[1:]} == {0.5}


def test_no_two_cells_share_a_folder(tmp_path: Path) -> None:
    """Also beside folders that earlier versions named after mode and K alone."""
    settings = parse("--capk --k 64 --method top_k,top_k:sdc=exact,top_theta:sdc=exact,top_theta")
    run = Run(tmp_path, settings, "test_llama.py")
    for name in ("mode1_k64", "mode0_k64"):
        (tmp_path / name).mkdir()
    assert len({product_folder(run, cell) for cell in settings.cells()}) == 4
    assert product_folder(run, settings.cells()[-1]) == tmp_path / "mode0_k64"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method top_k:vmc=often", "--method top_k:vmc is 'often': give true or false"),
        ("--method top_k:sdc=all", "--method top_k:sdc is 'all': choose"),
        ("--method top_k:sdc=exact,sdc=none", "--method top_k:sdc is given twice: give it once"),
        ("--method streaming_llm:sinks=2,sinks=3", "--method streaming_llm:sinks is given twice"),
        (
            "--method streaming_llm:sinks=99999999999",
            "--method streaming_llm:sinks is 99999999999: give a fin",
        ),
        ("--method top_k:sdc_scale=-1 --sdc exact", "--method top_k:sdc_scale is -1.0: give a number"),
        ("--method dense:vmc", "--method dense has no option 'vmc': it has none"),
        ("--method top_k:vcm", "--method top_k has no option 'vcm': it has none; of all methods: .*vmc"),
        ("--method top_k:calib_to=budget", "--method top_k:calib_to applies to calibrated thresholds only"),
        ("--method top_k:calib_smooth=3", "--method top_k:calib_smooth has no effect without calibration"),
        (
            "--calib_dump_samples --method top_theta:placement=post-softmax,calib_to=budget",
            "and --method top_theta:calib_to budget takes none",
        ),
        ("--method top_theta:calib_to=budget", "--method top_theta:calib_to budget .* needs --placement"),
        ("--method top_theta:placement=post-softmax,sdc=exact", "sdc"),
        ("--method top_theta:calib_load_path=x", "--method top_theta has no option 'calib_load_path'"),
        ("--method top_k --mode 3", "--method and --mode both name the method: give one of them."),
        ("--method topk", r"--method is 'topk': choose one of .*\(did you mean top_k"),
        ("--method top_theta:caps", "--method top_theta has no option 'caps': its options are capk"),
        ("--method top_theta:capk=maybe", "--method top_theta:capk is 'maybe': give true or false"),
        ("--method top_k,dense --calib_tac", "--calib_tac has no effect without thresholds"),
        ("--method streaming_llm:sinks=40 --k 64,16", "--k 16 leaves no recent key next to the 40 sinks"),
        ("--method top_k:sdc_scale=2", "--method top_k:sdc_scale has no effect where no cell has SDC"),
        ("--method top_k:when_slower=dense", "--method top_k:when_slower has no effect"),
        ("--method dense --vmc", "--vmc has no effect on dense attention"),
        ("--method top_k --effective_k", "--effective_k applies to thresholds"),
    ],
)
def test_methods_that_make_no_sense(flags: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(flags)


def test_both_names_in_python() -> None:
    with pytest.raises(UsageError, match="both name the method"):
        settings_from_json(Settings, Settings(mode=(0,), method=("top_k",)).to_json())


def test_runs_of_before() -> None:
    """A run.json without what has come since loads with its default; one that does not fit is blamed."""
    saved = QASettings(mode=(0, 1), k=(64,), layerk={0: 128}, num_samples=0.5).to_json()
    for name in ("method", "calib_smooth"):
        del saved[name]
    loaded = settings_from_json(QASettings, saved)
    assert loaded.to_json() | saved == loaded.to_json()
    assert [cell.folder for cell in loaded.cells()] == ["mode0_k64", "mode1_k64"]
    with pytest.raises(UsageError, match=r"run.json there does not fit this script \(its k is 64\)"):
        settings_from_json(QASettings, saved | {"k": 64})
    with pytest.raises(UsageError, match="run.json there .*there is no setting 'dataset'"):
        settings_from_json(QASettings, {"dataset": "needle"})


@pytest.mark.parametrize("kind", [QASettings, GenSettings])
def test_every_setting_is_an_option(kind: type[Settings]) -> None:
    assert [f.name for f in fields(kind)] == [name for name, _, _ in options_of(kind)]


def test_help_waits_for_no_torch() -> None:
    script = (
        "import sys, test_llama, gen_llama\n"
        "text = test_llama.make_parser().format_help() + gen_llama.make_parser().format_help()\n"
        "assert '--method NAME' in text and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


def test_a_method_for_decode_reads_no_prompt(tmp_path: Path) -> None:
    """Where all of a text is a prompt, its numbers would be those of dense attention."""
    text = tmp_path / "text.txt"
    text.write_text("word " * 100)
    for name in ("quest", "snapkv", "tova", "h2o"):
        read = GenSettings(dataset="perplexity", text=str(text), method=("dense", name))
        check_settings(read)
        with pytest.raises(
            UsageError, match=f"--method {name} leaves prompts dense, and with --decode_from 0"
        ):
            check_settings(replace(read, decode_from=0))
    causal = ("h2o:prefill=causal",)
    check_settings(GenSettings(dataset="perplexity", text=str(text), method=causal, decode_from=0))

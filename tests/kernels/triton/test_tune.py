"""`python -m toptheta.kernels.tune`, tried on toys; its clock; what it refuses."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tests.helpers.paths import ROOT
from tests.kernels.triton.helpers import needs_triton
from toptheta.kernels import tune
from toptheta.kernels.dense import DENSE_WAYS
from toptheta.kernels.profile import SPARSE_WAYS, Entry, Kind, Profile, Shape, pick
from toptheta.util.errors import UsageError
from toptheta.util.schema import read_json


def command(folder: Path, *more: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOPTHETA_CACHE": str(folder / "cache")}
    asked = [sys.executable, "-m", "toptheta.kernels.tune", *more]
    return subprocess.run(asked, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.long
@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs where the interpreter is not on")
def test_tiny_run(tmp_path):
    """Every way is timed in every mode, and the profile decides; toys are not kept."""
    done = command(tmp_path, "--tiny", "--output", str(tmp_path / "profile.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no profile is saved" in done.stdout and not (tmp_path / "cache").exists()
    profile = read_json(tmp_path / "profile.json", Profile, "")
    assert set(profile.tiles) == {"decode", "int8", "prefill"} and profile.about["left out"] == 0
    for masked, graphed in tune.MODES:
        kind = Kind("decode", 2, 32, "float16", graphed, masked)
        ways = {one.way for one in profile.entries if one.kind == kind}
        needed = {"sdpa", "kernel", *SPARSE_WAYS}
        assert needed <= ways <= {*DENSE_WAYS, *SPARSE_WAYS} and not (masked and "flash" in ways)
        kept = sorted(one.kept for one in profile.entries if one.kind == kind and one.way == "scores")
        assert len(kept) == 4 and 0 < kept[0] < 0.5 and kept[-2:] == [1.0, 1.0]
        assert pick(profile, Shape(kind, 2, 50), 0.3, [*DENSE_WAYS, *SPARSE_WAYS]) is not None
    kind = Kind("prefill", 2, 32, "float16")
    assert {one.way for one in profile.entries if one.kind == kind} >= {"sdpa", "kernel", "scores", "weights"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: this machine has no GPU to measure")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"heads": "32:8"}, "--heads is '32:8': give query heads:KV heads:head_dim"),
        ({"heads": "9:4:64"}, "query heads must be a multiple of KV heads"),
        ({"heads": "8:4:300"}, "head_dim a"),
        ({"dtype": "float32"}, "--dtype is 'float32': choose bfloat16 or float16"),
        ({"minutes": "nan"}, "--minutes is 'nan': give a number above 0"),
        ({"minutes": "x"}, "--minutes is 'x'"),
    ],
)
def test_refuses(flags, says):
    given = {"heads": "32:8:128", "dtype": "bfloat16", "minutes": "4.5", "tiny": False} | flags
    with pytest.raises(UsageError, match=says):
        tune.plan_of(Namespace(**given))


def test_takes_less_than_five_minutes():
    """By design: the plan has less, a sweep of tiles at most a part of it, and the clock is asked before
    each."""
    assert tune.Plan().seconds < 300
    now = [0.0]
    clock = tune.Clock(100.0, lambda: now[0])
    assert not clock.over(tune.TILES_SHARE) and not clock.over()
    now[0] = 50.0
    assert clock.over(tune.TILES_SHARE) and not clock.over()
    now[0] = 101.0
    assert clock.over()


@needs_triton
def test_what_time_leaves_out(monkeypatch):
    """When the time is over nothing more is measured, and the profile says so."""
    from toptheta.kernels.triton import backend

    if not (backend.INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs a GPU or TRITON_INTERPRET=1: see test_in_the_interpreter")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    late = iter([0.0])
    profile = tune.tune(tune.TINY, device, tune.Clock(10.0, lambda: next(late, 11.0)))
    assert profile.entries == [] and profile.tiles == {} and profile.about["left out"] == 7


def test_other_heads_are_kept():
    """A second run, for other heads, adds to the profile; of the same heads it replaces."""

    def of(group: int, ms: float) -> Profile:
        return Profile(
            {"gpu": "x"}, entries=[Entry(Kind("decode", group, 64, "bfloat16"), "sdpa", 8, 100, 1.0, ms)]
        )

    both = tune.joined(of(3, 2.0), tune.joined(of(4, 1.0), None))
    assert [(one.kind.group, one.ms) for one in both.entries] == [(4, 1.0), (3, 2.0)]
    assert [(one.kind.group, one.ms) for one in tune.joined(of(4, 5.0), both).entries] == [(3, 2.0), (4, 5.0)]

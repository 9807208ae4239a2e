"""The GPU benchmarks of decode and of tiles run, on toys."""

import pytest

from bench.attention import MODELS, Case
from bench.decode import BASELINES, METHODS, Bench
from tests.kernels.triton.helpers import DEVICE, here
from toptheta.kernels import registry as kernels


@here
def test_decode_benchmark_runs(monkeypatch):
    """All its methods, two tiers too, on a toy; the shared K and V make them agree on what they read."""
    monkeypatch.setattr(kernels, "FORCED", "triton")
    row = Bench("tiny", DEVICE, k=16, steps=1, blocks=1, eager=True).measure(1, 100)
    assert list(row["methods"]) == list(METHODS)
    ran = {name: cell for name, cell in row["methods"].items() if "ms" in cell}
    assert {"stock sdpa", "sdpa, grouped", "dense, ours", "Top-theta", "Top-k"} <= set(ran)
    assert all(cell["ms"] > 0 for cell in ran.values()) and row["fastest dense"] in BASELINES
    assert ran[row["fastest dense"]]["ratio"] == 1.0
    assert all("not run" in row["methods"][name] for name in set(METHODS) - set(ran))
    assert 0.05 < row["kept"]["elements"] < 0.5 and row["kept"]["elements"] < row["kept"]["V rows"] < 1


@here
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_tuning_runs(kind, monkeypatch):
    """Other tiles give the same outputs and leave nothing changed; configurations that cannot run are listed
    last, with the reason."""
    from bench import attention_gpu, tune_gpu  # they need Triton
    from toptheta.kernels.triton import decode as triton_decode
    from toptheta.kernels.triton import prefill as triton_prefill

    monkeypatch.setitem(MODELS, "tiny", (0, 0, 0))  # what is changed is restored afterwards
    for name in ("K", "MODEL", "DTYPE", "COLD_BYTES", "THETA", "POST", "TOPK"):
        monkeypatch.setattr(attention_gpu, name, getattr(attention_gpu, name))
    attention_gpu.be_tiny()
    module = triton_prefill if kind == "prefill" else triton_decode
    before = {name: value for name, value in vars(module).items() if name.isupper()}
    if kind == "prefill":
        configs = [triton_prefill.TILE, {"BLOCK_M": 64, "SKIP": False}, {"BLOCK_N": 48}]
    else:
        configs = [{"tile": (64, 4)}, {"tile": (32, 2), "BLOCK_F": 64}, {"tile": (48, 4)}]
    case = Case("tiny", "prefill" if kind == "prefill" else "decode", 250, 1)
    rows = tune_gpu.sweep(kind, case, configs, DEVICE)
    assert ["ms" in row for row in rows] == [True, True, False] and "not run" in rows[-1]
    assert rows[0]["ms"] <= rows[1]["ms"] and sorted(row["set"] for row in rows) == [False, False, True]
    assert all(getattr(module, name) == before[name] for name in before)

"""The Triton kernels as operators: torch.compile, CUDA graphs, whole models, and refusals."""

import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, StaticCache

from bench.attention import MODELS, Case
from bench.decode import METHODS, Bench
from tests.conftest import tiny_config
from tests.kernels.cpu.test_attend import SCALE, K, tables
from tests.kernels.triton.test_attend import DEVICE, FEW, HERE, draw, here, needs_triton, on_device
from tests.models.test_patch import SPARSE, steer, tokens
from topk_llama import TopThetaCache
from toptheta.attention.reference import LayerSpec
from toptheta.attention.rows import rows_of
from toptheta.kernels import int8_keys as two_tier
from toptheta.kernels import registry as kernels
from toptheta.kernels.triton import backend as gpu
from toptheta.models.control import record_statistics
from toptheta.models.recorder import Recorder
from toptheta.util.errors import UsageError


@here
def test_operators_have_true_fakes():
    """The shapes and types that torch.compile is told are those that come out."""
    q, k, v = (x.to(DEVICE) for x in draw(2, (4, 2, 16), 1, 40))
    n, theta = torch.full((1, 1), 40, device=DEVICE), torch.full((1, 1), 0.5, device=DEVICE)
    settings = (SCALE, 0, "pre-softmax", K, "none", 1.0, True)
    checks = ("test_schema", "test_faketensor")
    int8 = two_tier.quantized(k)
    for tiers in ((None,) * 4, (int8.codes, int8.steps, int8.slacks, int8.mean)):
        decode = (q, k, v, n, None, None, theta, None, None, *tiers, *settings)
        torch.library.opcheck(gpu._decode, decode, test_utils=checks)
    n = torch.arange(1, 2, device=DEVICE)[None]
    prefill = (q, k, v, n, 0, None, None, None, theta, None, None, *settings)
    torch.library.opcheck(gpu._prefill, prefill, test_utils=checks)


@here
@pytest.mark.parametrize("q_len", [1, 20])
def test_compiles_whole(q_len):
    """One graph without a break, and thresholds that change in place count at once."""
    torch.manual_seed(8)
    q, k, v = (x.to(DEVICE) for x in draw(1, (2, 1, 16), q_len, 70 if q_len == 1 else q_len))
    rows = on_device(rows_of(None, q_len, k.shape[2], torch.device("cpu")))
    theta = torch.full((2, 71), -math.inf, device=DEVICE)
    call = torch.compile(
        lambda: gpu.attend(q, k, v, rows, FEW[0], SCALE, theta)[0], fullgraph=True, backend="aot_eager"
    )
    for value in (-math.inf, 1.0, 2.0):
        theta[:, K + 1 :] = value
        expected = gpu.attend(q, k, v, rows, FEW[0], SCALE, theta)[0]
        torch.testing.assert_close(call(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("spec", [*FEW, LayerSpec(1, "pre-softmax", K, "exact")], ids=str)
def test_cuda_graph(spec):
    """Nothing waits for the device, and a replay takes the thresholds and queries that are there by then."""
    torch.manual_seed(9)
    q, k, v = (x.to(DEVICE) for x in draw(2, (8, 2, 64), 1, 1000))
    rows = on_device(rows_of(None, 1, 1000, torch.device("cpu")))
    theta, table = (x.to(DEVICE) for x in tables(spec, 8, 1001))

    def call() -> Tensor:
        return gpu.attend(q, k, v, rows, spec, SCALE, theta, table)[0]

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(3):
        q.mul_(0.9)
        theta.mul_(0.8)
        graph.replay()
        assert torch.equal(out, call())


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(10)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(tiny_config(**sizes)).eval().to(DEVICE)


@here
@pytest.mark.parametrize("name", ["Top-theta", "Top-theta post"])
def test_whole_model(name, monkeypatch):
    """The patched model by TOPTHETA_KERNEL=triton: prefill of a padded batch, decode, statistics."""
    model = small_llama()
    steer(model, SPARSE[name])
    ids = tokens(batch=2, length=23).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    calls = []
    real = gpu.attend
    monkeypatch.setattr(gpu, "attend", lambda *args: calls.append(args[0].shape[2]) or real(*args))
    got = {}
    for path in ("reference", "triton"):
        monkeypatch.setattr(kernels, "FORCED", path)
        recorder = Recorder(2)
        record_statistics(model, recorder)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        given = {"attention_mask": mask[:, :21], "position_ids": positions[:, :21]}
        state = model(ids[:, :21], use_cache=True, **given)
        logits = [state.logits[mask[:, :21].bool()]]
        for end in (22, 23):
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, end - 1 : end]}
            step = model(ids[:, end - 1 : end], past_key_values=state.past_key_values, **given)
            logits.append(step.logits[:, 0])
        record_statistics(model, None)
        prefill, decode = recorder.drain()
        records = [*prefill.values(), *(record for steps in decode.values() for record in steps)]
        got[path] = torch.cat(logits), records
    assert calls == [21] * 2 + [1] * 4
    torch.testing.assert_close(got["triton"][0], got["reference"][0], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(got["triton"][1], got["reference"][1]):
        assert (ours.attn == theirs.attn).all() and (ours.vrow == theirs.vrow).all()


CACHES = {
    "static": lambda config: StaticCache(config=config, max_cache_len=30),
    "with sum": lambda config: TopThetaCache(config, 30),
    "two tiers": lambda config: TopThetaCache(config, 30, two_tier=True),
}


@here
@pytest.mark.parametrize("kind", CACHES)
def test_whole_model_compiles_once(kind, monkeypatch):
    """A static cache: every step runs the one graph, without a break, and equals the plain path."""
    model = small_llama()
    steer(model, SPARSE["Top-theta"])
    ids = tokens(length=23).to(DEVICE)

    def decode(step, cache) -> Tensor:
        model(ids[:, :20], past_key_values=cache)
        out = []
        for at in range(20, 23):
            position = torch.tensor([[at]], device=DEVICE)
            given = {"past_key_values": cache, "position_ids": position}
            out.append(step(input_ids=ids[:, at : at + 1], **given).logits[:, 0])
        return torch.cat(out)

    monkeypatch.setattr(kernels, "FORCED", "reference")
    expected = decode(model.forward, StaticCache(config=model.config, max_cache_len=30))
    monkeypatch.setattr(kernels, "FORCED", "triton")
    torch._dynamo.reset()
    cache = CACHES[kind](model.config)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = decode(torch.compile(model.forward, fullgraph=True, backend="aot_eager"), cache)
    # With two tiers exact SDC adds up estimates of the scores that were not computed.
    close = 2e-3 if kind == "two tiers" else 1e-4
    torch.testing.assert_close(got, expected, rtol=close, atol=close)
    for layer in cache.layers if kind != "static" else ():
        torch.testing.assert_close(layer._sum, layer.values[:, :, :23].sum(dim=2, dtype=torch.float64))
    for layer in cache.layers if kind == "two tiers" else ():
        fresh = two_tier.quantized(layer.keys, layer.int8.mean)
        assert torch.equal(layer.int8.codes[:, :, :23], fresh.codes[:, :, :23])
        torch.testing.assert_close(layer.int8.slacks[:, :, :23], fresh.slacks[:, :, :23])


@here
def test_two_tiers_keep_the_same(monkeypatch):
    """A padded batch in the patched model: what is kept is identical, and the copy was used for it."""
    model = small_llama()
    steer(model, SPARSE["Top-theta"])
    ids = tokens(batch=2, length=23).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    monkeypatch.setattr(kernels, "FORCED", "triton")
    copies = []
    real = gpu.attend
    monkeypatch.setattr(gpu, "attend", lambda *args: copies.append(args[10]) or real(*args))
    got = {}
    for kind, make in CACHES.items():
        copies.clear()
        recorder = Recorder(2)
        record_statistics(model, recorder)
        cache, logits = make(model.config), []
        for start, end in ((0, 20), (20, 21), (21, 22), (22, 23)):
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            logits.append(model(ids[:, start:end], past_key_values=cache, **given).logits[:, -1])
        record_statistics(model, None)
        _, decode = recorder.drain()
        got[kind] = torch.cat(logits), [record for steps in decode.values() for record in steps]
        assert [copy is not None for copy in copies] == [kind == "two tiers"] * 2 * 4
    for kind in ("with sum", "two tiers"):
        torch.testing.assert_close(got[kind][0], got["static"][0], rtol=2e-3, atol=2e-3)
        for ours, theirs in zip(got[kind][1], got["static"][1]):
            assert (ours.attn == theirs.attn).all() and (ours.vrow == theirs.vrow).all()


@here
def test_decode_benchmark_runs(monkeypatch):
    """All its methods, two tiers too, on a toy; the shared K and V make them agree on what they read."""
    monkeypatch.setattr(kernels, "FORCED", "triton")
    row = Bench("tiny", DEVICE, k=16, steps=1, blocks=1, eager=True).measure(1, 100)
    assert list(row["methods"]) == list(METHODS)
    assert all(cell["ms"] > 0 for cell in row["methods"].values())
    assert 0.05 < row["kept"]["elements"] < 0.5 and row["kept"]["elements"] < row["kept"]["V rows"] < 1


@here
@pytest.mark.parametrize("kind", ["decode", "int8", "prefill"])
def test_tuning_runs(kind, monkeypatch):
    """Other tiles give the same outputs and leave nothing changed; what cannot be run is told, and last."""
    from bench import attention_gpu, tune_gpu  # which need Triton
    from toptheta.kernels.triton import decode as triton_decode
    from toptheta.kernels.triton import prefill as triton_prefill

    monkeypatch.setitem(MODELS, tune_gpu.MODEL, (4, 2, 32))
    monkeypatch.setattr(attention_gpu, "DTYPE", torch.float16)
    monkeypatch.setattr(attention_gpu, "COLD_BYTES", 0)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(tune_gpu, "captured", lambda call: call)
        monkeypatch.setattr(tune_gpu, "median_times", lambda calls, _: dict.fromkeys(calls, 1.0))
    module = triton_prefill if kind == "prefill" else triton_decode
    before = {name: value for name, value in vars(module).items() if name.isupper()}
    if kind == "prefill":
        configs = [triton_prefill.TILE, {"BLOCK_M": 64, "SKIP": False}, {"BLOCK_N": 48}]
    else:
        configs = [{"tile": (64, 4), "RESIDENT": 3}, {"tile": (32, 2), "RESIDENT": 1}, {"tile": (48, 4)}]
    case = Case(tune_gpu.MODEL, "prefill" if kind == "prefill" else "decode", 700, 1)
    rows = tune_gpu.tune(kind, case, configs, DEVICE)
    assert [("ms" in row, row["set"]) for row in rows] == [(True, True), (True, False), (False, False)]
    assert "not run" in rows[-1] and all(getattr(module, name) == before[name] for name in before)


@here
def test_forced_but_impossible(tiny_model, monkeypatch):
    monkeypatch.setattr(kernels, "FORCED", "triton")
    steer(tiny_model.to(DEVICE), SPARSE["Top-k"])
    with pytest.raises(UsageError, match="TOPTHETA_KERNEL=triton cannot be obeyed, because Top-k of"):
        tiny_model(tokens().to(DEVICE))


@needs_triton
def test_says_what_it_cannot():
    q = torch.zeros(1, 2, 3, 16, device="meta")
    rows = rows_of(None, 3, 3, torch.device("cpu"))
    assert "not on a GPU" in (gpu.unsupported(q, q, q, rows, LayerSpec()) or "")
    if HERE:
        q = torch.zeros(1, 2, 3, 16, device=DEVICE)
        for spec, says in (
            (LayerSpec(1, "pre-softmax", 2), "Top-k of many rows"),
            (LayerSpec(0, "pre-softmax", 2, capk=True), "capk"),
        ):
            assert says in (gpu.unsupported(q, q, q, rows, spec) or "")
        assert "single rows" in (gpu.unsupported(q, q, q, rows, LayerSpec(), count_rows=True) or "")
        wide = torch.zeros(1, 2, 3, 264, device=DEVICE)
        assert "head_dim is 264" in (gpu.unsupported(wide, wide, wide, rows, LayerSpec()) or "")
        double = q.double()
        assert "not torch.float64" in (gpu.unsupported(double, double, double, rows, LayerSpec()) or "")

"""Every family of families.py, as a tiny random model: stock eager attention where K is at least the length,
slow loops where it is not. `bench/families.py` makes docs/families.md of these tests, a column for each.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from tests.helpers.families import NAMES, TINY, WINDOW, check_by_loops, make, watched
from tests.helpers.kernel_cases import needs_kernel
from topk_llama import restore_model, set_params, update_model
from toptheta.kernels import registry
from toptheta.models.control import record_statistics
from toptheta.models.divergence import against_dense
from toptheta.models.families import FAMILIES, attention_layers, head_logits
from toptheta.models.generation import negative_log_likelihood
from toptheta.models.kl import kl_divergence
from toptheta.models.patch import dense_for
from toptheta.models.recorder import Recorder

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
DENSE = [
    {"mode": 1, "K": 200, "placement": "pre-softmax", "sdc": "exact", "vmc": True},
    {"mode": 1, "K": 200, "placement": "post-softmax", "sdc": "none", "vmc": True},
]
SPARSE: dict[str, dict[str, Any]] = {
    "Top-k": {"mode": 1, "K": 4, "placement": "pre-softmax", "sdc": "exact", "vmc": True},
    "Top-theta": {"mode": 0, "K": 4, "placement": "pre-softmax", "sdc": "offline-calibrated", "vmc": True},
    "Top-theta post": {"mode": 0, "K": 4, "placement": "post-softmax", "sdc": "none", "vmc": True},
}


class Models:
    """One family: stock with eager attention, and patched."""

    def __init__(self, name: str):
        self.name, self.stock = name, make(name)
        self.ours = update_model(copy.deepcopy(self.stock))

    def steer(self, method: str) -> None:
        params = SPARSE[method]
        if params["mode"] == 0:
            set_params(self.ours, **params, calibrate=True, calib_sample_frac=1.0)
            for seed in range(3):
                self.ours(tokens(length=30, seed=seed))
        set_params(self.ours, **params, calibrate=False)


@pytest.fixture(scope="module", params=NAMES)
def family(request) -> Models:
    with torch.no_grad():
        return Models(request.param)


def read(model: PreTrainedModel, ids: Tensor, sizes: list[int], cache=None, mask=None) -> Tensor:
    """Logits of `ids`, given to the model in parts of these sizes."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    parts, start = [], 0
    for size in sizes:
        end = start + size
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        parts.append(model(ids[:, start:end], past_key_values=cache, **given).logits)
        start = end
    return torch.cat(parts, dim=1)


def tokens(batch: int = 1, length: int = 40, seed: int = 1) -> Tensor:
    """No token twice in a sequence: without RoPE equal tokens have equal scores, and which of them Top-k
    keeps is open."""
    generator = torch.Generator().manual_seed(seed)
    return 3 + torch.stack([torch.randperm(94, generator=generator)[:length] for _ in range(batch)])


def lasts(sizes: list[int]) -> list[int]:
    """The last position of each part."""
    return [sum(sizes[: i + 1]) - 1 for i in range(len(sizes))]


def real(ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool)


def test_every_family_is_tested() -> None:
    assert NAMES == tuple(family.name for family in FAMILIES)


def test_prefill(family: Models, monkeypatch) -> None:
    ids = tokens(2, length=20)
    stock = family.stock(ids).logits
    for params in DENSE:
        set_params(family.ours, **params)
        torch.testing.assert_close(family.ours(ids).logits, stock, **CLOSE)
    for method in SPARSE:
        family.steer(method)
        with watched(monkeypatch) as seen:
            assert not torch.allclose(family.ours(ids).logits, stock, atol=1e-2)
        check_by_loops(family.name, seen, [19], real(ids))


def test_decode(family: Models, monkeypatch) -> None:
    ids, sizes = tokens(length=16), [11, 1, 1, 1, 1, 1]
    stock = read(family.stock, ids, sizes)
    for params in DENSE:
        set_params(family.ours, **params)
        torch.testing.assert_close(read(family.ours, ids, sizes), stock, **CLOSE)
    for method in SPARSE:
        family.steer(method)
        with watched(monkeypatch) as seen:
            read(family.ours, ids, sizes)
        check_by_loops(family.name, seen, lasts(sizes), real(ids))


def test_static_cache(family: Models, monkeypatch) -> None:
    """Below the window, across its end, single rows and chunks in a full cache."""
    ids, sizes = tokens(length=16), [5, 1, 4, 1, 3, 1, 1]

    def cache(model: PreTrainedModel) -> StaticCache:
        return StaticCache(config=model.config, max_cache_len=24)

    stock = read(family.stock, ids, sizes, cache(family.stock))
    set_params(family.ours, **DENSE[0])
    torch.testing.assert_close(read(family.ours, ids, sizes, cache(family.ours)), stock, **CLOSE)
    for method in ("Top-k", "Top-theta post"):
        family.steer(method)
        with watched(monkeypatch) as seen:
            read(family.ours, ids, sizes, cache(family.ours))
        check_by_loops(family.name, seen, lasts(sizes), real(ids))


def test_padding(family: Models, monkeypatch) -> None:
    """A batch padded at the left: each sequence is as it is alone, in prefill and decode."""
    ids, sizes = tokens(2, length=18), [15, 1, 1, 1]
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for method in ("Top-k", "Top-theta"):
        family.steer(method)
        with watched(monkeypatch) as seen:
            together = read(family.ours, ids, sizes, mask=mask)
        check_by_loops(family.name, seen, lasts(sizes), mask.bool())
        torch.testing.assert_close(together[:1], read(family.ours, ids[:1], sizes), **CLOSE)
        alone = read(family.ours, ids[1:, 6:], [9, 1, 1, 1])
        torch.testing.assert_close(together[1:, 6:], alone, **CLOSE)


def test_sliding_window(family: Models, monkeypatch) -> None:
    """Far beyond the window, in chunks of all sizes: the cache has forgotten most keys, and row lengths end
    at the window."""
    windows = TINY[family.name].windows
    if windows == (None, None):
        pytest.skip("no layer has a window")
    ids, sizes = tokens(length=34), [5, 9, 1, 12, 1, 1, 4, 1]
    for method in ("Top-k", "Top-theta post"):
        family.steer(method)
        whole = family.ours(ids).logits
        with watched(monkeypatch) as seen:
            torch.testing.assert_close(read(family.ours, ids, sizes), whole, **CLOSE)
        check_by_loops(family.name, seen, lasts(sizes), real(ids))
        for number, one in enumerate(seen):
            if windows[number % 2] is not None:
                assert one.call.k.shape[2] <= WINDOW - 1 + sizes[number // 2]
                assert int(one.call.rows.n.max()) <= WINDOW


def test_statistics(family: Models, monkeypatch, request) -> None:
    """What single calls keep is what loops keep; chunks count like the whole, dense layers too."""
    ids, sizes = tokens(2, length=30), [5, 9, 12, 4]
    recorder = Recorder()
    record_statistics(family.ours, recorder)
    request.addfinalizer(lambda: record_statistics(family.ours, None))
    for layer in (None, 1):
        set_params(family.ours, **SPARSE["Top-k"] | {"test_layer": layer})
        with watched(monkeypatch) as seen:
            family.ours(ids)
        if layer is None:
            check_by_loops(family.name, seen, [29], real(ids))
        whole, _ = recorder.drain()
        read(family.ours, ids, sizes)
        chunks, _ = recorder.drain()
        for i, window in enumerate(TINY[family.name].windows):
            n = [min(t + 1, window or 30) for t in range(30)]
            assert whole[i].full.tolist() == [sum(n)] * 2 and whole[i].n.tolist() == [n[-1]] * 2
            if layer == 1 and i == 0:
                assert whole[i].attn.tolist() == [[sum(n)] * 4] * 2
                assert whole[i].vrow.tolist() == [[30] * 2] * 2
            for name in ("attn", "vrow", "full", "topk", "n"):
                assert (getattr(whole[i], name) == getattr(chunks[i], name)).all(), name
    set_params(family.ours, test_layer=None)
    read(family.ours, ids, [10, 1, 1])
    _, decode = recorder.drain()
    for i, window in enumerate(TINY[family.name].windows):
        assert [step.n.tolist() for step in decode[i]] == [[min(n, window or n)] * 2 for n in (11, 12)]
        assert all((step.attn == 4).all() and (step.vrow >= 4).all() for step in decode[i])


@needs_kernel
def test_kernels(family: Models, monkeypatch, record_property) -> None:
    """The CPU kernel computes every call, with the reference's result, or says why it does not."""
    ids, sizes = tokens(length=20), [14, 1, 4, 1]
    why = {
        "gemma2": "the kernels do not support capped scores (softcap)",
        "gpt_oss": "the kernels do not support attention sinks",
    }
    for method in SPARSE:
        family.steer(method)
        monkeypatch.setattr(registry, "FORCED", None)
        with watched(monkeypatch) as seen:
            chosen = read(family.ours, ids, sizes)
        assert {one.call.reference_only for one in seen} == {why.get(family.name)}
        assert {one.backend for one in seen} == {"reference" if family.name in why else "cpu"}
        monkeypatch.setattr(registry, "FORCED", "reference")
        torch.testing.assert_close(chosen, read(family.ours, ids, sizes), **CLOSE)
    record_property("cell", "plain PyTorch" if family.name in why else "cpu")


def test_compile(family: Models) -> None:
    """A step of a static cache is one graph, without a break: what generate compiles."""
    methods = ["Top-k"]
    if TINY[family.name].windows == (None, None):  # a copy of K needs all keys
        methods.append("Top-theta post")
    ids = tokens(length=11)
    for method in methods:
        torch._dynamo.reset()
        family.steer(method)
        if method != "Top-k":
            set_params(family.ours, method="top_theta:key_copy=int8")
        logits = []
        for step in (family.ours, torch.compile(family.ours, fullgraph=True, backend="eager")):
            cache = StaticCache(config=family.ours.config, max_cache_len=24)
            family.ours(ids[:, :10], past_key_values=cache)
            logits.append(step(ids[:, 10:], past_key_values=cache).logits)
        torch.testing.assert_close(logits[1], logits[0], **CLOSE)


def test_attn_implementation(family: Models, tmp_path) -> None:
    """The second door: dense as loaded, then steered, the same as through update_model; saving changes
    nothing."""
    ids = tokens(length=20)
    family.steer("Top-theta post")
    sparse = family.ours(ids).logits
    family.ours.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="top_theta").eval()
    torch.testing.assert_close(other(ids).logits, family.stock(ids).logits, **CLOSE)
    own = Models.__new__(Models)
    own.ours = other
    own.steer("Top-theta post")
    assert torch.equal(other(ids).logits, sparse)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(stock(ids).logits, family.stock(ids).logits)
    stock.set_attn_implementation("top_theta")
    own.ours = stock
    own.steer("Top-theta post")
    assert torch.equal(stock(ids).logits, sparse)
    restore_model(stock)
    stock.set_attn_implementation("eager")
    assert torch.equal(stock(ids).logits, family.stock(ids).logits)


@pytest.mark.parametrize("method", ["top_p:p=0.3", "skip_softmax:prefill=0.5,tile=16"])
def test_methods_without_k(family: Models, method: str) -> None:
    """They are sparse in every layer, also where the default K would be longer than the window."""
    set_params(family.ours, method=method, placement="post-softmax", sdc="none", vmc=False, K=256)
    assert all(layer.toptheta.spec.sparse for layer in attention_layers(family.ours))
    default = family.ours(tokens(length=20)).logits
    set_params(family.ours, K=4)
    assert torch.equal(family.ours(tokens(length=20)).logits, default)


def test_restore(family: Models) -> None:
    model = update_model(make(family.name))
    assert len(attention_layers(model)) == 2
    set_params(model, **SPARSE["Top-k"])
    model(tokens())
    restore_model(model)
    assert all(not hasattr(layer, "toptheta") for layer in attention_layers(model))
    assert [type(x) for x in model.modules()] == [type(x) for x in family.stock.modules()]
    assert torch.equal(model(tokens()).logits, family.stock(tokens()).logits)


def test_likelihood(family: Models) -> None:
    """Logits from hidden states are the model's own; chunks change no likelihood, no distance to dense."""
    ids = tokens(length=30)
    stock = family.stock(ids).logits.log_softmax(dim=-1)[:, :-1]
    hidden = family.stock.model(ids).last_hidden_state
    torch.testing.assert_close(head_logits(family.stock, hidden), family.stock(ids).logits)
    set_params(family.ours, **SPARSE["Top-k"])
    with dense_for(family.ours):
        got = negative_log_likelihood(family.ours, ids, 7)
    torch.testing.assert_close(got, -stock.gather(-1, ids[:, 1:, None])[..., 0], **CLOSE)
    whole = negative_log_likelihood(family.ours, ids, None)
    torch.testing.assert_close(negative_log_likelihood(family.ours, ids, 7), whole, **CLOSE)
    sparse = family.ours(ids).logits.log_softmax(dim=-1)[:, :-1]
    far = against_dense(family.ours, ids, 0, 7)
    torch.testing.assert_close(far.kl, kl_divergence(stock, sparse), rtol=1e-3, atol=1e-4)
    behind = against_dense(family.ours, ids, 12, 5)  # the first 12 rows are dense for both
    torch.testing.assert_close(behind.dense_nll, far.dense_nll[:, 12:], **CLOSE)
    assert (behind.kl > 0).all()

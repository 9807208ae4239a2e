"""Top-theta with a copy of K in few bits, against its rule in slow loops, by hand, and behind a cache."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from tests.helpers.calls import call
from tests.helpers.methods import LAYOUTS, LENGTH, SCALE, check
from tests.helpers.models import tokens
from topk_llama import set_params, update_model
from toptheta.attention.kv_bytes import kv_bytes
from toptheta.attention.reference import sparse_attention
from toptheta.attention.rows import rows_of
from toptheta.methods.base import parse_method
from toptheta.methods.key_codes import ROOM, KeyCodes
from toptheta.methods.key_copy import FIRST, LAST, any_head, codes_of
from toptheta.methods.params import LayerSpec
from toptheta.methods.state import State
from toptheta.methods.top_theta import TopTheta
from toptheta.models.control import record_statistics
from toptheta.models.recorder import Recorder
from toptheta.util.errors import UsageError

K = 24


def coded(key: Tensor, mean: Tensor, largest: int) -> Tensor:
    """A key in so many steps to either side of the mean."""
    rest = key - mean
    step = (rest.abs().max() / largest).float().bfloat16().double()
    codes = [max(-largest, min(largest, round(float(x / step)))) for x in rest]
    return mean + step * torch.tensor(codes, dtype=torch.float64)


def table(theta: float, heads: int) -> Tensor:
    out = torch.full((heads, LENGTH + 1), theta)
    out[:, : K + 1] = float("-inf")
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "copy, largest, placement, theta",
    [("int4", 7, "post-softmax", 0.04), ("int8", 127, "pre-softmax", 0.6)],
)
def test_against_loops(layout: str, placement: str, theta: float, copy: str, largest: int) -> None:
    heads, per_group, missed = (4, 2), 2, []

    def loop(q: Tensor, key: Tensor, prompt: int, places: list[int]) -> Tensor:
        out = torch.zeros(q.shape[0], q.shape[1], q.shape[1], dtype=torch.float64)
        kept_of = (lambda s: s.softmax(dim=0)) if placement == "post-softmax" else (lambda s: s)
        for i in range(q.shape[1]):
            n = i + 1
            scores = [key[h // per_group, :n] @ q[h, i] * SCALE for h in range(q.shape[0])]
            read = [set(range(n)) for _ in scores]
            if i >= prompt and n > K:
                guesses = []
                for h in range(q.shape[0]):
                    own = key[h // per_group, :n]
                    mean = own[:prompt].mean(dim=0)
                    guesses.append(torch.stack([coded(x, mean, largest) for x in own]) @ q[h, i] * SCALE)
                for h in range(q.shape[0]):
                    group = [x for x in range(q.shape[0]) if x // per_group == h // per_group]
                    wanted = {j for x in group for j in range(n) if kept_of(guesses[x])[j] > theta}
                    read[h] = wanted | set(range(min(FIRST, n))) | set(range(max(0, n - LAST), n))
                    exact = kept_of(scores[h])
                    missed.extend(j for j in range(n) if exact[j] > theta and j not in read[h])
                for h in range(q.shape[0]):
                    scores[h] = torch.stack([(scores if j in read[h] else guesses)[h][j] for j in range(n)])
            for h in range(q.shape[0]):
                compared = kept_of(scores[h])
                kept = [j for j in read[h] if n <= K or compared[j] > theta]
                kept = kept or [max(read[h], key=lambda j: float(compared[j]))]
                weights = scores[h].softmax(dim=0)
                if placement == "pre-softmax":
                    weights = weights / weights[kept].sum()
                out[h, i, kept] = weights[kept]
        return out

    method = TopTheta(key_copy=copy)
    check(method, K, loop, layout, heads, placement=placement, theta=table(theta, heads[0]))
    if copy == "int4" and placement == "post-softmax":
        assert missed  # the estimates decide something


def copied(k: Tensor, mean: Tensor, bits: int) -> KeyCodes:
    copy = KeyCodes.around(mean, bits)
    copy.put(k, 0)
    return copy


def represented(k: Tensor, mean: Tensor, bits: int) -> Tensor:
    return copied(k, mean, bits).represented(k.shape[2])


def test_the_copy_by_hand() -> None:
    k = torch.tensor([[[[7.0, -3.4, 0.0], [1.0, 1.0, 1.0]]]])
    mean = torch.tensor([[[0.0, 0.0, 1.0]]])
    expected = torch.tensor([[[[7.0, -3.0, -0.0], [1.0, 1.0, 1.0]]]])
    torch.testing.assert_close(represented(k, mean, 4), expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(represented(k, mean, 8), k, rtol=0.01, atol=0.04)
    assert torch.equal(represented(k[:, :, :1], k[:, :, 0], 4), k[:, :, :1])  # nothing but the mean
    four = copied(torch.tensor([[[[7.0, -3.0, -7.0, 2.0]]]]), torch.zeros(1, 1, 4), 4)
    assert four.codes[0, 0, 0].tolist() == [7 - 7 * 16, (-3 & 15) + 2 * 16]  # channels 0 and 2, 1 and 3
    assert four.steps[0, 0, 0] == 1.0 and four.codes.dtype == torch.int8


@pytest.mark.parametrize("bits", [4, 8])
def test_the_copy_follows_the_cache(bits: int) -> None:
    """Step by step, behind a crop, a later prompt and other sequences it is the copy of all keys at once."""
    torch.manual_seed(1)
    k, state = torch.randn(3, 2, 2 * ROOM, 16), State()
    seen = torch.ones(3, 2 * ROOM, dtype=torch.bool)
    seen[1, :9] = False  # padding
    mean = torch.stack([k[b, :, 0 if b != 1 else 9 : 29].mean(dim=1) for b in range(3)])

    def step(end: int, order: list[int]) -> None:
        keys = k[order, :, :end]
        copy = codes_of(state, keys, seen[order, :end], 1, True, bits)
        torch.testing.assert_close(copy.mean, mean[order])
        assert torch.equal(copy.represented(copy.length), represented(keys, copy.mean, bits))

    order = [0, 1, 2]
    for end in (30, 31, 32):
        step(end, order)
    state.crop(30)
    k[:, :, 30:] = torch.randn(3, 2, 2 * ROOM - 30, 16)
    for end in (31, 32, 50, 51, 2 * ROOM):  # 18 keys of another prompt, and more than there was room for
        step(end, order)
    other = state.clone()
    state.select(torch.tensor([2, 0]))
    state.repeat(2)
    state.crop(100)
    before = k.clone()
    k[:, :, 100:] += 1.0
    step(101, [2, 2, 0, 0])
    k.copy_(before)
    state = other
    state.crop(200)
    step(201, order)
    state.clear()
    assert state.key_codes is None


def test_what_a_step_reads() -> None:
    """Of 60 keys the first 4, the last 16 and the one that stands out; the copy at 36 of 128 bytes a key."""
    torch.manual_seed(0)
    k = 0.01 * torch.randn(1, 1, 60, 64)
    k[:, :, 30] = 1.0
    rows, theta = rows_of(None, 1, 60, k.device), torch.full((2, 61), 0.05)
    spec = LayerSpec(TopTheta(key_copy="int4"), "post-softmax", 8)
    for dtype in (torch.float32, torch.bfloat16):
        q, key, v = (x.to(dtype) for x in (torch.ones(1, 2, 1, 64), k, torch.randn(1, 1, 60, 64)))
        one = call(q, key, v, rows, spec, 0.1, theta, count=True, decode=True, state=State())
        _, counts = sparse_attention(one)
        assert counts.attn.tolist() == [[1, 1]] and counts.keys.tolist() == [[[21]]]
        row = 64 * key.element_size()
        priced = kv_bytes(one, counts)
        assert priced.read.tolist() == [[(21 + 1) * row + 60 * 34 * key.element_size() // 2]]
        assert priced.dense.tolist() == [60 * 2 * row]


def test_behind_a_cache(tiny_model: LlamaForCausalLM) -> None:
    """After a crop and a reordering the steps are the same; without statistics too; prompts do not see it."""
    update_model(tiny_model)
    set_params(tiny_model, K=20, placement="post-softmax", calibrate=True, calib_sample_frac=1.0, mode=0)
    for seed in range(3):
        tiny_model(tokens(length=60, seed=seed))
    set_params(tiny_model, calibrate=False)
    ids = tokens(batch=2, length=40)
    prompt = tiny_model(ids).logits
    set_params(tiny_model, method="top_theta:key_copy=int4")
    torch.testing.assert_close(tiny_model(ids).logits, prompt)

    def steps(cache: DynamicCache, first: int, order: list[int]) -> Tensor:
        parts = [tiny_model(ids[order, i : i + 1], past_key_values=cache).logits for i in range(first, 40)]
        return torch.cat(parts, dim=1)

    cache = DynamicCache(config=tiny_model.config)
    tiny_model(ids[:, :30], past_key_values=cache)
    record_statistics(tiny_model, Recorder())
    one = steps(cache, 30, [0, 1])
    record_statistics(tiny_model, None)
    cache.crop(-5)
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(steps(cache, 35, [1, 0]), one[[1, 0], 5:])
    exact = DynamicCache(config=tiny_model.config)
    tiny_model(ids[:, :30], past_key_values=exact)
    set_params(tiny_model, method="top_theta")
    assert 1e-4 < (steps(exact, 30, [0, 1]) - one).abs().max() < 0.5


def test_its_names() -> None:
    method = parse_method("top_theta:key_copy=int4")
    assert method == TopTheta(key_copy="int4") and method.label(64) == "Top-theta key_copy=int4 K=64"
    assert method.kernel_spec().key_bits == 4 and "4 bits" in method.stores
    with pytest.raises(UsageError, match="key_copy is 'int3': choose none, int8 or int4"):
        parse_method("top_theta:key_copy=int3")


def test_any_head() -> None:
    """What one of two heads marks, also in the code that torch.compile generates."""
    marks = torch.tensor([[[[0, 1, 0]], [[1, 1, 0]], [[0, 0, 0]], [[0, 0, 1]]]], dtype=torch.bool)
    expected = torch.tensor([[[[1, 1, 0]], [[0, 0, 1]]]], dtype=torch.bool)
    for compute in (any_head, torch.compile(any_head)):
        assert torch.equal(compute(marks, 2), expected)
    where = torch.compile(lambda marks: torch.where(any_head(marks, 2), 1.0, 0.0))
    assert torch.equal(where(marks), expected.float())

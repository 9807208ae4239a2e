"""Keys that a copy of K misses, against the rule in slow loops, in one call and step by step."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from tests.helpers.calls import call
from tests.helpers.models import tokens
from topk_llama import set_params, update_model
from toptheta.attention.missed import EVERY, missed_keys
from toptheta.attention.reference import sparse_attention
from toptheta.attention.rows import rows_of
from toptheta.methods.base import ValueNorms
from toptheta.methods.key_copy import FIRST, LAST
from toptheta.methods.params import LayerSpec
from toptheta.methods.state import State
from toptheta.methods.top_theta import TopTheta
from toptheta.models.control import reading_steps, record_statistics
from toptheta.models.interface import toptheta_mask
from toptheta.models.recorder import LayerRecord, Recorder

HEADS, GROUPS, D, PROMPT, STEPS, K = 4, 2, 16, 60, 40, 24
KEYS, PADDED = PROMPT + STEPS, 44  # of the second sequence, whose first examined row is no longer than K


def coded(key: Tensor, mean: Tensor) -> Tensor:
    """The keys `[n, D]` in seven steps to either side of the mean."""
    rest = key - mean
    steps = (rest.abs().amax(dim=1, keepdim=True) / 7).bfloat16().float()
    return mean + steps * (rest / steps).round().clamp(-7, 7)


@pytest.mark.parametrize("placement, theta", [("post-softmax", 0.03), ("pre-softmax", 0.5)])
@pytest.mark.parametrize("value_aware", [False, True])
def test_against_loops(placement: str, theta: float, value_aware: bool) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, HEADS, STEPS, D)
    k, v = torch.randn(2, 2, GROUPS, KEYS, D)
    values = ValueNorms(torch.eye(D).expand(HEADS, -1, -1), v.mean(dim=(0, 2)), torch.full((HEADS,), D**0.5))
    real = torch.ones(2, KEYS, dtype=torch.bool)
    real[1, :PADDED] = False
    rows = rows_of(toptheta_mask(2, STEPS, KEYS, q_offset=PROMPT, attention_mask=real), STEPS, KEYS, q.device)
    table = torch.full((HEADS, KEYS + 1), theta)
    table[:, : K + 1] = float("-inf")
    spec = LayerSpec(TopTheta(key_copy="int4", value_aware=value_aware), placement, K, "none", vmc=True)
    one = call(q, k, v, rows, spec, 0.2, table, decode=True, state=State(), values=values)
    sparse_attention(one)
    found = missed_keys(one)

    factors, expected = values.of(v), torch.zeros(2, STEPS, 2, dtype=torch.int64)
    for b, first in enumerate((0, PADDED)):
        for i in range(STEPS):
            n = PROMPT + i + 1 - first
            if (n - 1) % EVERY or n <= K:
                continue
            for group in range(GROUPS):
                own = k[b, group, first : PROMPT + i + 1]
                near = coded(own, own[: PROMPT - first].mean(dim=0))
                read, wanted = torch.zeros(n, dtype=torch.bool), []
                read[:FIRST] = read[n - LAST :] = True
                for head in (2 * group, 2 * group + 1):
                    for keys in (own, near):
                        compared = keys @ q[b, head, i] * 0.2
                        if placement == "post-softmax":
                            compared = compared.softmax(dim=0)
                        if value_aware:
                            compared = compared * factors[b, head, first : PROMPT + i + 1]
                        if keys is own:
                            wanted.append(compared > theta)
                        else:
                            read |= compared > theta
                expected[b, i, 0] += sum(int(one.sum()) for one in wanted)
                expected[b, i, 1] += sum(int((one & ~read).sum()) for one in wanted)
    assert found.tolist() == expected.tolist()
    share = expected[..., 1].sum() / expected[..., 0].sum()
    assert 0.001 < share < 0.1
    assert (expected[1, 0] == 0).all() and (expected[1, 32] > 0).any()


def test_step_by_step(tiny_model: LlamaForCausalLM) -> None:
    """The same numbers step by step as in one call, and in a static cache; none without a copy."""
    update_model(tiny_model)
    set_params(tiny_model, K=20, placement="post-softmax", calibrate=True, calib_sample_frac=1.0, mode=0)
    for seed in range(3):
        tiny_model(tokens(length=60, seed=seed))
    set_params(tiny_model, calibrate=False, method="top_theta:key_copy=int4")
    ids, recorder = tokens(batch=2, length=60), Recorder()
    record_statistics(tiny_model, recorder)

    def counted(width: int, cache: DynamicCache | StaticCache) -> list[LayerRecord]:
        record_statistics(tiny_model, None)
        tiny_model(ids[:, :30], past_key_values=cache)
        record_statistics(tiny_model, recorder)
        with reading_steps(tiny_model):
            for at in range(30, 60, width):
                tiny_model(ids[:, at : at + width], past_key_values=cache)
        return recorder.drain()[1][0]

    several = counted(30, DynamicCache(config=tiny_model.config))
    single = counted(1, DynamicCache(config=tiny_model.config))
    for name in ("wanted", "missed"):
        assert [getattr(x, name).tolist() for x in several] == [getattr(x, name).tolist() for x in single]
    at = [30 + i for i, x in enumerate(single) if x.wanted.any()]
    assert at == [32, 48] and all(0 < x.wanted.min() for x in (single[2], single[18]))
    static = counted(1, StaticCache(config=tiny_model.config, max_cache_len=60))
    assert [x.wanted.tolist() for x in static] == [x.wanted.tolist() for x in single]
    assert [x.missed.tolist() for x in static] == [x.missed.tolist() for x in single]
    set_params(tiny_model, method="top_theta")
    assert all(x.missed is None for x in counted(1, DynamicCache(config=tiny_model.config)))

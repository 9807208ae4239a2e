"""StreamingLLM against its rule in slow loops, and behind a cache."""

import pytest
import torch
from transformers import DynamicCache

from tests.helpers.calls import call
from tests.helpers.kernel_cases import KINDS, SCALE, case, inputs
from tests.helpers.models import tokens
from topk_llama import set_params, update_model
from toptheta.attention.reference import sparse_attention
from toptheta.methods.base import parse_method
from toptheta.methods.params import AttentionParams, LayerSpec, check
from toptheta.methods.streaming_llm import StreamingLLM
from toptheta.util.errors import UsageError


def kept_keys(visible: list[int], k: int, sinks: int) -> list[int]:
    """Of a row's visible keys, in order: the first `sinks` (one less than K at most), and the last K -
    sinks."""
    if len(visible) <= k:
        return visible
    sinks = min(sinks, k - 1)
    return visible[:sinks] + visible[len(visible) - (k - sinks) :]


def test_a_row_by_hand() -> None:
    assert kept_keys(list(range(10)), 5, 2) == [0, 1, 7, 8, 9]
    assert kept_keys([3, 4, 5, 6, 7], 3, 4) == [3, 4, 7]


@pytest.mark.parametrize("sinks, k", [(4, 12), (0, 12), (20, 6), (2, 500)])
@pytest.mark.parametrize("kind", KINDS)
def test_against_loops(kind: str, sinks: int, k: int) -> None:
    torch.manual_seed(0)
    rows, batch, q_len, kv_len = case(kind)
    q, key, v = inputs(batch, (4, 2, 16), q_len, kv_len)
    spec = LayerSpec(StreamingLLM(sinks), "pre-softmax", k)
    out, counts = sparse_attention(call(q, key, v, rows, spec, SCALE, count=True))
    end = rows.end(q_len, kv_len)
    seen = rows.visible(0, q_len, kv_len)
    seen = torch.ones(1, 1, q_len, end, dtype=torch.bool) if seen is None else seen
    popularity = torch.zeros(batch, kv_len, dtype=torch.int64)
    for b in range(batch):
        for i in range(q_len):
            visible = seen[b if seen.shape[0] > 1 else 0, 0, i].nonzero()[:, 0].tolist()
            kept = kept_keys(visible, k, sinks)
            if not kept:
                continue
            expected = []
            for head in range(4):
                group = head // 2
                weights = (key[b, group, kept].double() @ q[b, head, i].double() * SCALE).softmax(dim=0)
                expected.append(weights @ v[b, group, kept].double())
            torch.testing.assert_close(out[b, :, i].double(), torch.stack(expected), rtol=1e-4, atol=1e-5)
            if rows.real is None or rows.real[b if rows.real.shape[0] > 1 else 0, i]:
                popularity[b, kept] += 2  # the heads of a group
    assert torch.equal(counts.vrow.long(), popularity[:, None].expand(-1, 2, -1))


def test_decode_goes_on_from_prefill(tiny_model) -> None:
    """Token by token behind a cache, the logits are those of the whole."""
    update_model(tiny_model)
    set_params(tiny_model, method="streaming_llm:sinks=2", K=6)
    ids = tokens(length=30)
    whole = tiny_model(ids).logits
    cache = DynamicCache(config=tiny_model.config)
    parts = [tiny_model(ids[:, :20], past_key_values=cache).logits]
    parts += [tiny_model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 30)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    set_params(tiny_model, mode=3)
    assert (tiny_model(ids).logits - whole).abs().max() > 0.01


def test_its_names() -> None:
    method = parse_method("streaming_llm:sinks=8")
    assert method == StreamingLLM(8) and method.spec == "streaming_llm:sinks=8"
    assert StreamingLLM().label(64) == "StreamingLLM K=64" and method.label(64) == "StreamingLLM sinks=8 K=64"
    assert method.folder(64) == "streaming_llm_sinks8_k64"
    with pytest.raises(UsageError, match="K 4 leaves no recent key next to the 4 sinks of streaming_llm"):
        check(AttentionParams(method=StreamingLLM(), placement="pre-softmax", K=[0, 5, 4]))
    with pytest.raises(UsageError, match="sinks is -1: give a whole number of at least 0"):
        parse_method("streaming_llm:sinks=-1")

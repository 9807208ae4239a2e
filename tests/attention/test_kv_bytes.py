"""KV bytes that a step reads, counted in slow loops and by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.helpers.calls import call
from tests.helpers.models import tokens
from topk_llama import set_params, update_model
from toptheta.attention.call import AttentionCall
from toptheta.attention.kv_bytes import dense_bytes, kv_bytes
from toptheta.attention.reference import sparse_attention
from toptheta.attention.rows import rows_of
from toptheta.eval.cell import Cell
from toptheta.kernels.int8_keys import keys_read_of, quantized
from toptheta.methods.base import parse_method, registered
from toptheta.methods.params import LayerSpec
from toptheta.models import generation as chunked
from toptheta.models.control import record_statistics
from toptheta.models.interface import toptheta_mask
from toptheta.models.recorder import DECODE, Recorder

N, D, HEADS, GROUPS = 24, 8, 4, 2
ROW = D * 4  # bytes of a row of K or V


def step(
    method: str, k: int = 6, padded: int = 0, dtype=torch.float32, **spec
) -> tuple[AttentionCall, Tensor]:
    """A decode step of two sequences, the second with padding, and what is kept: `[2, H, N]` bool."""
    torch.manual_seed(0)
    q, key = torch.randn(2, HEADS, 1, D).to(dtype), torch.randn(2, GROUPS, N, D).to(dtype)
    real = torch.ones(2, N, dtype=torch.bool)
    real[1, :padded] = False
    mask = toptheta_mask(2, 1, N, q_offset=N - 1, attention_mask=real)
    rows = rows_of(mask, 1, N, q.device)
    options = {"placement": "pre-softmax"} | spec
    one = call(
        q, key, key, rows, LayerSpec(parse_method(method), k=k, **options), 1.0, count=True, decode=True
    )
    kept = []
    for head in range(HEADS):  # what a head keeps: of a call with that head alone
        group = head // (HEADS // GROUPS)
        alone = call(
            q[:, [head]], key[:, [group]], key[:, [group]], rows, one.spec, 1.0, count=True, decode=True
        )
        kept.append(sparse_attention(alone)[1].vrow[:, 0] > 0)
    return one, torch.stack(kept, dim=1)


def bytes_read(kept: Tensor, n: int, all_keys: bool, extra: int) -> list[int]:
    """Of one sequence, for each KV head: rows of V that a head of the group keeps, of K likewise, or all."""
    found = []
    for group in range(GROUPS):
        heads = range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
        v_rows = sum(any(bool(kept[head, j]) for head in heads) for j in range(N))
        found.append((v_rows + (n if all_keys else v_rows)) * ROW + extra)
    return found


@pytest.mark.parametrize(
    "method, all_keys, spec, extra",
    [
        ("top_k", True, {}, 0),
        ("top_k", True, {"placement": "post-softmax", "vmc": True}, 4 * D),
        ("top_p", True, {}, 0),
        ("skip_softmax:decode=0.3,tile=4", True, {}, 0),
        ("streaming_llm", False, {}, 0),
        ("streaming_llm", True, {"sdc": "exact"}, 0),
        ("streaming_llm", True, {"placement": "post-softmax"}, 0),
        ("tova", False, {}, 0),
        ("snapkv", False, {}, 0),
    ],
)
@pytest.mark.parametrize("padded", [0, 7])
def test_against_loops(method: str, all_keys: bool, spec: dict, extra: int, padded: int) -> None:
    one, kept = step(method, padded=padded, **spec)
    counts = sparse_attention(one)[1]
    got = kv_bytes(one, counts)
    for b, n in enumerate((N, N - padded)):
        assert got.dense[b] == 2 * n * ROW
        assert got.read[b].tolist() == bytes_read(kept[b], n, all_keys, extra)
        assert (got.read[b] <= got.dense[b] + extra).all()


def test_quest_and_h2o_read_more_than_the_cache() -> None:
    one, kept = step("quest:page=4", k=12)
    pages = 6 * 2 * ROW  # of 24 keys in pages of 4: the largest and the smallest
    got = kv_bytes(one, sparse_attention(one)[1])
    assert [got.read[b].tolist() for b in (0, 1)] == [bytes_read(kept[b], N, False, pages) for b in (0, 1)]
    one, kept = step("h2o", k=6)
    got = kv_bytes(one, sparse_attention(one)[1])
    for b in (0, 1):  # a sum of weights for each key that a head still has
        sums = [4 * int(kept[b, 2 * group : 2 * group + 2].sum()) for group in range(GROUPS)]
        assert got.read[b].tolist() == [bytes_read(kept[b], N, False, sums[g])[g] for g in range(GROUPS)]


def test_dense_rows_cost_what_dense_attention_costs() -> None:
    for method in ("top_k", "quest:page=4", "h2o", "streaming_llm"):
        one, _ = step(method, k=N, padded=7)
        got = kv_bytes(one, sparse_attention(one)[1])
        plain = dense_bytes(one.rows, one.k)
        assert torch.equal(got.read, plain.read) and torch.equal(got.read, got.dense[:, None].expand(2, 2))


def test_types_of_the_cache() -> None:
    one, kept = step("streaming_llm", k=6, dtype=torch.bfloat16)
    got = kv_bytes(one, sparse_attention(one)[1])
    assert got.read.tolist() == [[2 * 6 * D * 2] * 2] * 2 and got.dense.tolist() == [2 * N * D * 2] * 2


def test_the_int8_copy() -> None:
    """A byte a channel and 8 a key, and K rows of the keys that the copy leaves open."""
    one, _ = step("top_k", padded=7)
    one.spec = LayerSpec(parse_method("top_theta"), "pre-softmax", 6)
    one.int8 = quantized(one.k)
    one.theta = torch.full((HEADS, N + 1), 1.5)
    one.theta[3] = 99.0  # nothing passes: the group reads all of K
    counts = sparse_attention(one)[1]
    open_keys = keys_read_of(one)
    scores = one.q.view(2, GROUPS, 2, D) @ one.k.transpose(2, 3)
    for b, n in enumerate((N, N - 7)):
        assert open_keys[b, 1] == n
        least = int((scores[b, 0].amax(dim=0)[N - n :] > 1.5).sum())
        assert least <= open_keys[b, 0] <= least + 4  # what passes, and a few that may
        v_rows = (counts.vrow[b] > 0).sum(dim=-1)
        got = kv_bytes(one, counts, open_keys).read[b]
        assert got.tolist() == [int(open_keys[b, g] + v_rows[g]) * ROW + n * (D + 8) for g in range(GROUPS)]


def test_a_prompt_reads_by_call() -> None:
    """A prompt reads what any of its rows keeps; its last row alone says how long it is."""
    torch.manual_seed(0)
    q, key = torch.randn(1, HEADS, N, D), torch.randn(1, GROUPS, N, D)
    spec = LayerSpec(parse_method("streaming_llm:sinks=1"), "pre-softmax", 3)
    one = call(q, key, key, rows_of(None, N, N, q.device), spec, 1.0, count=True)
    got = kv_bytes(one, sparse_attention(one)[1])
    assert got.read.tolist() == [[2 * N * ROW] * 2] and got.dense.tolist() == [2 * N * ROW]


@pytest.mark.parametrize("batch", [1, 2])
def test_in_a_model(tiny_model: LlamaForCausalLM, batch: int) -> None:
    """Over a generation: dense reads all; StreamingLLM K of n keys in each step, and nothing less in the
    prompt."""
    update_model(tiny_model)
    row, new = 2 * 16 * 4, {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": []}
    prompt = {"input_ids": tokens(batch, 20), "attention_mask": torch.ones(batch, 20, dtype=torch.long)}
    for method, per_step in (("dense", None), ("streaming_llm", 6), ("quest:dense_layers=0,page=2", None)):
        set_params(tiny_model, method=method, K=6)
        recorder = Recorder()
        record_statistics(tiny_model, recorder)
        chunked.generate(tiny_model, prompt, 8, **new)
        prefill, decode = recorder.drain()
        for record in prefill.values():  # chunks of 8, 8 and 4 read 8, 16 and 20 keys
            assert (record.kv_dense == (8 + 16 + 20) * row).all()
            assert (record.kv_read <= record.kv_dense[:, None]).all()
        for steps in decode.values():
            for number, record in enumerate(steps):
                n = 21 + number
                assert record.kv_dense.tolist() == [n * row] * batch and record.kv_read.shape == (batch, 2)
                if method == "dense":
                    assert (record.kv_read == n * row).all()
                elif per_step:
                    assert (record.kv_read == per_step * row).all()
                else:  # 3 pages of 2, of 3 heads: up to 9 pages
                    beside = -(-n // 2) * row
                    assert (record.kv_read >= 5 * row + beside).all()
                    assert (record.kv_read <= min(n, 18) * row + beside).all()


def test_every_method_says_what_it_stores() -> None:
    for kind in registered().values():
        assert isinstance(kind().stores, str) and kind().stores
    assert parse_method("top_theta:value_aware").stores.startswith("4 for each query head")


def test_a_cell_sums_over_what_counts(tiny_model: LlamaForCausalLM, tmp_path) -> None:
    """Steps after a sequence's end do not count, nor do their bytes."""
    update_model(tiny_model)
    set_params(tiny_model, method="streaming_llm", K=6)
    recorder, cell = Recorder(), Cell(tmp_path)
    record_statistics(tiny_model, recorder)
    prompt = {"input_ids": tokens(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    chunked.generate(
        tiny_model, prompt, None, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=[]
    )
    cell.add({"a": 1}, *recorder.drain(), decode_steps=np.array([4, 1]))
    cell.checkpoint()
    lengths = [21, 22, 23, 24, 21]
    assert cell.kv_bytes() == {"prefill": 1.0, DECODE: 6 * len(lengths) / sum(lengths)}
    assert Cell(tmp_path).kv_bytes() == cell.kv_bytes()
    assert Cell(tmp_path / "new").kv_bytes() == {"prefill": None, DECODE: None}

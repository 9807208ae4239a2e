"""The vectorised attention against slow loops, over the options of DESIGN sections 2-3."""

import itertools

import pytest
import torch

from tests.helpers import reference
from tests.helpers.calls import call, layer_spec
from toptheta.attention.reference import sparse_attention
from toptheta.attention.rows import Rows, rows_of
from toptheta.methods.params import AttentionParams, LayerSpec, check
from toptheta.models.interface import toptheta_mask

K = 5
OPTIONS = [
    layer_spec(mode=mode, placement=placement, k=K, sdc=sdc, sdc_scale=scale, vmc=vmc, capk=capk)
    for mode, placement, (sdc, scale), vmc, capk in itertools.product(
        (0, 1, 3),
        ("pre-softmax", "post-softmax"),
        (("none", 1.0), ("exact", 1.0), ("exact", 0.5), ("exp-threshold", 0.7), ("offline-calibrated", 1.3)),
        (False, True),
        (False, True),
    )
    if mode == 0 or not capk
]


def makes_sense(spec: LayerSpec) -> bool:
    try:
        check(
            AttentionParams(
                K=spec.k,
                method=spec.method,
                placement=spec.placement,
                sdc=spec.sdc,
                sdc_scale=spec.sdc_scale,
                vmc=spec.vmc,
            )
        )
    except ValueError:
        return False
    return not spec.method.is_dense or not (spec.sdc != "none" or spec.vmc)


OPTIONS = [spec for spec in OPTIONS if makes_sense(spec)]


def rows_for(kind: str) -> tuple[Rows, torch.Tensor, int, int]:
    """Rows, `[B, Q, N]` visibility, Q and N of one shape of call; B = 2."""
    if kind == "prefill":
        q_len = kv_len = 14
        visible = torch.ones(2, q_len, kv_len, dtype=torch.bool).tril()
        return rows_of(None, q_len, kv_len, torch.device("cpu")), visible, q_len, kv_len
    if kind == "decode":
        visible = torch.ones(2, 1, 14, dtype=torch.bool)
        return rows_of(None, 1, 14, torch.device("cpu")), visible, 1, 14
    if kind == "chunk":
        mask = toptheta_mask(2, 6, 14, q_offset=8)
    elif kind == "left padding":
        mask = toptheta_mask(2, 14, 14, attention_mask=torch.tensor([[1] * 14, [0] * 4 + [1] * 10]).bool())
    elif kind == "right padding":
        mask = toptheta_mask(2, 14, 14, attention_mask=torch.tensor([[1] * 14, [1] * 9 + [0] * 5]).bool())
    elif kind == "padded decode":
        mask = toptheta_mask(
            2, 1, 14, q_offset=13, attention_mask=torch.tensor([[1] * 14, [0] * 4 + [1] * 10]).bool()
        )
    elif kind == "static cache":
        mask = toptheta_mask(2, 1, 20, q_offset=13, attention_mask=torch.ones(2, 14).bool())
    elif kind == "own mask":  # not causal, one row sees nothing
        torch.manual_seed(3)
        mask = torch.rand(2, 1, 7, 14) < 0.7
        mask[1, 0, 2] = False
    else:
        raise ValueError(kind)
    assert mask is not None
    return (
        rows_of(mask, mask.shape[2], mask.shape[3], torch.device("cpu")),
        mask[:, 0],
        mask.shape[2],
        mask.shape[3],
    )


KINDS = [
    "prefill",
    "decode",
    "chunk",
    "left padding",
    "right padding",
    "padded decode",
    "static cache",
    "own mask",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)], ids=str)
def test_against_loops(kind: str, heads: tuple[int, int]) -> None:
    rows, visible, q_len, kv_len = rows_for(kind)
    torch.manual_seed(1)
    num_heads, num_kv_heads = heads
    q = torch.randn(2, num_heads, q_len, 8) * 2
    k, v = torch.randn(2, 2, num_kv_heads, kv_len, 8)
    scale = 0.35
    length = 12  # shorter than the longest row: those look up the last entry
    for spec in OPTIONS:
        pre = spec.placement == "pre-softmax"
        theta = torch.rand(num_heads, length) * (1.5 if pre else 0.2) - (0.5 if pre else 0.0)
        theta[0] = 30.0 if pre else 1.0  # nothing passes in head 0
        theta[:, : K + 1] = float("-inf")
        table = torch.rand(num_heads, length)
        table[:, : K + 1] = 0.0
        expected, kept = reference.attention(q, k, v, visible, spec, scale, theta, table)
        out, counts = sparse_attention(call(q, k, v, rows, spec, scale, theta, table, count=True))
        torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-6, msg=str(spec))
        assert counts is not None
        if rows.real is not None:
            kept = kept & rows.real[:, None, :, None]
        group = num_heads // num_kv_heads
        assert torch.equal(counts.attn, kept.sum(dim=(2, 3))), spec
        popularity = kept.view(2, num_kv_heads, group, q_len, kv_len).sum(dim=(2, 3))
        assert torch.equal(counts.vrow.long(), popularity), spec


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    q, k, v = torch.randn(1, 4, 50, 16), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)
    spec = layer_spec(mode=1, placement="pre-softmax", k=7, sdc="exact", vmc=True)
    rows = rows_of(None, 50, 50, torch.device("cpu"))
    whole, counts = sparse_attention(call(q, k, v, rows, spec, 0.25, count=True))
    monkeypatch.setattr("toptheta.attention.reference.BLOCK_ELEMENTS", {"cpu": 1000})
    parts, part_counts = sparse_attention(call(q, k, v, rows, spec, 0.25, count=True))
    torch.testing.assert_close(parts, whole)
    assert counts is not None and part_counts is not None
    assert torch.equal(counts.vrow, part_counts.vrow)


def test_exactly_k_on_ties() -> None:
    q, k = torch.zeros(1, 1, 10, 4), torch.zeros(1, 1, 10, 4)  # every score is 0
    spec = layer_spec(mode=1, placement="pre-softmax", k=3)
    rows = rows_of(None, 10, 10, torch.device("cpu"))
    _, counts = sparse_attention(call(q, k, torch.randn(1, 1, 10, 4), rows, spec, 0.5, count=True))
    assert counts is not None and counts.attn.item() == 1 + 2 + 3 * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", [0, 1])
def test_low_precision(dtype: torch.dtype, mode: int) -> None:
    """Selection is made in float32, so only the rounding of inputs and output may show (tolerance: STYLE.md's
    rule)."""
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, h, 40, 16).to(dtype) for h in (4, 2, 2))
    theta = torch.full((4, 41), 0.3)
    theta[:, :8] = float("-inf")
    spec = layer_spec(mode=mode, placement="pre-softmax", k=7, sdc="exact", vmc=True)
    rows = rows_of(None, 40, 40, torch.device("cpu"))
    out, _ = sparse_attention(call(q, k, v, rows, spec, 0.25, theta))
    exact, _ = sparse_attention(call(q.float(), k.float(), v.float(), rows, spec, 0.25, theta))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    plain_exact = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True
    )
    allowed = 2 * (plain.float() - plain_exact).abs().max()
    assert out.dtype == dtype
    assert (out.float() - exact).abs().max() <= allowed + 1e-5

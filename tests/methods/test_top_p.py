"""Top-p against its rule in slow loops, and by hand."""

import pytest
import torch
from torch import Tensor

from tests.helpers.calls import call
from tests.helpers.methods import LAYOUTS, SCALE, check, softmax_over
from tests.helpers.models import tokens
from topk_llama import set_params, update_model
from toptheta.attention.reference import sparse_attention
from toptheta.attention.rows import rows_of
from toptheta.methods.base import Block, RowTables, parse_method
from toptheta.methods.params import LayerSpec
from toptheta.methods.top_k import keep_largest
from toptheta.methods.top_p import TopP
from toptheta.util.errors import UsageError


def kept_keys(weights: list[float], p: float) -> list[int]:
    """Take the largest that is left, until what is taken sums to at least p."""
    kept: list[int] = []
    while sum(weights[i] for i in kept) < p and len(kept) < len(weights):
        kept.append(max((i for i in range(len(weights)) if i not in kept), key=lambda i: weights[i]))
    return sorted(kept)


def test_a_row_by_hand() -> None:
    row = [0.1, 0.4, 0.05, 0.3, 0.15]
    for p, kept in ((0.4, [1]), (0.41, [1, 3]), (0.7, [1, 3]), (0.8, [1, 3, 4]), (1.0, [0, 1, 2, 3, 4])):
        assert kept_keys(row, p - 1e-9) == kept
        k = torch.tensor(row, dtype=torch.float64).log().float()[None, None, :, None]  # the score is the key
        v = torch.eye(5)[None, None, :, :1]
        one = call(torch.ones(1, 1, 1, 1), k, v, rows_of(None, 1, 5, k.device), None, 1.0, count=True)
        one.spec = LayerSpec(TopP(p - 1e-6), "pre-softmax")
        counts = sparse_attention(one)[1]
        assert counts.vrow[0, 0].nonzero()[:, 0].tolist() == kept


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=str)
def test_against_loops(layout: str, heads: tuple[int, int]) -> None:
    for placement in ("pre-softmax", "post-softmax"):

        def loop(q: Tensor, k: Tensor, prompt: int, places: list[int], post=placement == "post-softmax"):
            out = torch.zeros(q.shape[0], q.shape[1], q.shape[1], dtype=torch.float64)
            for h in range(q.shape[0]):
                for i in range(q.shape[1]):
                    scores = k[h // (heads[0] // heads[1]), : i + 1] @ q[h, i] * SCALE
                    weights = scores.softmax(dim=0)
                    kept = kept_keys(weights.tolist(), 0.7)
                    out[h, i, kept] = weights[kept] if post else softmax_over(scores, kept)[kept]
            return out

        check(TopP(0.7), 0, loop, layout, heads, placement=placement)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 50, 16), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)
    one = call(q, k, v, rows_of(None, 50, 50, q.device), LayerSpec(TopP(), "post-softmax", vmc=True), 0.25)
    whole = sparse_attention(one)[0]
    monkeypatch.setattr("toptheta.attention.reference.BLOCK_ELEMENTS", {"cpu": 1000})
    torch.testing.assert_close(sparse_attention(one)[0], whole)


def test_vmc_on_all_rows() -> None:
    """A method without K compensates rows of any length."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 12, 8), torch.randn(1, 1, 12, 8)
    rows = rows_of(None, 1, 12, q.device)
    out = sparse_attention(call(q, k, v, rows, LayerSpec(TopP(0.5), "post-softmax", 256, vmc=True), 1.0))[0]
    weights = (k[0, 0].double() @ q[0, 0, 0].double()).softmax(dim=0)
    kept = kept_keys(weights.tolist(), 0.5)
    lost = 1 - weights[kept].sum()
    expected = weights[kept] @ v[0, 0, kept].double() + lost * v[0, 0].double().mean(dim=0)
    torch.testing.assert_close(out[0, 0, 0].double(), expected, rtol=1e-4, atol=1e-5)


def test_in_a_model(tiny_model) -> None:
    """All of the weight is dense attention, whatever K says; less is not."""
    ids = tokens(length=30)
    dense = tiny_model(ids).logits
    update_model(tiny_model)
    set_params(tiny_model, method="top_p:p=1", K=4)
    torch.testing.assert_close(tiny_model(ids).logits, dense, rtol=1e-3, atol=1e-3)
    set_params(tiny_model, method="top_p:p=0.5")
    assert (tiny_model(ids).logits - dense).abs().max() > 0.01


def test_its_names() -> None:
    method = parse_method("top_p:p=0.9")
    assert method == TopP(0.9) and method.label(64) == "Top-p p=0.9" and method.folder(64) == "top_p_p0.9"
    with pytest.raises(UsageError, match="p is 1.5: give a share"):
        parse_method("top_p:p=1.5")


def test_of_equal_weights_the_first_are_kept() -> None:
    """Here and in every rule that ranks keys (`keep_largest`), as a stable sort decides."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 6, (4, 3, 50), generator=generator).float()  # many are equal
    x[0, :, 20:] = -torch.inf
    order = x.sort(dim=-1, descending=True, stable=True)
    for k in (0, 1, 7, 25, 49, 50, 60):
        expected = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order.indices[..., :k], True)
        assert torch.equal(keep_largest(x, k, earlier=True), expected & (x > -torch.inf)), k
    weights = x.clamp_min(0.0) / x.clamp_min(0.0).sum(dim=-1, keepdim=True)
    sums = order.values.clamp_min(0.0).cumsum(dim=-1).double() / x.clamp_min(0.0).sum(dim=-1, keepdim=True)
    block = Block(weights, weights, torch.full((4, 1), 50), None, 0, 0, are_weights=True)
    for p in (0.11, 0.53, 0.87):
        count = (sums < p).sum(dim=-1) + 1
        for i, j in torch.cartesian_prod(torch.arange(4), torch.arange(3)).tolist():
            first = order.indices[i, j, : count[i, j]]
            expected = torch.zeros(50, dtype=torch.bool).index_fill_(0, first, True)
            kept = TopP(p=p).keep(block, RowTables())[i, j]
            assert torch.equal(kept, expected), (p, i, j)

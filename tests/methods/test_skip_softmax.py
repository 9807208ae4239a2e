"""Skip softmax against its rule in slow loops, by hand, and its calibration."""

import math

import pytest
import torch
from torch import Tensor

from bench.skip_softmax import calibrate, skipped
from tests.helpers.calls import call
from tests.helpers.methods import LAYOUTS, PROMPT, SCALE, check, inputs, softmax_over, weights
from tests.helpers.models import tokens
from topk_llama import set_params, update_model
from toptheta.attention.reference import sparse_attention
from toptheta.attention.rows import rows_of
from toptheta.methods.base import parse_method
from toptheta.methods.params import LayerSpec
from toptheta.methods.skip_softmax import SkipSoftmax, fit
from toptheta.util.errors import UsageError

TILE = 4


def kept_tiles(rows: list[list[float]], tile: int, log_lambda: float) -> list[int]:
    """Tiles of keys that a tile of rows computes. rows: the scores of each, over the keys that it sees."""
    kept, running = [], [-math.inf] * len(rows)
    for number in range(-(-max(len(row) for row in rows) // tile)):
        needed = False
        for i, row in enumerate(rows):
            own = row[number * tile : (number + 1) * tile]
            if own:
                running[i] = max(running[i], *own)
                needed |= max(own) - running[i] > log_lambda
        if needed:
            kept.append(number)
    return kept


def test_tiles_by_hand() -> None:
    low, e = -3.0, math.log(0.1)  # ten times less
    assert kept_tiles([[0.0, 1.0, low, low, 0.0, 0.0]], 2, e) == [0, 2]
    assert kept_tiles([[low, low, 1.0, 0.0]], 2, e) == [
        0,
        1,
    ]  # left to right: the first was the largest so far
    assert kept_tiles([[1.0, 0.0, low, low], [low, low, 0.0, 0.0]], 2, e) == [0, 1]  # one row needs it
    assert kept_tiles([[1.0, 0.0, low, low], [1.0, 0.0, low]], 2, e) == [0]


def kept_by(
    method: SkipSoftmax, scores: list[float], decode: bool, placement: str = "pre-softmax"
) -> list[int]:
    key = torch.tensor(scores)[None, None, :, None]
    rows, spec = rows_of(None, 1, len(scores), key.device), LayerSpec(method, placement)
    one = call(torch.ones(1, 1, 1, 1), key, key, rows, spec, 1.0, count=True, decode=decode)
    return sparse_attention(one)[1].vrow[0, 0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("placement", ["pre-softmax", "post-softmax"])
def test_steps_by_hand(placement: str) -> None:
    """Tiles of two; a lambda of 1/8 in steps, 1/2 in prompts: a tile goes at ln 8 = 2.08, or 0.69."""
    method = SkipSoftmax(prefill=0.5, decode=0.125, tile=2)
    row = [1.0, 3.0, 2.0, 0.0, 0.5, -9.0, 4.0, 0.0, 2.9]
    assert kept_by(method, row, True, placement) == [0, 1, 2, 3, 6, 7, 8]
    assert kept_by(method, row, False, placement) == [0, 1, 6, 7]
    # Calibrated: a * exp(b * share) / L = 1.125 * exp(0) / 9 is the same 1/8 in steps.
    one = SkipSoftmax(share=0.5, prefill_a=4.5, decode_a=1.125 * math.exp(-1.0), decode_b=2.0, tile=2)
    assert kept_by(one, row, True, placement) == [0, 1, 2, 3, 6, 7, 8]
    assert kept_by(one, row, False, placement) == [0, 1, 6, 7]
    too_much = SkipSoftmax(share=0.5, prefill_a=100.0, decode_a=100.0, tile=2)  # a lambda of 11 is cut to 1
    assert kept_by(too_much, row, True, placement) == [0, 1, 6, 7]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=str)
def test_against_loops(layout: str, heads: tuple[int, int]) -> None:
    chunks = LAYOUTS[layout].get("chunks", [PROMPT])
    starts = [sum(chunks[:i]) for i in range(len(chunks))]

    def tile_of_rows(place: int) -> tuple[int, int]:
        """Rows are cut into tiles from the first of each call; a step is one by itself."""
        if place >= PROMPT:
            return place, 0
        start = max(s for s in starts if s <= place)
        return start, (place - start) // TILE

    for method in (
        SkipSoftmax(0.5, 0.3, tile=TILE),
        SkipSoftmax(share=0.4, prefill_a=3.0, prefill_b=2.0, decode_a=2.0, decode_b=3.0, tile=TILE),
    ):

        def loop(q: Tensor, key: Tensor, prompt: int, places: list[int], method=method) -> Tensor:
            length = q.shape[1]
            out = torch.zeros(q.shape[0], length, length, dtype=torch.float64)
            for tile in dict.fromkeys(tile_of_rows(place) for place in places):
                own = [i for i in range(length) if tile_of_rows(places[i]) == tile]
                in_call = [i for i in range(length) if tile_of_rows(places[i])[0] == tile[0]]
                if own[0] >= prompt:
                    a, b, given = method.decode_a, method.decode_b, method.decode
                else:
                    a, b, given = method.prefill_a, method.prefill_b, method.prefill
                log = math.log(a * math.exp(b * method.share) / (in_call[-1] + 1) if method.share else given)
                for h in range(q.shape[0]):
                    scores = [key[h // (heads[0] // heads[1]), : i + 1] @ q[h, i] * SCALE for i in own]
                    kept = kept_tiles([row.tolist() for row in scores], TILE, min(log, -1e-6))
                    for i, row in zip(own, scores):
                        out[h, i, : i + 1] = softmax_over(row, [j for j in range(i + 1) if j // TILE in kept])
            return out

        check(method, 0, loop, layout, heads)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = inputs()
    spec = LayerSpec(SkipSoftmax(0.5, 0.3, tile=TILE), "pre-softmax")
    for padded in (None, slice(0, 9), slice(21, 29)):
        whole = weights(spec, q, k, padded=padded)
        with monkeypatch.context() as patch:
            patch.setattr("toptheta.attention.reference.BLOCK_ELEMENTS", {"cpu": 1000})
            torch.testing.assert_close(weights(spec, q, k, padded=padded), whole)


def test_fit() -> None:
    """Exact where the points lie on the curve; points at the ends are left out."""
    shares, lengths = [0.1, 0.4, 0.7, 0.5], [100, 300, 900, 200]
    lambdas = [2.0 * math.exp(5.0 * share) / length for share, length in zip(shares, lengths)]
    assert fit([*lambdas, 0.9], [*lengths, 50], [*shares, 0.99]) == pytest.approx((2.0, 5.0))
    with pytest.raises(UsageError, match="of 2 measured shares of skipped scores, 1 are between"):
        fit([0.1, 0.2], [100, 100], [0.01, 0.3])


def test_calibration_to_a_share(tiny_model) -> None:
    """What is fitted skips about the share that was asked for, of other prompts of other lengths."""
    update_model(tiny_model)
    lambdas = tuple(0.9 * 0.5**i for i in range(8))
    prompts = [tokens(length=length, seed=i) for i, length in enumerate((60, 90, 120, 160))]
    for share in (0.2, 0.4):
        method = calibrate(tiny_model, prompts, share, 6, lambdas, tile=TILE)
        set_params(tiny_model, method=parse_method(method.spec))
        found = [skipped(tiny_model, tokens(length=length, seed=9), 6) for length in (70, 100, 140)]
        for phase in (0, 1):
            assert sum(x[phase] for x in found) / 3 == pytest.approx(share, abs=0.08), (share, phase)


def test_in_a_model(tiny_model) -> None:
    ids = tokens(length=40)
    dense = tiny_model(ids).logits
    update_model(tiny_model)
    set_params(tiny_model, method="skip_softmax:prefill=0.5,tile=4")
    whole = tiny_model(ids).logits
    assert (whole - dense).abs().max() > 0.01
    set_params(tiny_model, method="skip_softmax:prefill=1e-30,tile=4")
    torch.testing.assert_close(tiny_model(ids).logits, dense, rtol=1e-3, atol=1e-3)


def test_its_names() -> None:
    method = parse_method("skip_softmax:prefill=0.01")
    assert method == SkipSoftmax(0.01) and method.label(64) == "skip softmax prefill=0.01"
    for text, says in (
        ("decode=1", "decode is 1.0: give a lambda between 0 and 1"),
        ("share=0.5", "needs prefill_a, prefill_b, decode_a and decode_b"),
        ("share=1,prefill_a=1,decode_a=1", "give a share of scores"),
        ("tile=0", "tile is 0"),
    ):
        with pytest.raises(UsageError, match=says):
            parse_method(f"skip_softmax:{text}")

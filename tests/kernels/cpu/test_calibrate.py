"""The CPU kernel's calibration samples and missing denominators against plain PyTorch."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.calls import call, layer_spec
from tests.helpers.kernel_cases import SCALE, K, case, inputs, needs_kernel
from toptheta.attention.reference import sparse_attention
from toptheta.calibration.sampler import LayerCalibration
from toptheta.kernels.cpu import samples
from toptheta.methods.base import Block, of_mode


@needs_kernel
@pytest.mark.parametrize("placement", ["pre-softmax", "post-softmax"])
@pytest.mark.parametrize("kind", ["prefill", "decode", "left padding", "few rows", "any mask"])
def test_samples_are_the_next_largest(kind, placement):
    torch.manual_seed(7)
    rows, batch, q_len, kv_len = case(kind)
    q, k, v = inputs(batch, (8, 2, 80), q_len, kv_len)
    ks = (5, K, 40)
    chosen = torch.rand(batch, q_len) < 0.7
    for output in (layer_spec(), layer_spec(1, placement, K, vmc=placement == "post-softmax"), None):
        seen = _Seen()
        plain = layer_spec(3, placement) if output is None or not output.sparse else output
        asked = call(q, k, v, rows, plain, SCALE)
        got = samples.sample(asked, ks, placement, output is not None, chosen=chosen)
        expected, _ = sparse_attention(call(q, k, v, rows, plain, SCALE), seen)
        x = torch.nn.functional.pad(torch.cat(seen.blocks, dim=2), (0, max(ks)), value=-math.inf)
        largest = x.topk(max(ks) + 1, dim=-1).values
        for which, k_ in enumerate(ks):
            sampled = ((rows.n > k_) & chosen)[:, None].expand(batch, 8, q_len)
            assert torch.allclose(got.values[which][sampled], largest[..., k_][sampled], rtol=1e-5, atol=1e-9)
            assert (got.values[which][~sampled] == 0).all()
        assert (got.out is None) == (output is None)
        if got.out is not None:
            torch.testing.assert_close(got.out, expected, rtol=1e-5, atol=2e-6)


class _Seen:
    """A Calibrator that keeps every block."""

    def __init__(self):
        self.blocks: list[Tensor] = []

    def observe(self, block: Block) -> None:
        width = block.x.shape[-1]
        if self.blocks and width > self.blocks[0].shape[-1]:
            grow = width - self.blocks[0].shape[-1]
            self.blocks = [torch.nn.functional.pad(b, (0, grow), value=-math.inf) for b in self.blocks]
        self.blocks.append(block.x.clone())


@needs_kernel
@pytest.mark.parametrize("mode", [0, 1])
def test_missing_denominators(mode):
    """R of what would be dropped equals LayerCalibration's, for several K."""
    torch.manual_seed(8)
    rows, batch, q_len, kv_len = case("left padding")
    q, k, v = inputs(batch, (8, 2, 80), q_len, kv_len)
    ks = (K, 5)
    plain = LayerCalibration(ks, 8, of_mode(mode), with_sdc=True)
    plain.start_call(rows.n, rows.real, batch, kv_len)
    sparse_attention(call(q, k, v, rows, layer_spec(3, "pre-softmax"), SCALE), plain)
    thresholds = [plain.thresholds[k_].threshold(0.0).float() for k_ in ks] if mode == 0 else None
    dense = call(q, k, v, rows, layer_spec(), SCALE)
    got = samples.sample(dense, ks, "pre-softmax", False, True, thresholds, chosen=rows.real)
    for which, k_ in enumerate(ks):
        mine = LayerCalibration((k_,), 8, of_mode(mode), with_sdc=True).missing[k_]
        mine.reserve(kv_len)
        sampled = rows.real & (rows.n > k_)
        mine.add(got.missing[which], rows.n, sampled)
        assert torch.equal(mine.count, plain.missing[k_].count)
        assert torch.allclose(mine.mean(), plain.missing[k_].mean(), rtol=1e-5, equal_nan=True)


def test_sdc_of_a_method_that_keeps_other_keys(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean sum that StreamingLLM's dropped keys have is not that of Top-k's."""
    from tests.helpers.models import tokens
    from topk_llama import set_params, update_model
    from toptheta.kernels import registry
    from toptheta.models.control import tables_of

    found, model = [], update_model(tiny_model)
    for forced in (None, "reference"):
        monkeypatch.setattr(registry, "FORCED", forced)
        set_params(
            model, method="streaming_llm:sinks=2", K=8, sdc="offline-calibrated", calibrate=True,
            calib_sample_frac=1.0,
        )  # fmt: skip
        model(tokens(length=40))
        set_params(model, calibrate=False)
        found.append(tables_of(model).sdc[0].values)
        set_params(model, mode=3, sdc="none")
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)

"""The backward pass is that of plain loops, in which what is kept is given; what cannot be trained is refused
at the first forward pass."""

import itertools

import pytest
import torch
from torch import Tensor

from tests.helpers.calls import layer_spec
from tests.helpers.families import NAMES, make
from tests.helpers.models import SPARSE, steer, tokens
from tests.helpers.reference import attention
from topk_llama import set_params, update_model
from toptheta.attention.call import AttentionCall
from toptheta.attention.rows import rows_of
from toptheta.kernels import registry
from toptheta.methods.params import LayerSpec
from toptheta.models.calibrate import calibrations
from toptheta.models.interface import toptheta_mask
from toptheta.util.errors import UsageError

K, SCALE, HEADS, GROUP = 4, 0.3, 4, 2
SPECS = [
    layer_spec(mode, placement, K, sdc, 0.8, vmc)
    for mode, (placement, sdc), vmc in itertools.product(
        (0, 1),
        [
            ("pre-softmax", "none"),
            ("pre-softmax", "exact"),
            ("pre-softmax", "exp-threshold"),
            ("pre-softmax", "offline-calibrated"),
            ("post-softmax", "none"),
        ],
        (False, True),
    )
    if not (mode == 1 and sdc == "exp-threshold")
    and not (vmc and (placement, sdc) == ("pre-softmax", "none"))
]


@pytest.fixture(autouse=True)
def gradients():
    with torch.enable_grad():
        yield


def by_loops(one: AttentionCall, visible: Tensor, kept: Tensor) -> Tensor:
    """The output of DESIGN sections 2-3 for what is kept, `[B, H, Q, D]`, row by row in torch's operations.
    visible: `[B, Q, N]`; kept: `[B, H, Q, N]`."""
    spec, rows = one.spec, {}
    batch, num_heads, q_len, _ = one.q.shape
    for b, h, i in itertools.product(range(batch), range(num_heads), range(q_len)):
        seen = visible[b, i].nonzero()[:, 0]
        if len(seen) == 0:
            rows[b, h, i] = one.v.new_zeros(one.v.shape[3])
            continue
        v, n, keep = one.v[b, h // GROUP, seen], len(seen), kept[b, h, i, seen]
        s = one.k[b, h // GROUP, seen] @ one.q[b, h, i] * SCALE
        if one.softcap is not None:
            s = (s / one.softcap).tanh() * one.softcap
        e = (s - s.max()).exp()
        sink = 0.0 if one.sinks is None else (one.sinks[h] - s.max()).exp()
        if n <= K or spec.placement == "post-softmax":
            whole, share = e.sum(), keep.double()
        else:
            missing = {
                "none": 0.0,
                "exact": e[~keep].sum(),
                "exp-threshold": (n - keep.sum()) * (one.theta[h, n] - s.max()).exp(),
                "offline-calibrated": one.sdc_table[h, n],
            }[spec.sdc]
            whole, share = e[keep].sum() + spec.sdc_scale * missing, keep.double()
        weights = e * share / (whole + sink)
        out = weights @ v
        if spec.vmc and n > K:
            out = out + (whole / (whole + sink) - weights.sum()) * v.mean(dim=0)
        rows[b, h, i] = out
    flat = torch.stack(list(rows.values()))
    return flat.view(batch, num_heads, q_len, -1)


@pytest.mark.parametrize("special", ["plain", "sinks and cap"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_of_a_call(spec: LayerSpec, special: str) -> None:
    torch.manual_seed(3)
    length = 11
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[1, :3] = False
    mask = toptheta_mask(2, length, length, attention_mask=padding)
    rows = rows_of(mask, length, length, mask.device)
    q, k, v = torch.randn(2, HEADS, length, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
    theta, table = 0.1 + 0.2 * torch.rand(HEADS, length + 1), torch.rand(HEADS, length + 1)
    theta[:, : K + 1], table[:, : K + 1] = float("-inf"), 0.0
    softcap, sinks = (None, None) if special == "plain" else (2.0, torch.randn(HEADS))
    leaves = [x.requires_grad_() for x in (q, k, v, *([] if sinks is None else [sinks]))]
    given = {"theta": theta, "sdc_table": table, "softcap": softcap}
    one = AttentionCall(q, k, v, rows, spec, SCALE, sinks=sinks, **given)
    out, _ = registry.attend(one)

    doubles = [x.detach().double().requires_grad_() for x in leaves]
    q2, k2, v2, sinks2 = (*doubles, None)[:4]
    with torch.no_grad():
        _, kept = attention(
            q2, k2, v2, mask[:, 0], spec, SCALE, theta, table, softcap=softcap, sinks=sinks2
        )  # fmt: skip
    two = AttentionCall(q2, k2, v2, rows, spec, SCALE, sinks=sinks2, **given)
    expected = by_loops(two, mask[:, 0], kept)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    wanted = torch.randn(out.shape)
    got = torch.autograd.grad(out, leaves, wanted)
    loops = torch.autograd.grad(expected, doubles, wanted.double())
    for a, b in zip(got, loops):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_trains(name: str) -> None:
    """Every weight gets a gradient, the dense one where K is at least the length."""
    stock, ours = make(name), update_model(make(name))
    ids = tokens(2, length=14)
    set_params(ours, mode=1, K=200, sdc="exact", vmc=True)
    for model in (stock, ours):
        model.train()
        model(ids, labels=ids).loss.backward()
    own = dict(ours.named_parameters())
    for key, weight in stock.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(own[key].grad, weight.grad, rtol=1e-3, atol=1e-4)
    set_params(ours, K=4)
    ours.zero_grad()
    ours(ids, labels=ids).loss.backward()
    trained = [key for key, weight in stock.named_parameters() if weight.grad is not None]
    assert all(own[key].grad is not None and own[key].grad.isfinite().all() for key in trained)
    differs = [not torch.allclose(own[key].grad, dict(stock.named_parameters())[key].grad) for key in trained]
    assert any(differs)


def test_dropout_is_refused() -> None:
    model = make("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    update_model(model)
    set_params(model, mode=1, K=4)
    model.train()
    with pytest.raises(UsageError, match="attention_dropout is 0.1 while training"):
        model(tokens())
    model.eval()
    model(tokens())


@pytest.mark.parametrize("params", [{}, {"placement": "post-softmax", "calib_to": "budget"}], ids=str)
def test_calibration_needs_no_graph(params: dict) -> None:
    """Calibration with gradients enabled, as in a plain loop over prompts: the samples hold no graph."""
    model = update_model(make("gpt_oss"))
    theta = []
    for enabled in (True, False):
        set_params(model, mode=0, K=4, **params, calibrate=True, calib_sample_frac=1.0)
        with torch.set_grad_enabled(enabled):
            model(tokens(length=20))
        states = [calibration.state() for calibration in calibrations(model).values()]
        assert not any(x.requires_grad for state in states for x in state.values())
        set_params(model, calibrate=False)
        theta.append(model.model.layers[0].self_attn.toptheta.theta)
    torch.testing.assert_close(*theta)


def test_steps_hold_no_graph() -> None:
    """Decoding with gradients enabled: the sum of V that is carried from step to step is a plain number."""
    model = make("llama")
    with torch.no_grad():
        steer(model, SPARSE["Top-theta"])
    cache = model(tokens(length=12), use_cache=True).past_key_values
    for _ in range(2):
        model(tokens(length=1), past_key_values=cache)
    sums = [
        layer.self_attn.toptheta._sums[cache.layers[i]]._sum for i, layer in enumerate(model.model.layers)
    ]
    assert not any(x is not None and x.requires_grad for x in sums)


def test_gradient_checkpointing() -> None:
    """Layers that are computed again in the backward pass keep the same: the gradients are the same."""
    model, ids = update_model(make("gemma2")), tokens(2, length=14)
    set_params(model, mode=1, K=4, sdc="exact", vmc=True)
    model.train()
    gradients = []
    for enable in (lambda: None, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    assert model.is_gradient_checkpointing
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two)

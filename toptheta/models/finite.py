"""Detection of non-finite numbers in a model, and of where they first occur.

Detection costs a pass over the last layer's output, the logits and, in sparse layers, queries and new keys;
and one device synchronisation per batch. Where they first occur is found by computing the batch again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from toptheta.models.control import record_statistics
from toptheta.models.families import eager_of
from toptheta.models.interface import IMPLEMENTATION, toptheta_attention_forward
from toptheta.models.patch import model_state, patched_layers
from toptheta.util.errors import UsageError

T = TypeVar("T")
R = TypeVar("R")


def checked(model: Any, run: Callable[[list[T]], R], batch: list[T], name: Callable[[T], str]) -> R:
    """The result of `run(batch)`, which runs a batch of requests through the patched model. Raises UsageError
    if attention scores, the last layer's output or logits are not finite, with the request's name, and the
    layer and head where this first occurs."""
    shared = model_state(model)
    finite: dict[torch.device, Tensor] = {}

    def note_output(module: nn.Module, args: Any, output: Any) -> None:
        by_device: dict[torch.device, list[Tensor]] = {}
        calls, shared.extremes = shared.extremes or [], []
        for _, *ends in calls:
            by_device.setdefault(ends[0].device, []).extend(ends)
        scale = max([abs(one[0]) for one in calls], default=1.0)
        found = [_scores_finite(ends, scale) for ends in by_device.values()]
        for one in [*found, torch.stack(_tensor(output).detach().aminmax()).isfinite().all()]:
            finite[one.device] = finite[one.device] & one if one.device in finite else one

    # A sparse method may drop a score that is NaN without a trace; dense attention shows it.
    shared.extremes = []
    try:
        with _hooked([model.model, model.lm_head], note_output):
            found = run(batch)
    finally:
        shared.extremes = None
    if all(map(bool, finite.values())):
        return found
    record_statistics(model, None)  # what comes now is no request
    help_ = "if the model overflows, use --dtype float32."
    for one in batch:
        if where := _begins(model, lambda: run([one])):  # noqa: B023
            raise UsageError(f"{name(one)}: {where} are not finite numbers; {help_}")
    names = ", ".join(map(name, batch))
    raise UsageError(f"{names}: some numbers are not finite, but only in this batch; {help_}")


def _scores_finite(ends: list[Tensor], scale: float) -> Tensor:
    """Whether the scores of calls are certainly finite, bool `[]`. ends: for each call the minimum and
    maximum of its queries, and of its keys."""
    largest = torch.stack(ends).float().view(-1, 2, 2).abs().amax(dim=-1)
    return (largest.prod(dim=-1) * scale).isfinite().all()


def _begins(model: Any, run: Callable[[], Any]) -> str | None:
    """The first quantity within `run` that is not finite, in words."""
    found: list[str] = []

    def note(x: Tensor, what: str, each: str = "") -> None:
        """each: the name of the second dimension of x, to report an index of it."""
        bad = ~x.isfinite()
        if found or not bad.any():
            return
        if each:
            at = int(bad.transpose(0, 1).flatten(1).any(dim=1).nonzero()[0])
            what = f"{what}, {each} {at}"
        found.append(what)

    def traced(attention: Callable[..., Any]) -> Callable[..., Any]:
        def run_traced(
            module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            layer = f"of layer {module.layer_idx}"
            note(query, f"the queries {layer}", "head")
            note(key, f"the keys {layer}", "KV head")
            note(value, f"the values {layer}", "KV head")
            if not found:
                note(_largest_scores(module, query, key), f"the attention scores {layer}", "head")
            out = attention(module, query, key, value, *args, **kwargs)
            note(out[0].transpose(1, 2), f"the attention's outputs {layer}", "head")
            return out

        return run_traced

    index = {layer: layer.layer_idx for layer in patched_layers(model)}
    blocks = {m: index[one] for m in model.modules() for one in m.children() if one in index}

    def note_block(block: nn.Module, args: Any, output: Any) -> None:
        note(_tensor(output), f"the outputs of layer {blocks[block]}, after its attention,")

    with (
        _attention(traced),
        _hooked(list(blocks), note_block),
        _hooked([model.model], lambda m, a, out: note(_tensor(out), "the last layer's outputs")),
        _hooked([model.lm_head], lambda m, a, out: note(out, "the logits")),
    ):
        run()
    return found[0] if found else None


def _largest_scores(module: Any, query: Tensor, key: Tensor) -> Tensor:
    """`[B, H, Q]` float32, the largest |score| of each row, including masked keys."""
    group = query.shape[1] // key.shape[1]
    rows = []
    for head in range(query.shape[1]):
        scores = query[:, head].float() @ key[:, head // group].float().transpose(-1, -2) * module.scaling
        rows.append(scores.abs().amax(dim=-1))
    return torch.stack(rows, dim=1)


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _attention(around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within the context every attention function that a patched model may call is wrapped by `around`."""

    def eager(module: Any, *args: Any, **kwargs: Any) -> Any:
        return eager_of(module)(module, *args, **kwargs)

    functions = {IMPLEMENTATION: toptheta_attention_forward, "sdpa": sdpa_attention_forward, "eager": eager}
    with patch.dict(AttentionInterface._global_mapping, {n: around(one) for n, one in functions.items()}):
        yield


@contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        yield

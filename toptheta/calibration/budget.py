"""One threshold on weights for a whole budget: `--calib_to budget`, our extension of the paper.

In each row the threshold theta keeps the keys whose attention weight is above it; heads and rows that spread
their attention keep more keys than others. It is chosen such that the mean over sampled rows and heads is K.
One pass over the prompts collects histograms of log-weights, from which the threshold for every K is solved.
As the weights of a row of any length sum to 1, the threshold does not depend on the row length.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from toptheta.attention.call import AttentionCall
from toptheta.attention.reference import block_rows
from toptheta.calibration.sampler import RowSampler
from toptheta.calibration.tables import LayerTable, no_long_row
from toptheta.methods.base import NEG_INF, ValueNorms

# Equally wide bins of ln(weight); the first also counts lower weights. Weights times value norms may be above
# 1. Bins are narrow enough to know the kept count of a threshold within a few parts in a thousand.
LOWEST, HIGHEST, BINS = -24.0, 4.0, 4096
WIDTH = (HIGHEST - LOWEST) / BINS
PROBES = (0.5, 1.0, 2.0)  # multiples of K at which a layer's damage is measured
LEAST = 1.0  # minimum kept by a layer: a row is never empty
PROMPTS, PROMPT_TOKENS = 2, 512  # on which damage is measured


class BudgetCalibration(RowSampler):
    """Histograms of the log-weights of one layer's sampled rows: for each K, of the rows longer than K.

    counts: by K, `[H, BINS]` int64; rows: by K, the number of these rows. gram: that of ValueNorms, for
    value-aware thresholds: then the weight times the value's relative norm is counted, with the mean and
    scale from the first prompt with a sampled row. prompts: the first tokens of some prompts, for
    measurements after the pass; only one layer of a model has them.
    """

    apart = True

    def __init__(
        self,
        ks: Sequence[int],
        num_heads: int,
        sample_frac: float = 1.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        gram: Tensor | None = None,
    ):
        super().__init__(ks, sample_frac, seed, device)
        self.gram, self.values = gram, None if gram is None else _no_values(gram)
        self.weighed = False  # whether mean and scale are set
        self.counts = {k: torch.zeros(num_heads, BINS, dtype=torch.int64, device=device) for k in self.ks}
        self.rows = {k: torch.zeros((), dtype=torch.int64, device=device) for k in self.ks}
        self.prompts: list[Tensor] = []

    @property
    def in_order(self) -> bool:
        return self.gram is not None  # the first prompt determines the scale

    @torch.no_grad()
    def sample(self, call: AttentionCall) -> None:
        assert self.chosen is not None
        batch, num_heads, _, head_dim = call.q.shape
        num_kv_heads, kv_len = call.k.shape[1], call.k.shape[2]
        some = self.chosen.any(dim=0).nonzero()[:, 0]
        if some.numel() == 0:
            return
        factor = None if self.gram is None else self._factors(call)
        keys = call.k.float().transpose(2, 3)
        step = block_rows(batch * num_heads * kv_len, some.numel(), call.q.device.type)
        for at in some.split(step):
            q = (call.q[:, :, at].float() * call.scale).reshape(batch, num_kv_heads, -1, head_dim)
            scores = call.capped((q @ keys).view(batch, num_heads, at.numel(), kv_len))
            n = call.rows.n.expand(batch, -1)[:, at]
            if call.rows.mask is not None:
                visible = call.rows.mask[:, :, at]
            else:
                visible = torch.arange(kv_len, device=n.device) < n[:, None, :, None]
            scores.masked_fill_(~visible, NEG_INF)
            log_sum = scores.logsumexp(dim=-1, keepdim=True)
            if call.sinks is not None:
                log_sum = log_sum.logaddexp(call.sinks.float()[:, None, None])
            log_weights = scores.sub_(log_sum)
            if factor is not None:
                log_weights += factor[:, :, None]
            self.add(log_weights, n, self.chosen[:, at])

    def _factors(self, call: AttentionCall) -> Tensor:
        """`[B, H, N]`, the logarithm of the relative norm of each key's value."""
        assert self.gram is not None and self.values is not None
        if not self.weighed:  # the first prompt; its padding is excluded from the mean
            self.weighed = True
            real = self._seen(call)
            rows = call.v.float().transpose(1, 2)  # [B, N, H_kv, D]
            rows = rows.flatten(0, 1) if real is None else rows[real]
            mean = rows.mean(dim=0)
            one = ValueNorms(self.gram, mean, torch.ones_like(self.values.scale))
            self.values = ValueNorms(self.gram, mean, one.of(rows.transpose(0, 1)[None]).mean(dim=(0, 2)))
        return self.values.of(call.v).clamp_min(1e-12).log()

    @staticmethod
    def _seen(call: AttentionCall) -> Tensor | None:
        """`[B, N]` bool, keys that are neither padding nor the unused end of a static cache; None: all."""
        rows, (batch, kv_len), q_len = call.rows, (call.k.shape[0], call.k.shape[2]), call.q.shape[2]
        if rows.mask is not None and rows.key_real is None and rows.first is None:
            return rows.mask.any(dim=2)[:, 0].expand(batch, -1)
        at = torch.arange(kv_len, device=call.k.device)
        first = rows.first if rows.first is not None else rows.first_on_device
        there = None if first is None or q_len == kv_len else (at < first + q_len).expand(batch, -1)
        if there is None or rows.key_real is None:
            return rows.key_real if there is None else there
        return there & rows.key_real

    def add(self, log_weights: Tensor, n: Tensor, sampled: Tensor) -> None:
        """Add rows: log_weights `[B, H, R, E]`, -inf where not visible; n, sampled: `[B, R]`."""
        num_heads, end = log_weights.shape[1], log_weights.shape[3]
        heads = torch.arange(num_heads, device=log_weights.device)[:, None] * BINS
        counted = sorted(self.counts)
        for shortest, longest in zip(counted, [*counted[1:], end]):
            batch, rows = (sampled & (n > shortest) & (n <= longest)).nonzero(as_tuple=True)
            if batch.numel() == 0:
                continue
            chosen = log_weights[batch, :, rows]  # [rows, H, E]
            bins = chosen.sub_(LOWEST).div_(WIDTH).clamp_(0, BINS - 1).int().add_(heads)
            counts = torch.bincount(bins.flatten(), minlength=num_heads * BINS).view(num_heads, BINS)
            counts[:, 0] -= (end - n[batch, rows]).sum()  # the keys that are not visible
            for k in counted[: counted.index(shortest) + 1]:  # these rows are longer than each of them
                self.counts[k] += counts
                self.rows[k] += batch.numel()

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        for k in self.ks:
            state |= {f"counts.{k}": self.counts[k], f"rows.{k}": self.rows[k]}
        if self.values is not None:
            state |= {"value.mean": self.values.mean, "value.scale": self.values.scale}
        return state | {f"prompt.{i}": ids for i, ids in enumerate(self.prompts)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        for k in self.ks:
            self.counts[k] = state[f"counts.{k}"].to(self.device)
            self.rows[k] = state[f"rows.{k}"].to(self.device)
        if self.gram is not None:
            mean, scale = state["value.mean"].to(self.device), state["value.scale"].to(self.device)
            self.values, self.weighed = ValueNorms(self.gram, mean, scale), bool(scale.any())
        names = sorted((name for name in state if name.startswith("prompt.")), key=lambda x: int(x[7:]))
        self.prompts = [state[name] for name in names]

    def add_state(self, state: dict[str, Tensor]) -> None:
        super().add_state(state)
        for k in self.ks:
            self.counts[k] += state[f"counts.{k}"].to(self.device)
            self.rows[k] += state[f"rows.{k}"].to(self.device)


def _no_values(gram: Tensor) -> ValueNorms:
    """Before the first prompt: the scale is 0."""
    return ValueNorms(
        gram, torch.zeros(0, device=gram.device), torch.zeros(gram.shape[0], device=gram.device)
    )


def kept_above(counts: np.ndarray, rows: int, log_theta: float) -> float:
    """The mean number of weights above a threshold, over the rows and heads of a histogram `[..., BINS]`."""
    heads = counts.reshape(-1, BINS)
    above = np.append(heads.sum(axis=0)[::-1].cumsum()[::-1], 0) / (rows * len(heads))
    return float(np.interp((log_theta - LOWEST) / WIDTH, np.arange(BINS + 1), above))


def solve_threshold(counts: np.ndarray, rows: int, k: float) -> float:
    """ln(theta) such that `k` weights are kept on average over the rows and heads of a histogram
    `[..., BINS]`. Raises ValueError if there are no rows, or they have fewer than k keys."""
    heads = counts.reshape(-1, BINS)
    if rows == 0:
        raise ValueError("no row was sampled")
    above = np.append(heads.sum(axis=0)[::-1].cumsum()[::-1], 0) / (rows * len(heads))
    if above[0] < k:
        raise ValueError(f"the sampled rows have {above[0]:.0f} keys on average")
    # `above` falls with the bin; interpolated between the edges of the bin that holds k.
    at = np.interp(-k, -above, np.arange(BINS + 1))
    return float(LOWEST + at * WIDTH)


def budget_tables(
    budgets: Mapping[int, BudgetCalibration],
    ks: Sequence[int],
    measure: Callable[[list[float], int], np.ndarray] | None = None,
) -> dict[int, LayerTable]:
    """Thresholds by layer, the same for every head and row length. budgets: by layer; ks: K of every layer.

    Layers with the same K share its budget: with one threshold or, with `measure`, with one for each layer
    (`share_out`). measure: returns, for log-thresholds and K, the damage `[layers, thresholds]` of making
    only that layer sparse, for all layers of the model. Raises UsageError if no row was longer than K.
    """
    tables = {}
    for k in sorted({ks[i] for i in budgets}):
        layers = [i for i in budgets if ks[i] == k]
        counts, rows = histogram(budgets, layers, k)
        log_thetas = [solve_threshold(counts, rows, k)] * len(layers)
        if measure is not None and len(layers) > 1:
            probes = [
                solve_threshold(counts, rows, min(k * factor, _most(counts, rows))) for factor in PROBES
            ]
            damage = measure(probes, k)[layers]
            kept = np.array([[kept_above(own, rows, at) for at in probes] for own in counts])
            shares = share_out(damage, kept, k, np.array([_most(own, rows) for own in counts]))
            log_thetas = [solve_threshold(own, rows, share) for own, share in zip(counts, shares)]
        for i, log_theta in zip(layers, log_thetas):
            tables[i] = constant_table(float(np.exp(log_theta)), k, counts.shape[1], rows)
    return tables


def share_out(damage: np.ndarray, kept: np.ndarray, k: float, most: np.ndarray) -> np.ndarray:
    """The number of elements that each layer should keep, `[layers]`, with mean `k`, such that one more
    element reduces the damage equally in all layers.

    damage: `[layers, probes]`, KL of the output (nats) when only this layer is sparse and keeps `kept`
    elements, `[layers, probes]`; most: `[layers]`, the elements that there are. Damage is modelled as a power
    of the kept elements c, A c^-b, fitted to the probes: then A b c^(-b - 1) is the same for all layers.
    """
    x, y = np.log(kept.clip(1e-3)), np.log(damage.clip(1e-9))
    x_mean, y_mean = x.mean(axis=1, keepdims=True), y.mean(axis=1, keepdims=True)
    spread = ((x - x_mean) ** 2).sum(axis=1).clip(1e-9)
    power = (-((x - x_mean) * (y - y_mean)).sum(axis=1) / spread).clip(0.1, 10.0)
    log_scale = y_mean[:, 0] + power * x_mean[:, 0]
    low, high = -60.0, 60.0  # of the logarithm of the gain from one more element

    def keeping(log_gain: float) -> np.ndarray:
        return np.exp(((log_scale + np.log(power) - log_gain) / (power + 1)).clip(-5, 20)).clip(LEAST, most)

    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if keeping(middle).mean() > k else (low, middle)
    return keeping(low)


def _most(counts: np.ndarray, rows: int) -> float:
    """The most that the sampled rows can keep: nearly all their keys."""
    return 0.99 * counts.sum() / (rows * counts.reshape(-1, BINS).shape[0])


def histogram(
    budgets: Mapping[int, BudgetCalibration], layers: Sequence[int], k: int
) -> tuple[np.ndarray, int]:
    """`[layers, H, BINS]`, the counts of these layers, and the number of sampled rows of the first, to which
    those of the others are scaled: layers with a sliding window are sampled by themselves."""
    rows = {i: int(budgets[i].rows[k]) for i in layers}
    for i in layers:
        if rows[i] == 0:
            raise no_long_row(k, i, budgets[i].longest)
    first = rows[layers[0]]
    counts = [budgets[i].counts[k].cpu().numpy() for i in layers]
    if len(set(rows.values())) > 1:
        counts = [own * (first / rows[i]) for i, own in zip(layers, counts)]
    return np.stack(counts), first


def constant_table(theta: float, k: int, num_heads: int, rows: int) -> LayerTable:
    """A table with one threshold at the shortest sparse row length; all longer rows take it from there."""
    values, samples = np.full((num_heads, k + 2), np.nan), np.zeros((num_heads, k + 2), dtype=np.int64)
    values[:, k + 1], samples[:, k + 1] = theta, rows
    return LayerTable(values, samples)

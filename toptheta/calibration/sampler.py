"""Calibration of one layer: running sums of samples per (head, row length), kept on the device (DESIGN
section 4).

Covers which rows are sampled, what a sample is, and how sums become thresholds. Files and whole models are
the business of tables.py.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
from torch import Tensor

from toptheta.attention.reference import NEG_INF, Block, top_k_keep, top_theta_keep
from toptheta.methods.params import TOP_THETA


class RunningSums:
    """Count, sum and sum of squares of samples per (head, n); grows with the longest row, not with the
    samples.

    float64 holds the sum of squares: a variance taken from float32 sums loses its digits after some hundred
    samples.
    """

    def __init__(self, num_heads: int, device: torch.device):
        self.count = torch.zeros(num_heads, 0, dtype=torch.int64, device=device)
        self.total = torch.zeros(num_heads, 0, dtype=torch.float64, device=device)
        self.squares = torch.zeros(num_heads, 0, dtype=torch.float64, device=device)

    def reserve(self, max_n: int) -> None:
        """Make room for row lengths up to `max_n`."""
        missing = max_n + 1 - self.count.shape[1]
        if missing > 0:
            self.count, self.total, self.squares = (
                torch.nn.functional.pad(sums, (0, missing)) for sums in (self.count, self.total, self.squares)
            )

    def add(self, samples: Tensor, n: Tensor, sampled: Tensor) -> None:
        """Add samples `[B, H, R]` of rows with lengths n `[B, R]`, where sampled `[B, R]` holds."""
        num_heads = samples.shape[1]
        index = torch.where(sampled, n, 0).reshape(
            -1
        )  # length 0 does not occur: it takes what is not sampled
        values = torch.where(sampled[:, None], samples, 0.0).double().transpose(0, 1).reshape(num_heads, -1)
        self.count.index_add_(1, index, sampled.reshape(-1).long().expand(num_heads, -1))
        self.total.index_add_(1, index, values)
        self.squares.index_add_(1, index, values * values)

    def mean(self) -> Tensor:
        """`[H, L]` float64; NaN where nothing was sampled."""
        return self.total / self.count

    def threshold(self, add_sigma: float) -> Tensor:
        """mean + add_sigma * population standard deviation, `[H, L]` float64; NaN where nothing was
        sampled."""
        mean = self.mean()
        if add_sigma == 0.0:
            return mean
        variance = (self.squares / self.count - mean * mean).clamp_min(0.0)
        # One sample has no spread; rounding in the line above must not give it any.
        return mean + add_sigma * torch.where(self.count > 1, variance.sqrt(), 0.0)

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count, "total": self.total, "squares": self.squares}

    def load_state(self, state: dict[str, Tensor]) -> None:
        device = self.count.device
        self.count, self.total, self.squares = (
            state[key].to(device) for key in ("count", "total", "squares")
        )


class KeptSamples:
    """Every sample of one K, on the CPU: it grows with the samples, unlike RunningSums."""

    def __init__(self, num_heads: int):
        self.n = [torch.zeros(0, dtype=torch.int32)]
        self.values = [torch.zeros(0, num_heads)]

    def add(self, samples: Tensor, n: Tensor, sampled: Tensor) -> None:
        """As of RunningSums."""
        self.n.append(n[sampled].int().cpu())
        self.values.append(samples.transpose(1, 2)[sampled].float().cpu())

    def state(self) -> dict[str, Tensor]:
        self.n, self.values = [torch.cat(self.n)], [torch.cat(self.values)]
        return {"n": self.n[0], "values": self.values[0]}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.n, self.values = [state["n"]], [state["values"]]


class LayerCalibration:
    """Samples of one layer while prompts run through it. `ks` may hold several K: one pass then serves them
    all.

    mode, add_sigma: as they will be used, for the SDC samples of Top-theta. with_sdc: also sample R of SDC
    'exact'. sample_frac: share of a prompt's eligible rows that are sampled, drawn with a generator seeded by
    `seed`. keep_samples: keep each sample of thresholds, in the computer's memory.
    """

    def __init__(
        self,
        ks: Sequence[int],
        num_heads: int,
        mode: int,
        with_sdc: bool = False,
        add_sigma: float = 0.0,
        sample_frac: float = 1.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        keep_samples: bool = False,
    ):
        self.ks = tuple(ks)
        self.mode, self.with_sdc = mode, with_sdc
        self.add_sigma, self.sample_frac = add_sigma, sample_frac
        self.device = torch.device(device)
        self.thresholds = (
            {k: RunningSums(num_heads, self.device) for k in self.ks} if mode == TOP_THETA else {}
        )
        self.missing = {k: RunningSums(num_heads, self.device) for k in self.ks} if with_sdc else {}
        self.kept = {k: KeptSamples(num_heads) for k in self.thresholds} if keep_samples else {}
        self.seen = torch.zeros(0, dtype=torch.int64, device=self.device)  # rows sampled so far, by length
        self.longest = 0  # of any row met, sampled or not: for the error when no row was longer than K
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        self.chosen: Tensor | None = None  # `[B, Q]` bool, the rows of this call that are sampled

    def start_call(self, n: Tensor, real: Tensor | None, batch: int, kv_len: int) -> None:
        """Choose the rows of one attention call that will be sampled. n: `[B or 1, Q]` row lengths."""
        n = n.expand(batch, -1)
        self.longest = max(self.longest, kv_len)
        for sums in (*self.thresholds.values(), *self.missing.values()):
            sums.reserve(kv_len)
        if self.seen.shape[0] <= kv_len:
            self.seen = torch.nn.functional.pad(self.seen, (0, kv_len + 1 - self.seen.shape[0]))
        eligible = n > min(self.ks)
        if real is not None:
            eligible = eligible & real
        if self.sample_frac >= 1.0:
            self.chosen = eligible
            return
        if n.shape[1] == 1:  # decode: each row with probability f
            draw = torch.rand(n.shape, generator=self.generator, device=self.device)
            self.chosen = eligible & (draw < self.sample_frac)
        else:
            self.chosen = draw_rows(eligible, self.seen[n], self.sample_frac, self.generator)
        self.seen.index_add_(0, n.reshape(-1), self.chosen.reshape(-1).long())

    def observe(self, block: Block) -> None:
        """Take the samples of one block: its (K+1)-th largest, and R of what would be dropped."""
        x, rows = block.scores, block.scores.shape[2]
        n = block.n.expand(x.shape[0], -1)
        assert self.chosen is not None
        chosen = self.chosen[:, block.start : block.start + rows]
        if self.sample_frac < 1.0:  # ranking is the costly part: spare it for rows that no sequence samples
            some = chosen.any(dim=0).nonzero()[:, 0]
            x, n, chosen = x[:, :, some], n[:, some], chosen[:, some]
            if some.numel() == 0:
                return
        largest = x.topk(min(max(self.ks) + 1, x.shape[-1]), dim=-1).values
        for k in self.ks:
            if k >= largest.shape[-1]:  # no row of this block is longer than K
                continue
            sampled = chosen & (n > k)
            if self.mode == TOP_THETA:
                self._add(k, largest[..., k], n, sampled)
            if self.with_sdc:
                self.missing[k].add(self._dropped(x, k, n, largest[..., :1]), n, sampled)

    def take(self, samples: Tensor | None, missing: Tensor | None, n: Tensor) -> None:
        """Take what a kernel has sampled of a whole call: `[len(ks), B, H, Q]` samples of thresholds (None:
        taken before) and of R (None: not sampled), 0 where not chosen. n: `[B or 1, Q]`."""
        assert self.chosen is not None
        n = n.expand(self.chosen.shape[0], -1)
        for i, k in enumerate(self.ks):
            sampled = self.chosen & (n > k)
            if samples is not None and self.mode == TOP_THETA:
                self._add(k, samples[i], n, sampled)
            if missing is not None:
                self.missing[k].add(missing[i], n, sampled)

    def _add(self, k: int, samples: Tensor, n: Tensor, sampled: Tensor) -> None:
        self.thresholds[k].add(samples, n, sampled)
        if self.kept:
            self.kept[k].add(samples, n, sampled)

    def kept_samples(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Row lengths int32 `[S]` and values float32 `[S, H]` of every sample, with keep_samples only."""
        state = self.kept[k].state()
        return state["n"].numpy(), state["values"].numpy()

    def running_threshold(self, k: int) -> Tensor:
        """Thresholds from the samples so far, `[H, L]` float32; NaN where nothing was sampled."""
        return self.thresholds[k].threshold(self.add_sigma).float()

    def _dropped(self, scores: Tensor, k: int, n: Tensor, peak: Tensor) -> Tensor:
        """R of SDC 'exact' for the block's rows, `[B, H, R]`, by the thresholds so far or by Top-k."""
        if self.mode == TOP_THETA:
            theta = self.running_threshold(k).to(scores.dtype)
            keep = top_theta_keep(scores, theta[:, n].transpose(0, 1).unsqueeze(-1), peak)
        else:
            keep = top_k_keep(scores, k)
        exps = torch.exp(scores - peak.clamp_min(torch.finfo(scores.dtype).min))
        return exps.masked_fill_(keep, 0.0).sum(dim=-1)

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed calibration needs, as flat named tensors."""
        state = {
            "seen": self.seen,
            "longest": torch.tensor(self.longest),
            "generator": self.generator.get_state(),
        }
        for kind, sums_by_k in (("theta", self.thresholds), ("sdc", self.missing)):
            for k, sums in sums_by_k.items():
                state.update({f"{kind}.{k}.{name}": value for name, value in sums.state().items()})
        for k, kept in self.kept.items():
            state.update({f"kept.{k}.{name}": value for name, value in kept.state().items()})
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.seen, self.longest = state["seen"].to(self.device), int(state["longest"])
        self.generator.set_state(state["generator"].cpu())
        for kind, sums_by_k in (("theta", self.thresholds), ("sdc", self.missing)):
            for k, sums in sums_by_k.items():
                sums.load_state({name: state[f"{kind}.{k}.{name}"] for name in ("count", "total", "squares")})
        for k, kept in self.kept.items():
            kept.load_state({name: state[f"kept.{k}.{name}"] for name in ("n", "values")})


def draw_rows(eligible: Tensor, seen: Tensor, frac: float, generator: torch.Generator) -> Tensor:
    """Draw ceil(frac * eligible) rows of each sequence without replacement, `[B, Q]` bool.

    A row's weight is 1 + (most seen - seen) of its length, so that lengths sampled least so far come first.
    Weighted drawing without replacement is the top of log(weight) + Gumbel noise (Efraimidis and Spirakis
    2006); nothing here waits for the device.
    """
    weight = 1.0 + (seen.amax(dim=-1, keepdim=True) - seen).double()
    uniform = torch.rand(seen.shape, generator=generator, device=seen.device, dtype=torch.float64)
    key = weight.log() - torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
    key = key.masked_fill(~eligible, NEG_INF)
    wanted = torch.ceil(frac * eligible.sum(dim=-1, keepdim=True).double() - 1e-9).long()
    rank = key.argsort(dim=-1, descending=True).argsort(dim=-1)
    return eligible & (rank < wanted)


def sample_count(eligible: int, frac: float) -> int:
    """How many of `eligible` rows `draw_rows` samples."""
    return ceil(frac * eligible - 1e-9)

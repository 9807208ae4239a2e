"""Calibration of one layer: which rows are sampled, and what a sample is.

Sums stay on the device (statistics.py). tables.py handles files and whole models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from toptheta.attention.call import AttentionCall
from toptheta.calibration.draw import draw_rows
from toptheta.calibration.plan import RowPlan
from toptheta.calibration.statistics import RunningSums, grown
from toptheta.methods.base import Block, Method, RowTables


class KeptSamples:
    """All samples of one K, on the CPU: its size grows with the samples, unlike RunningSums."""

    def __init__(self, num_heads: int):
        self.n = [torch.zeros(0, dtype=torch.int32)]
        self.values = [torch.zeros(0, num_heads)]

    def add(self, samples: Tensor, n: Tensor, sampled: Tensor) -> None:
        """Same as `RunningSums.add`."""
        self.n.append(n[sampled].int().cpu())
        self.values.append(samples.transpose(1, 2)[sampled].float().cpu())

    def state(self) -> dict[str, Tensor]:
        self.n, self.values = [torch.cat(self.n)], [torch.cat(self.values)]
        return {"n": self.n[0], "values": self.values[0]}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.n, self.values = [state["n"]], [state["values"]]

    def add_state(self, state: dict[str, Tensor]) -> None:
        """Add the samples of another process."""
        self.n.append(state["n"])
        self.values.append(state["values"])


class RowSampler:
    """Chooses the rows of one layer that are sampled while prompts run through it.

    ks: all K that are calibrated in this pass: rows longer than the smallest are eligible. sample_frac: share
    of a prompt's eligible rows that are sampled, drawn with a generator seeded by `seed`. plan: the rows
    drawn of announced prompts, shared by all layers; the rows of other calls are drawn per call.
    """

    apart = False  # whether `sample` takes the samples from the call, independently of the attention

    @property
    def in_order(self) -> bool:
        """Whether a prompt's samples depend on earlier prompts, so that processes cannot divide them."""
        return False

    def __init__(self, ks: Sequence[int], sample_frac: float, seed: int, device: torch.device | str):
        self.ks, self.sample_frac, self.device = tuple(ks), sample_frac, torch.device(device)
        self.seen = torch.zeros(0, dtype=torch.int64, device=self.device)  # rows sampled so far, by length
        self.longest = 0  # longest row seen, sampled or not: for the error if no row is longer than K
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        self.plan: RowPlan | None = None
        self.window: int | None = None  # of the layer: the most keys that a row sees
        self.chosen: Tensor | None = None  # `[B, Q]` bool, the rows of this call that are sampled

    def start_call(self, n: Tensor, real: Tensor | None, batch: int, kv_len: int) -> None:
        """Choose the rows of one attention call that will be sampled. n: `[B or 1, Q]` row lengths."""
        n = n.expand(batch, -1)
        self.longest = max(self.longest, kv_len)
        if self.seen.shape[0] <= kv_len:
            self.seen = grown(self.seen, kv_len + 1)
        eligible = n > min(self.ks)
        if real is not None:
            eligible = eligible & real
        if self.sample_frac >= 1.0:
            self.chosen = eligible
            return
        # The plan tells rows apart by their lengths; behind a window all have the same.
        beyond = self.window is not None and bool((n >= self.window).any())
        planned = None if self.plan is None or beyond else self.plan.rows(min(self.ks), n)
        if planned is not None:
            self.chosen = eligible & planned
            return
        if n.shape[1] == 1:  # decode: each row with probability f
            draw = torch.rand(n.shape, generator=self.generator, device=self.device)
            self.chosen = eligible & (draw < self.sample_frac)
        else:
            self.chosen = draw_rows(eligible, self.seen[n], self.sample_frac, self.generator)
        self.seen.index_add_(0, n.reshape(-1), self.chosen.reshape(-1).long())

    def sample(self, call: AttentionCall) -> None:
        """Take the samples of the chosen rows of a call, if `apart`."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Everything needed to resume the calibration, as named tensors."""
        return {
            "seen": self.seen,
            "longest": torch.tensor(self.longest),
            "generator": self.generator.get_state(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.seen, self.longest = state["seen"].to(self.device), int(state["longest"])
        self.generator.set_state(state["generator"].cpu())

    def add_state(self, state: dict[str, Tensor]) -> None:
        """Add the state of another process, which computed other prompts."""
        self.longest = max(self.longest, int(state["longest"]))
        more = state["seen"].to(self.device)
        length = max(len(self.seen), len(more))
        self.seen, more = (grown(x, length) for x in (self.seen, more))
        self.seen = self.seen + more


class LayerCalibration(RowSampler):
    """Samples of one layer while prompts run through it, for one or several K in one pass.

    method, placement, add_sigma: as they will be used. with_sdc: also sample R of SDC 'exact', for the keys
    that the method would drop. keep_samples: keep every threshold sample in CPU memory.
    """

    def __init__(
        self,
        ks: Sequence[int],
        num_heads: int,
        method: Method,
        placement: str = "pre-softmax",
        with_sdc: bool = False,
        add_sigma: float = 0.0,
        sample_frac: float = 1.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        keep_samples: bool = False,
    ):
        super().__init__(ks, sample_frac, seed, device)
        self.method, self.placement, self.with_sdc = method, placement, with_sdc
        self.add_sigma = add_sigma
        self.thresholds = (
            {k: RunningSums(num_heads, self.device) for k in self.ks} if method.needs_thresholds else {}
        )
        self.missing = {k: RunningSums(num_heads, self.device) for k in self.ks} if with_sdc else {}
        self.kept = {k: KeptSamples(num_heads) for k in self.thresholds} if keep_samples else {}

    @property
    def in_order(self) -> bool:
        return self.with_sdc and bool(self.thresholds)  # R depends on the thresholds so far

    def start_call(self, n: Tensor, real: Tensor | None, batch: int, kv_len: int) -> None:
        for sums in (*self.thresholds.values(), *self.missing.values()):
            sums.reserve(kv_len)
        super().start_call(n, real, batch, kv_len)

    def observe(self, block: Block) -> None:
        """Take the samples of one block: the (K+1)-th largest of each row, and R of the dropped keys."""
        x, rows = block.x, block.x.shape[2]
        n = block.n.expand(x.shape[0], -1)
        assert self.chosen is not None
        chosen = self.chosen[:, block.start : block.start + rows]
        if self.sample_frac < 1.0:  # ranking is expensive: skip rows that no sequence samples
            some = chosen.any(dim=0).nonzero()[:, 0]
            x, n, chosen = x[:, :, some], n[:, some], chosen[:, some]
            if some.numel() == 0:
                return
        largest = x.topk(min(max(self.ks) + 1, x.shape[-1]), dim=-1).values
        for k in self.ks:
            if k >= largest.shape[-1]:  # no row of this block is longer than K
                continue
            sampled = chosen & (n > k)
            if self.thresholds:
                self._add(k, largest[..., k], n, sampled)
            if self.with_sdc:
                rows_of_k = replace(block, x=x, row_max=largest[..., :1], n=n, budget=k)
                self.missing[k].add(self._dropped(rows_of_k), n, sampled)

    def take(self, samples: Tensor | None, missing: Tensor | None, n: Tensor) -> None:
        """Take the samples of a whole call from a kernel: `[len(ks), B, H, Q]` threshold samples (None:
        already taken) and samples of R (None: not sampled), 0 where not chosen. n: `[B or 1, Q]`."""
        assert self.chosen is not None
        n = n.expand(self.chosen.shape[0], -1)
        for i, k in enumerate(self.ks):
            sampled = self.chosen & (n > k)
            if samples is not None and self.thresholds:
                self._add(k, samples[i], n, sampled)
            if missing is not None:
                self.missing[k].add(missing[i], n, sampled)

    def _add(self, k: int, samples: Tensor, n: Tensor, sampled: Tensor) -> None:
        self.thresholds[k].add(samples, n, sampled)
        if self.kept:
            self.kept[k].add(samples, n, sampled)

    def kept_samples(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Row lengths int32 `[S]` and values float32 `[S, H]` of all samples; only with keep_samples."""
        state = self.kept[k].state()
        return state["n"].numpy(), state["values"].numpy()

    def running_threshold(self, k: int) -> Tensor:
        """The thresholds from the samples so far, `[H, L]` float32; NaN where nothing was sampled."""
        return self.thresholds[k].threshold(self.add_sigma).float()

    def _dropped(self, block: Block) -> Tensor:
        """R of SDC 'exact' for the block's rows, `[B, H, R]`, with the thresholds so far if the method uses
        thresholds."""
        k, scores, row_max = block.budget, block.x, block.row_max
        tables = RowTables()
        if self.thresholds:
            theta = self.running_threshold(k).to(scores.dtype)
            tables.theta = theta[:, block.n].transpose(0, 1).unsqueeze(-1)
        keep = self.method.for_sdc_samples().keep(block, tables)
        exps = torch.exp(scores - row_max.clamp_min(torch.finfo(scores.dtype).min))
        return exps.masked_fill_(keep, 0.0).sum(dim=-1)

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        for kind, sums_by_k in (("theta", self.thresholds), ("sdc", self.missing)):
            for k, sums in sums_by_k.items():
                state.update({f"{kind}.{k}.{name}": value for name, value in sums.state().items()})
        for k, kept in self.kept.items():
            state.update({f"kept.{k}.{name}": value for name, value in kept.state().items()})
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        for part, own in self._parts(state):
            part.load_state(own)

    def add_state(self, state: dict[str, Tensor]) -> None:
        super().add_state(state)
        for part, own in self._parts(state):
            part.add_state(own)

    def _parts(
        self, state: dict[str, Tensor]
    ) -> Iterator[tuple[RunningSums | KeptSamples, dict[str, Tensor]]]:
        """All objects with samples, each with its part of a state."""
        for kind, by_k in (("theta", self.thresholds), ("sdc", self.missing), ("kept", self.kept)):
            for k, part in by_k.items():
                prefix = f"{kind}.{k}."
                own = {name: value for name, value in state.items() if name.startswith(prefix)}
                yield part, {name.removeprefix(prefix): value for name, value in own.items()}

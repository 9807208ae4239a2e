"""Which rows of each calibration prompt are sampled, if only a share of them is.

Row lengths drawn least so far are preferred, so the rows drawn for a prompt depend on earlier prompts.
Prompts are therefore announced before any is computed, and drawn in the order of their keys. The same rows
are then sampled for any order, chunks, batches or processes.
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from toptheta.calibration.draw import draw_rows
from toptheta.calibration.statistics import grown


class RowPlan:
    """frac: share of a prompt's rows; seed: of the sampling; longest: maximum tokens of prompt and reply."""

    def __init__(self, frac: float, seed: int, longest: int):
        self.frac, self.seed, self.longest = frac, seed, longest
        self._spans: dict[str, tuple[int, int]] = {}
        self._drawn: dict[int, _Drawn] = {}  # by the smallest K
        self._keys: list[str] = []  # of the sequences that are computed now
        self._tables: dict[tuple[int, torch.device], Tensor] = {}  # of these, by the smallest K

    def announce(self, spans: Mapping[str, tuple[int, int]]) -> None:
        """Add prompts. spans: by a prompt's key (start, stop): its rows have lengths start + 1 to stop. Call
        it with all prompts, including those of other processes and earlier starts."""
        for key in sorted(spans.keys() - self._spans.keys()):
            self._spans[key] = spans[key]

    def begin(self, keys: Sequence[str]) -> None:
        """Declare that the following calls compute the prompts with these keys, in this order. All must have
        been announced."""
        self._keys, self._tables = list(keys), {}

    def rows(self, least_k: int, n: Tensor) -> Tensor | None:
        """Which rows of a call are sampled, of those longer than `least_k`, as bool like n; None if the call
        does not belong to the declared prompts. n: `[B, Q]` row lengths."""
        if n.shape[0] != len(self._keys):
            return None
        at = (least_k, n.device)
        if at not in self._tables:
            tables = [self._table(key, least_k) for key in self._keys]
            self._tables[at] = torch.from_numpy(np.stack(tables)).to(n.device)
        return self._tables[at].gather(1, n.clamp(max=self.longest))

    def _table(self, key: str, least_k: int) -> np.ndarray:
        """`[longest + 1]` bool by row length. Rows after the prompt are decoded, and each is sampled with
        probability `frac`."""
        if least_k not in self._drawn:
            self._drawn[least_k] = _Drawn(self.frac, self.seed, least_k)
        start, stop = self._spans[key]
        generator = np.random.default_rng([self.seed, zlib.crc32(key.encode())])
        table = generator.random(self.longest + 1) < self.frac
        table[: stop + 1] = False
        drawn = self._drawn[least_k].of(key, self._spans)
        table[drawn[drawn <= self.longest]] = True
        return table


class _Drawn:
    """The rows drawn of the prompts for one K, in the order in which the prompts were announced."""

    def __init__(self, frac: float, seed: int, least_k: int):
        self.frac, self.least_k = frac, least_k
        self.generator = torch.Generator().manual_seed(seed)
        self.seen = torch.zeros(1, dtype=torch.int64)  # rows drawn so far, by length
        self.lengths: dict[str, np.ndarray] = {}

    def of(self, key: str, spans: Mapping[str, tuple[int, int]]) -> np.ndarray:
        """The row lengths that are drawn of a prompt."""
        if key not in self.lengths:
            for other in list(spans)[len(self.lengths) :]:
                self.lengths[other] = self._draw(*spans[other])
        return self.lengths[key]

    def _draw(self, start: int, stop: int) -> np.ndarray:
        if stop >= len(self.seen):
            self.seen = grown(self.seen, stop + 1)
        n = torch.arange(min(max(start, self.least_k), stop) + 1, stop + 1)
        if len(n) == 0:
            return n.numpy()
        eligible = torch.ones(1, len(n), dtype=torch.bool)
        lengths = n[draw_rows(eligible, self.seen[n][None], self.frac, self.generator)[0]]
        self.seen[lengths] += 1
        return lengths.numpy()

"""Counts of kept elements per head and kept V rows per group, collected on the device.

Covers counting during calls, and moving the counts to the CPU after a request, all at once. eval/cell.py
writes them to files.
"""

from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from toptheta.attention.call import Counts
from toptheta.attention.effective_k import count_rows, empty_histogram
from toptheta.attention.kv_bytes import KVBytes, Price
from toptheta.attention.rows import Rows

PREFILL, DECODE = "prefill", "generative_decoding"


@dataclass
class LayerRecord:
    """Counts of one layer for one prefill (summed over its rows) or one decode step; B sequences.

    attn: `[B, H]` kept elements; vrow: `[B, H_kv]` V rows that at least one row keeps; full: `[B]` elements
    that dense attention would use; topk: `[B]` elements that Top-k would keep; n: `[B]` length of the last
    row, 0 if a sequence had only padding. popularity: `[B, H_kv, N]` the number of (row, head) pairs that
    keep each V row, or None. histogram: of the rows of a prefill that are longer than K, see effective_k.py,
    or None; a decode step is a single row, which attn and n describe. kv_read: `[B, H_kv]` bytes read from
    the cache, kv_dense: `[B]` bytes that dense attention would read for each KV head; both summed over the
    calls of a prefill. wanted, missed: `[B]`, see attention/missed.py, or None if not counted.
    """

    attn: np.ndarray
    vrow: np.ndarray
    full: np.ndarray
    topk: np.ndarray
    n: np.ndarray
    popularity: np.ndarray | None = None
    histogram: np.ndarray | None = None
    kv_read: np.ndarray | None = None
    kv_dense: np.ndarray | None = None
    wanted: np.ndarray | None = None
    missed: np.ndarray | None = None


@dataclass
class _Open:
    """An unfinished prefill, which may consist of several calls (chunks, or answers after a shared
    prompt)."""

    attn: Tensor
    vrow: Tensor
    full: Tensor
    topk: Tensor
    n: Tensor
    kv_read: Tensor
    kv_dense: Tensor
    key_real: Tensor | None = None  # which keys are not padding, from the last call


@dataclass(frozen=True)
class _StepFacts:
    """What is needed to read the packed counts of a decode step. k: the layer's K, 0: none; price: None if
    bytes are not counted; reads_keys, misses: whether K rows that are read, and missed keys, are counted."""

    num_heads: int
    num_kv_heads: int
    k: int
    price: Price | None
    reads_keys: bool
    misses: bool

    def records(self, packed: Tensor) -> list[LayerRecord]:
        """A record for each step. packed: `[S, B, H + H_kv (+ H_kv) (+ 2) + 1]` int64: kept elements, kept
        V rows, K rows read, wanted and missed keys (if counted), visible keys."""
        heads, groups = self.num_heads, self.num_kv_heads
        flat = packed.flatten(0, 1)
        widths = (heads, groups, groups * self.reads_keys, 2 * self.misses, 1)
        attn, vrow, keys, missed, n = flat.split(widths, dim=1)
        n = n[:, 0]
        read, dense = torch.zeros_like(vrow), torch.zeros_like(n)
        if self.price is not None:
            keys_read = keys if self.reads_keys else None
            read = self.price.read(n, attn, vrow, keys_read, decode=True) * (n > 0)[:, None]
            dense = self.price.dense(n)
        topk = n.clamp(max=self.k) if self.k > 0 else n
        parts = [attn, vrow, n, topk, n, read, dense]
        names = ["attn", "vrow", "full", "topk", "n", "kv_read", "kv_dense"]
        if self.misses:
            parts += [missed[:, 0], missed[:, 1]]
            names += ["wanted", "missed"]
        by_step = zip(*(part.unflatten(0, packed.shape[:2]).numpy() for part in parts))
        return [LayerRecord(**dict(zip(names, step))) for step in by_step]


@dataclass
class PrefixCounts:
    """Counts, by layer, of the rows of a prefix that several prompts share, for `Recorder.begin_behind`, or
    of prompts that several answers share, for `Recorder.begin_answers`. one_call: the prefix was computed in
    one call, as each whole prompt would have been."""

    opened: dict[int, _Open]
    histograms: dict[int, Tensor]
    one_call: bool


def count_steps(steps: list[LayerRecord], k: int, live: np.ndarray | None = None) -> np.ndarray:
    """The histogram (effective_k.py) of a layer's decode steps whose rows are longer than K. live: `[steps,
    B]` bool, the rows that count; None: all."""
    n = np.stack([record.n for record in steps])
    used = n > k if live is None else live & (n > k)
    kept = torch.from_numpy(np.stack([record.attn for record in steps])).transpose(1, 2)
    histogram = empty_histogram()
    count_rows(histogram, kept, torch.from_numpy(n), torch.from_numpy(used))
    return histogram.numpy()


class Recorder:
    """Collects counts while a model runs. A request is a prefill and its decode steps; `drain` ends it.

    No value is copied from the device before `drain`. keep_popularity: also count how often each V row is
    kept. effective_k: also count individual rows of sparse layers; the rows of a prompt that several answers
    share count once, as they are computed once.
    """

    def __init__(self, keep_popularity: bool = False, effective_k: bool = False):
        self.keep_popularity, self.effective_k = keep_popularity, effective_k
        self._histograms: dict[int, Tensor] = {}
        self._open: dict[int, _Open] = {}
        self._prefixes: dict[int, Tensor] = {}  # `[1, H_kv, P]`, of prefixes that the next call continues
        self._steps: dict[int, list[tuple[_StepFacts, Tensor]]] = {}
        self._step_popularity: dict[int, list[Tensor]] = {}
        self._going: tuple[Tensor, int] | None = None  # see go_on

    def add(
        self,
        layer: int,
        rows: Rows,
        k: int,
        counts: Counts | None,
        shape: tuple[int, int, int, int],
        kv: KVBytes | None = None,
    ) -> None:
        """Add an attention call of `layer` on a prompt, or on a part of it. shape: (B, H, H_kv, N). counts:
        None if the call is dense and keeps all visible keys. k: the layer's K, 0 if it is left dense or its
        method has none. kv: bytes read, None if not counted."""
        batch, num_heads, num_kv_heads, kv_len = shape
        n = self._lengths(rows, batch)
        key_real = self._key_real(rows, counts)
        full = n.sum(dim=-1)
        topk = n.clamp(max=k).sum(dim=-1) if k > 0 else full
        longest = n.amax(dim=-1)
        if counts is None:
            attn = full[:, None].expand(batch, num_heads)
            # Below, only which V rows are used matters, not how often.
            vrow = rows.seen(kv_len)[:, None].expand(batch, num_kv_heads, -1)
        else:
            attn, vrow = counts.attn, counts.vrow
        if rows.offset:  # index by position: a sliding cache no longer holds earlier keys
            vrow, kv_len = torch.nn.functional.pad(vrow, (rows.offset, 0)), kv_len + rows.offset
        if kv is None:
            kv = KVBytes(full.new_zeros(batch, num_kv_heads), torch.zeros_like(full))
        if self.effective_k and counts is not None:
            if layer not in self._histograms:
                self._histograms[layer] = empty_histogram(n.device)
            # For a single row, attn is its count.
            kept = counts.attn[..., None] if counts.row is None else counts.row
            count_rows(self._histograms[layer], kept, n, n > k)
        before = self._open.get(layer)
        if before is None:
            parts = (attn.clone(), vrow.int(), full, topk, longest, kv.read, kv.dense)
            self._open[layer] = _Open(*parts, key_real)
            return
        if kv_len < before.vrow.shape[2] or batch != before.vrow.shape[0]:
            raise RuntimeError(
                "a new request began while the last one was open: call drain() after each request"
            )
        wide = vrow.new_zeros(before.vrow.shape[:2] + (kv_len,), dtype=torch.int32)
        wide[..., : before.vrow.shape[2]] = before.vrow
        self._open[layer] = _Open(
            before.attn + attn,
            wide + vrow,
            before.full + full,
            before.topk + topk,
            torch.maximum(before.n, longest),
            before.kv_read + kv.read,
            before.kv_dense + kv.dense,
            key_real,
        )

    def add_steps(
        self,
        layer: int,
        rows: Rows,
        k: int,
        counts: Counts | None,
        shape: tuple[int, int, int, int],
        price: Price | None = None,
        keys_read: Tensor | None = None,
        missed: Tensor | None = None,
    ) -> None:
        """Add the rows of a call as decode steps. Parameters as in `add`; price: None if bytes are not
        counted; keys_read: `[B, H_kv]` K rows that were read in addition to the int8 copy of K, None without
        a copy; missed: of attention/missed.py, None if not counted.

        To launch few kernels per step, everything that follows from the counts is computed in `drain`, for
        all steps at once. Popularity is counted per call, so it is correct for calls of one step only.
        """
        batch, num_heads, num_kv_heads, kv_len = shape
        n = self._lengths(rows, batch)
        lengths = n.reshape(-1, 1)
        if counts is None:
            keys = missed = None
            parts = [lengths.expand(-1, num_heads), lengths.expand(-1, num_kv_heads)]
        else:
            steps = counts.steps()
            parts = [steps.attn, steps.vrows]
            keys = keys_read if steps.keys is None else steps.keys[..., 0]
            parts += [] if keys is None else [keys]
            parts += [] if missed is None else [missed.flatten(0, 1)]
        facts = _StepFacts(num_heads, num_kv_heads, k, price, keys is not None, missed is not None)
        packed = torch.cat([*parts, lengths], dim=1).view(batch, n.shape[1], -1)
        packed = self._of_all(packed)
        self._steps.setdefault(layer, []).extend((facts, step) for step in packed.unbind(dim=1))
        if self.keep_popularity:
            if counts is None:
                seen = torch.arange(kv_len, device=n.device) < n[:, -1:]
                vrow = seen[:, None].expand(-1, num_kv_heads, -1)
            else:
                vrow = _without_padding(counts.vrow, self._key_real(rows, counts))
            self._step_popularity.setdefault(layer, []).append(self._of_all(vrow.int()))

    def _lengths(self, rows: Rows, batch: int) -> Tensor:
        """`[B, Q]` visible keys of each row, 0 for padding."""
        n = rows.n if rows.real is None else rows.n * rows.real
        return n.expand(batch, -1)

    def _key_real(self, rows: Rows, counts: Counts | None) -> Tensor | None:
        """Which keys are not padding, for popularities; None if not needed: dense calls are not counted by
        key, and a sliding cache has no padding."""
        counted = self.keep_popularity and counts is not None and not rows.offset
        return rows.key_real if counted else None

    def _of_all(self, counts: Tensor) -> Tensor:
        """Counts `[B, ...]` of all sequences, from those of the unfinished ones; 0 for finished sequences."""
        if self._going is None:
            return counts
        going, batch = self._going
        whole = counts.new_zeros(batch, *counts.shape[1:])
        whole[going.to(counts.device)] = counts
        return whole

    def repeat(self, index: Tensor) -> None:
        """Reorder or repeat the sequences of the unfinished prefill like those of the cache. index: `[new
        B]` indices of sequences."""
        for layer, o in self._open.items():
            at = index.to(o.attn.device)
            parts = (o.attn, o.vrow, o.full, o.topk, o.n, o.kv_read, o.kv_dense, o.key_real)
            self._open[layer] = _Open(*(None if part is None else part[at] for part in parts))  # type: ignore[arg-type]

    def go_on(self, going: Tensor, batch: int) -> None:
        """From now on, decode steps are of the sequences `going` only, `[rest]` indices into the `batch`
        sequences of the request; for the others, 0 is counted."""
        self._going = (going, batch)

    def take_prefix(self, one_call: bool) -> PrefixCounts:
        """End the prefill of a beginning that others share, and return its counts."""
        counts = PrefixCounts(self._open, self._histograms, one_call)
        self._open, self._histograms = {}, {}
        return counts

    def begin_behind(self, prefix: PrefixCounts, batch: int) -> None:
        """Begin prefills of `batch` sequences that start with the rows of `prefix`, which count as if they
        had been computed for each sequence."""
        self._histograms = {layer: histogram * batch for layer, histogram in prefix.histograms.items()}
        for layer, o in prefix.opened.items():
            if prefix.one_call:  # the bytes that the whole prompt reads in one call are known at its end
                self._prefixes[layer] = o.vrow
                o = replace(o, kv_read=torch.zeros_like(o.kv_read), kv_dense=torch.zeros_like(o.kv_dense))
            self._open[layer] = o
        self.repeat(torch.zeros(batch, dtype=torch.int64))

    def begin_answers(self, prompts: PrefixCounts, owner: Tensor) -> None:
        """Begin prefills that start with the rows of some of the `prompts`. owner: `[B]`, the prompt of each
        sequence. In histograms the rows of the prompts count in the first call alone."""
        self._open, self._histograms = dict(prompts.opened), prompts.histograms
        prompts.histograms = {}
        self.repeat(owner)

    def prefix_of(self, layer: int) -> Tensor | None:
        """`[1, H_kv, P]`, how often the rows of a prefix kept each V row, if the prefix counts as a part of
        the layer's next call, else None. Call it once, in that call."""
        return self._prefixes.pop(layer, None)

    def drain(self) -> tuple[dict[int, LayerRecord], dict[int, list[LayerRecord]]]:
        """End the request: its prefill record and its decode records, by layer, as numpy arrays."""
        prefill = {
            layer: LayerRecord(
                attn=o.attn.cpu().numpy(),
                vrow=(o.vrow > 0).sum(dim=-1).cpu().numpy(),
                full=o.full.cpu().numpy(),
                topk=o.topk.cpu().numpy(),
                n=o.n.cpu().numpy(),
                kv_read=o.kv_read.cpu().numpy(),
                kv_dense=o.kv_dense.cpu().numpy(),
                popularity=_without_padding(o.vrow, o.key_real).cpu().numpy()
                if self.keep_popularity
                else None,
                histogram=self._histograms[layer].cpu().numpy() if layer in self._histograms else None,
            )
            for layer, o in self._open.items()
        }
        decode = {}
        for layer, steps in self._steps.items():
            decode[layer] = [
                record
                for facts, alike in groupby(steps, key=lambda step: step[0])
                for record in facts.records(torch.stack([step for _, step in alike]).cpu())
            ]
            for record, vrow in zip(decode[layer], self._step_popularity.get(layer, [])):
                record.popularity = vrow.cpu().numpy()
        self._open, self._steps, self._step_popularity, self._histograms = {}, {}, {}, {}
        self._prefixes, self._going = {}, None
        return prefill, decode


def _without_padding(vrow: Tensor, key_real: Tensor | None) -> Tensor:
    """`[B, H_kv, N]`, with the counts of keys that are not padding (`key_real`, `[B, N]`) first; key_real:
    None if there is no padding."""
    if key_real is None:
        return vrow
    order = (~key_real).int().argsort(dim=1, stable=True)
    return vrow.gather(2, order[:, None].expand_as(vrow))

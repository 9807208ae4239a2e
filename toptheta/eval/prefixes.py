"""Which prefixes prompts share, so that each is computed once (models/prefix.py).

Prompts with the same prefix are computed one after the other, and only the current prefix is kept. A tree of
all prefixes would take more memory and save hardly any more tokens: the examples of a subject, or a system
prompt, are one level, and only a few tokens are shared above or below it.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

REST = 2  # minimum tokens of a prompt after the prefix: a single one has the shape of a decode step
LEAST = 256  # tokens that sharing must save: it costs a call of the model, and may cost two smaller batches
LEAST_SHARE = 0.25  # of all tokens of the prompts that share

T = TypeVar("T")
Prompt = tuple[int, ...]


@dataclass
class _Node:
    """Prompts from `start` on, in the order of their tokens, that begin with the same `length` tokens.
    children: groups within, (start, stop, length); spared: tokens that these spare."""

    length: int
    start: int
    children: list[tuple[int, int, int]] = field(default_factory=list)
    spared: int = 0

    def take(self, child: "_Node") -> None:
        self.children += child.children
        self.spared += child.spared

    def close(self, stop: int, tokens: list[int]) -> None:
        """Choose between one group of all prompts and the groups within. tokens: of all prompts before each,
        in sum."""
        spared = (stop - self.start - 1) * self.length
        worth = max(LEAST, LEAST_SHARE * (tokens[stop] - tokens[self.start]))
        if spared >= worth and spared >= self.spared:
            self.children, self.spared = [(self.start, stop, self.length)], spared


def shared_lengths(prompts: Iterable[Prompt]) -> dict[Prompt, int]:
    """The length of each prompt's shared prefix; prompts with the same prefix form a group. 0: sharing is not
    worthwhile. The total number of saved tokens is the maximum for one level of groups."""
    ordered = sorted(set(prompts))
    tokens = [0]
    for prompt in ordered:
        tokens.append(tokens[-1] + len(prompt))
    common = [_common(a, b) for a, b in pairwise(ordered)]
    open_nodes = [_Node(0, 0)]
    for i, length in enumerate([*common, 0]):
        node, start = None, i
        while open_nodes[-1].length > length:
            node = open_nodes.pop()
            node.close(i + 1, tokens)
            start = node.start
            if open_nodes[-1].length >= length:
                open_nodes[-1].take(node)
                node = None
        if open_nodes[-1].length < length:
            open_nodes.append(_Node(length, start))
            if node is not None:
                open_nodes[-1].take(node)
    lengths = dict.fromkeys(ordered, 0)
    for start, stop, length in open_nodes[0].children:
        lengths |= dict.fromkeys(ordered[start:stop], length)
    return lengths


def in_batches(items: Iterable[T], prefix: Callable[[T], Hashable], size: int) -> list[list[T]]:
    """Batches of at most `size` items with the same prefix, or whatever else makes them go together. Those of
    one prefix follow each other, in place of the first; otherwise the order is kept."""
    together: dict[Hashable, list[T]] = {}
    for item in items:
        together.setdefault(prefix(item), []).append(item)
    return [group[i : i + size] for group in together.values() for i in range(0, len(group), size)]


def _common(a: Prompt, b: Prompt) -> int:
    """The number of leading tokens that two prompts share, excluding the last REST of either."""
    most = max(0, min(len(a), len(b)) - REST)
    if a[:most] == b[:most]:
        return most
    return next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)

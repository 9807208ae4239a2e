"""Batches that are split when memory runs out."""

from collections.abc import Callable, Container, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from toptheta.eval.settings import AUTO
from toptheta.util.console import say

T = TypeVar("T")
LARGEST = 64  # initial batch size of `auto`


class Batches:
    """size: the requested batch size. most: the current maximum."""

    def __init__(self, size: int):
        self.size = LARGEST if size == AUTO else size
        self.most = self.size

    def run(
        self,
        batches: Sequence[list[T]],
        run: Callable[[list[T]], None],
        undo: Callable[[], None],
        failed: Callable[[T], None],
    ) -> None:
        """Run every batch. If memory runs out, the batch is halved, and so are later ones. undo: discards the
        results of an unfinished batch; failed: receives an item that does not fit even alone."""
        waiting = list(batches)
        while waiting:
            batch = waiting.pop(0)
            if len(batch) > self.most:
                waiting[:0] = [batch[: self.most], batch[self.most :]]
                continue
            if _fits(batch, run):
                continue
            undo()
            clear_device_cache(garbage_collection=True)
            if len(batch) == 1:
                failed(batch[0])
                continue
            self.most = len(batch) // 2
            say(f"Out of memory with a batch of {len(batch)} prompts: continuing with {self.most}.")
            waiting.insert(0, batch)


def _fits(batch: list[T], run: Callable[[list[T]], None]) -> bool:
    """Run a batch; False if memory ran out. After returning, nothing references the error, whose frames
    reference tensors."""
    try:
        run(batch)
        return True
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error):
            return False
        raise


def unfinished(
    batches: Sequence[list[T]], done: Container[str], key: Callable[[T], str] = str
) -> list[list[T]]:
    """The batches without what is `done`, by its key, and without empty ones. The rest of a batch stays
    together, so that rounding does not change."""
    left = ([one for one in batch if key(one) not in done] for batch in batches)
    return [batch for batch in left if batch]

"""A prefix shared by several prompts, computed once: its keys and values, and the counts of its rows.

Rows of a prompt see the same keys whether its beginning was read with them or before, so results agree within
float noise, as those of chunks do, and every prompt counts the shared rows as if it had read them itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from toptheta.models.cache_state import branch
from toptheta.models.calibrate import calibrations
from toptheta.models.control import get_params, recorder_of
from toptheta.models.generation import hidden_states
from toptheta.models.growing_cache import growing_cache
from toptheta.models.patch import model_device
from toptheta.models.recorder import PrefixCounts


@dataclass
class Prefix:
    """ids: its tokens; cache: of one sequence, which stays as it is; counts: None where nothing was counted.
    It belongs to the parameters that the model had when it was read."""

    ids: tuple[int, ...]
    cache: Cache
    counts: PrefixCounts | None

    @property
    def has_window(self) -> bool:
        """Whether a layer has a sliding window, in which padding after the prefix would take up places."""
        return any(getattr(layer, "is_sliding", False) for layer in self.cache.layers)

    def begin(self, model: Any, batch: int) -> Cache:
        """A new cache for `batch` prompts, for a call of the model with the rest of each prompt; the current
        statistics start with the prefix's rows."""
        recorder = recorder_of(model)
        if recorder is not None:
            assert self.counts is not None
            recorder.begin_behind(self.counts, batch)
        return branch(self.cache, batch)


def can_share(model: Any) -> bool:
    """Whether prompts may be computed in parts: not if what a row keeps depends on the other rows of its
    call, and not while a calibration samples per prompt."""
    params = get_params(model)
    return not calibrations(model) and not (params.sparse and params.method.by_call)


@torch.no_grad()
def read_prefix(model: Any, ids: tuple[int, ...]) -> Prefix:
    """Compute a prefix in one call of a patched model. Earlier counts must have been drained."""
    cache = growing_cache(model.config)
    for _ in hidden_states(model, torch.tensor([ids], device=model_device(model)), cache, None):
        pass
    recorder = recorder_of(model)
    return Prefix(ids, cache, None if recorder is None else recorder.take_prefix(one_call=True))

"""Tensor parallelism: with transformers' DistributedConfig each process computes some of a layer's heads,
while the config counts all of them. Tables of thresholds are of all heads, in every process.
"""

from typing import Any

import numpy as np
import torch.distributed as dist

from toptheta.calibration.tables import LayerTable
from toptheta.util.errors import UsageError


def mesh_of_heads(model: Any, layer: Any) -> Any:
    """The one-dimensional device mesh over which the layer's heads are distributed; None if every process
    computes all heads (for example if q and k are normalised over all heads, or are one projection)."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor, Shard

    plan = next(
        (how for name, how in (model.tp_plan or {}).items() if name.endswith("self_attn.q_proj")), None
    )
    weight = getattr(getattr(layer, "q_proj", None), "weight", None)
    if plan != "colwise" or not isinstance(weight, DTensor):
        return None
    mesh: Any = weight.device_mesh
    return mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[weight.placements.index(Shard(0))]]


def local_heads(layer: Any, mesh: Any) -> slice:
    """The query heads of a layer that this process computes."""
    total = layer.config.num_attention_heads
    if mesh is None:
        return slice(0, total)
    share = total // mesh.size()
    return slice(mesh.get_local_rank() * share, (mesh.get_local_rank() + 1) * share)


def of_all_heads(table: LayerTable, mesh: Any) -> LayerTable:
    """A table of this process's heads, extended to all heads; every process must call it."""
    if mesh is None:
        return table
    parts: list[Any] = [None] * mesh.size()
    dist.all_gather_object(parts, (table.values, table.samples), group=mesh.get_group())
    return LayerTable(*(np.concatenate(part) for part in zip(*parts)))


def refuse(mesh: Any, what: str, instead: str) -> None:
    """Raise UsageError for `what`, which does not support distributed heads."""
    if mesh is not None:
        raise UsageError(f"{what} does not support tensor parallelism: {instead}.")

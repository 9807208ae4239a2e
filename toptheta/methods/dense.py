"""Dense attention: all visible keys, the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from toptheta.methods.base import Block, KernelSpec, Method, RowTables, register

if TYPE_CHECKING:  # as in base.py
    from torch import Tensor


@register
@dataclass(frozen=True)
class Dense(Method):
    name = "dense"
    title = "dense"
    mode = 3  # the published project: any number but 0 and 1
    is_dense = True
    uses_k = False

    def keep(self, block: Block, tables: RowTables) -> Tensor:
        return block.visible

    def kernel_spec(self) -> KernelSpec:
        return KernelSpec()

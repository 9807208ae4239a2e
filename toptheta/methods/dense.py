"""Dense attention: every visible key, the baseline."""

from dataclasses import dataclass

from torch import Tensor

from toptheta.methods.base import Block, KernelSpec, Method, RowTables, register


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

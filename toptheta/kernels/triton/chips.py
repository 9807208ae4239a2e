"""What the Triton kernels have to fit: the kind of GPU, its registers and its shared memory. Can be imported
without Triton.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

RESERVED = 1024  # bytes of shared memory that the system takes for every program


@dataclass(frozen=True)
class Chip:
    """A GPU. backend: cuda or hip; arch: 90 for compute capability 9.0, or AMD's name of it; processors: SMs
    or CUs; shared: bytes of shared memory that one program may have; shared_of_all: that a processor has;
    registers: 32-bit ones of a processor."""

    backend: str
    arch: int | str
    processors: int
    shared: int
    shared_of_all: int
    registers: int = 65536

    @property
    def blackwell(self) -> bool:
        """Whether products go through tensor memory."""
        return self.arch in (100, 103)

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Programs that a processor runs at the same time, by the registers of a thread, the bytes of shared
        memory and the warps of one. At least 1."""
        if self.backend == "hip":
            return 2  # its compiler says nothing of registers in this form
        by_registers = self.registers // (-(-max(registers, 1) // 8) * 8 * warps * 32)
        return max(1, min(by_registers, self.shared_of_all // (shared + RESERVED), 32))


KB = 1024
# By the data sheets; `chip_of` asks the driver. For the build gates, and for where there is no GPU.
KNOWN = {
    "sm_80": Chip("cuda", 80, 108, 163 * KB, 164 * KB),  # A100
    "sm_86": Chip("cuda", 86, 84, 99 * KB, 100 * KB),  # RTX 30, A10
    "sm_89": Chip("cuda", 89, 128, 99 * KB, 100 * KB),  # RTX 40, L4
    "sm_90": Chip("cuda", 90, 132, 227 * KB, 228 * KB),  # H100, H200
    "sm_100": Chip("cuda", 100, 148, 227 * KB, 228 * KB),  # B200
    "sm_120": Chip("cuda", 120, 170, 99 * KB, 100 * KB),  # RTX 50
    "gfx942": Chip("hip", "gfx942", 304, 64 * KB, 64 * KB, 131072),  # MI300X
}


@cache
def chip_of(device: torch.device) -> Chip:
    """The chip of a device; a small part of an H100 where it is none, for the interpreter."""
    if device.type != "cuda":
        return replace(KNOWN["sm_90"], processors=8)
    about: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Chip(
            "hip", about.gcnArchName.split(":")[0], about.multi_processor_count, 64 * KB, 64 * KB, 131072
        )
    return Chip(
        "cuda",
        10 * about.major + about.minor,
        about.multi_processor_count,
        about.shared_memory_per_block_optin,
        about.shared_memory_per_multiprocessor,
        about.regs_per_multiprocessor,
    )


def too_old(chip: Chip) -> str | None:
    """Why the kernels cannot be built for this chip at all, or None."""
    if isinstance(chip.arch, int) and chip.arch < 80:
        return f"the kernels need compute capability 8.0 or later, and this GPU has {chip.arch / 10}"
    return None

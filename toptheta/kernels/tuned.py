"""Applies the tile sizes of a GPU's profile when the kernels are first used on it."""

from functools import cache

import torch

from toptheta.kernels.profile import profile_of


@torch.compiler.assume_constant_result  # files cannot be read while a model is traced
@cache
def use_tiles(device: torch.device) -> None:
    """Set the best tile sizes of the device's profile. They apply to the whole process, so the defaults stay
    if it uses GPUs of several kinds."""
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    profile = profile_of(device) if len(names) == 1 else None
    if profile is None or not profile.tiles:
        return
    from toptheta.kernels.triton import tiles  # needs Triton

    for kind in tiles.KINDS:
        if kind in profile.tiles:
            tiles.use(kind, profile.tiles[kind])

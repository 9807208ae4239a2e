"""Tiles, warps and pipeline stages of the kernels, as they are set, and other ones to try: the best of them
differ from GPU to GPU. What is set serves 16-bit types and head_dim up to 128; the rest keeps its own.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from toptheta.kernels.timing import Call, captured, median_times
from toptheta.kernels.triton import decode as triton_decode
from toptheta.kernels.triton import prefill as triton_prefill

Config = dict[str, Any]
KINDS = ("decode", "int8", "prefill")
TILES = [(32, 2), (64, 4), (128, 4), (128, 8)]  # keys, warps
SET_AT_FIRST = {
    module: {name: value for name, value in vars(module).items() if name in ("TILE", "BLOCK_F", "REGISTERS")}
    for module in (triton_decode, triton_prefill)
}


def product(**choices: list) -> list[Config]:
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


CONFIGS: dict[str, list[Config]] = {
    "decode": product(tile=TILES, num_stages=[2, 3], REGISTERS=[128, 168, 255]),
    "int8": product(tile=TILES[:3], num_stages=[2, 3], BLOCK_F=[64, 128, 256]),
    "prefill": product(
        BLOCK_M=[64, 128], BLOCK_N=[64, 128], num_warps=[4, 8], num_stages=[2, 3], SKIP=[True, False]
    ),
}
# The likeliest of them: what a person has the patience for.
FEW: dict[str, list[Config]] = {
    "decode": product(tile=TILES[1:], num_stages=[3, 2]),
    "int8": product(BLOCK_F=[64, 128, 256]),
    "prefill": [
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    ],
}


def module_of(kind: str) -> Any:
    return triton_prefill if kind == "prefill" else triton_decode


def changes(kind: str, config: Mapping[str, Any]) -> Config:
    """What `config` sets in the kernels' module."""
    module = module_of(kind)
    tile = {name: value for name, value in config.items() if name in module.TILE}
    if "tile" in config:
        tile["BLOCK_N"], tile["num_warps"] = config["tile"]
    rest = {name: value for name, value in config.items() if hasattr(module, name)}
    return rest | {"TILE": module.TILE | tile}


def use(kind: str, config: Mapping[str, Any]) -> Config:
    """Set `config` in the kernels' module from now on; returns what was set there before."""
    module, new = module_of(kind), changes(kind, config)
    before = {name: getattr(module, name) for name in new}
    vars(module).update(new)
    triton_decode.forget_builds()
    return before


def use_first() -> None:
    """Set what the kernels come with."""
    for module, values in SET_AT_FIRST.items():
        vars(module).update(values)
    triton_decode.forget_builds()


@contextmanager
def configured(kind: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Sets `config` in the kernels' module, and restores the old one at the end."""
    before = use(kind, config)
    try:
        yield
    finally:
        vars(module_of(kind)).update(before)
        triton_decode.forget_builds()


def is_set(kind: str, config: Mapping[str, Any]) -> bool:
    """Whether `config` is what is set now."""
    return all(getattr(module_of(kind), name) == value for name, value in changes(kind, config).items())


def tune(kind: str, config: Config, calls: dict[str, Call], expected: dict[str, Any], copies: int) -> Config:
    """`config` with the milliseconds of each call, or with the reason why it was "not run". calls: each
    returns a list of tensors, one for each of `copies`; expected: the first of them, by what is set now."""
    row: Config = config | {"set": is_set(kind, config)}
    try:
        with configured(kind, config):
            for name, call in calls.items():
                found = call()[0].float()
                if not ((found - expected[name]).abs() <= 0.02 + 0.02 * expected[name].abs()).all():
                    raise ValueError("the outputs differ")
            times = median_times({name: captured(call) for name, call in calls.items()}, 12)
        row |= {name: round(ms / copies, 4) for name, ms in times.items()}
    except Exception as error:  # a configuration that does not fit the device must not end the run
        row["not run"] = f"{type(error).__name__}: {error}"[:100]
    return row

"""Building and loading the library of kernel.cpp, and the arguments of its calls.

The library has a plain C interface, so that building it needs only a compiler (no ninja, no Python headers)
and takes seconds.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from toptheta.util.environment import cache_folder

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = "-O3 -march=native -std=c++17 -fopenmp -fno-math-errno -fPIC -shared".split()


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


_INT, _REAL, _AT = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class Call(ctypes.Structure):
    """The arguments of one call, with the fields of `struct Call` in kernel.cpp in the same order."""

    _fields_ = [
        *_fields(_INT, "batch num_heads num_kv_heads q_len kv_len head_dim threads type"),
        *_fields(_AT, "q k v"),
        *_fields(_INT, "q_batch q_head q_row k_batch k_head k_row v_batch v_head v_row"),
        *_fields(_AT, "n mask real key_real chosen"),
        *_fields(_INT, "n_batch mask_batch mask_row real_batch key_real_batch chosen_batch first"),
        *_fields(_INT, "mode post_softmax k_keep sdc vmc capk"),
        *_fields(_REAL, "sdc_scale scale"),
        *_fields(_AT, "theta table"),
        *_fields(_INT, "theta_len table_len"),
        *_fields(_AT, "factor"),
        *_fields(_INT, "factor_batch factor_head"),
        *_fields(_AT, "codes steps key_mean read"),
        *_fields(_INT, "code_bits codes_batch codes_head steps_batch steps_head"),
        *_fields(_AT, "v_sum out"),
        *_fields(_INT, "out_batch out_head out_row"),
        *_fields(_AT, "attn vrow row row_vrows ks"),
        *_fields(_INT, "num_ks"),
        *_fields(_AT, "samples missing missing_theta"),
        *_fields(_INT, "missing_len"),
        *_fields(_AT, "packed sums scores"),
    ]


def _cpu_name() -> str:
    """What -march=native depends on, because different machines may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return platform.machine() + next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.machine() + platform.processor()


def build(compiler: Sequence[str] | None = None, flags: Sequence[str] = FLAGS) -> Path:
    """The library's file, compiled unless the cache holds it. Raises RuntimeError, with the reason as a
    clause, if it cannot be built.

    Two processes may start at once: a lock, which ends with its process, lets one of them compile, and
    renaming makes only complete files visible.
    """
    if sys.platform == "win32":
        raise RuntimeError("it is not made for Windows (WSL has it)")
    if compiler is None:
        compiler = shlex.split(os.environ.get("CXX", ""))
        if not compiler and sys.platform == "darwin":  # what is called g++ there is Apple's clang
            raise RuntimeError("Apple's compiler lacks OpenMP and GCC's vectors: set CXX to Homebrew's g++")
        compiler = compiler or [shutil.which("g++") or shutil.which("c++") or ""]
    if not shutil.which(compiler[0]):
        raise RuntimeError("there is no C++ compiler (install g++, or set CXX)")
    key = "\n".join([SOURCE.read_text(), *compiler, *flags, _cpu_name()])
    folder = cache_folder()
    target = folder / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if target.exists():  # another process was faster
                return target
            print(f"toptheta: compiling the CPU kernel, once, into {target}", file=sys.stderr, flush=True)
            made = target.with_suffix(f".{os.getpid()}")
            command = [*compiler, *flags, str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode != 0:
                errors = [line for line in done.stderr.splitlines() if "error" in line]
                raise RuntimeError(f"{compiler[0]} failed ({(errors or [done.stderr[-200:]])[0].strip()})")
            os.replace(made, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"it could not be built in {folder} ({error})") from error
    return target


@dataclass(frozen=True)
class Library:
    """The loaded library's functions: `void toptheta_run(const Call*)`, `void toptheta_workspace(const Call*,
    int64_t*)`."""

    run: "ctypes._FuncPointer"
    workspace: "ctypes._FuncPointer"


def open_library(path: Path) -> Library:
    handle = ctypes.CDLL(str(path))
    handle.toptheta_run.restype = handle.toptheta_workspace.restype = None
    return Library(handle.toptheta_run, handle.toptheta_workspace)


@cache
def load() -> Library | str:
    """The library, or why there is none. Compiles on first use, and tries that once per process."""
    try:
        return open_library(build())
    except (RuntimeError, OSError) as error:
        return str(error)


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"toptheta computes CPU attention in plain PyTorch, several times slower than by its kernel, because "
        f"{reason}.",
        stacklevel=3,
    )


@torch.compiler.assume_constant_result  # a library cannot be loaded while a model is traced
def ready() -> str | None:
    """Build and load the library at first use; returns None, or why that failed. Warns once if it failed."""
    library = load()
    if isinstance(library, str):
        _warn_once(library)
        return library
    return None

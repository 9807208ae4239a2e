"""The CPU path for float32: building kernel.cpp on first use, and calling it with torch tensors.

Covers loading, the calls and what they support. What is computed is attention/reference.py's to say; how,
kernel.cpp's. The library has a plain C interface: a compiler is all it needs (no ninja, no Python headers),
and it builds in seconds.
"""

import ctypes
import fcntl
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
from torch import Tensor

from toptheta.attention.reference import Counts, LayerSpec, mean_of_visible
from toptheta.attention.rows import Rows
from toptheta.methods.params import DENSE, SDC_METHODS, TOP_THETA
from toptheta.util.environment import cache_folder

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = "-O3 -march=native -std=c++17 -fopenmp -fno-math-errno -fPIC -shared".split()
MAX_HEAD_DIM = 1024
DENSE_SPEC = LayerSpec()


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


_INT, _REAL, _AT = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class Call(ctypes.Structure):
    """The arguments of one call; field for field `struct Call` of kernel.cpp."""

    _fields_ = [
        *_fields(_INT, "batch num_heads num_kv_heads q_len kv_len head_dim threads"),
        *_fields(_AT, "q k v"),
        *_fields(_INT, "q_batch q_head q_row k_batch k_head k_row v_batch v_head v_row"),
        *_fields(_AT, "n mask real key_real chosen"),
        *_fields(_INT, "n_batch mask_batch mask_row real_batch key_real_batch chosen_batch first"),
        *_fields(_INT, "mode post_softmax k_keep sdc vmc capk"),
        *_fields(_REAL, "sdc_scale scale"),
        *_fields(_AT, "theta table"),
        *_fields(_INT, "theta_len table_len"),
        *_fields(_AT, "v_sum out"),
        *_fields(_INT, "out_batch out_head out_row"),
        *_fields(_AT, "attn vrow row ks"),
        *_fields(_INT, "num_ks"),
        *_fields(_AT, "samples missing missing_theta"),
        *_fields(_INT, "missing_len"),
        *_fields(_AT, "packed sums scores"),
    ]


# ---- Building ----


def _cpu_name() -> str:
    """What -march=native depends on: a cache folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return platform.machine() + next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.machine() + platform.processor()


def build(compiler: Sequence[str] | None = None, flags: Sequence[str] = FLAGS) -> Path:
    """The library's file, compiled unless the cache holds it. Raises RuntimeError with half a sentence if it
    cannot be.

    Two processes may start at once: the file appears by renaming, under a lock that ends with its process.
    """
    if compiler is None:
        compiler = shlex.split(os.environ.get("CXX", "")) or [
            shutil.which("g++") or shutil.which("c++") or ""
        ]
    if not shutil.which(compiler[0]):
        raise RuntimeError("there is no C++ compiler (g++ or $CXX)")
    key = "\n".join([SOURCE.read_text(), *compiler, *flags, _cpu_name()])
    folder = cache_folder()
    target = folder / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
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
    """The library, or why there is none. Compiles on first use; nothing is tried twice in a process."""
    try:
        return open_library(build())
    except (RuntimeError, OSError) as error:
        return str(error)


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"toptheta computes CPU attention in plain PyTorch, several times slower than by its kernel, because "
        f"{reason}: install g++ to get the kernel.",
        stacklevel=3,
    )


# ---- Calling ----


def unsupported(q: Tensor, k: Tensor, v: Tensor, rows: Rows, spec: LayerSpec) -> str | None:
    """Why the kernel cannot take this call, or None if it can. Builds nothing."""
    if torch.compiler.is_compiling():
        return "the kernel cannot be traced by torch.compile"
    if not (q.device.type == k.device.type == v.device.type == "cpu"):
        return "the tensors are not on the CPU"
    if not (q.dtype == k.dtype == v.dtype == torch.float32):
        return f"the kernel computes in float32 only, not in {q.dtype}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "the kernel has no backward pass"
    head_dim = q.shape[3]
    if head_dim % 16 or head_dim > MAX_HEAD_DIM or v.shape[3] != head_dim:
        return f"head_dim is {head_dim}, and the kernel does multiples of 16 up to {MAX_HEAD_DIM}"
    return None


def supports(q: Tensor, k: Tensor, v: Tensor, rows: Rows, spec: LayerSpec) -> bool:
    """Whether `attend` takes this call. Builds the library on first use; warns once if that fails."""
    if unsupported(q, k, v, rows, spec) is not None:
        return False
    library = load()
    if isinstance(library, str):
        _warn_once(library)
        return False
    return True


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    spec: LayerSpec,
    scale: float,
    theta: Tensor | None = None,
    table: Tensor | None = None,
    count: bool = False,
    v_sum: Tensor | None = None,
    count_rows: bool = False,
) -> tuple[Tensor, Counts | None]:
    """`sparse_attention` of attention/reference.py, computed by the kernel; the same arguments and results.

    The output is a view of a `[B, Q, H, D]` tensor. v_sum: `[B, H_kv, D]` float32, sum of V over the
    visible keys of the only query row (Q = 1), if the caller has it: with VMC, V is then read only where it
    is kept.
    """
    call = _Prepared(q, k, v, rows, spec, scale, theta, table, v_sum)
    out = call.output()
    counts = None
    if count:
        batch, num_heads, num_kv_heads, kv_len = q.shape[0], q.shape[1], k.shape[1], k.shape[2]
        counts = Counts(
            attn=torch.zeros(batch, num_heads, dtype=torch.int64),
            vrow=torch.zeros(batch, num_kv_heads, kv_len, dtype=torch.int32),
        )
        call.args.attn, call.args.vrow = counts.attn.data_ptr(), counts.vrow.data_ptr()
        if count_rows:
            counts.row = torch.zeros(batch, num_heads, q.shape[2], dtype=torch.int32)
            call.args.row = counts.row.data_ptr()
    call.run()
    return out, counts


@dataclass
class Samples:
    """What a calibration call returns. values: `[len(ks), B, H, Q]` float32, the (K+1)-th largest score or
    weight of each row; missing: likewise R of SDC 'exact', or None. Both are 0 where n <= K or the row was
    not chosen. out: `[B, H, Q, D]`, or None."""

    values: Tensor
    missing: Tensor | None
    out: Tensor | None


def calibrate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    scale: float,
    ks: Sequence[int],
    placement: str,
    output: LayerSpec | None = DENSE_SPEC,
    missing: bool = False,
    missing_theta: Sequence[Tensor] | None = None,
    chosen: Tensor | None = None,
) -> Samples:
    """The calibration samples of every row (DESIGN section 4) and, in the same pass, attention.

    output: the attention to compute meanwhile (mode 3: dense; mode 1: Top-k, with its placement and VMC),
    None for none. missing: also R of what Top-k would drop or, with missing_theta (a `[H, L]` table for
    each K), of what those thresholds would. chosen: `[B or 1, Q]` bool, the rows to sample; None: all.
    """
    if output is not None and output.sparse and output.placement != placement:
        raise ValueError(f"the output is {output.placement}, but the samples are {placement}")
    call = _Prepared(q, k, v, rows, output or DENSE_SPEC, scale, None, None, None)
    args, shape = call.args, (len(ks), q.shape[0], q.shape[1], q.shape[2])
    args.post_softmax = placement == "post-softmax"
    out = None if output is None else call.output()
    args.ks, args.num_ks = call.keep(torch.tensor(tuple(ks))).data_ptr(), len(ks)
    values = torch.zeros(shape)
    args.samples = values.data_ptr()
    rest = torch.zeros(shape) if missing else None
    if rest is not None:
        args.missing = rest.data_ptr()
        if missing_theta is not None:
            tables = call.keep(torch.stack(tuple(missing_theta)).float().contiguous())
            args.missing_theta, args.missing_len = tables.data_ptr(), tables.shape[2]
    if chosen is not None:
        chosen = call.keep(chosen.contiguous())
        args.chosen, args.chosen_batch = chosen.data_ptr(), chosen.stride(0) if chosen.shape[0] > 1 else 0
    call.run()
    return Samples(values, rest, out)


class _Prepared:
    """A Call and the tensors that its addresses point into."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: Rows,
        spec: LayerSpec,
        scale: float,
        theta: Tensor | None,
        table: Tensor | None,
        v_sum: Tensor | None,
    ):
        batch, num_heads, q_len, head_dim = q.shape
        num_kv_heads, kv_len = k.shape[1], k.shape[2]
        # The kernel follows addresses blindly: what does not fit must stop here.
        if v.shape != k.shape or k.shape[0] != batch or k.shape[3] != head_dim or num_heads % num_kv_heads:
            raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
        for name, at, needed in (
            ("theta", theta, spec.sparse and (spec.mode == TOP_THETA or spec.sdc == "exp-threshold")),
            ("table", table, spec.sparse and spec.sdc == "offline-calibrated"),
        ):
            if needed and (at is None or at.shape[0] != num_heads):
                raise ValueError(f"{spec} needs a {name} of shape [{num_heads}, L]")
        self.kept: list[Tensor] = []
        q, k, v = (self.keep(x if x.stride(3) == 1 else x.contiguous()) for x in (q, k, v))
        self.q = q
        first = rows.first
        if first is None:  # without a mask: plain causal, aligned at the first key
            first = -1 if rows.mask is not None else 0 if q_len > 1 else kv_len - 1
        self.args = args = Call(
            batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, torch.get_num_threads(),
            q.data_ptr(), k.data_ptr(), v.data_ptr(), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        )  # fmt: skip
        args.first, args.scale = first, scale
        args.mode, args.k_keep = (spec.mode, spec.k) if spec.sparse else (DENSE, 0)
        args.post_softmax = spec.placement == "post-softmax"
        args.sdc, args.sdc_scale = SDC_METHODS.index(spec.sdc), spec.sdc_scale
        args.capk, args.vmc = spec.capk, spec.vmc
        n = self.keep(rows.n.contiguous())
        args.n, args.n_batch = n.data_ptr(), self.batch_stride(n)
        if rows.mask is not None:
            mask = self.keep(rows.mask if rows.mask.stride(3) == 1 else rows.mask.contiguous())
            args.mask, args.mask_batch, args.mask_row = (
                mask.data_ptr(),
                self.batch_stride(mask),
                mask.stride(2),
            )
        if rows.real is not None:
            real = self.keep(rows.real.contiguous())
            args.real, args.real_batch = real.data_ptr(), self.batch_stride(real)
        if theta is not None:
            theta = self.keep(theta.float().contiguous())
            args.theta, args.theta_len = theta.data_ptr(), theta.shape[1]
        if table is not None:
            table = self.keep(table.float().contiguous())
            args.table, args.table_len = table.data_ptr(), table.shape[1]
        if spec.vmc:
            if v_sum is not None and q_len == 1:
                args.v_sum = self.keep(v_sum.contiguous()).data_ptr()
            elif first < 0:  # which keys a row sees follows no rule: a matrix product
                sums = mean_of_visible(v, rows) * rows.n[:, None, :, None]
                args.v_sum = self.keep(sums.contiguous()).data_ptr()
            elif rows.key_real is not None:
                key_real = self.keep(rows.key_real.contiguous())
                args.key_real, args.key_real_batch = key_real.data_ptr(), self.batch_stride(key_real)

    def keep(self, tensor: Tensor) -> Tensor:
        self.kept.append(tensor)
        return tensor

    @staticmethod
    def batch_stride(tensor: Tensor) -> int:
        return tensor.stride(0) if tensor.shape[0] > 1 else 0

    def output(self) -> Tensor:
        batch, num_heads, q_len, head_dim = self.q.shape
        out = self.q.new_empty(batch, q_len, num_heads, head_dim).transpose(1, 2)
        self.args.out = out.data_ptr()
        self.args.out_batch, self.args.out_head, self.args.out_row = out.stride()[:3]
        return out

    def run(self) -> None:
        library = load()
        if isinstance(library, str):
            raise RuntimeError(f"the CPU kernel is missing: {library}")
        sizes = (ctypes.c_int64 * 3)()
        library.workspace(ctypes.byref(self.args), sizes)
        self.args.packed, self.args.sums, self.args.scores = (
            self.keep(self.q.new_empty(size)).data_ptr() if size else None for size in sizes
        )
        library.run(ctypes.byref(self.args))

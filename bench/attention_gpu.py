"""The attention call on a GPU, for `bench/attention.py --device cuda`: decode and prefill in bfloat16.

Every method is captured as a CUDA graph, so that launching costs what it costs in a graph; the graphs are
replayed one after the other, many times, and the numbers are medians. Keys and values come from memory: a
graph goes over as many copies of them as fill several times the L2 cache. The best dense is the fastest of
torch's scaled_dot_product_attention, FlashAttention and FlashInfer where they are installed, and our kernel
without thresholds. Thresholds come with VMC; "int8 copy" and "int4 copy" are thresholds on weights with
key_copy, whose steps code their own key and find those before coded. Leaves out the rest of the model and the
growing of caches.

Scores are normal with standard deviation 1.5; the query heads of a group share most of their variance, as
heads of a model do (the table says how many V rows a group keeps). Thresholds are calibrated for K=512 on
other draws or, in the sweep, set to keep a fraction f. Bytes are what an ideal kernel moves: K or its copy,
the K rows in question, the V rows kept; their share of the bandwidth of a plain copy is beside them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench.attention import MODELS, Case, calibrated
from toptheta.attention.call import AttentionCall
from toptheta.kernels.drawn import COLD_BYTES, Drawn, Sizes, threshold
from toptheta.kernels.int8_keys import candidate_keys
from toptheta.kernels.timing import Call, captured, median_times
from toptheta.kernels.triton import backend as gpu
from toptheta.methods.key_copy import BITS, STEP_BYTES
from toptheta.methods.params import LayerSpec
from toptheta.methods.state import State
from toptheta.methods.top_k import TopK
from toptheta.methods.top_theta import TopTheta

K = 512
MODEL = "Llama-3-8B"
DTYPE = torch.bfloat16
THETA = LayerSpec(TopTheta(), "pre-softmax", K, "exact", vmc=True)
POST = LayerSpec(TopTheta(), "post-softmax", K, vmc=True)
TOPK = LayerSpec(TopK(), "pre-softmax", K)
FRACTIONS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

PHASES = ("decode", "prefill")


def gpu_cases(quick: bool) -> list[tuple[Case, float | None]]:
    """Cases, each with the fraction to keep or None for calibrated thresholds."""
    if MODEL == "tiny":
        return [(Case(MODEL, phase, 100), None) for phase in PHASES]
    lengths, batches, prefills = (4096, 8192, 32768, 131072), (1, 4, 16), (8192, 16384, 32768)
    if quick:
        lengths, batches, prefills = (4096, 32768), (1, 4), (8192,)
    found: list[tuple[Case, float | None]] = [
        (Case(MODEL, "decode", n, b), None) for b in batches for n in lengths
    ]
    found += [(Case(MODEL, "decode", lengths[-1], 4), f) for f in FRACTIONS]
    found += [(Case(MODEL, "prefill", n), None) for n in prefills]
    return found + [(Case(MODEL, "prefill", prefills[0]), f) for f in FRACTIONS]


class Problem(Drawn):
    """The tensors of one case, and the methods to run on them."""

    def __init__(self, case: Case, fraction: float | None, device: torch.device):
        self.case = case
        sizes = Sizes(*MODELS[case.model], DTYPE, case.phase, case.batch, case.kv_len)
        super().__init__(sizes, device, COLD_BYTES)
        self.bytes_k = self.sizes.bytes_k
        self.thetas = {spec.placement: calibrated(case, spec.placement, device, K) for spec in (THETA, POST)}
        if fraction is not None:
            for placement, theta in self.thetas.items():
                theta[:, K + 1 :] = threshold(fraction, placement, case.kv_len)
        # A state for each copy of K and V, as each layer of a model has its own.
        self.states = {key_copy: [State() for _ in self.k] for key_copy in BITS}

    def method(self, spec: LayerSpec, two_tier: bool = False) -> Call:
        return self.ours(spec, self.thetas.get(spec.placement), two_tier)

    def copied(self, key_copy: str, index: int, count: bool = False) -> AttentionCall:
        spec = replace(POST, method=TopTheta(key_copy=key_copy))
        state = self.states[key_copy][index]
        return self.call(spec, self.thetas[spec.placement], index, count=count, decode=True, state=state)

    def with_copy(self, key_copy: str) -> Call:
        return self.over_copies(lambda index: gpu.run(self.copied(key_copy, index))[0])

    def flash_attention(self) -> Call:
        """Its own layout, `[B, N, H, D]`. Raises ImportError where it is not installed."""
        from flash_attn import flash_attn_func, flash_attn_with_kvcache

        k, v = (x.transpose(2, 3).contiguous() for x in (self.k, self.v))
        q = self.q.transpose(1, 2)
        if self.case.phase == "prefill":
            return lambda: [
                flash_attn_func(q, a, b, softmax_scale=self.scale, causal=True) for a, b in zip(k, v)
            ]
        return lambda: [flash_attn_with_kvcache(q, a, b, softmax_scale=self.scale) for a, b in zip(k, v)]

    def flash_infer(self) -> Call:
        """Its decode over pages, planned beforehand. Raises ImportError where it is not installed."""
        import flashinfer

        if self.case.phase == "prefill":
            raise ImportError("decode only")
        num_heads, num_kv_heads, head_dim = MODELS[self.case.model]
        batch, page = self.case.batch, 16
        pages = self.case.kv_len // page
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=self.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        counts = torch.arange(batch + 1, dtype=torch.int32, device=self.device) * pages
        indices = torch.arange(batch * pages, dtype=torch.int32, device=self.device)
        last = torch.full((batch,), page, dtype=torch.int32, device=self.device)
        wrapper.plan(
            counts, indices, last, num_heads, num_kv_heads, head_dim, page,
            q_data_type=DTYPE, kv_data_type=DTYPE, sm_scale=self.scale,
        )  # fmt: skip
        k, v = (
            x.transpose(2, 3).reshape(len(x), batch * pages, page, num_kv_heads, head_dim)
            for x in (self.k, self.v)
        )
        q = self.q[:, :, 0].contiguous()
        return lambda: [wrapper.run(q, (a, b)) for a, b in zip(k, v)]

    def methods(self) -> dict[str, Callable[[], Call]]:
        found: dict[str, Callable[[], Call]] = {
            "sdpa": lambda: self.dense("sdpa"),
            "flash-attn": self.flash_attention,
            "flashinfer": self.flash_infer,
            "dense, ours": lambda: self.method(LayerSpec()),
            "Top-theta": lambda: self.method(THETA),
            "Top-theta post": lambda: self.method(POST),
        }
        if self.case.phase == "decode":
            found["Top-theta int8 K"] = lambda: self.method(THETA, two_tier=True)
            found["int8 copy"] = lambda: self.with_copy("int8")
            found["int4 copy"] = lambda: self.with_copy("int4")
            found["Top-k"] = lambda: self.method(TOPK)
        return found

    def shares(self) -> dict[str, float]:
        """f of elements, and of V rows that some head of a group keeps; in decode also of K rows that two
        tiers and the copies of K leave in question, and of the V rows kept with these."""
        theta = self.thetas["pre-softmax"]
        _, counts = gpu.run(self.call(THETA, theta, 0, count=True))
        assert counts is not None
        full = float(self.rows.n.sum()) * self.case.batch * self.q.shape[1]
        found = {"kept": float(counts.attn.sum()) / full}
        if self.case.phase == "decode":
            found["kept V rows"] = float((counts.vrow > 0).float().mean())
            candidates = candidate_keys(self.q, self.int8[0], theta, self.rows, self.scale)
            found["K rows in question"] = float(candidates.float().mean())
            for key_copy in BITS:
                _, counts = gpu.run(self.copied(key_copy, 0, count=True))
                assert counts is not None and counts.keys is not None
                found[f"K rows, {key_copy} copy"] = float(counts.keys.float().mean()) / self.case.kv_len
                found[f"V rows, {key_copy} copy"] = float((counts.vrow > 0).float().mean())
        return found

    def ideal_bytes(self, shares: dict[str, float]) -> dict[str, float]:
        """What a decode step has to move, for the methods where that is plain."""
        f, c, dense = shares["kept V rows"], shares["K rows in question"], 2 * self.bytes_k
        head_dim = self.q.shape[3]
        found = dict.fromkeys(("sdpa", "flash-attn", "flashinfer", "dense, ours"), float(dense))
        found["Top-theta"] = self.bytes_k * (1 + f)
        found["Top-theta int8 K"] = self.bytes_k * ((1 + 8 / head_dim) / 2 + c + f)
        for key_copy, bits in BITS.items():
            coded = (bits / 8 + STEP_BYTES / head_dim) / self.k.element_size()
            rows = shares[f"K rows, {key_copy} copy"] + shares[f"V rows, {key_copy} copy"]
            found[f"{key_copy} copy"] = self.bytes_k * (coded + rows)
        return found


def be_tiny() -> None:
    """From now on cases are so small that the interpreter computes them: to try the scripts without a GPU."""
    MODELS["tiny"] = (4, 2, 32)
    globals().update(
        K=16,
        MODEL="tiny",
        DTYPE=torch.float16,
        COLD_BYTES=0,
        THETA=replace(THETA, k=16),
        POST=replace(POST, k=16),
        TOPK=replace(TOPK, k=16),
    )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a plain copy of 1 GiB moves, read and written."""
    source = torch.empty(1 << (30 if device.type == "cuda" else 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    graph = captured(lambda: target.copy_(source))
    return 2 * source.numel() / (median_times({"copy": graph}, 20)["copy"] / 1e3)


def measure(case: Case, fraction: float | None, device: torch.device, bandwidth: float) -> dict[str, Any]:
    """Of every method: ms, ratio to the best dense, GB moved and share of `bandwidth`; or why not run."""
    problem = Problem(case, fraction, device)
    graphs, cells = {}, {}
    for name, make in problem.methods().items():
        try:
            graphs[name] = captured(make())
        except ImportError:
            cells[name] = {"not run": "not installed"}
        except Exception as error:  # a baseline's own limits must not end the table
            if "dense, ours" in graphs or name == "dense, ours":
                raise
            cells[name] = {"not run": f"{type(error).__name__}: {error}"[:200]}
    copies = len(problem.k)
    times = {name: ms / copies for name, ms in median_times(graphs, 30).items()}
    best = min(times[name] for name in ("sdpa", "flash-attn", "flashinfer", "dense, ours") if name in times)
    shares = problem.shares()
    moved = problem.ideal_bytes(shares) if case.phase == "decode" else {}
    for name, ms in times.items():
        cells[name] = {"ms": round(ms, 4), "of best dense": round(ms / best, 3)}
        if name in moved:
            cells[name]["GB"] = round(moved[name] / 1e9, 3)
            cells[name]["of copy bandwidth"] = round(moved[name] / (ms / 1e3) / bandwidth, 3)
    return {"shares": {name: round(value, 5) for name, value in shares.items()}, "methods": cells}


def table(
    quick: bool, device: torch.device, phases: tuple[str, ...] = PHASES, batch: int | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Print and return all rows; on a machine without a GPU every row says "not run"."""
    there = torch.cuda.is_available() or MODEL == "tiny"
    bandwidth = copy_bandwidth(device) if there else 0.0
    about = {
        "device": torch.cuda.get_device_name(device) if torch.cuda.is_available() else "none",
        "dtype": str(DTYPE).removeprefix("torch."),
        "K": K,
        "copy bandwidth GB/s": round(bandwidth / 1e9) if there else "not run",
    }
    print("  ".join(f"{key}: {value}" for key, value in about.items()))
    print("ms (of the best dense's time; of the copy bandwidth)\n")
    results = []
    for case, fraction in gpu_cases(quick):
        if case.phase not in phases or batch not in (None, case.batch):
            continue
        thresholds = "calibrated" if fraction is None else f"f={fraction}"
        label = f"{case.phase:8}batch {case.batch:<3} kv_len {case.kv_len:<7} {thresholds}"
        row: dict[str, Any] = {"phase": case.phase, "batch": case.batch, "kv_len": case.kv_len}
        row["thresholds"] = thresholds
        if not there:
            row["not run"] = "this machine shows no CUDA GPU"
            print(f"{label}: not run ({row['not run']})")
        else:
            with torch.no_grad():
                row |= measure(case, fraction, device, bandwidth)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(label, " ".join(f"{name} {value:.4f}" for name, value in row["shares"].items()))
            for name, cell in row["methods"].items():
                print(f"  {name:18}" + ", ".join(f"{key} {value}" for key, value in cell.items()), flush=True)
        results.append(row)
    return about, results

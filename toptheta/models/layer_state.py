"""What a layer remembers: its spec, tables, calibration and statistics, as a child module of the attention
layer, whatever the family. What all layers of a model share is a ModelState.

The layer's own forward is left as it is: hooks of it look at the cache before it is updated (value_sum.py).
"""

from threading import RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from toptheta.attention.call import AttentionCall
from toptheta.calibration.sampler import RowSampler
from toptheta.calibration.tables import CalibrationTables
from toptheta.methods.base import ValueNorms
from toptheta.methods.params import AttentionParams, LayerSpec
from toptheta.methods.state import State
from toptheta.models.cache import TopThetaLayer
from toptheta.models.cache_state import state_of_layer
from toptheta.models.recorder import Recorder
from toptheta.models.tensor_parallel import local_heads
from toptheta.models.value_sum import VSum
from toptheta.models.when_slower import Chooser, by_kernels, is_dense, sparse_way
from toptheta.util.errors import UsageError


class ModelState:
    """What the layers of one model share: the parameters as set_params left them, and the tables in use.
    in_prompt: all rows that come belong to a prompt, even a single one behind others; in_steps: all are
    decode steps, even several in one call. extremes: takes from each sparse or calibrating call its scale and
    the lowest and highest number of its queries and new keys, see finite.py; None: nobody asks. sparse_calls:
    of sparse layers while `when_slower` was dense, not in compiled models; dense_calls: those of them that
    were computed dense."""

    def __init__(self) -> None:
        self.params = AttentionParams()
        self.tables: CalibrationTables | None = None
        self.recorder: Recorder | None = None
        self.prompt_hooks: list[Any] = []  # while a calibration keeps prompts
        self.in_prompt = self.in_steps = False
        self.extremes: list[tuple[float, Tensor, Tensor, Tensor, Tensor]] | None = None
        self.sparse_calls = self.dense_calls = 0

    def end_prompt_hooks(self) -> None:
        """Stop keeping the prompts of a calibration."""
        while self.prompt_hooks:
            self.prompt_hooks.pop().remove()

    def is_decode(self, q_len: int, kv_len: int, first: int | None) -> bool:
        """Whether the `q_len` rows of a call over `kv_len` keys, the first of which lies at key `first`, if
        that is known, are decode steps: a single row after others is, unless it is the last chunk of a
        prompt. Where the length of a static cache is known on the device only, every single row is."""
        return self.in_steps or q_len == 1 and kv_len > 1 and first != 0 and not self.in_prompt


class CallState:
    """What a layer knows during a call: its cache, and the sum of V or the int8 copy that comes with it; and
    how often it was called, and what `when_slower` chose. A plain object: setting attributes of a module
    takes microseconds, in every layer."""

    def __init__(self) -> None:
        self.calls = 0  # of our attention function, to prove that a patched model runs it
        self.due = False  # between the layer's start and the call of our attention function
        self.cache: Cache | None = None
        self.extras: VSum | TopThetaLayer | None = None
        self.chooser = Chooser()
        # Threads can share a model, each with its own cache: who computes this layer.
        self.lock = RLock()
        self.owner: int | None = None


class LayerState(nn.Module):
    """theta, sdc_table: non-persistent float32 buffers `[H, L]` by row length n, looked up at min(n, L - 1).
    base: the name of the attention implementation that computes the layer when it is plainly dense. heads:
    the query heads that this process computes, of the mesh that shares them out, if any."""

    theta: Tensor | None
    sdc_table: Tensor | None

    def __init__(self, layer_idx: int, shared: ModelState, base: str = "sdpa", mesh: Any = None):
        super().__init__()
        self.layer_idx, self.shared, self.base, self.mesh = layer_idx, shared, base, mesh
        self.spec = LayerSpec()
        self.calibration: RowSampler | None = None
        self.values: ValueNorms | None = None  # for value-aware thresholds
        self.now = CallState()
        self._sums: WeakKeyDictionary[Any, VSum] = WeakKeyDictionary()  # by cache layer
        self.register_buffer("theta", None, persistent=False)
        self.register_buffer("sdc_table", None, persistent=False)

    @property
    def recorder(self) -> Recorder | None:
        return self.shared.recorder

    @property
    def ours(self) -> bool:
        """Whether the layer needs our attention function."""
        return self.spec.sparse or self.calibration is not None or self.recorder is not None

    def begin(self, cache: Cache | None) -> None:
        """Inspect the cache before it is updated, and check that its sum of V still matches its values. Until
        `end`, other threads wait."""
        now = self.now
        if not torch.compiler.is_compiling():
            now.lock.acquire()
            if now.owner is not None:  # a call of this thread that was interrupted before its end
                now.lock.release()
            now.owner = get_ident()
        now.cache, now.extras, now.due = cache, None, self.ours
        layers = getattr(cache, "layers", ())
        vmc = self.spec.sparse and self.spec.vmc and self.calibration is None
        if self.layer_idx >= len(layers):
            return
        layer = layers[self.layer_idx]
        copies = self.spec.sparse and self.spec.method.key_bits and self.calibration is None
        if copies and not getattr(layer, "is_sliding", False):
            self.method_state()  # before the cache is updated: a static one counts what comes
        if isinstance(layer, TopThetaLayer):
            layer.summing = vmc
            weighs = self.spec.sparse and self.spec.method.needs_values and self.calibration is None
            layer.weighing = self.values if weighs else None
            now.extras = layer
        elif vmc and not torch.compiler.is_compiling():
            if layer not in self._sums:
                self._sums[layer] = VSum()
            now.extras = self._sums[layer]
            now.extras.check(layer.values)

    def end(self, finished: bool = True) -> None:
        """Drop the references to the cache, which must not outlive its owner. finished: False after an error.
        Raises UsageError if the layer did not compute its attention with top_theta although it should
        have."""
        now = self.now
        if now.owner is not None and now.owner != get_ident():
            return  # this call failed before its `begin`, while another thread computes
        due, now.due = now.due, False
        now.cache = now.extras = None
        if now.owner is not None:
            now.owner = None
            now.lock.release()
        if due and finished:
            raise UsageError(
                f"layer {self.layer_idx} did not compute its attention with top_theta, although set_params "
                "selected it: call model.set_attn_implementation('top_theta'), or restore_model(model)."
            )

    def attach(self, layer: nn.Module) -> None:
        """Attach this state to an attention layer, as a child module with hooks."""
        layer.toptheta = self
        self.heads = local_heads(layer, self.mesh)
        self.hooks = (
            layer.register_forward_pre_hook(_begin, with_kwargs=True),
            layer.register_forward_hook(_end, always_call=True),
        )

    def detach(self, layer: nn.Module) -> None:
        """The inverse of `attach`."""
        for hook in self.hooks:
            hook.remove()
        del layer.toptheta

    def complete(self, call: AttentionCall) -> None:
        """Add to a call the layer's tables, on its device, and what the cache stores besides K and V."""
        tables, device = self._buffers, call.q.device
        for name, table in tables.items():
            if table is not None and table.device != device:  # an offloaded layer computes elsewhere
                setattr(self, name, table.to(device))
        if self.values is not None and self.values.gram.device != device:
            parts = (self.values.gram, self.values.mean, self.values.scale)
            self.values = ValueNorms(*(part.to(device) for part in parts))
        call.theta, call.sdc_table, call.values = tables["theta"], tables["sdc_table"], self.values
        extras = self.now.extras
        if extras is not None:
            call.int8 = extras.int8
            if self.spec.method.needs_values:
                call.factor = extras.factor
            call.v_sum = extras.at(call.v, call.rows) if self.spec.vmc else None
        by_kernel = call.factor is not None and call.kernel is not None and not call.kernel.key_bits
        if self.spec.method.has_state and not by_kernel:  # else the cache holds all of it
            call.state = self.method_state()
            if self.spec.method.needs_prompt and call.decode and not call.state.seen_by(self.spec.method):
                raise UsageError(
                    f"{self.spec.method.title} has not seen the prompt in this cache, and cannot rank its "
                    "keys: compute the prompt again, with set_params before it."
                )
            if call.state.room and self.spec.method.key_bits and not call.decode:
                call.key_codes()  # so that decode steps, which may be compiled, only add to it

    def way(self, call: AttentionCall) -> str | None:
        """How to compute a call if `when_slower` allows a choice; None: according to the call. See
        when_slower.py."""
        if self.shared.params.when_slower != "dense":
            return None
        chooser = self.now.chooser
        if torch.compiler.is_compiling():
            asked, (batch, num_heads, q_len, head_dim) = sparse_way(call), call.q.shape
            if asked is None or q_len > 1 or not by_kernels(call):
                return None
            shape = (batch, num_heads, *call.k.shape[1:3], head_dim)
            masked = call.rows.mask is not None
            return chooser.traced(call.q.device, call.q.dtype, shape, masked, asked, self.spec.k)
        way = chooser.way(call)
        self.shared.sparse_calls += 1
        self.shared.dense_calls += is_dense(way)
        return way

    def method_state(self) -> State:
        """The method's state for this layer of the current call's cache."""
        return state_of_layer(self.now.cache, self.layer_idx)

    def _apply(self, fn, recurse: bool = True):
        """Move with the model, but stay float32: rounding a threshold to 16 bits would change the kept
        keys."""
        for name, table in self._buffers.items():
            if table is not None:
                self._buffers[name] = table.to(fn(table[:0]).device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Excludes what belongs to a cache: a copy starts without one."""
        return self.__dict__ | {"now": None, "_sums": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.now, self._sums = CallState(), WeakKeyDictionary()


def _begin(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    layer.toptheta.begin(kwargs.get("past_key_values"))  # type: ignore[operator, union-attr]


def _end(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    layer.toptheta.end(output is not None)  # type: ignore[operator, union-attr]

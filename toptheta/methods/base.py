"""The base class of methods, the part of an attention call that a method sees, and the registry of methods.

A method is one frozen dataclass in its own file: name, options (its fields), rule, defaults and source.
Flags, labels, product folders, plots and tables come from the registry. This covers selection only: SDC and
VMC are in compensation.py, thresholds in calibration/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from enum import IntEnum
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from toptheta import methods
from toptheta.util.errors import UsageError
from toptheta.util.options import WORDS, check_type

if TYPE_CHECKING:  # importing torch takes seconds, and flags need this file
    from torch import Tensor

    from toptheta.methods.state import State

NEG_INF = float("-inf")
TINY = 1e-30  # in place of a sum of 0, of a row that sees nothing
LARGEST_EXPONENT = 80.0  # of a sink above a row's maximum: exp is finite in float32


class Selection(IntEnum):
    """The kinds of selection that kernels support; the numbers are those of kernel.cpp and the operators."""

    THRESHOLD = 0  # keys above a threshold, else the row's largest
    LARGEST = 1  # the K largest
    ALL = 3  # every visible key


@dataclass(frozen=True)
class KernelSpec:
    """What a kernel computes for one layer (DESIGN sections 2-3). k <= 0, or Selection.ALL: dense."""

    selection: Selection = Selection.ALL
    placement: str = "none"
    k: int = 0
    sdc: str = "none"
    sdc_scale: float = 1.0
    vmc: bool = False
    capk: bool = False
    weighed: bool = False  # compare the weight times the factor of the key's value
    key_bits: int = 0  # of the quantized copy of K that selects the K rows to read; 0: all are read

    @property
    def sparse(self) -> bool:
        return self.selection != Selection.ALL and self.placement != "none" and self.k > 0


@dataclass
class RowTables:
    """Calibrated values for the rows of one block, `[B or 1, H, R, 1]`: theta, -inf where n <= K; sdc, the
    missing part of the softmax denominator, 0 where n <= K. None where the layer has no table."""

    theta: Tensor | None = None
    sdc: Tensor | None = None


@dataclass(frozen=True)
class ValueNorms:
    """How much a row of V can change the output, for each head: the norm of W_o (v - mean), relative to the
    head's mean of that norm.

    gram: `[H, D, D]`, W_o^T W_o of the head's part of the output projection; mean: `[H_kv, D]`, the mean of
    V; scale: `[H]`, the mean norm; both as calibrated. All are float32.
    """

    gram: Tensor
    mean: Tensor
    scale: Tensor

    def of(self, v: Tensor) -> Tensor:
        """The relative norms `[B, H, N]`, float32, of the rows of V `[B, H_kv, N, D]`."""
        group = self.gram.shape[0] // v.shape[1]
        centred = (v.float() - self.mean[:, None]).repeat_interleave(group, dim=1)
        squares = (centred @ self.gram * centred).sum(dim=-1).clamp_min(0.0)
        return squares.sqrt() / self.scale[:, None]


@dataclass
class Block:
    """Rows start to start + R of one attention call, as a method sees them.

    x: `[B, H, R, E]`, what is compared, over the first E keys of the call: scores, or weights with placement
    post-softmax; -inf where not visible.
    row_max: `[B, H, R, 1]`, the largest x of each row.
    n: `[B or 1, R]`, number of visible keys of each row.
    real: `[B or 1, R]` bool, rows that are not padding, or None (all).
    budget: the layer's K.
    q: `[B, H, R, D]`, scaled queries; k, v: `[B, H_kv, E, D]`, keys and values; q and k are float32.
    last: whether these are the last rows of the call.
    state: the method's state; None for a method without.
    own: whether the last R of the E keys are the rows' own keys.
    values: the norms of value-aware thresholds, where calibrated; factor: `[B, H, E]`, the relative norms,
    where the cache has them.
    decode: whether the rows are decode steps; else they belong to a prompt.
    are_weights: whether x contains weights.
    longest: `[B or 1]`, visible keys of the longest row of the call.
    sinks: `[H]`, scores that are in the denominators of all rows, or None.
    share: `[B, H, R, 1]`, the sum of a row's weights without that of the sink, set once they are computed;
    None (no sinks): 1.
    softcap: see AttentionCall.
    read: `[B, H, R, E]` bool, keys whose scores are computed from K; for the others x has estimates. None:
    all.
    """

    x: Tensor
    row_max: Tensor
    n: Tensor
    real: Tensor | None
    start: int
    budget: int
    q: Tensor | None = None
    k: Tensor | None = None
    last: bool = True
    state: State | None = None
    v: Tensor | None = None
    own: bool = False
    values: ValueNorms | None = None
    factor: Tensor | None = None
    decode: bool = False
    are_weights: bool = False
    longest: Tensor | None = None
    sinks: Tensor | None = None
    share: Tensor | None = None
    softcap: float | None = None
    read: Tensor | None = None

    @property
    def visible(self) -> Tensor:
        """`[B, H, R, E]` bool."""
        return self.x > NEG_INF

    @property
    def weights(self) -> Tensor:
        """The weights of dense attention, `[B, H, R, E]`: 0 where not visible."""
        if self.are_weights:
            return self.x.clamp_min(0.0)
        exps = (self.x - self.row_max).exp()
        return exps / self.with_sink(exps.sum(dim=-1, keepdim=True)).clamp_min(TINY)

    def with_sink(self, denominator: Tensor) -> Tensor:
        """A sum of exp(scores - row_max) `[B, H, R, 1]`, plus the sink's exp."""
        if self.sinks is None:
            return denominator
        above = self.sinks.float()[:, None, None] - self.row_max
        return denominator + above.clamp(max=LARGEST_EXPONENT).exp()


@dataclass(frozen=True)
class Method:
    """Base class of all methods; the fields are the options, each with a default.

    name: in flags, files and folders; title: in tables and plots; source: reference for the rule.
    mode: the published project's number, None for a method that it does not have.
    is_dense: keeps everything.
    uses_k: `--k` is its budget, and rows with n <= K are left dense; otherwise only its options matter.
    needs_thresholds: reads calibrated thresholds.
    aims_at_k: keeps about K elements, so that kept elements are reported relative to K.
    has_state: `keep` reads and changes `block.state`.
    needs_values: reads `block.values`, which are calibrated with the thresholds.
    key_bits: bits of the quantized copy of K that it reads in decode steps (key_copy.py); 0: none.
    needs_weights: it compares weights only, so that the placement has to be post-softmax.
    samples_sdc: it drops the same from prompts as in decode, so that SDC can be calibrated on prompts.
    decode_only: prompts are dense, so that it differs from dense attention in generated tokens only.
    by_row: what a decode step keeps does not depend on earlier steps; otherwise several steps in one call are
    computed one by one.
    needs_prompt: its state comes from the prompt, which it has to see.
    prompt_needs_k: the state that comes from a dense prompt depends on K.
    by_call: what a prompt row keeps depends on the other rows of its call, so that prompts cannot be split at
    any position.
    reads_all_keys: it needs the score of every visible key; otherwise it reads only the K rows that it keeps.
    stores: what it stores in addition to the cache, in bytes for each token and KV head.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str] = ""
    mode: ClassVar[int | None] = None
    is_dense: ClassVar[bool] = False
    uses_k: ClassVar[bool] = True
    needs_thresholds: ClassVar[bool] = False
    aims_at_k: ClassVar[bool] = False
    has_state: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False
    key_bits: ClassVar[int] = 0
    needs_weights: ClassVar[bool] = False
    samples_sdc: ClassVar[bool] = True
    reads_all_keys: ClassVar[bool] = True
    stores: ClassVar[str] = "nothing"
    decode_only: ClassVar[bool] = False
    by_row: ClassVar[bool] = True
    needs_prompt: ClassVar[bool] = False
    prompt_needs_k: ClassVar[bool] = True
    by_call: ClassVar[bool] = False

    def leaves_dense(self, layer: int) -> bool:
        """Whether the layer of this index is dense, whatever its K."""
        return False

    def keep(self, block: Block, tables: RowTables) -> Tensor:
        """`[B, H, R, E]` bool: the keys that each row keeps. Must be False where not visible. The caller
        overwrites rows that are left dense (n <= K)."""
        raise NotImplementedError

    def estimate(self, block: Block, tables: RowTables, placement: str) -> None:
        """Called before the softmax of decode steps: a method that does not compute all scores from K puts
        estimates into `block.x` and sets `block.read`."""

    def extra_bytes(self, n: Tensor, kept: Tensor, head_dim: int, element_size: int) -> Tensor:
        """Bytes per KV head that a decode step reads in addition to K and V, `[B, 1]` or `[B, H_kv]` int64.
        n: `[B, 1]` visible keys; kept: `[B, H_kv, G]` keys that the heads of each group keep; element_size:
        bytes of a number in the cache."""
        return n * 0

    def rows_of_block(self, rows: int) -> int:
        """The number of rows of a block, given that `rows` is a good size."""
        return rows

    def prompt_rows(self, budget: int, state: State | None) -> int | None:
        """Of a method whose prompts are dense: the number of last rows of a part of a prompt that it has to
        see, while the part is computed without it; None: all of them."""
        return None if self.needs_prompt else 0

    def after(self, block: Block, weights: Tensor) -> None:
        """Update `block.state` from the rows' final weights `[B, H, R, E]`, which are 0 where not kept."""

    def kernel_spec(self) -> KernelSpec | None:
        """The selection in the form that kernels support, without the layer's parameters; None: reference
        path only."""
        return None

    def while_calibrating(self, tac: bool) -> Method:
        """The method that attention computes while thresholds are calibrated. tac: top-k at calibration."""
        return registered()["dense"]()

    def for_sdc_samples(self) -> Method:
        """The selection whose missing denominator is sampled in calibration."""
        return self

    def check(self, flag: Callable[[str], str] = str) -> None:
        """Raise UsageError for an invalid option value; its type is right (`check_method`)."""

    def check_k(self, k: int, flag: Callable[[str], str] = str) -> None:
        """Raise UsageError for a K, above 0, that does not go with the options."""

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @property
    def spec(self) -> str:
        """In the form of `--method`: 'top_k', 'streaming_llm:sinks=8'."""
        options = ",".join(f"{name}={value}" for name, value in self.options().items())
        return f"{self.name}:{options}" if options else self.name

    def label(self, k: int | None, more: Sequence[str] = ()) -> str:
        """Its name in tables: 'dense', 'Top-k K=64', 'StreamingLLM sinks=8 K=64'. more: further parts."""
        parts = [self.title, *(self.option_label(*option) for option in self.options().items()), *more]
        return " ".join([*parts, f"K={k}"] if self.uses_k and k is not None else parts)

    @staticmethod
    def option_label(name: str, value: Any) -> str:
        return name if value is True else f"{name}={value}"

    def folder(self, k: int | None, more: Sequence[str] = ()) -> str:
        """Its folder in a run of several cells: 'mode0_k64', 'streaming_llm_sinks8_k64'. more: further
        parts."""
        if self.mode is not None and not self.options() and not more:
            parts = [f"mode{self.mode}"]
        else:
            own = (name if v is True else f"{name}{v}" for name, v in self.options().items())
            parts = [self.name, *own, *more]
        return "_".join([*parts, f"k{k}"] if self.uses_k and k is not None else parts)


REGISTRY: dict[str, type[Method]] = {}
AnyMethod = TypeVar("AnyMethod", bound=type[Method])


def register(method: AnyMethod) -> AnyMethod:
    """Class decorator: adds a method to the registry. Raises ValueError if another method has its name or its
    published number."""
    for other in REGISTRY.values():
        if other.name == method.name or method.mode is not None and other.mode == method.mode:
            raise ValueError(f"{method.__name__} has the name or published number of {other.__name__}")
    REGISTRY[method.name] = method
    return method


@cache
def _import_methods() -> None:
    for module in iter_modules(methods.__path__):
        import_module(f"{methods.__name__}.{module.name}")


def registered() -> dict[str, type[Method]]:
    """The methods by name: those of this package, and those registered elsewhere."""
    _import_methods()
    return REGISTRY


def names() -> list[str]:
    """The registered methods, those with a published number first."""
    known = registered()
    return sorted(known, key=lambda name: (known[name].mode is None, known[name].mode, name))


def of_mode(mode: int) -> Method:
    """The method with a published number; dense for any other number."""
    known = registered()
    for method in known.values():
        if method.mode == mode:
            return method()
    return known["dense"]()


def parse_method(text: str, flag: str = "method", also: Sequence[str] = ()) -> Method:
    """A method from 'NAME[:option=value[,option=value...]]'. Raises UsageError, naming `flag`, for an unknown
    name or option, or an invalid value. also: other options that the error message names."""
    name, _, rest = text.strip().partition(":")
    known_methods = registered()
    if name not in known_methods:
        near = get_close_matches(name, known_methods, n=2, cutoff=0.5)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UsageError(f"{flag} is {name!r}: choose one of {', '.join(names())}{hint}.")
    kind = known_methods[name]
    known = {f.name: f for f in fields(kind)}
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        option, equals, value = part.partition("=")
        if option not in known:
            of_it = f"its options are {', '.join(known)}" if known else "it has none"
            of_all = f"; of all methods: {', '.join(also)}" if also and not kind.is_dense else ""
            raise UsageError(f"{flag} {name} has no option {option!r}: {of_it}{of_all}.")
        shown = f"{flag} {name}:{option}"
        if option in options:
            raise UsageError(f"{shown} is given twice: give it once.")
        options[option] = option_value(shown, known[option].default, value if equals else None)
    method = kind(**options)
    check_method(method, lambda option: f"{flag} {name}:{option}")
    return method


def check_method(method: Method, flag: Callable[[str], str] = str) -> None:
    """Raise UsageError for an option whose value is not of its default's type, or is invalid."""
    for f in fields(method):
        if type(f.default) in WORDS:
            check_type(flag(f.name), getattr(method, f.name), type(f.default))
    method.check(flag)


def split_methods(text: str) -> list[str]:
    """The methods of a comma-separated list: 'top_k,streaming_llm:sinks=8,dense'. A part that is not a
    method's name and has no colon is another option of the method before it."""
    parts: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if parts and part not in registered() and ":" not in part and ("=" in part or ":" in parts[-1]):
            parts[-1] += ("," if ":" in parts[-1] else ":") + part
        else:
            parts.append(part)
    return parts


def option_value(name: str, default: Any, text: str | None) -> Any:
    """An option's value, of the type of its default; a bool option without a value is True."""
    if isinstance(default, bool):
        words = {None: True, "true": True, "1": True, "false": False, "0": False}
        word = None if text is None else text.lower()
        if word not in words:
            raise UsageError(f"{name} is {text!r}: give true or false.")
        return words[word]
    try:
        return type(default)(text if text is not None else "")
    except ValueError:
        raise UsageError(f"{name} is {text!r}: give {WORDS.get(type(default), 'a value')}.") from None

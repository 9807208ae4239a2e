"""What a cell computes: a method as `--method` names it, with the settings that it has for itself alone."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from toptheta.methods.base import Method, option_value, parse_method, registered, split_methods
from toptheta.methods.params import AttentionParams, MethodOptions
from toptheta.util.errors import UsageError

# The flags that a method can have for itself. Tables are read for all methods.
OF_FLAGS = {f.name: f.default for f in fields(MethodOptions) if f.name != "calib_load_path"}
# Those that only thresholds have. The others of calibration apply to SDC's table, too.
OF_THRESHOLDS = ("calib_tac", "calib_to", "calib_layers", "calib_add_sigma")


@dataclass(frozen=True)
class Chosen:
    """A method, and the flags that `given` sets for it alone: name and value, in the order of the flags."""

    method: Method
    given: tuple[tuple[str, Any], ...] = ()

    @property
    def spec(self) -> str:
        """In the form of `--method`: 'top_k', 'top_theta:key_copy=int4,placement=post-softmax'."""
        given = ",".join(f"{name}={value}" for name, value in self.given)
        if not given:
            return self.method.spec
        return f"{self.method.spec}{',' if ':' in self.method.spec else ':'}{given}"


def parse_chosen(text: str, flag: str = "--method") -> Chosen:
    """A method from 'NAME[:option=value[,option=value...]]', whose options are the method's own, and those of
    OF_FLAGS. Raises UsageError, naming `flag`, for an unknown name or option, an invalid value, or one that
    has no effect on the method."""
    name, _, rest = text.strip().partition(":")
    kind, given, own = registered().get(name), dict[str, Any](), list[str]()
    for part in rest.split(",") if kind is not None and not kind.is_dense else []:
        option, equals, value = part.strip().partition("=")
        if option not in OF_FLAGS:
            own.append(part)
            continue
        shown = f"{flag} {name}:{option}"
        if option in given:
            raise UsageError(f"{shown} is given twice: give it once.")
        given[option] = option_value(shown, OF_FLAGS[option], value if equals else None)
        if option in OF_THRESHOLDS and kind is not None and not kind.needs_thresholds:
            raise UsageError(f"{shown} applies to calibrated thresholds only: leave it out.")
    method = parse_method(f"{name}:{','.join(own)}" if given else text, flag, tuple(OF_FLAGS))
    return Chosen(method, tuple((option, given[option]) for option in OF_FLAGS if option in given))


def parse_all_chosen(text: str, flag: str = "--method") -> tuple[Chosen, ...]:
    """Methods from a comma-separated list, see `split_methods`. Raises UsageError as `parse_chosen`."""
    return tuple(parse_chosen(part, flag) for part in split_methods(text))


@dataclass(frozen=True)
class CellParams(AttentionParams):
    """The parameters of a cell. given: names of those that `--method` sets for the method alone."""

    given: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """With what the method has for itself: 'Top-k sdc=exact vmc K=64'; a budget has weights only."""
        implied = ("calib_to", "placement") if self.calib_to == "budget" else ("calib_to",)
        return self.label_with(self._shown(implied))

    @property
    def k(self) -> int | None:
        """None if the cell is dense, or its method has no K."""
        assert isinstance(self.K, int)
        return self.K if self.sparse and self.method.uses_k else None

    @property
    def folder(self) -> str:
        """Its folder in a run of several: 'mode3', 'mode0_k64', 'top_k_sdcexact_vmc_k64'."""
        return self.method.folder(self.k, [part.replace("=", "") for part in self._shown()])

    def flag(self, name: str) -> str:
        """How the user gave a parameter."""
        return f"--method {self.method.name}:{name}" if name in self.given else f"--{name.lower()}"

    def _shown(self, without: Sequence[str] = ()) -> list[str]:
        names = [name for name in self.given if name not in without] if self.sparse else []
        return [Method.option_label(name, getattr(self, name)) for name in names]

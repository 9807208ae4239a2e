"""A script's settings: one typed, frozen object, checked once, before anything is loaded."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from toptheta.eval.generation_flags import HUMANEVAL, check_generation
from toptheta.eval.tasks.lm_eval_tasks import BUNDLED_TASK
from toptheta.methods.params import DENSE, PLACEMENTS, TOP_K, TOP_THETA, AttentionParams, check, method_name
from toptheta.util.errors import UsageError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """What both jobs share. mode, k: every pair of them is one cell of the table. layerk: K of single
    layers. calib_task: the Q&A task to calibrate on; None: what is evaluated."""

    llama: str = "smollm2"
    mode: tuple[int, ...] = (DENSE,)
    k: tuple[int, ...] = (256,)
    layerk: dict[int, int] = field(default_factory=dict)
    placement: str = "pre-softmax"
    sdc: str = "none"
    sdc_scale: float = 1.0
    vmc: bool = False
    capk: bool = False
    calib_tac: bool = False
    calib_add_sigma: float = 0.0
    calib_sample_frac: float = 0.1
    calib_load_path: str = ""
    calib_samples: float | None = None
    calib_task: str | None = None
    calib_interp: str = "nearest"
    calib_smooth: int = 0
    calib_dump_samples: bool = False
    calibrate_only: bool = False
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 1
    seed: int = 42
    output_dir: str = "products"
    apply_chat_template: bool = False
    statistics: bool = True
    vrow_popularity: bool = False
    effective_k: bool = False

    def cells(self) -> list[AttentionParams]:
        """The settings of each cell: every mode with every K; dense has no K and comes once."""
        cells = []
        for mode in dict.fromkeys(self.mode):
            sparse = mode in (TOP_THETA, TOP_K) and self.placement != "none"
            for k in dict.fromkeys(self.k) if sparse else [self.k[0]]:
                cells.append(self._cell(mode, k) if sparse else AttentionParams(mode=mode, placement="none"))
        return cells

    def _cell(self, mode: int, k: int) -> AttentionParams:
        return AttentionParams(
            K=k,
            mode=mode,
            placement=self.placement,
            sdc=self.sdc,
            sdc_scale=self.sdc_scale,
            vmc=self.vmc,
            capk=self.capk and mode == TOP_THETA,
            calib_tac=self.calib_tac and mode == TOP_THETA,
            calib_add_sigma=self.calib_add_sigma,
            calib_sample_frac=self.calib_sample_frac,
            calib_interp=self.calib_interp,
            calib_smooth=self.calib_smooth,
        )

    @property
    def calibration_task(self) -> str:
        """The task that calibration prompts come from; known to each script's own settings."""
        return ""

    def layer_ks(self, cell: AttentionParams, num_layers: int) -> tuple[int, ...]:
        """K of every layer in a cell. Raises UsageError for a --layerk layer that the model does not have."""
        for layer in self.layerk:
            if not 0 <= layer < num_layers:
                raise UsageError(
                    f"--layerk names layer {layer}, but the model has layers 0 to {num_layers - 1}: "
                    "name one of those."
                )
        assert isinstance(cell.K, int)
        return tuple(self.layerk.get(layer, cell.K) for layer in range(num_layers))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class QASettings(Settings):
    """Settings of test_llama.py. num_samples: documents to evaluate; below 1, a fraction; None: all."""

    task: str = BUNDLED_TASK
    num_samples: float | None = None
    num_fewshot: int | None = None
    data_dir: str | None = None

    @property
    def calibration_task(self) -> str:
        return self.calib_task or self.task


@dataclass(frozen=True)
class GenSettings(Settings):
    """Settings of gen_llama.py. max_seq_len: tokens of prompt and reply together. prefill_chunk: tokens of a
    prompt computed at once; None: all. needle_lengths: tokens, empty: powers of two; needle_depths: %."""

    dataset: str = HUMANEVAL
    num_tasks: int | None = None
    num_samples_per_task: int = 1
    max_seq_len: int = 4096
    prompt_prefix: str = ""
    prompt_suffix: str = ""
    do_sample: bool = False
    allow_code_execution: bool = False
    prefill_chunk: int | None = None
    data_dir: str | None = None
    max_new_tokens: int | None = None
    text: str | None = None
    needle_lengths: tuple[int, ...] = ()
    needle_depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    needle_repeats: int = 1

    @property
    def calibration_task(self) -> str:
        return self.calib_task or self.dataset


AnySettings = TypeVar("AnySettings", bound=Settings)


def check_settings(settings: AnySettings) -> AnySettings:
    """The rules beyond a single cell. Raises UsageError."""
    sparse = [mode for mode in settings.mode if mode in (TOP_THETA, TOP_K)]
    if min(settings.k) < 1:
        raise UsageError(
            f"--k {min(settings.k)} keeps nothing: give whole numbers of at least 1 (dense is --mode 3)."
        )
    if any(k < 0 for k in settings.layerk.values()):
        raise UsageError("--layerk takes K of at least 0 (0 leaves the layer dense).")
    if settings.placement not in PLACEMENTS:
        raise UsageError(f"--placement is {settings.placement!r}: choose one of {', '.join(PLACEMENTS)}.")
    for name in ("vmc", "capk", "calib_tac"):
        if getattr(settings, name) and not sparse:
            raise UsageError(
                f"--{name} has no effect on dense attention: add --mode 0"
                + (" or 1." if name == "vmc" else ".")
            )
        if name != "vmc" and getattr(settings, name) and TOP_THETA not in sparse:
            raise UsageError(f"--{name} is for thresholds: use it with --mode 0.")
    if settings.sdc != "none" and not sparse:
        raise UsageError("--sdc has no effect on dense attention: add --mode 0 or 1.")
    cells = [check(cell, lambda name: f"--{name.lower()}") for cell in settings.cells()]
    needing = [cell for cell in cells if cell.needs_calibration]
    if settings.calib_load_path:
        if not needing:
            raise UsageError(
                "--calib_load_path serves --mode 0 and --sdc offline-calibrated: add one, or leave it out."
            )
        if not Path(settings.calib_load_path).is_dir():
            raise UsageError(f"--calib_load_path {settings.calib_load_path}: there is no such folder.")
    _check_calibration(settings, needing)
    if settings.calibrate_only and (not needing or settings.calib_load_path):
        raise UsageError(
            "--calibrate_only needs something to calibrate: --mode 0 or --sdc offline-calibrated, "
            "and no --calib_load_path."
        )
    if settings.dtype not in DTYPES:
        raise UsageError(f"--dtype is {settings.dtype!r}: choose one of {', '.join(DTYPES)}.")
    if settings.vrow_popularity and not settings.statistics:
        raise UsageError("--vrow_popularity needs statistics: leave out --no_statistics.")
    if settings.effective_k:
        if not any(cell.sparse and cell.mode == TOP_THETA for cell in cells):
            raise UsageError("--effective_k judges thresholds: use it with --mode 0 and a --placement.")
        if not settings.statistics:
            raise UsageError("--effective_k needs statistics: leave out --no_statistics.")
        if settings.calibrate_only:
            raise UsageError("--effective_k needs an evaluation: leave out --calibrate_only.")
    limits: Sequence[tuple[str, float]] = (
        ("batch_size", 1),
        ("num_tasks", 1),
        ("num_samples_per_task", 1),
        ("max_seq_len", 128),
        ("num_fewshot", 0),
    )
    for name, least in limits:
        value = getattr(settings, name, None)
        if value is not None and value < least:
            raise UsageError(f"--{name} is {value}: give at least {least}.")
    for name in ("num_samples", "calib_samples"):
        value = getattr(settings, name, None)
        if value is not None and (value <= 0 or value > 1 and value != int(value)):
            raise UsageError(f"--{name} is {value}: give a count, or a share between 0 and 1.")
    if isinstance(settings, GenSettings):
        check_generation(settings)
    device = settings.device
    if device not in ("auto", "cpu", "cuda", "mps") and not (
        device.startswith("cuda:") and device[5:].isdigit()
    ):
        raise UsageError(f"--device is {device!r}: choose auto, cpu, cuda, cuda:N or mps.")
    return settings


def _check_calibration(settings: Settings, needing: list[AttentionParams]) -> None:
    """Flags that shape calibrated tables need a cell that uses some. Raises UsageError."""
    defaults = type(settings)()
    for name in ("calib_interp", "calib_smooth", "calib_task", "calib_dump_samples"):
        value = getattr(settings, name, None)
        if value == getattr(defaults, name, None):
            continue
        shapes_use = name in ("calib_interp", "calib_smooth")
        given = f"--{name}" if isinstance(value, bool) else f"--{name} {value}"
        if not needing:
            raise UsageError(
                f"{given} has no effect without calibration: add --mode 0 or --sdc offline-calibrated."
            )
        if not shapes_use and settings.calib_load_path:
            raise UsageError(f"{given} has no effect with --calib_load_path, which calibrates nothing.")
        if name == "calib_dump_samples" and not any(cell.needs_thresholds for cell in needing):
            raise UsageError(f"{given} keeps samples of thresholds: use it with --mode 0.")


def settings_from_json(kind: type[AnySettings], saved: dict[str, Any]) -> AnySettings:
    """Settings as `to_json` saved them. Raises UsageError when they are of another program or version."""
    try:
        values = saved | {
            "mode": tuple(saved["mode"]),
            "k": tuple(saved["k"]),
            "layerk": {int(layer): k for layer, k in saved["layerk"].items()},
        }
        values |= {name: tuple(saved[name]) for name in ("needle_lengths", "needle_depths") if name in saved}
        return check_settings(kind(**values))
    except (KeyError, TypeError) as error:
        raise UsageError(f"--resume: config.json there does not fit this script ({error}).") from None


def resolve_device(settings: AnySettings) -> AnySettings:
    """Settle 'auto': device and dtype. Raises UsageError for a GPU that is not there."""
    import torch

    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        index = int(device[5:]) if ":" in device else 0
        if index >= torch.cuda.device_count():
            raise UsageError(f"--device {device}: this machine shows {torch.cuda.device_count()} CUDA GPUs.")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this machine has no Apple GPU.")
    dtype = settings.dtype
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    return replace(settings, device=device, dtype=dtype)


def label(cell: AttentionParams) -> str:
    """A cell's name in tables: 'dense', 'Top-k K=64', 'Top-theta K=64'."""
    name = method_name(cell.mode, cell.placement)
    return name if name == "dense" else f"{name} K={cell.K}"


def cell_folder(cell: AttentionParams) -> str:
    return f"mode{cell.mode}" if not cell.sparse else f"mode{cell.mode}_k{cell.K}"

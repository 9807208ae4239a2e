"""A script's settings: one typed, frozen object. Each is declared once, here; its flag, run.json and check
are derived from that (util/options.py). Rules that involve several settings are in rules.py."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from toptheta.eval.cell_params import CellParams, Chosen, parse_all_chosen, parse_chosen
from toptheta.methods.base import Method, of_mode
from toptheta.methods.params import CALIBRATION_GROUP, AttentionParams, MethodOptions, expand_k
from toptheta.util.errors import UsageError
from toptheta.util.options import at_least, option

DTYPES = ("auto", "float32", "bfloat16", "float16")
BUNDLED_TASK = "everyday_science"
HUMANEVAL = "openai_humaneval"
LONGBENCH = ("longbench_qmsum", "longbench_gov_report")
PERPLEXITY, NEEDLE = "perplexity", "needle"
DATASETS = (HUMANEVAL, *LONGBENCH, PERPLEXITY, NEEDLE)
TEXT_JOBS = (HUMANEVAL, *LONGBENCH, NEEDLE)  # those that show the model a prompt and read its reply

AUTO = 0  # --batch_size auto

RUN, TASK, GENERATION, LONG = "model and run", "task", "generation", "long context"  # groups of flags


def _is_share_or_count(number: float) -> bool:
    return 0 < number <= 1 or number > 1 and number == int(number)


SHARE_OR_COUNT = (_is_share_or_count, "give a count, or a share between 0 and 1")


def _batch_size(text: str) -> int:
    """Raises UsageError."""
    try:
        return AUTO if text == "auto" else int(text)
    except ValueError:
        raise UsageError(f"--batch_size is {text!r}: give a whole number, or auto.") from None


def _is_device(device: str) -> bool:
    return device in ("auto", "cpu", "cuda", "mps") or (
        device.startswith("cuda:") and device.removeprefix("cuda:").isdecimal()
    )


@dataclass(frozen=True)
class CellOptions:
    """The methods and K to run: every pair is one cell of the table. method: specs as `parse_all_chosen`
    reads them, instead of `mode`. layerk: K of individual layers."""

    mode: tuple[int, ...] = option(
        (3,), "0 Top-theta, 1 Top-k, 3 dense (default); a list runs each", metavar="M[,M]", group="method"
    )
    method: tuple[str, ...] = option(
        (),
        "methods by name, instead of --mode, with options, e.g. top_k or top_theta:capk; --placement, --sdc, "
        "--calib_to and others can be set for one method, e.g. top_k:sdc=exact,vmc; a list runs each; an "
        "unknown name lists all methods",
        metavar="NAME[:OPTION=VALUE,...]",
        group="method",
        parse=lambda text: tuple(chosen.spec for chosen in parse_all_chosen(text)),
    )
    k: tuple[int, ...] = option(
        (256,),
        "attention elements to keep per row; a list runs each (default 256)",
        metavar="K[,K]",
        group="method",
    )
    layerk: dict[int, int] = option(
        {},
        "K of individual layers, e.g. 0:512,1:512; 0 leaves a layer dense",
        metavar="L:K[,L:K]",
        group="method",
    )
    capk: bool = option(
        False, "Top-theta: keep at most the K most recent keys above the threshold", group="method"
    )

    def methods(self) -> list[Method]:
        return [chosen.method for chosen in self.chosen()]

    def chosen(self) -> list[Chosen]:
        """The methods, each once; those with an option `capk` have it set by --capk."""
        found = [parse_chosen(spec) for spec in self.method] or [Chosen(of_mode(mode)) for mode in self.mode]
        if self.capk:
            found = [
                replace(one, method=replace(one.method, **{"capk": True}))
                if hasattr(one.method, "capk")
                else one
                for one in found
            ]
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Settings(MethodOptions, CellOptions):
    """The settings of both scripts. calib_task: the Q&A task to calibrate on; None: the evaluated one."""

    calib_samples: float | None = option(
        None,
        "number of calibration examples; below 1, a share of them",
        metavar="N",
        group=CALIBRATION_GROUP,
        rule=SHARE_OR_COUNT,
    )
    calib_task: str | None = option(
        None,
        "calibrate on the calibration split of this Q&A task, with its usual shots and size (default: the "
        "evaluated task)",
        metavar="TASK",
        group=CALIBRATION_GROUP,
    )
    calib_dump_samples: bool = option(
        False,
        "also save every threshold sample (calib_samples.safetensors); they are held in memory: 4 bytes for "
        "each layer, head, K and sampled row",
        group=CALIBRATION_GROUP,
        answers=False,
    )
    calibrate_only: bool = option(
        False, "calibrate, write the tables and stop", group=CALIBRATION_GROUP, answers=False
    )
    llama: str = option(
        "smollm2",
        "smollm2 (default), 2-7, 2-70, 34, 3-8, 3-8i, 3-70, 3-70i, 3.1-8i, a hub id, a folder or a .gguf "
        "file",
        metavar="MODEL",
        group=RUN,
    )
    device: str = option(
        "auto",
        "cpu, cuda, cuda:1, ..., or auto (default): all GPUs if there are any",
        group=RUN,
        rule=(_is_device, "choose auto, cpu, cuda, cuda:N or mps"),
        answers=False,
    )
    dtype: str = option(
        "auto",
        f"{', '.join(DTYPES)} (auto: float32 on CPU, the model's own on a GPU)",
        group=RUN,
        choices=DTYPES,
    )
    allow_pickle: bool = option(
        False,
        "also load pickled weights (pytorch_model.bin): such a file can contain code",
        group=RUN,
        answers=False,
    )
    batch_size: int = option(
        1,
        "prompts in a batch (default 1); auto or 0: as many as fit in memory, up to 64",
        metavar="N",
        group=RUN,
        parse=_batch_size,
        rule=at_least(0),
        answers=False,
    )
    seed: int = option(
        42,
        "seed of subsets, row sampling and generation (default 42)",
        metavar="N",
        group=RUN,
        rule=at_least(0),
    )
    apply_chat_template: bool = option(
        False, "wrap prompts in the model's chat template", group=RUN, serves=TEXT_JOBS
    )
    output_dir: str = option(
        "products", "folder of the results (default products)", metavar="DIR", group=RUN, answers=False
    )
    statistics: bool = option(True, "do not count kept elements and V rows", group=RUN)
    vrow_popularity: bool = option(
        False, "also save how often each V row is kept (large)", group=RUN, answers=False
    )
    effective_k: bool = option(
        False, "Top-theta: report how many elements rows keep, against K", group=RUN, answers=False
    )

    def cells(self) -> list[CellParams]:
        """The parameters of each cell: every method with every K; a method without K once. Of cells that are
        the same, the first."""
        cells = []
        for chosen in self.chosen():
            method, given = chosen.method, dict(chosen.given)
            options = {f.name: getattr(self, f.name) for f in fields(MethodOptions)} | given
            if method.is_dense or options["placement"] == "none":
                cells.append(CellParams(method=method, placement="none"))
                continue
            options["calib_tac"] &= method.needs_thresholds
            cell = CellParams(method=method, given=tuple(given), **options)
            if not cell.needs_calibration:
                cell = replace(cell, calib_load_path="")
            cells += [replace(cell, K=k) for k in dict.fromkeys(self.k)] if method.uses_k else [cell]
        return list({replace(cell, given=()): cell for cell in reversed(cells)}.values())[::-1]

    @property
    def calibration_task(self) -> str:
        """The task of the calibration prompts; defined by each script's settings."""
        return ""

    def layer_ks(self, cell: AttentionParams, num_layers: int) -> tuple[int, ...]:
        """K of every layer in a cell. Raises UsageError for a --layerk layer that the model does not have."""
        assert isinstance(cell.K, int)
        return expand_k(self.layerk, num_layers, cell.K, "--layerk")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class QASettings(Settings):
    """Settings of test_llama.py. num_samples: documents to evaluate; below 1, a fraction; None: all."""

    task: str = option(
        BUNDLED_TASK,
        "everyday_science (bundled, default), hellaswag, arc_challenge, arc_easy, mmlu, gsm8k, medmcqa, or "
        "any lm-eval task; a list runs each",
        metavar="T[,T]",
        group=TASK,
    )
    num_samples: float | None = option(
        None,
        "questions to evaluate; below 1, a share (default all)",
        metavar="N",
        group=TASK,
        rule=SHARE_OR_COUNT,
    )
    num_fewshot: int | None = option(
        None,
        "examples in each prompt (default: the task's usual number)",
        metavar="N",
        group=TASK,
        rule=at_least(0),
    )
    fixed_shots: bool = option(
        False,
        "use the first examples in every prompt, as mmlu does, so that they are computed only once",
        group=TASK,
    )
    data_dir: str | None = option(
        None, "local data: DIR/<task>/<split>.jsonl with the hub's columns", metavar="DIR", group=TASK
    )

    @property
    def calibration_task(self) -> str:
        return self.calib_task or self.task


@dataclass(frozen=True)
class GenSettings(Settings):
    """Settings of gen_llama.py. max_seq_len: tokens of prompt and reply together. prefill_chunk: tokens of a
    prompt computed at once; None: all. needle_lengths: tokens, empty: powers of two; needle_depths: %."""

    dataset: str = option(
        HUMANEVAL,
        f"{', '.join(DATASETS)} (default {HUMANEVAL})",
        group=GENERATION,
        choices=DATASETS,
        hint=True,
    )
    num_tasks: int | None = option(
        None,
        "tasks, rows or windows to evaluate (default all)",
        metavar="N",
        group=GENERATION,
        rule=at_least(1),
        serves=(HUMANEVAL, *LONGBENCH, PERPLEXITY),
    )
    task_ids: tuple[int, ...] = option(
        (),
        "HumanEval: these tasks only, by number, e.g. 0,23 (default all)",
        metavar="N[,N]",
        group=GENERATION,
        serves=(HUMANEVAL,),
    )
    num_samples_per_task: int = option(
        1,
        "completions per task (default 1)",
        metavar="N",
        group=GENERATION,
        rule=at_least(1),
        serves=(HUMANEVAL,),
    )
    max_seq_len: int = option(
        4096,
        "tokens of prompt and reply (default 4096)",
        metavar="N",
        group=GENERATION,
        rule=at_least(128),
    )
    prefill_chunk: int | None = option(
        None,
        "compute prompts N tokens at a time (default: whole prompts)",
        metavar="N",
        group=GENERATION,
        rule=at_least(1),
        answers=False,
    )
    prompt_prefix: str = option(
        "",
        "text before every prompt",
        metavar="TEXT",
        group=GENERATION,
        serves=(HUMANEVAL, *LONGBENCH),
    )
    prompt_suffix: str = option(
        "", "text after every prompt", metavar="TEXT", group=GENERATION, serves=(HUMANEVAL, *LONGBENCH)
    )
    do_sample: bool = option(
        False,
        "sample tokens (temperature 0.5, top_p 0.95, typical_p 0.95) instead of greedy decoding",
        group=GENERATION,
        serves=(HUMANEVAL,),
    )
    allow_code_execution: bool = option(
        False, "run the generated programs, in a sandbox", group=GENERATION, serves=(HUMANEVAL,)
    )
    data_dir: str | None = option(
        None,
        "longbench_*, --calib_task: folder of local rows (default: the hub)",
        metavar="DIR",
        group=LONG,
        serves=LONGBENCH,
    )
    max_new_tokens: int | None = option(
        None,
        "longbench_*: maximum tokens of a reply (default LongBench's, 512)",
        metavar="N",
        group=LONG,
        rule=at_least(1),
        serves=LONGBENCH,
    )
    text: str | None = option(
        None,
        "perplexity: the text; needle: the haystack (default: generated); of a .jsonl file, such as "
        "LongBench's, the 'context' fields are read",
        metavar="FILE",
        group=LONG,
        serves=(PERPLEXITY, NEEDLE),
    )
    decode_from: int | None = option(
        None,
        "perplexity: the first N tokens of each window are a prompt, dense and not counted; the others are "
        "decode steps (default half of --max_seq_len; 0: the whole window is a prompt, and is counted)",
        metavar="N",
        group=LONG,
        rule=at_least(0),
        serves=(PERPLEXITY,),
        earlier=0,
    )
    calib_text: str | None = option(
        None,
        "perplexity: calibrate on windows of this text (default: on the first windows of --text); the same "
        "windows are evaluated as without it, so --calib_samples moves them",
        metavar="FILE",
        group=LONG,
        serves=(PERPLEXITY,),
    )
    calib_seq_len: int | None = option(
        None,
        "perplexity: calibrate on the first N tokens of each window only (default: all)",
        metavar="N",
        group=LONG,
        rule=at_least(2),
        serves=(PERPLEXITY,),
    )
    reference_dtype: str = option(
        "auto",
        "perplexity: type of the dense model that methods are compared with (auto: --dtype); a type other "
        "than --dtype loads a second model",
        group=LONG,
        choices=DTYPES,
        serves=(PERPLEXITY,),
    )
    needle_lengths: tuple[int, ...] = option(
        (),
        "needle: context lengths (default 512, 1024, ... )",
        metavar="N[,N]",
        group=LONG,
        serves=(NEEDLE,),
    )
    needle_depths: tuple[int, ...] = option(
        (0, 25, 50, 75, 100),
        "needle: depths in %% (default 0,25,50,75,100)",
        metavar="P[,P]",
        group=LONG,
        serves=(NEEDLE,),
    )
    needle_repeats: int = option(
        1,
        "needle: needles at each length and depth (default 1)",
        metavar="N",
        group=LONG,
        rule=at_least(1),
        serves=(NEEDLE,),
    )

    @property
    def calibration_task(self) -> str:
        return self.calib_task or self.calib_text or self.dataset


AnySettings = TypeVar("AnySettings", bound=Settings)


def resolve_device(settings: AnySettings) -> AnySettings:
    """Resolve 'auto' in device and dtype. Raises UsageError for a GPU that does not exist."""
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

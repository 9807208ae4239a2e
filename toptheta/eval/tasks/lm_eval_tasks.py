"""Q&A tasks: the stock lm-eval tasks, their calibration twins, local data, and the bundled task.

A calibration twin is the stock task's config with its name and test split changed, so the harness stays
untouched.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from toptheta.eval.settings import BUNDLED_TASK
from toptheta.eval.tasks.rows import check_file
from toptheta.util.errors import UsageError

SPLITS = ("train", "validation", "test", "dev")


@dataclass(frozen=True)
class TaskDefaults:
    """A task's usual shots and calibration size. yaml: under lm_eval/tasks; a folder holds one file per
    sub-task. calib_samples: documents to calibrate on, or a fraction of them if below 1."""

    yaml: str | None
    num_fewshot: int | None
    calib_samples: float


TASKS = {
    BUNDLED_TASK: TaskDefaults(None, 25, 40),
    "hellaswag": TaskDefaults("hellaswag/hellaswag.yaml", 10, 1004),
    "arc_challenge": TaskDefaults("arc/arc_challenge.yaml", 25, 120),
    "arc_easy": TaskDefaults("arc/arc_easy.yaml", 25, 120),
    "mmlu": TaskDefaults("mmlu/default", 5, 0.1),
    "gsm8k": TaskDefaults("gsm8k/gsm8k.yaml", 8, 120),
    "medmcqa": TaskDefaults("medmcqa/medmcqa.yaml", 5, 120),
}
OTHER = TaskDefaults(None, None, 120)


def task_defaults(name: str) -> TaskDefaults:
    return TASKS.get(name, OTHER)


def task_names(tasks: str) -> list[str]:
    """The names in a comma-separated --task. Raises UsageError when it names none, or one twice."""
    names = [name.strip() for name in tasks.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise UsageError(f"--task is {tasks!r}: name each task once, joined by commas.")
    return names


def task_configs(
    name: str, data_dir: str | None, calibration: bool, flag: str = "--task"
) -> list[dict[str, Any]]:
    """lm-eval configs of a task or of its calibration twin; one, or one per sub-task (mmlu).

    data_dir: folder with `<task>/<split>.jsonl` files of the hub's row format, or `<data set>/<split>.jsonl`
    (gsm8k for gsm8k_cot); None: the hub. Raises
    UsageError for an unknown task or missing data; `flag` is what named the task.
    """
    configs = [_bundled()] if name == BUNDLED_TASK else _stock_configs(name, flag)
    if calibration:
        configs = [_twin(config, flag) for config in configs]
    if data_dir is not None and name != BUNDLED_TASK:
        configs = _with_local_data(name, configs, Path(data_dir), flag)
    return configs


def check_task(name: str, data_dir: str | None, flag: str = "--task") -> None:
    """Raise UsageError, before anything is loaded, for a task that is plainly unknown or whose local data is
    missing."""
    if name == BUNDLED_TASK:
        return
    if data_dir is not None:
        folder = Path(data_dir)
        if not folder.is_dir():
            raise UsageError(f"--data_dir {data_dir}: there is no such folder.")
        local = sorted(p.name for p in folder.iterdir() if p.is_dir())
        if name not in local and not _has_rows_of_another(name, folder, flag):
            raise UsageError(
                f"--data_dir {data_dir} has no folder {name!r} for {flag} {name}: its folders are "
                f"{', '.join(local) or 'none'}."
            )
    if name not in TASKS and name not in _all_tasks():
        near = get_close_matches(name, {*TASKS, *_all_tasks()}, n=4)
        some = ", ".join(near) or ", ".join(TASKS)
        raise UsageError(f"{flag} {name!r} is unknown: choose for example {some}.")


def _has_rows_of_another(name: str, data_dir: Path, flag: str) -> bool:
    """Whether a task's rows are there under the name of its data set, which other tasks have too."""
    if name in TASKS or name not in _all_tasks():
        return False
    return any(_folder(name, config, data_dir).is_dir() for config in _stock_configs(name, flag))


def _folder(name: str, config: dict[str, Any], data_dir: Path) -> Path:
    """Where a task's rows lie: under its own name, else under that of its data set."""
    own = data_dir / name
    return own if own.is_dir() else data_dir / str(config["dataset_path"]).rpartition("/")[2]


_index: dict[str, Any] = {}


def _all_tasks() -> dict[str, Any]:
    """The harness's own index. It reads thousands of files, so it is asked only for tasks not in TASKS."""
    if not _index:
        from lm_eval.tasks import TaskManager

        _index.update(TaskManager().task_index)
    return _index


def _stock_configs(name: str, flag: str) -> list[dict[str, Any]]:
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    if name in TASKS and TASKS[name].yaml is not None:
        path = Path(lm_eval.__file__).parent / "tasks" / str(TASKS[name].yaml)
        files = sorted(path.glob("mmlu_*.yaml")) if path.is_dir() else [path]
        return [load_yaml(file) for file in files]
    entry = _all_tasks()[name]
    if entry.yaml_path is None or entry.kind.name != "TASK":
        raise UsageError(f"{flag} {name} is a {entry.kind.name.lower()} of tasks: name one of its tasks.")
    return [load_yaml(entry.yaml_path)]


def _bundled() -> dict[str, Any]:
    folder = Path(__file__).parent / BUNDLED_TASK
    return {
        "task": BUNDLED_TASK,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
        },
        "output_type": "multiple_choice",
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nChoices: {{choices.text | join('; ')}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }


def _with_local_data(
    name: str, configs: list[dict[str, Any]], data_dir: Path, flag: str
) -> list[dict[str, Any]]:
    local = []
    for config in configs:
        folder = _folder(name, config, data_dir)
        part = folder / str(config.get("dataset_name"))  # a sub-task's folder is named as its part on the hub
        if len(configs) > 1 and not part.is_dir():
            continue
        folder = part if part.is_dir() else folder
        files = {split: str((folder / f"{split}.jsonl").resolve()) for split in SPLITS}
        files = {split: file for split, file in files.items() if Path(file).is_file()}
        needed = str(config.get("test_split") or config.get("validation_split"))
        if needed not in files:
            raise UsageError(f"--data_dir: {folder} has no {needed}.jsonl, which {flag} {name} needs.")
        used = {needed, config.get("fewshot_split"), config.get("training_split")}
        for split, file in files.items():
            check_file(Path(file), name, split in used)
        local.append(
            config
            | {
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": files},
                "tag": None,
            }
        )
    if not local:
        raise UsageError(f"--data_dir: {data_dir / name} has none of the {len(configs)} sub-tasks of {name}.")
    return local


def with_examples(config: dict[str, Any], shots: int) -> dict[str, Any]:
    """A config of local data with the splits that have files. Raises UsageError if the one that examples come
    from has none; without examples, it is not needed."""
    files, own = config["dataset_kwargs"]["data_files"], config.get("fewshot_config") or {}
    source = config.get("fewshot_split") or own.get("split")
    if source is None and own.get("samples") is None:
        source = config.get("training_split") or config.get("validation_split")
    if shots and source is not None and source not in files:
        path = Path(next(iter(files.values()))).with_name(f"{source}.jsonl")
        raise UsageError(
            f"--data_dir: there is no {path}, which has the examples in prompts of {config['task']}: add it, "
            "or give --num_fewshot 0."
        )
    names = ("fewshot_split", "training_split", "validation_split")
    return config | {name: None for name in names if config.get(name) not in files}


def _twin(config: dict[str, Any], flag: str) -> dict[str, Any]:
    """The calibration twin: another split of the same task, never the one that is evaluated."""
    test = config.get("test_split") or config.get("validation_split")
    split = config.get("training_split") or config.get("validation_split")
    if split is None and "mmlu" in config["task"]:
        split = "validation"  # the stock config leaves it out, but the data has it
    if split is None or split == test:
        raise UsageError(
            f"{flag} {config['task']} has no split to calibrate on other than the evaluated one."
        )
    return config | {"task": f"{config['task']}_calibration", "test_split": split, "tag": None}

"""What the runner asks of a data set: what it calibrates on, what it evaluates, what it found."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from toptheta.eval import processes
from toptheta.eval.cell import Cell
from toptheta.eval.checkpoint import Checkpoint
from toptheta.eval.settings import Settings
from toptheta.methods.params import AttentionParams
from toptheta.models.loading import ModelSource, load_model, spread_notice
from toptheta.models.patch import update_model
from toptheta.models.recorder import Recorder
from toptheta.report.results import Answer, Metric
from toptheta.util.console import say


@dataclass
class Engine:
    """A loaded, patched model. lm: the harness's object around it, where the job goes through lm-eval."""

    model: Any
    lm: Any = None


@dataclass
class Outcome:
    """What the evaluation of a cell found. answers: one for each question; extra: what results.json has
    besides the metrics; files: texts of further product files, by name; summary: for results-<Model>/."""

    metrics: dict[str, Metric]
    answers: list[Answer]
    extra: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    summary: str = ""


class Job(ABC):
    """One data set of a run, the same in every cell, dense ones included, so that cells compare. It neither
    prints nor draws: what a person should know is in notices (when the run starts), calibration_note (before
    calibration) and `hint` (at the end). task: its name in results and tables; num_fewshot: None where
    there are no examples in the prompts."""

    calibration_note = ""
    num_fewshot: int | None = None

    def __init__(self, settings: Settings, task: str):
        self.settings, self.task = settings, task
        self.notices: list[str] = []

    @abstractmethod
    def question_counts(self) -> tuple[float, float]:
        """How many questions calibrate, and how many are evaluated, in each cell: for the time left."""

    def load(self, source: ModelSource) -> Engine:
        """The model, once for all cells and jobs of a run."""
        model = self.load_stock(source, self.settings.dtype)
        if notice := spread_notice(model):
            say(notice)
        return Engine(update_model(model))

    def load_stock(self, source: ModelSource, dtype: str) -> Any:
        """The model, unpatched, where this process has its place."""
        place = processes.place(self.settings.device)
        return load_model(source, dtype, place, self.settings.allow_pickle)

    @abstractmethod
    def calibrate(self, engine: Engine, description: str, progress: Checkpoint) -> None:
        """Run the calibration prompts through the model, but for those that `progress` has done, each batch
        within its `counting`. description: of the progress bar."""

    @abstractmethod
    def evaluate(self, engine: Engine, product: Cell, recorder: Recorder | None, description: str) -> Outcome:
        """Answer what `product` holds no answer to yet, hand it answers and counts, and score all. Several
        processes share the questions, and the first one scores."""

    def facts(self, cell: AttentionParams) -> dict[str, Any]:
        """What config.json says of the data, apart from the settings."""
        facts: dict[str, Any] = {"task": self.task}
        if cell.needs_calibration and not self.settings.calib_load_path:
            facts["calib_task"] = self.settings.calibration_task
        return facts

    def title(self, model_name: str) -> str:
        """Of the run's table."""
        return f"{model_name}, {self.task}"

    def hint(self, folder: str) -> str:
        """How a person goes on with the run in `folder`; empty: there is nothing to do."""
        return ""


def passage_id(text: str) -> str:
    """Names the text that questions are about, so that those about the same go together, see Answer."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]

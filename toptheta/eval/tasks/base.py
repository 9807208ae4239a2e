"""The interface of a data set to the runner: calibration, evaluation and results."""

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
    """A loaded, patched model. lm: lm-eval's object with it, if the job uses lm-eval."""

    model: Any
    lm: Any = None


@dataclass
class Outcome:
    """The results of a cell's evaluation. answers: one per question; extra: further content of results.json;
    files: texts of further output files, by name; summary: for results-<Model>/."""

    metrics: dict[str, Metric]
    answers: list[Answer]
    extra: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    summary: str = ""


class Job(ABC):
    """One data set of a run, the same in every cell, so that cells can be compared. It neither prints nor
    plots: its messages are notices (at the start of the run), calibration_note (before calibration) and
    `hint` (at the end). task: its name in results and tables; num_fewshot: None if prompts have no
    examples."""

    calibration_note = ""
    num_fewshot: int | None = None

    def __init__(self, settings: Settings, task: str):
        self.settings, self.task = settings, task
        self.notices: list[str] = []

    @abstractmethod
    def question_counts(self) -> tuple[float, float]:
        """The numbers of calibration and evaluation questions in each cell, for the time left."""

    @abstractmethod
    def data_hash(self) -> str:
        """The hash of all calibration and evaluation questions."""

    def load(self, source: ModelSource) -> Engine:
        """The model, once for all cells and jobs of a run."""
        model = self.load_stock(source, self.settings.dtype)
        if notice := spread_notice(model):
            say(notice)
        return Engine(update_model(model))

    def load_stock(self, source: ModelSource, dtype: str) -> Any:
        """The unpatched model, on this process's device."""
        place = processes.place(self.settings.device)
        return load_model(source, dtype, place, self.settings.allow_pickle)

    @abstractmethod
    def calibrate(self, engine: Engine, description: str, progress: Checkpoint) -> None:
        """Run the calibration prompts that `progress` has not done through the model, each batch within its
        `counting`. description: of the progress bar."""

    @abstractmethod
    def evaluate(self, engine: Engine, product: Cell, recorder: Recorder | None, description: str) -> Outcome:
        """Answer the questions that `product` has no answer to, add answers and counts to it, and score all.
        Several processes share the questions, and the first one scores."""

    def facts(self, cell: AttentionParams) -> dict[str, Any]:
        """The facts about the data in config.json, besides the settings."""
        facts: dict[str, Any] = {"task": self.task}
        if cell.needs_calibration and not self.settings.calib_load_path:
            facts["calib_task"] = self.settings.calibration_task
        return facts

    def title(self, model_name: str) -> str:
        """Of the run's table."""
        return f"{model_name}, {self.task}"

    def hint(self, folder: str) -> str:
        """What to do next with the run in `folder`; empty if nothing."""
        return ""


def passage_id(text: str) -> str:
    """The id of the text that questions are about, to cluster questions about the same text, see Answer."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]

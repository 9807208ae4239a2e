"""Q&A: a task of lm-eval, calibrated on another split of the same task or on --calib_task."""

from dataclasses import replace
from typing import Any

from toptheta.eval import processes
from toptheta.eval.cell import Cell
from toptheta.eval.checkpoint import Checkpoint
from toptheta.eval.settings import BUNDLED_TASK, QASettings
from toptheta.eval.tasks import harness
from toptheta.eval.tasks.base import Engine, Job, Outcome
from toptheta.eval.tasks.lm_eval_tasks import check_task, task_configs, task_defaults, task_names
from toptheta.methods.params import AttentionParams
from toptheta.models.loading import ModelSource, load_tokenizer
from toptheta.models.recorder import Recorder
from toptheta.util.errors import UsageError


class QAJob(Job):
    """One task, evaluated by lm-eval with the engine's `lm`."""

    settings: QASettings

    def __init__(self, settings: QASettings):
        super().__init__(settings, settings.task)
        given = settings.num_fewshot
        self.num_fewshot = task_defaults(settings.task).num_fewshot if given is None else given
        own = settings.calibration_task == settings.task
        self.calib_num_fewshot = (
            self.num_fewshot if own else task_defaults(settings.calibration_task).num_fewshot
        )
        if settings.fixed_shots and self.num_fewshot == 0:
            raise UsageError(
                f"--fixed_shots has no effect on {settings.task}, whose prompts have no examples: give "
                "--num_fewshot."
            )
        self.num_questions = 0
        self._tasks: list[Any] = []  # the harness's, of evaluation and calibration

    def question_counts(self) -> tuple[float, float]:
        default = task_defaults(self.settings.calibration_task).calib_samples
        return max(1.0, self.settings.calib_samples or default), self.num_questions

    def check_data(self) -> None:
        """Raise UsageError, before the model is loaded, if data cannot be loaded."""
        settings = self.settings
        calibrates = any(cell.needs_calibration for cell in settings.cells()) and not settings.calib_load_path
        if not settings.calibrate_only:
            configs = task_configs(self.task, settings.data_dir, False)
            tasks = harness.load_tasks(configs, settings, self.num_fewshot)
            self._tasks += tasks
            self.num_questions = sum(harness.chosen_docs(tasks, settings.num_samples).values())
        if calibrates and not settings.calib_task:
            configs = task_configs(self.task, settings.data_dir, True)
            self._tasks += harness.load_tasks(configs, settings, self.calib_num_fewshot)

    def data_hash(self) -> str:
        return harness.data_hash(self._tasks)

    def load(self, source: ModelSource) -> Engine:
        engine = super().load(source)
        engine.lm = harness.around(engine.model, load_tokenizer(source), self.settings.batch_size)
        return engine

    def facts(self, cell: AttentionParams) -> dict[str, Any]:
        facts = super().facts(cell) | {"num_fewshot": self.num_fewshot}
        return facts | ({"calib_num_fewshot": self.calib_num_fewshot} if "calib_task" in facts else {})

    def calibrate(self, engine: Engine, description: str, progress: Checkpoint) -> None:
        task, shots = self.settings.calibration_task, self.calib_num_fewshot
        harness.calibrate_on_task(engine.lm, self.settings, task, shots, description, progress)

    def evaluate(self, engine: Engine, product: Cell, recorder: Recorder | None, description: str) -> Outcome:
        from lm_eval.utils import make_table

        lm, settings = engine.lm, self.settings
        lm.cell, lm.recorder, lm.description = product, recorder, description
        lm.tokens.clear()
        lm.reply_ids.clear()
        lm.cut.clear()
        configs = task_configs(self.task, settings.data_dir, False)
        try:
            output = harness.run_tasks(
                lm, settings, configs, self.num_fewshot, settings.num_samples, log_samples=True
            )
        finally:
            lm.cell = lm.recorder = None

        def outcome() -> Outcome:
            answers = harness.answers_of(output, lm.tokens, lm.reply_ids)
            extra = {"cut_prompts": len(lm.cut)} if lm.cut else {}
            return Outcome(harness.metrics_of(output), answers, extra, summary=make_table(output))

        return processes.from_first(outcome)


def qa_jobs(settings: QASettings) -> list[QAJob]:
    """A job for each task. Raises UsageError for an unknown task, or one whose data cannot be loaded."""
    parts = [replace(settings, task=task) for task in task_names(settings.task)]
    for part in parts:
        check_task(part.task, part.data_dir)
    harness.check_calib_task(settings)
    jobs = [QAJob(part) for part in parts]
    for job in jobs:
        job.check_data()
    if settings.data_dir and {*(job.task for job in jobs), settings.calib_task or BUNDLED_TASK} == {
        BUNDLED_TASK
    }:
        jobs[0].notices.append(f"--data_dir has no effect on {BUNDLED_TASK}, whose questions are bundled.")
    return jobs

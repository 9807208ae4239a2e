"""Progress of a run in one terminal line: the current cell, how much of it is done, the speed, and the time
left for the whole run. If stderr is not a terminal, nothing is shown.

Working code reports to a `Bar` and does not know about other cells; the run defines its stages in a
`RunProgress`. Without one, a bar shows only its own work.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from tqdm import tqdm

CALIBRATING, EVALUATING = "calibrating", "evaluating"


@dataclass(frozen=True)
class Stage:
    """A stage of a run: a cell, the kind of work, and its number of questions."""

    cell: str
    work: str
    questions: float


_current: ContextVar["RunProgress | None"] = ContextVar("run_progress", default=None)


class RunProgress:
    """The progress of a run over its stages. clock: returns seconds."""

    def __init__(self, stages: Sequence[Stage], clock: Callable[[], float] = time.monotonic):
        self.stages, self.clock = list(stages), clock
        self.at = -1
        self._spent: dict[str, tuple[float, float]] = {}  # by work: questions done in this process, seconds

    def begin(self, cell: str, work: str) -> None:
        """Start the next stage with this cell and work; earlier stages are finished."""
        for i in range(self.at + 1, len(self.stages)):
            if (self.stages[i].cell, self.stages[i].work) == (cell, work):
                self.at = i
                return

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block every bar shows its place in this run."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    @property
    def place(self) -> str:
        """'cell 3 of 12: Top-k K=64, evaluating'; empty before the first stage."""
        if self.at < 0:
            return ""
        cells = [i for i, one in enumerate(self.stages) if one.work == EVALUATING]
        number = 1 + sum(i < self.at for i in cells)
        stage = self.stages[self.at]
        return f"cell {number} of {max(len(cells), number)}: {stage.cell}, {stage.work}"

    def spend(self, share: float, seconds: float) -> None:
        """Count work done in this stage: a share of its questions, and the seconds that they took."""
        stage = self.stages[self.at]
        questions, before = self._spent.get(stage.work, (0.0, 0.0))
        self._spent[stage.work] = (questions + share * stage.questions, before + seconds)

    def seconds_left(self, share_done: float) -> float | None:
        """The seconds left for the whole run, if `share_done` of this stage is done: each kind of work at its
        pace so far, or at the pace of all work if it has none yet. None if nothing is done yet."""
        questions, seconds = (sum(column) for column in zip(*self._spent.values())) if self._spent else (0, 0)
        if not questions or self.at < 0:
            return None
        left = 0.0
        for i, stage in enumerate(self.stages[self.at :]):
            done, spent = self._spent.get(stage.work, (0.0, 0.0))
            pace = spent / done if done else seconds / questions
            left += pace * stage.questions * (1.0 - share_done if i == 0 else 1.0)
        return left


def begin(cell: str, work: str) -> None:
    """Call `RunProgress.begin` of the run that is shown, if any."""
    run = _current.get()
    if run is not None:
        run.begin(cell, work)


class Bar:
    """A progress bar for `total` questions, `done` of them by an earlier start. description: used without a
    run; unit: name of a question, in the singular; shown: whether to show it on a terminal."""

    def __init__(self, total: int, done: int, unit: str, description: str, shown: bool = True):
        self.run = _current.get()
        if self.run is not None and self.run.at < 0:
            self.run = None
        self.total, self.done, self.unit = total, done, unit
        self.words = self.run.place if self.run is not None else description
        self.clock = time.monotonic if self.run is None else self.run.clock
        self.tokens, self.started = 0, self.clock()
        self.last = self.started
        self._line = tqdm(
            total=max(total, 1),
            initial=done,
            bar_format="{percentage:3.0f}%|{bar:12}| {desc}",
            dynamic_ncols=True,
            leave=False,
            disable=None if shown else True,
        )
        self._line.set_description_str(self.text)

    def update(self, count: int, tokens: int = 0) -> None:
        """Count finished questions, and the tokens computed for them."""
        now = self.clock()
        self.done += count
        self.tokens += tokens
        if self.run is not None and self.total:
            self.run.spend(count / self.total, now - self.last)
        self.last = now
        self._line.set_description_str(self.text, refresh=False)
        self._line.update(count)

    def close(self) -> None:
        self._line.close()

    @property
    def text(self) -> str:
        """'cell 3 of 12: Top-k K=64, evaluating: 45 of 100 answers, 1,240 tokens/s, 12 min left'."""
        words = f"{self.words}: {self.done} of {self.total} {self.unit}{'' if self.total == 1 else 's'}"
        seconds = self.last - self.started
        if self.tokens and seconds > 0:
            words += f", {self.tokens / seconds:,.0f} tokens/s"
        left = None
        if self.run is not None:
            left = self.run.seconds_left(self.done / max(self.total, 1))
        return words if left is None else f"{words}, {duration(left)} left"


def duration(seconds: float) -> str:
    """'40 s', '12 min', '3 h 20 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"

"""LongBench's two English summarisation sets: QMSum (questions about a meeting) and GovReport.

Prompts, truncation, reply lengths and score are those of LongBench (Bai et al. 2023, arXiv 2308.14508):
pred.py, config/ and eval.py of its project. Rows come from a local folder or from the hub. Calibration never
sees an evaluated row: it takes `train.jsonl` where the local folder has one, else the first rows, which are
then not evaluated.
"""

import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toptheta.eval.settings import GenSettings
from toptheta.eval.tasks.base import Outcome, passage_id
from toptheta.eval.tasks.items import (
    CALIBRATION_ITEMS,
    Item,
    ReplyJob,
    calibration_count,
    mean_and_stderr,
    split_off,
)
from toptheta.eval.tasks.rows import LongBench, read_file, read_rows
from toptheta.models.loading import hub_reachable
from toptheta.util.errors import UsageError

HUB_ID, HUB_FILE = "THUDM/LongBench", "data.zip"
ROUGE_INSTALL = "pip install rouge==1.0.1"


@dataclass(frozen=True)
class Summaries:
    """A set's name at the hub, its prompt and its most reply tokens."""

    hub_name: str
    prompt: str
    max_new: int


SETS = {
    "longbench_qmsum": Summaries(
        "qmsum",
        "You are given a meeting transcript and a query containing a question or instruction. Answer the "
        "query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the "
        "above meeting transcript in one or more sentences.\n\nQuery: {input}\nAnswer:",
        512,
    ),
    "longbench_gov_report": Summaries(
        "gov_report",
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n"
        "{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512,
    ),
}


class LongBenchJob(ReplyJob):
    """Summaries, scored by ROUGE-L."""

    def __init__(self, settings: GenSettings, tokenizer: Any):
        super().__init__(settings, tokenizer)
        _rouge()  # a missing package is named before anything is computed
        self.set = SETS[settings.dataset]
        self.max_new = settings.max_new_tokens or self.set.max_new
        self.most = settings.max_seq_len - self.max_new  # tokens of a prompt
        if self.most < 128:
            raise UsageError(
                f"--max_seq_len {settings.max_seq_len} leaves {self.most} tokens for the prompt next to a "
                f"reply of {self.max_new}: give at least {self.max_new + 128}, or lower --max_new_tokens."
            )
        rows, train = load_rows(settings.dataset, settings.data_dir)
        self.references: dict[str, list[str]] = {}
        if train is None:
            first, rest = split_off(rows, settings, CALIBRATION_ITEMS, "rows")
        else:
            first, rest = self._calibration_rows(train), rows
        self.calibration = [self._item(f"calibration{i}", row) for i, row in enumerate(first)]
        for i, row in enumerate(rest[: settings.num_tasks]):
            item = self._item(str(row.get("_id", i)).replace(" ", "_"), row)
            if item.key in self.references:  # a hub file repeats an id
                item.key += f"#{i}"
            self.references[item.key] = list(row["answers"])
            self.items.append(item)

    def _calibration_rows(self, train: list[dict[str, Any]]) -> list[dict[str, Any]]:
        count = calibration_count(self.settings, min(CALIBRATION_ITEMS, len(train)), len(train))
        if count > len(train):
            raise UsageError(
                f"--calib_samples {count}: train.jsonl of {self.settings.dataset} has only {len(train)} "
                "rows; give at most that."
            )
        return train[:count]

    def _item(self, key: str, row: dict[str, Any]) -> Item:
        text = self.set.prompt.format(context=row["context"], input=row["input"])
        text = self.settings.prompt_prefix + text + self.settings.prompt_suffix
        return Item(key, self._shortened(text), cluster=passage_id(row["context"]), question=row["input"])

    def _shortened(self, text: str) -> list[int]:
        """The prompt's tokens; of one that is too long the first and the last half of what fits. As LongBench
        does, the halves become text again before the chat template is put around them."""
        tokens, ids = self.tokenizer(text)["input_ids"], self.prompt_ids(text)
        half = min(self.most, len(tokens)) // 2
        while len(ids) > self.most:
            if half < 16:
                raise UsageError(
                    f"--max_seq_len {self.settings.max_seq_len} leaves no room for a prompt next to the "
                    "reply and the chat template; raise it."
                )
            halves = (tokens[:half], tokens[-half:])
            short = "".join(self.tokenizer.decode(part, skip_special_tokens=True) for part in halves)
            ids = self.prompt_ids(short)
            # Text cut in two can take a few tokens more than before, and the template takes its own.
            half -= max(1, (len(ids) - self.most + 1) // 2)
        return ids

    def judged(self, item: Item, answer: dict[str, Any]) -> dict[str, Any]:
        references = self.references.get(item.key)
        if references is None:  # it calibrates
            return answer
        return answer | {"answers": references, "rouge_l": rouge_l(answer["reply"], references)}

    def outcome(self, answers: list[dict[str, Any]]) -> Outcome:
        scores = [{"rouge_l": answer["rouge_l"]} for answer in answers]
        metric = mean_and_stderr([score["rouge_l"] for score in scores])
        return Outcome({"rouge_l": metric}, self.answers(answers, scores))


def rouge_l(prediction: str, references: list[str]) -> float:
    """The best ROUGE-L F of `prediction` against any reference, 0..1; 0 where either has no words.

    That of the package `rouge`, as LongBench's eval.py takes it. It recurses as deep as texts without a full
    stop are long; LongBench scores 0 where Python's limit ends that, here the limit is raised.
    """
    scorer = _rouge()(metrics=["rouge-l"])
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 20_000))
    best = 0.0
    try:
        for reference in references:
            try:
                best = max(best, scorer.get_scores(prediction, reference)[0]["rouge-l"]["f"])
            except ValueError:  # "Hypothesis is empty", or the reference
                continue
    finally:
        sys.setrecursionlimit(limit)
    return best


def _rouge() -> Any:
    try:
        from rouge import Rouge
    except ImportError:
        raise UsageError(f"--dataset longbench_* needs the package `rouge`: run {ROUGE_INSTALL}.") from None
    return Rouge


def load_rows(dataset: str, data_dir: str | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Test rows, and train rows where there are any. data_dir: holds `<dataset>/test.jsonl` (and
    train.jsonl), or `<name>.jsonl` as in the hub's data.zip; None: the hub. Raises UsageError."""
    name = SETS[dataset].hub_name
    if data_dir is None:
        return _hub_rows(name), None
    folder = Path(data_dir)
    for path in (folder / dataset / "test.jsonl", folder / f"{name}.jsonl"):
        if path.is_file():
            train = path.with_name("train.jsonl")
            is_split = path.name == "test.jsonl" and train.is_file()
            return read_file(path, LongBench), read_file(train, LongBench) if is_split else None
    raise UsageError(
        f"--data_dir {data_dir} has neither {dataset}/test.jsonl nor {name}.jsonl: name the folder that has "
        "one, or leave the flag out to use the hub."
    )


def _hub_rows(name: str) -> list[dict[str, Any]]:
    """Rows out of the zip file that the hub keeps LongBench in: `datasets` no longer runs loading scripts."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(HUB_ID, HUB_FILE, repo_type="dataset", local_files_only=not hub_reachable())
    except LocalEntryNotFoundError:
        raise UsageError(
            f"{HUB_ID} is not on this machine and the hub cannot be reached: connect to the network, or give "
            "--data_dir a folder with its rows."
        ) from None
    except HfHubHTTPError as error:
        raise UsageError(
            f"{HUB_ID} cannot be downloaded from the hub ({' '.join(str(error).split())[:200]}): give "
            "--data_dir a folder with its rows."
        ) from None
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"data/{name}.jsonl") as file:
            return read_rows(file, Path(path) / f"data/{name}.jsonl", LongBench)
    except (KeyError, zipfile.BadZipFile):
        raise UsageError(f"{path} has no data/{name}.jsonl: remove it to download it again.") from None

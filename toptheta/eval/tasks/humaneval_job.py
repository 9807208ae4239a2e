"""HumanEval: programs from their signature and description, run and scored by pass@k."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, set_seed

from toptheta.eval.run import Run
from toptheta.eval.settings import GenSettings
from toptheta.eval.tasks import humaneval
from toptheta.eval.tasks.base import CALIBRATION_ITEMS, Item, ReplyJob, end_tokens
from toptheta.models import generation as chunked
from toptheta.models.patch import model_device
from toptheta.util.console import say
from toptheta.util.errors import UsageError
from toptheta.util.files import write_text

SAMPLING = {"temperature": 0.5, "top_p": 0.95, "typical_p": 0.95}  # the published project's, with --do_sample


class StopWhenDone(StoppingCriteria):
    """Stops each sequence of a batch on its own once its text says all that is needed; lengths: tokens until
    then."""

    def __init__(self, tokenizer: Any, prompt_length: int, items: list[Item], limits: list[int], chat: bool):
        self.tokenizer, self.prompt_length, self.items, self.chat = tokenizer, prompt_length, items, chat
        self.limits = limits  # tokens that each reply may have: prompts of a batch differ in length
        self.lengths: list[int | None] = [None] * len(items)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        length = input_ids.shape[1] - self.prompt_length
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        for i, (text, item) in enumerate(zip(texts, self.items)):
            if self.lengths[i] is None and (length >= self.limits[i] or self._done(text, item)):
                self.lengths[i] = length
        return torch.tensor([n is not None for n in self.lengths], device=input_ids.device)

    def _done(self, text: str, item: Item) -> bool:
        if not self.chat:
            return any(stop in text for stop in humaneval.STOP_SEQUENCES)
        start = text.find(f"def {item.facts['entry_point']}")
        return start >= 0 and "\n```" in text[start:]  # the block that holds the function is closed


class HumanEvalJob(ReplyJob):
    """Every task, `num_samples_per_task` times. There is only one split: the first tasks calibrate too."""

    options = ("num_tasks", "num_samples_per_task", "max_seq_len", "prompt_prefix", "prompt_suffix")

    def __init__(self, settings: GenSettings, tokenizer: Any):
        super().__init__(settings, tokenizer)
        problems = list(humaneval.load_problems().values())[: settings.num_tasks]
        per_task = settings.num_samples_per_task
        self.items = [self._item(problem, i) for problem in problems for i in range(per_task)]
        tasks = self.items[::per_task]  # one sample of each
        size = settings.calib_samples or CALIBRATION_ITEMS
        self.calibration = tasks[: max(1, round(size * len(tasks))) if size < 1 else int(size)]
        self.calibration_note = (
            f"HumanEval has no other split: {len(self.calibration)} of the {len(tasks)} tasks that are "
            "evaluated calibrate too; --calib_task names another task to calibrate on."
        )

    def _item(self, problem: dict[str, Any], sample: int) -> Item:
        settings, prompt = self.settings, problem["prompt"]
        chat = settings.apply_chat_template
        text = humaneval.chat_message(prompt) if chat else prompt
        text = settings.prompt_prefix + text + settings.prompt_suffix
        facts = {"task_id": problem["task_id"], "prompt": prompt, "entry_point": problem["entry_point"]}
        return Item(f"{problem['task_id']}#{sample}", self.prompt_ids(text), facts)

    def run(self, model: Any, batch: list[Item]) -> list[dict[str, Any]]:
        replies, lengths = self._generate(model, batch)
        answers = []
        for item, reply, length in zip(batch, replies, lengths):
            completion = (
                humaneval.completion_from_reply(reply, item.facts["prompt"], item.facts["entry_point"])
                if self.settings.apply_chat_template
                else humaneval.truncate_base_completion(reply)
            )
            sample = {"task_id": item.facts["task_id"], "completion": completion, "reply": reply}
            answers.append(sample | {"prompt_tokens": len(item.ids), "reply_tokens": length})
        return answers

    @torch.no_grad()
    def _generate(self, model: Any, batch: list[Item]) -> tuple[list[str], list[int]]:
        """Replies to a batch, and the tokens of each."""
        settings, tokenizer = self.settings, self.tokenizer
        tokens = tokenizer.pad(
            {"input_ids": [item.ids for item in batch]}, padding_side="left", return_tensors="pt"
        ).to(model_device(model))
        prompt_length = tokens["input_ids"].shape[1]
        if prompt_length >= settings.max_seq_len:
            raise UsageError(
                f"--max_seq_len {settings.max_seq_len}: a prompt alone has {prompt_length} tokens; raise it."
            )
        if settings.do_sample:
            # The same text for the same batch, whatever was generated before: a resumed run must not differ.
            first = f"{batch[0].key}{settings.seed}".encode()
            set_seed(int.from_bytes(first, "big") % (1 << 32))
        limits = [settings.max_seq_len - len(item.ids) for item in batch]
        stop = StopWhenDone(tokenizer, prompt_length, batch, limits, settings.apply_chat_template)
        eos = end_tokens(model, tokenizer)
        out = chunked.generate(
            model,
            tokens,
            settings.prefill_chunk,
            stop,
            max_new_tokens=max(limits),
            do_sample=settings.do_sample,
            eos_token_id=eos,
            pad_token_id=tokenizer.pad_token_id,
            repetition_penalty=1.0,
            **(SAMPLING if settings.do_sample else {"temperature": None, "top_p": None, "top_k": None}),
        )
        lengths = []
        for row, stopped in zip(out.tolist(), stop.lengths):
            ends = [i + 1 for i, token in enumerate(row) if token in eos]
            lengths.append(min([len(row), *ends[:1], *([stopped] if stopped is not None else [])]))
        replies = [tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(out, lengths)]
        return replies, lengths

    def lines(self, answer: dict[str, Any]) -> dict[str, str]:
        lengths = f"{answer['prompt_tokens']} {answer['reply_tokens']}\n"
        return {
            "samples.jsonl": json.dumps(_sample(answer)) + "\n",
            "prompt_completion_lengths_per_sample.csv": lengths,
        }

    def metrics(self, answers: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
        if not self.settings.allow_code_execution:
            return {}
        return score(folder, [_sample(answer) for answer in answers], self.settings.num_samples_per_task)

    def finish(self, run: Run, results: list[dict[str, Any]], model_name: str) -> None:
        super().finish(run, results, model_name)
        if not self.settings.allow_code_execution:
            say(
                "The completions are not scored, because that runs generated programs. To run and "
                "score them:\n"
                f"  python gen_llama.py --score {run.folder} --allow_code_execution"
            )


def _sample(answer: dict[str, Any]) -> dict[str, Any]:
    """What samples.jsonl keeps of an answer."""
    return {name: answer[name] for name in ("task_id", "completion", "reply")}


def score(
    folder: Path, samples: list[dict[str, Any]], num_samples_per_task: int
) -> dict[str, dict[str, Any]]:
    """Run the samples' programs, write their results beside them, and return pass@k."""
    metrics, rows = humaneval.score_samples(
        samples, humaneval.load_problems(), range(1, num_samples_per_task + 1)
    )
    write_text(folder / "samples.jsonl_results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return {
        name: {"value": metric.value, "stderr": metric.stderr, "count": metric.count}
        for name, metric in metrics.items()
    }

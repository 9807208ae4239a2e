"""The HumanEval job: prompts, generation and scoring."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, set_seed

from toptheta.eval.cli import command
from toptheta.eval.sandbox.run import isolation_notice
from toptheta.eval.settings import GenSettings
from toptheta.eval.tasks.base import Outcome
from toptheta.eval.tasks.humaneval import completion, scoring
from toptheta.eval.tasks.items import CALIBRATION_ITEMS, Item, ReplyJob, calibration_count, end_tokens
from toptheta.models import generation as chunked
from toptheta.models.patch import model_device
from toptheta.models.planning import begin_prompts
from toptheta.util.errors import UsageError

SAMPLING = {"temperature": 0.5, "top_p": 0.95, "typical_p": 0.95}  # the published project's, with --do_sample


class StopWhenDone(StoppingCriteria):
    """Stops each sequence of a batch separately when its function is complete; lengths: tokens until then.
    going: numbers of the sequences that are still in the batch."""

    def __init__(self, tokenizer: Any, prompt_length: int, items: list[Item], limits: list[int], chat: bool):
        self.tokenizer, self.prompt_length, self.items, self.chat = tokenizer, prompt_length, items, chat
        self.limits = limits  # tokens that each reply may have: prompts of a batch differ in length
        self.lengths: list[int | None] = [None] * len(items)
        self.going = list(range(len(items)))

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        length = input_ids.shape[1] - self.prompt_length
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        for i, text in zip(self.going, texts):
            if self.lengths[i] is None and (length >= self.limits[i] or self._done(text, self.items[i])):
                self.lengths[i] = length
        return torch.tensor([self.lengths[i] is not None for i in self.going], device=input_ids.device)

    def _done(self, text: str, item: Item) -> bool:
        if not self.chat:
            return any(stop in text for stop in completion.STOP_SEQUENCES)
        start = text.find(f"def {item.facts['entry_point']}")
        return start >= 0 and "\n```" in text[start:]  # the block that holds the function is closed


class HumanEvalJob(ReplyJob):
    """Every task, `num_samples_per_task` times. There is only one split, so the first tasks are also used for
    calibration."""

    options = ("num_tasks", "num_samples_per_task", "max_seq_len", "prompt_prefix", "prompt_suffix")

    def __init__(self, settings: GenSettings, tokenizer: Any):
        super().__init__(settings, tokenizer)
        problems = _problems(settings)[: settings.num_tasks]
        per_task = settings.num_samples_per_task
        self.items = [self._item(problem, i) for problem in problems for i in range(per_task)]
        tasks = self.items[::per_task]  # one sample of each
        self.calibration = tasks[: calibration_count(settings, CALIBRATION_ITEMS, len(tasks))]
        if not settings.calib_task:
            self.calibration_note = (
                f"HumanEval has only one split: {len(self.calibration)} of the {len(tasks)} evaluated tasks "
                "are also used for calibration; --calib_task calibrates on another task."
            )
        notice = isolation_notice() if settings.allow_code_execution else None
        self.notices += [notice] if notice else []

    def _item(self, problem: dict[str, Any], sample: int) -> Item:
        settings, prompt = self.settings, problem["prompt"]
        chat = settings.apply_chat_template
        text = completion.chat_message(prompt) if chat else prompt
        text = settings.prompt_prefix + text + settings.prompt_suffix
        facts = {"task_id": problem["task_id"], "prompt": prompt, "entry_point": problem["entry_point"]}
        cluster = problem["task_id"] if settings.num_samples_per_task > 1 else None
        return Item(f"{problem['task_id']}#{sample}", self.prompt_ids(text), facts, cluster, prompt)

    def run(self, model: Any, batch: list[Item]) -> list[dict[str, Any]]:
        replies, tokens = self._generate(model, batch)
        answers = []
        for item, reply, ids in zip(batch, replies, tokens):
            answer = {
                "task_id": item.facts["task_id"],
                "completion": self._completion(reply, item),
                "reply": reply,
            }
            answer |= {"prompt_tokens": len(item.ids), "reply_tokens": len(ids), "reply_ids": ids}
            answers.append(answer)
        return answers

    def no_answer(self, item: Item) -> dict[str, Any]:
        return {"task_id": item.facts["task_id"], "completion": "", **super().no_answer(item)}

    def _completion(self, reply: str, item: Item) -> str:
        if self.settings.apply_chat_template:
            return completion.completion_from_reply(reply, item.facts["prompt"], item.facts["entry_point"])
        return completion.truncate_base_completion(reply)

    @torch.no_grad()
    def _generate(self, model: Any, batch: list[Item]) -> tuple[list[str], list[list[int]]]:
        """Replies to a batch, as text and as tokens."""
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
            first = hashlib.sha256(f"{batch[0].key} {settings.seed}".encode())
            set_seed(int.from_bytes(first.digest()[:4], "big"))
        limits = [settings.max_seq_len - len(item.ids) for item in batch]
        stop = StopWhenDone(tokenizer, prompt_length, batch, limits, settings.apply_chat_template)
        eos = end_tokens(model, tokenizer)

        def go_on(going: list[int]) -> None:
            stop.going = going
            begin_prompts(model, [batch[i].key for i in going])

        out = chunked.generate(
            model,
            tokens,
            settings.prefill_chunk,
            stop,
            go_on,
            max_new_tokens=max(limits),
            do_sample=settings.do_sample,
            eos_token_id=eos,
            pad_token_id=tokenizer.pad_token_id,
            repetition_penalty=1.0,
            **(SAMPLING if settings.do_sample else {"temperature": None, "top_p": None, "top_k": None}),
        )
        tokens_of = []
        for row, stopped in zip(out.tolist(), stop.lengths):
            ends = [i + 1 for i, token in enumerate(row) if token in eos]
            length = min([len(row), *ends[:1], *([stopped] if stopped is not None else [])])
            tokens_of.append(row[:length])
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens_of], tokens_of

    def lines(self, answer: dict[str, Any]) -> dict[str, str]:
        lengths = f"{answer['prompt_tokens']} {answer['reply_tokens']}\n"
        return {
            "samples.jsonl": json.dumps(_sample(answer)) + "\n",
            "prompt_completion_lengths_per_sample.csv": lengths,
        }

    def outcome(self, answers: list[dict[str, Any]]) -> Outcome:
        """Scored, and with samples.jsonl_results.jsonl, only where running the programs is allowed."""
        if not self.settings.allow_code_execution:
            return Outcome({}, self.answers(answers, [{} for _ in answers]))
        problems, ks = scoring.load_problems(), range(1, self.settings.num_samples_per_task + 1)
        metrics, rows = scoring.score_samples([_sample(answer) for answer in answers], problems, ks)
        scores = [{"passed": float(row["passed"])} for row in rows]
        files = {scoring.RESULTS: scoring.result_lines(rows)}
        extra = scoring.judged_together(rows)
        return Outcome(metrics, self.answers(answers, scores), extra, files)

    def hint(self, folder: str) -> str:
        if self.settings.allow_code_execution:
            return ""
        return (
            "The completions are not scored, because scoring runs generated programs. To score them:\n"
            f"  {command('gen_llama.py')} --score {folder} --allow_code_execution"
        )


def _problems(settings: GenSettings) -> list[dict[str, Any]]:
    """All tasks, or those of --task_ids in their order. Raises UsageError for a task that does not exist."""
    problems = scoring.load_problems()
    names = [f"HumanEval/{number}" for number in settings.task_ids] or list(problems)
    for name in names:
        if name not in problems:
            raise UsageError(f"--task_ids: there is no {name}; give numbers from 0 to {len(problems) - 1}.")
    return [problems[name] for name in dict.fromkeys(names)]


def _sample(answer: dict[str, Any]) -> dict[str, Any]:
    """The part of an answer in samples.jsonl."""
    return {name: answer[name] for name in ("task_id", "completion", "reply")}

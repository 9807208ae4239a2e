"""The lm-eval model class: patches its model, shares prompts between answers and prefixes between prompts,
and saves finished answers."""

import hashlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import StoppingCriteriaList

from toptheta.eval import processes
from toptheta.eval.batches import Batches, unfinished
from toptheta.eval.cell import Cell
from toptheta.eval.checkpoint import Checkpoint
from toptheta.eval.likelihoods import Group, Scored, score, split, unpadded_length
from toptheta.eval.prefixes import in_batches, shared_lengths
from toptheta.models.control import reading_prompt
from toptheta.models.finite import checked
from toptheta.models.generation import (
    LeavingGreedy,
    StopTexts,
    cache_for,
    generated_lengths,
    padded_behind,
)
from toptheta.models.loading import check_tokens, set_padding
from toptheta.models.patch import model_device, update_model
from toptheta.models.planning import announce_prompts, begin_prompts
from toptheta.models.prefix import Prefix, can_share, read_prefix
from toptheta.models.recorder import LayerRecord, Recorder
from toptheta.util.console import say
from toptheta.util.errors import UsageError
from toptheta.util.interrupts import uninterrupted

Request = tuple[tuple[str, str], list[int], list[int]]
QUOTED = 60  # characters of a prompt in a message
Groups = dict[tuple[int, ...], dict[str, tuple[int, ...]]]  # many of them
# Options of generation that ask nothing of the cache, nor for more sequences than prompts.
PLAIN = {"attention_mask", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


class TopThetaLM(HFLM):
    """HFLM with a patched model. cell: receives answers and counts, None while calibrating; recorder: counts
    what is kept, or None; description: of the progress bar; tokens: numbers of tokens of a prompt and its
    reply up to a stop sequence, by the prompt's text; reply_ids: the tokens of the reply; cut: prompts that
    are longer than the model's context, which lose their beginning."""

    def __init__(self, *args, **kwargs):
        self.cell: Cell | None = None
        self.recorder: Recorder | None = None
        self.description = "Evaluating"
        self.progress: Checkpoint | None = None  # of a calibration under way
        self.tokens: dict[str, dict[str, int]] = {}
        self.reply_ids: dict[str, list[int]] = {}
        self.cut: set[str] = set()
        self._said: set[str] = set()
        self._generated_lengths: list[int] = []
        self._lengths: dict[tuple[int, ...], int] = {}  # of what prompts share, while they are computed
        self._prefix: Prefix | None = None  # the last that was read
        self._keys: list[str] = []  # of the batch that is generated next
        self._begins_with: Prefix | None = None  # what the batch that is generated next has in its cache
        super().__init__(*args, **kwargs)
        if not isinstance(self.pretrained, str):
            self._device = model_device(self.pretrained)
        set_padding(self.tokenizer, self.model.config)

    @property
    def _grows(self) -> bool:
        """Whether the model leaves the kind of its cache to us."""
        return self.model.generation_config.cache_implementation is None

    def _create_model(self, *args, **kwargs) -> None:
        super()._create_model(*args, **kwargs)
        update_model(self._model)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy?) of every continuation. Answers to one prompt share its computation, and
        prompts share their common prefix.

        Unlike in the stock version, padding is masked, because it must not affect calibration and statistics.
        """
        self._check((*context, *continuation) for _, context, continuation in requests)
        keys = [_key(context, continuation) for _, context, continuation in requests]
        answers: dict[str, Any] = {}
        if self.cell is not None:
            answers = self.cell.answers
            self.cell.start_clock()
        done = answers if self.progress is None else self.progress.done
        groups: Groups = {}
        for key, (texts, context, continuation) in zip(keys, requests):
            whole = len(context)
            answer = len(continuation)
            context = self._fit(context, self.max_length + 1 - answer, answer)
            if texts is not None:  # None: a text that is read in windows
                self._count_prompt(texts[0], whole, len(context))
            groups.setdefault(tuple(context), {})[key] = tuple(continuation)
        self._say_cut(len({texts[0] for texts, _, _ in requests if texts is not None}))
        self._announce(groups)
        batches = Batches(self.batch_size)
        # Longest first: then memory runs out at once or not at all.
        order = split(sorted(groups.items(), key=lambda item: (-len(item[0]), item[0])), batches.size)
        self._lengths = shared_lengths(groups) if can_share(self.model) else {}
        length = unpadded_length(self.model.config, order)
        together = in_batches(order, lambda group: (self._shared(group[0]), length(group)), batches.size)
        todo = _without(together, done)
        total, left = len(set(keys)), sum(len(group) for batch in todo for _, group in batch)

        def run(batch: list[Group]) -> None:
            with self._counting(key for _, group in batch for key in group), reading_prompt(self.model):
                scored = checked(self.model, self._score, batch, lambda group: self._named(group[0]))
            with uninterrupted():  # all of a batch, or nothing
                for one in scored:
                    self._take(one.found, (one.prefill, one.decode), answers, last=one is scored[-1])
            tokens = sum(len(prompt) + sum(map(len, group.values())) for prompt, group in batch)
            advance(sum(len(one.found) for one in scored), tokens)

        def failed(group: Group) -> None:
            if self.progress is None:
                raise UsageError(
                    f"a prompt of {len(group[0])} tokens does not fit in memory, even alone: lower "
                    "--num_fewshot, or use a smaller --dtype."
                )
            for key in group[1]:
                self._skip(key)

        try:
            with self._bar(total, total - left, "answer", disable_tqdm) as advance:
                share = processes.share(todo)
                while share := _without(share, done):  # memory that ran out may have undone some
                    batches.run(share, run, self._undo, failed)
        finally:
            self._lengths = {}
            self._forget()
        self._join()
        results = [tuple(answers.get(key, (0.0, False))) for key in keys]
        for (request, _, _), result in zip(requests, results):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, result)
        return results

    def _named(self, prompt: str | Sequence[int]) -> str:
        """A readable reference to a prompt."""
        end = prompt if isinstance(prompt, str) else self.tok_decode(list(prompt[-QUOTED:]))
        return f"the prompt that ends in {end[-QUOTED:]!r}"

    def _counting(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """Within the block, computations for these requests count for the running calibration, if any."""
        return nullcontext() if self.progress is None else self.progress.counting(keys)

    def _announce(self, groups: Groups) -> None:
        """Announce the prompts and their answers to the running calibration, if any."""
        if self.progress is not None:
            spans = {_key(prompt): (0, len(prompt)) for prompt in groups}
            for prompt, group in groups.items():
                for key, answer in group.items():
                    spans[key] = (len(prompt), len(prompt) + len(answer) - 1)
            announce_prompts(self.model, spans)

    def _begin(self, keys: Iterable[str]) -> None:
        """Declare which announced sequences the following calls compute."""
        if self.progress is not None:
            begin_prompts(self.model, list(keys))

    def _take(
        self,
        found: dict[str, Any],
        counts: tuple[dict[int, LayerRecord], dict[int, list[LayerRecord]]],
        answers: dict[str, Any],
        decode_steps: np.ndarray | None = None,
        last: bool = True,
    ) -> None:
        """Add answers and counts to the cell; without a cell, add only the answers to `answers`."""
        if self.cell is None:
            answers.update(found)
            return
        self.cell.add(found, *counts, decode_steps, last=last)

    def _bar(
        self, total: int, done: int, unit: str, disable: bool
    ) -> AbstractContextManager[Callable[[int, int], None]]:
        return processes.progress(total, done, unit, self.description, not disable and self.rank == 0)

    def _shared(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The prefix that a prompt shares with others; empty if there is none."""
        prompt = tuple(prompt)
        return prompt[: self._lengths.get(prompt, 0)]

    def _read(self, ids: tuple[int, ...]) -> Prefix | None:
        """The computed prefix, reused if it is the last one; None if it is empty."""
        if not ids:
            return None
        if self._prefix is None or self._prefix.ids != ids:
            self._prefix = None  # before the next one takes memory
            self._prefix = read_prefix(self.model, ids)
        return self._prefix

    def _forget(self) -> None:
        """Free the memory of the computed prefix."""
        self._prefix = self._begins_with = None

    def _undo(self) -> None:
        """Discard the results of an unfinished batch."""
        self._forget()
        if self.recorder is not None:
            self.recorder.drain()
        if self.progress is not None:
            self.progress.restore()

    def _skip(self, key: str) -> None:
        """Continue the calibration without a request."""
        assert self.progress is not None
        say("Out of memory on a single prompt: calibration continues without it.")
        self.progress.skip(key)

    def _join(self) -> None:
        """Collect the answers of all processes in the first one."""
        if self.cell is not None:
            self.cell.join()

    def _fit(self, prompt: list[int], room: int, answer: int) -> list[int]:
        """The end of a prompt, of `room` tokens. answer: the number of tokens that leaves this room. Raises
        UsageError if there is none."""
        if room < 1:
            raise UsageError(
                f"an answer of {answer} tokens leaves no room for a prompt in the model's context of "
                f"{self.max_length} tokens: choose a model with a longer context, or another task."
            )
        return prompt[-room:]

    def _count_prompt(self, text: str, whole: int, kept: int) -> None:
        """Record the number of tokens of a prompt that the model is given, of all that it has."""
        self.tokens[text] = {"prompt": kept}
        if kept < whole:
            self.cut.add(text)

    def _say_cut(self, total: int) -> None:
        """Report, once, that some of `total` prompts are cut."""
        message = (
            f"{len(self.cut)} of {total} prompts are too long for the model's context of {self.max_length} "
            "tokens: they lose their beginning."
        )
        if self.cut and message not in self._said:
            self._said.add(message)
            say(message)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        size = self.batch_size
        self.batch_size_per_gpu = Batches(size).size  # lm-eval's loop over windows needs a number
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = size

    def _check(self, texts: Iterable[Sequence[int]]) -> None:
        check_tokens(texts, self.model.config, self.model.config._name_or_path)

    def _score(self, batch: list[Group]) -> list[Scored]:
        prefix = self._read(self._shared(batch[0][0]))
        return score(self.model, batch, prefix, self._begin, _key, self.softmax_dtype)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated texts, computed in batches and saved as soon as they are finished."""
        prompts = [self.tok_encode(r.args[0]) for r in requests]
        self._check(prompts)
        keys, drawn = list[str](), Counter[str]()
        for ids, request in zip(prompts, requests):
            options = request.args[1]
            reply = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            kept = self._fit(ids, self.max_length - reply, reply)
            self._count_prompt(request.args[0], len(ids), len(kept))
            key = _key([], ids, repr(sorted(options.items())))
            drawn[key] += 1
            if drawn[key] > 1 and not _is_greedy(options):  # a reply that is drawn anew
                key = _key([], ids, f"{sorted(options.items())!r} {drawn[key]}")
            keys.append(key)
        answers: dict[str, Any] = {}
        if self.cell is not None:
            answers = self.cell.answers
            self.cell.start_clock()
        done = answers if self.progress is None else self.progress.done
        self._say_cut(len({request.args[0] for request in requests}))
        by_key = dict(zip(keys, requests))
        if self.progress is not None:
            spans = {_key(options=r.args[0]): (0, len(ids)) for ids, r in zip(prompts, requests)}
            announce_prompts(self.model, spans)
        batches = Batches(self.batch_size)
        order = sorted(by_key, key=lambda key: (-len(by_key[key].args[0]), key))
        ids_of = dict(zip(keys, map(tuple, prompts)))
        if can_share(self.model) and self._grows:
            self._lengths = shared_lengths(ids_of.values())
        todo = unfinished(in_batches(order, lambda key: self._shared(ids_of[key]), batches.size), done)
        sizes = dict(zip(keys, map(len, prompts)))

        def texts_of(batch: list[str]) -> list[str]:
            return super(TopThetaLM, self).generate_until([by_key[key] for key in batch], disable_tqdm=True)

        def run(batch: list[str]) -> None:
            self._generated_lengths = []
            with self._counting(batch):
                texts = checked(self.model, texts_of, batch, lambda key: self._named(by_key[key].args[0]))
            found = dict(zip(batch, texts))
            counts = ({}, {}) if self.recorder is None else self.recorder.drain()
            self._take(found, counts, answers, np.array(self._generated_lengths) - 1)
            advance(len(found), sum(sizes[key] for key in batch) + sum(self._generated_lengths))

        def failed(key: str) -> None:
            if self.cell is not None:
                self.cell.fail(key, "")
            else:
                self._skip(key)

        try:
            with self._bar(len(order), len(order) - sum(map(len, todo)), "text", disable_tqdm) as advance:
                share = processes.share(todo)
                while share := unfinished(share, done):
                    batches.run(share, run, self._undo, failed)
        finally:
            self._lengths = {}
            self._forget()
        self._join()
        replies = [answers.get(key, "") for key in keys]
        for request, text in zip(requests, replies):
            ids = self.tok_encode(text, add_special_tokens=False)
            self.tokens[request.args[0]]["reply"] = len(ids)
            self.reply_ids[request.args[0]] = list(ids)
        return replies

    def tok_batch_encode(self, strings: list[str], *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Encode the next prompts, in the order of the batch, padded after a shared prefix, else at the
        left."""
        self._keys = [_key(options=text) for text in strings]
        self._begin(self._keys)
        tokens, mask = super().tok_batch_encode(strings, *args, **kwargs)
        rows = [tuple(row[real.bool()].tolist()) for row, real in zip(tokens, mask)]
        shared = self._shared(rows[0])  # nothing, if it was cut
        padded = not bool(mask.all())
        self._begins_with = None
        if not shared or any(self._shared(row) != shared for row in rows):
            return tokens, mask
        prefix = self._read(shared)
        assert prefix is not None
        if padded and prefix.has_window:
            return tokens, mask
        self._begins_with = prefix
        return padded_behind(tokens, mask, len(shared))

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs
    ) -> Tensor:
        plain = generation_kwargs.keys() <= PLAIN and self.mixed_precision_dtype is None and self._grows
        if self._begins_with is not None and plain:
            generation_kwargs["past_key_values"] = self._begins_with.begin(self.model, len(context))
        elif plain:
            generation_kwargs |= cache_for(self.model)
        if not plain or not _is_greedy(generation_kwargs):
            out = super()._model_generate(context, max_length, stop, **generation_kwargs)
            self._generated_lengths = generated_lengths(out[:, context.shape[1] :], self.eot_token_id)
            return out
        keys = self._keys
        greedy = LeavingGreedy(lambda going: self._begin([keys[i] for i in going]))
        out = self.model.generate(
            input_ids=context,
            max_length=max_length,
            stopping_criteria=StoppingCriteriaList([StopTexts(self.tokenizer, stop, context.shape[1])]),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            custom_generate=greedy,
            **generation_kwargs | {"do_sample": False, "temperature": None},
        )
        self._generated_lengths = greedy.lengths
        return out


def _is_greedy(options: dict[str, Any]) -> bool:
    """As lm-eval reads options of generation."""
    do_sample = options.get("do_sample")
    return do_sample is False or do_sample is None and options.get("temperature", 0.0) == 0.0


def _without(batches: list[list[Group]], done: Container[str]) -> list[list[Group]]:
    """Batches without finished items. The rest of a batch stays together, so that rounding does not
    change."""
    left = [
        [(prompt, {key: one for key, one in group.items() if key not in done}) for prompt, group in batch]
        for batch in batches
    ]
    return [kept for kept in ([one for one in batch if one[1]] for batch in left) if kept]


def _key(context: Sequence[int] = (), continuation: Sequence[int] = (), options: str = "") -> str:
    """The key of a request within one cell: a hash of its tokens and options."""
    digest = hashlib.sha256(options.encode())
    for part in (context, continuation):
        digest.update(",".join(map(str, part)).encode() + b";")
    return digest.hexdigest()[:24]

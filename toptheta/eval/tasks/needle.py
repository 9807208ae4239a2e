"""A needle in a haystack: one sentence with a random number, hidden at some depth of a long text.

Every prompt has its own number, thing and part of the haystack, all drawn with the seed. A reply that
contains the number scores 1. A length is the number of tokens of prompt and reply. Calibration prompts are
made in the same way with other numbers.
"""

import csv
import io
import random
import re
from itertools import product as pairs
from typing import Any

from toptheta.eval.settings import GenSettings
from toptheta.eval.tasks.base import Outcome
from toptheta.eval.tasks.items import CALIBRATION_ITEMS, Item, ReplyJob, calibration_count, mean_and_stderr
from toptheta.eval.tasks.texts import text_of
from toptheta.util.errors import UsageError

SHORTEST = 512  # of the default lengths
REPLY_TOKENS = 24
MOST_WORDS, MOST_CHARACTERS = 40, 100  # of a sentence, and of a word
THINGS = ("the lighthouse", "the old mill", "the north gate", "the observatory", "the harbour", "the archive")
INTRODUCTION = "One sentence in the following text tells a secret number. Remember that number.\n\n"
QUESTION = "\n\nWhat is the secret number of {thing}, according to the text above?"
STEM = "\nThe secret number of {thing} is"
NEEDLE = "The secret number of {thing} is {number}."

# The generated haystack: sentences without numbers, all slightly different.
_WHO = (
    "A gardener",
    "The baker",
    "My neighbour",
    "An old sailor",
    "The teacher",
    "A young painter",
    "The clerk",
)
_DID = (
    "walked past",
    "told us about",
    "often thought of",
    "drew a picture of",
    "waited beside",
    "dreamed of",
)
_WHAT = ("the market", "a quiet river", "the apple trees", "an empty road", "the stone bridge", "a blue door")
_WHEN = (
    "before the rain",
    "in the early morning",
    "while the kettle sang",
    "on a windy day",
    "late in autumn",
)
_THEN = (
    "and nobody was surprised",
    "because the days were long",
    "although the path was muddy",
    "and the birds went on singing",
    "so the story grew with every telling",
    "and that was all there was to say",
)


class NeedleJob(ReplyJob):
    """A grid of context lengths and depths, `needle_repeats` needles at each point."""

    max_new = REPLY_TOKENS

    def __init__(self, settings: GenSettings, tokenizer: Any):
        super().__init__(settings, tokenizer)
        self.lengths = sorted(set(settings.needle_lengths)) or default_lengths(settings.max_seq_len)
        self.depths = sorted(set(settings.needle_depths))
        text = text_of(settings.text, "--text") if settings.text else _filler(settings.seed)
        self.sentences = sentences_of(text)
        with_space = [" " + sentence for sentence in self.sentences]
        self.sizes = [len(ids) for ids in tokenizer(with_space, add_special_tokens=False)["input_ids"]]
        if sum(self.sizes) < max(self.lengths):
            name = f"--text {settings.text}" if settings.text else "the generated haystack (no --text)"
            raise UsageError(
                f"{name} has {sum(self.sizes)} tokens, fewer than the longest context "
                f"({max(self.lengths)}): give a longer text, or lower --needle_lengths."
            )
        grid = list(pairs(self.lengths, self.depths))
        for (length, depth), i in pairs(grid, range(settings.needle_repeats)):
            self.items.append(self._item(f"{length}/{depth}/{i}", length, depth))
        for i in range(
            calibration_count(settings, CALIBRATION_ITEMS, len(grid))
        ):  # the lengths in turn, so that few prompts already cover all of them
            length, depth = self.lengths[i % len(self.lengths)], self.depths[i % len(self.depths)]
            self.calibration.append(self._item(f"calibration{i}", length, depth))

    def _item(self, key: str, length: int, depth: int) -> Item:
        """The prompt whose length comes nearest below `length` less the reply."""
        draw = random.Random(f"{self.settings.seed} {key}")
        thing, number = draw.choice(THINGS), str(draw.randrange(1_000_000, 10_000_000))
        first, room = draw.randrange(len(self.sentences)), length - REPLY_TOKENS
        count, size = 0, 0
        while size + self.sizes[(first + count) % len(self.sizes)] <= room and count < len(self.sizes):
            size += self.sizes[(first + count) % len(self.sizes)]
            count += 1
        chosen = [self.sentences[(first + i) % len(self.sentences)] for i in range(count)]
        ids = self._prompt(chosen, depth, thing, number)
        while len(ids) > room:
            if not chosen:
                raise UsageError(
                    f"--needle_lengths: question and answer take {len(ids) + REPLY_TOKENS} tokens, more than "
                    f"{length}; give longer lengths."
                )
            over = len(ids) - room
            while over > 0 and chosen:
                over -= len(self.tokenizer(" " + chosen.pop(), add_special_tokens=False)["input_ids"])
            ids = self._prompt(chosen, depth, thing, number)
        words = f"{QUESTION.format(thing=thing).strip()} ({number}, at {depth} % of {length} tokens)"
        return Item(key, ids, {"length": length, "depth": depth, "number": number}, question=words)

    def _prompt(self, sentences: list[str], depth: int, thing: str, number: str) -> list[int]:
        at = round(len(sentences) * depth / 100)
        needle = NEEDLE.format(thing=thing, number=number)
        text = INTRODUCTION + " ".join([*sentences[:at], needle, *sentences[at:]])
        text += QUESTION.format(thing=thing)
        # A chat model answers in its own turn; any other continues the sentence.
        return self.prompt_ids(text if self.settings.apply_chat_template else text + STEM.format(thing=thing))

    def judged(self, item: Item, answer: dict[str, Any]) -> dict[str, Any]:
        digits = re.sub(r"(?<=\d)[,. ](?=\d)", "", answer["reply"])  # 1,234,567 is the number too
        return answer | item.facts | {"found": item.facts["number"] in digits}

    def outcome(self, answers: list[dict[str, Any]]) -> Outcome:
        """With the grid as rows, and as needle.csv: length (tokens), depth (%), found (needles), count."""
        rows = []
        for length, depth in pairs(self.lengths, self.depths):
            here = [a["found"] for a in answers if (a["length"], a["depth"]) == (length, depth)]
            rows.append({"length": length, "depth": depth, "found": sum(here), "count": len(here)})
        text = io.StringIO()
        table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        scores = [{"found": float(answer["found"])} for answer in answers]
        return Outcome(
            {"found": mean_and_stderr([score["found"] for score in scores])},
            self.answers(answers, scores),
            extra={"grid": rows},
            files={"needle.csv": text.getvalue()},
        )


def default_lengths(max_seq_len: int) -> list[int]:
    """512, 1024, ... and max_seq_len itself."""
    lengths, length = [], SHORTEST
    while length < max_seq_len:
        lengths.append(length)
        length *= 2
    return [*lengths, max_seq_len]


def sentences_of(text: str) -> list[str]:
    """The sentences of a text. Very long ones, of code or of a language without spaces, are cut, because
    prompts of a given length consist of whole sentences."""
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+|(?<=[。！？])", " ".join(text.split())):
        words = [
            word[at : at + MOST_CHARACTERS]
            for word in sentence.split()
            for at in range(0, len(word), MOST_CHARACTERS)
        ]
        found += [" ".join(words[at : at + MOST_WORDS]) for at in range(0, len(words), MOST_WORDS)]
    return found


def _filler(seed: int) -> str:
    """All generated sentences in random order: 7,560 of them, about 110,000 tokens."""
    parts = list(pairs(_WHO, _DID, _WHAT, _WHEN, _THEN))
    random.Random(seed).shuffle(parts)
    return " ".join(f"{who} {did} {what} {when}, {then}." for who, did, what, when, then in parts)

"""Settings of the jobs on the small folder model, as flags and as values."""

import argparse
import signal
from pathlib import Path

import pytest

from toptheta.eval.cli import parse_settings, settings_flags
from toptheta.eval.settings import GenSettings, QASettings, Settings
from toptheta.util.interrupts import on_signal

QA = {
    "k": (16,),
    "calib_sample_frac": 1.0,
    "calib_samples": 3,
    "device": "cpu",
}


def calibrating_settings(folder_model: str, **changes) -> QASettings:
    values = QA | {"llama": folder_model, "mode": (0,), "num_samples": 2, "num_fewshot": 2}
    return QASettings(**(values | changes))


def parse(flags: str) -> Settings:
    parser = argparse.ArgumentParser()
    settings_flags(parser, Settings)
    return parse_settings(Settings, parser.parse_args(flags.split()))


def gen_settings(folder_model: str, **changes) -> GenSettings:
    values = {
        "llama": folder_model,
        "mode": (0, 1, 3),
        "k": (16,),
        "sdc": "exact",
        "vmc": True,
        "calib_sample_frac": 1.0,
        "calib_samples": 2,
        "max_seq_len": 200,
        "prefill_chunk": 64,
        "device": "cpu",
    }
    return GenSettings(**(values | changes))


def qa_settings(folder_model: str, **changes) -> QASettings:
    method = {"mode": (0, 1, 3), "sdc": "exact", "vmc": True, "calib_tac": True}
    values = QA | method | {"llama": folder_model, "num_samples": 5, "num_fewshot": 3}
    return QASettings(**(values | changes))


def only_run(root: Path) -> Path:
    return next(root.iterdir())


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int, after: bool = False) -> list[int]:
    """Ctrl-C in a Q&A run at the batch of this number, counted from 1: before it is computed, or after. An
    evaluation stops there, a calibration when the batch is through. Returns how many prompts each batch had,
    as they come."""
    from toptheta.eval.lm_eval_model import TopThetaLM

    batches: list[int] = []
    score = TopThetaLM._score

    def scoring(lm, batch):
        batches.append(len(batch))
        if len(batches) != number:
            return score(lm, batch)
        if after:
            score(lm, batch)
        on_signal(signal.SIGINT, None)
        return score(lm, batch)

    monkeypatch.setattr(TopThetaLM, "_score", scoring)
    return batches

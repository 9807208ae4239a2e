"""Settings of the jobs on the small folder model, as flags and as values."""

import argparse
from pathlib import Path

from toptheta.eval.cli import parse_settings, settings_flags
from toptheta.eval.settings import GenSettings, QASettings, Settings


def calibrating_settings(folder_model: str, **changes) -> QASettings:
    values = {
        "llama": folder_model,
        "mode": (0,),
        "k": (16,),
        "calib_sample_frac": 1.0,
        "calib_samples": 3,
        "num_samples": 2,
        "num_fewshot": 2,
        "device": "cpu",
    }
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


def only_run(root: Path) -> Path:
    return next(root.iterdir())

"""`--model toptheta` of lm-eval's own command line: a model, its method, and saved thresholds.

    toptheta-eval run --model toptheta --tasks arc_easy \\
        --model_args pretrained=HUB_ID,method=top_theta,k=64,thresholds=DIR_OR_HUB_ID
"""

import inspect
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from toptheta.calibration.artefact import Calibration
from toptheta.eval.calibration_files import is_calibration, of_run
from toptheta.eval.lm_eval_model import TopThetaLM
from toptheta.eval.settings import Settings, resolve_device
from toptheta.methods.params import AttentionParams, MethodOptions, check
from toptheta.models.control import set_params
from toptheta.models.loading import find_model, load_config, load_tokenizer, unpacked
from toptheta.models.sharing import find_calibration, use_calibration
from toptheta.util.errors import UsageError

OURS = ("method", "k", "thresholds", *(f.name for f in fields(MethodOptions) if f.name != "calib_load_path"))

PARAMETERS = {"k": "K"}  # of set_params, where the names differ
LM_EVAL_DEVICE = "cuda:0"  # what its command line hands over where no --device is given


def _flag(name: str) -> str:
    """A parameter in the form that lm-eval's users give it."""
    return f"--model_args {'k' if name == 'K' else name}"


@register_model("toptheta")
class TopThetaHarnessLM(TopThetaLM):
    """pretrained, device, dtype: as `--llama`, `--device` and `--dtype` of the scripts; the last two are
    'auto' by default. method: NAME[:option=value]; k; thresholds: a folder or hub id of a calibration (whose
    saved method, k and options apply unless they are given), or a run's folder with th.txt. Options of
    `set_params` have their names; all other arguments go to lm-eval's `hf`. Raises UsageError for invalid
    arguments, if possible before the model is loaded."""

    def __init__(
        self,
        pretrained: str = "",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        **arguments: Any,
    ):
        if not pretrained:
            raise UsageError("--model_args names no model: add pretrained=HUB_ID, a folder, or smollm2.")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UsageError(
                f"--batch_size is {batch_size}: give a whole number; this model does not choose one itself."
            )
        ours = {PARAMETERS.get(name, name): arguments.pop(name) for name in OURS if name in arguments}
        calibration = _calibration(os.path.expanduser(str(ours.pop("thresholds", ""))), ours)
        saved = {} if calibration is None else calibration.config.params
        _check(saved | ours, calibration)
        source = find_model(pretrained, _flag("pretrained"))
        load_config(source)  # says in a sentence what is wrong with it
        local = unpacked(source)
        if local.gguf_file:
            arguments |= {"gguf_file": local.gguf_file, "tokenizer": load_tokenizer(source)}
        if device == LM_EVAL_DEVICE and not torch.cuda.is_available():
            device = "auto"
        where = resolve_device(Settings(device=device, dtype=dtype))
        try:
            super().__init__(
                pretrained=local.location,
                device=where.device,
                dtype=where.dtype,
                batch_size=int(batch_size),
                **arguments,
            )
        except TypeError as error:
            unknown = [name for name in arguments if name not in inspect.signature(HFLM.__init__).parameters]
            if not unknown or "unexpected keyword argument" not in str(error):
                raise
            raise UsageError(
                f"--model_args has {', '.join(unknown)}, which neither toptheta nor lm-eval accepts; those "
                f"of toptheta are pretrained, {', '.join(OURS)}."
            ) from None
        self.model.config._name_or_path = source.name
        if calibration is None:
            set_params(self.model, **ours)
        else:
            use_calibration(self.model, calibration, **ours)


def _calibration(thresholds: str, ours: dict[str, Any]) -> Calibration | None:
    """The calibration to use, from a folder or the hub."""
    if not thresholds:
        return None
    if not Path(thresholds).is_dir() or is_calibration(thresholds):
        return find_calibration(thresholds)
    return of_run(thresholds, {"placement": "pre-softmax"} | ours, name=_flag("thresholds"))


def _check(params: dict[str, Any], calibration: Calibration | None) -> None:
    wanted = check(AttentionParams().changed(params, _flag), _flag)
    if wanted.needs_calibration and calibration is None:
        raise UsageError(
            f"--model_args method={wanted.method.spec} needs calibrated tables: add thresholds=, the folder "
            "or hub id of a calibration, made by save_calibration, push_calibration or --calibrate_only."
        )

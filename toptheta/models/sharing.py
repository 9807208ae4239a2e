"""Saving a model's calibration, applying one to a model, and sharing it on the Hugging Face hub."""

import os
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor, nn

import toptheta
from toptheta.attention import effective_k
from toptheta.calibration.artefact import FORMAT, OPTIONS, SHAPING, Calibration, CalibrationConfig
from toptheta.calibration.tables import CalibrationTables
from toptheta.methods.params import AttentionParams
from toptheta.models.calibrate import calibrations
from toptheta.models.control import (
    UNSHAPED,
    change_params,
    get_params,
    record_statistics,
    recorder_of,
    tables_of,
)
from toptheta.models.divergence import against_dense
from toptheta.models.families import check_head
from toptheta.models.loading import hub_reachable
from toptheta.models.patch import model_device, model_state
from toptheta.models.recorder import DECODE, Recorder, count_steps
from toptheta.util.errors import UsageError
from toptheta.util.files import check_writable


def save_calibration(
    model: nn.Module,
    folder: Path | str,
    *,
    base_model: str | None = None,
    text: str = "",
    check_on: Sequence[Tensor] = (),
) -> None:
    """Write the calibration in use, with the method's parameters, as calibration.safetensors, config.json and
    a card (README.md) into `folder`.

    base_model: the model's hub id, by default what it was loaded from; text: name of the calibration text,
    for the card. check_on: other texts, as token ids `[1, L]`, on which the card's effective K and KL to
    dense attention are measured. Raises UsageError if the model has no calibration, or it cannot be written.
    """
    target, remedy = Path(_path(folder)), "name another folder"
    check_writable(target, "the folder", remedy)  # before anything is measured
    calibration = calibration_of(model, base_model, text, check_on)
    try:
        calibration.save(target)
    except OSError as error:
        raise UsageError(f"the folder {target} cannot be written to ({error.strerror}): {remedy}.") from None


def push_calibration(
    model: nn.Module,
    repo_id: str,
    *,
    base_model: str | None = None,
    text: str = "",
    check_on: Sequence[Tensor] = (),
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
) -> str:
    """`save_calibration` into a hub repository, which is created if it does not exist; returns the commit's
    URL. Also raises UsageError if the hub refuses it or cannot be reached."""
    try:
        validate_repo_id(repo_id or "")
    except HFValidationError:
        raise UsageError(
            f"the calibration cannot be pushed to {repo_id!r}: give a hub id of the form owner/name, of "
            "letters, digits and single '-', '_' and '.'."
        ) from None
    calibration = calibration_of(model, base_model, text, check_on)
    if not hub_reachable():
        raise UsageError(
            f"the calibration cannot be pushed to {repo_id}, because the hub cannot be reached: connect to "
            "the network, or write it to a folder with save_calibration."
        )
    try:
        return calibration.push_to_hub(
            repo_id,
            private=private,
            token=token,
            branch=branch,
            commit_message=f"Calibration by toptheta {toptheta.__version__}",
        )
    except (HFValidationError, OSError) as error:  # OSError: the hub's answers, and a broken connection
        raise UsageError(f"the calibration cannot be pushed to {repo_id}: {_reason(error)}.") from None


def load_calibration(
    model: nn.Module,
    folder_or_hub_id: Path | str,
    *,
    revision: str | None = None,
    token: str | None = None,
    strict: bool = True,
    **params: Any,
) -> CalibrationConfig:
    """Put a saved calibration to use in a patched model, with the parameters that were saved with it; returns
    its config.

    revision: of the hub repository; params: parameters as `set_params` takes them, overriding the saved ones.
    strict: refuse a model with another name or revision than that of the calibration, if both are known.
    Raises UsageError if there is no such calibration, or it does not match the model or `params`; the model
    is then not changed.
    """
    calibration = find_calibration(folder_or_hub_id, revision, token)
    use_calibration(model, calibration, strict, **params)
    return calibration.config


def use_calibration(model: nn.Module, calibration: Calibration, strict: bool = True, **params: Any) -> None:
    """`load_calibration` for a calibration that is already loaded."""
    _check_not_calibrating(model)
    for name in ("calibrate", "calib_load_path"):
        if params.get(name):
            raise UsageError(f"{name} gives other tables than the calibration to load: leave it out.")
    _check_model(calibration.config, model, strict)
    shared = model_state(model)
    before, shared.tables = shared.tables, calibration.tables
    try:
        saved = get_params(model).changed(UNSHAPED | {"test_layer": None} | calibration.config.params)
        change_params(model, saved, params)
    except BaseException:
        shared.tables = before
        raise


def find_calibration(
    folder_or_hub_id: Path | str, revision: str | None = None, token: str | None = None
) -> Calibration:
    """The calibration in a folder or a hub repository. Raises UsageError if there is none, or it is
    damaged."""
    where = _path(folder_or_hub_id)
    local = os.path.isdir(where)
    if local and not os.path.isfile(os.path.join(where, "config.json")):
        raise UsageError(
            f"the calibration {where} has no config.json: name a folder that save_calibration wrote, or load "
            "th.txt and sdc.txt with set_params(calib_load_path=...)."
        )
    try:
        return Calibration.from_pretrained(
            where, revision=revision, token=token, local_files_only=local or not hub_reachable()
        )
    except HFValidationError:
        raise UsageError(
            f"the calibration {where} is neither a folder nor a hub id of the form owner/name."
        ) from None
    except LocalEntryNotFoundError:
        raise UsageError(
            f"the calibration {where} is neither a folder nor in the local cache, and the hub cannot be "
            "reached: connect to the network, or name a folder."
        ) from None
    except HfHubHTTPError as error:
        raise UsageError(f"the calibration {where} cannot be loaded: {_reason(error)}.") from None
    except UsageError:
        raise
    except (ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UsageError(
            f"the calibration {where} is damaged or not of this format ({error}): name another, or make one "
            "from a run's folder with toptheta-calibration."
        ) from None


def calibration_of(
    model: nn.Module, base_model: str | None = None, text: str = "", check_on: Sequence[Tensor] = ()
) -> Calibration:
    """The model's calibration, see `save_calibration`."""
    params, tables = get_params(model), tables_of(model)
    _check_not_calibrating(model)
    if tables is None or not params.needs_calibration:
        raise UsageError(
            "the model has no calibration to save: calibrate with set_params(mode=0, calibrate=True), or "
            "load one."
        )
    texts = _texts(model, check_on)
    sizes, (rows, longest) = _sizes(model), sampled(tables)
    name = base_model or tables.meta.get("model") or sizes["base_model"]
    config = CalibrationConfig(
        format=FORMAT,
        **(sizes | {"base_model": _hub_id_or_name(name)}),
        params=used(params, sizes["num_layers"]),
        calibrated_with={name: tables.meta[name] for name in SHAPING if name in tables.meta},
        text=text or tables.meta.get("task", ""),
        rows=rows,
        longest=longest,
        measured=measure(model, texts) if texts else {},
        date=date.today().isoformat(),
        versions=versions(),
    )
    return Calibration(tables, config)


def sampled(tables: CalibrationTables) -> tuple[int, int]:
    """The number of sampled rows of each head of a layer, the most of any layer, and the length of the
    longest."""
    samples = [table.samples for table in (tables.theta or tables.sdc).values()]
    longest = max(int(np.flatnonzero(one.any(axis=0)).max()) for one in samples)
    stated = tables.meta.get("longest", "")  # of a budget, which has no table by row length
    rows = max(int(one.sum(axis=1).max()) for one in samples)
    return rows, int(stated) if stated.isdigit() else longest


def versions() -> dict[str, str]:
    """What a calibration was made with."""
    return {
        "toptheta": toptheta.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def measure(model: Any, texts: Sequence[Tensor]) -> dict[str, Any]:
    """KL of the current method to dense attention, and its effective K, on texts `[1, L]` of token ids.

    The first half of each text is left dense, as a prompt is; the others are decode steps, which count.
    Returns kl (mean and standard error between texts, nats a token; the share of the same most likely token),
    effective_k (of `effective_k.overall`, over all layers), and missed_keys (see attention/missed.py) if the
    method has a copy of K.
    """
    sizes, before = _sizes(model), recorder_of(model)
    recorder = Recorder()
    ks = get_params(model).k_per_layer(sizes["num_layers"])
    histograms, kl, same = dict[int, np.ndarray](), list[Tensor](), list[Tensor]()
    wanted = missed = 0
    record_statistics(model, recorder)
    try:
        for ids in texts:
            found = against_dense(model, ids.to(model_device(model)), ids.shape[1] // 2, None)
            kl.append(found.kl.double())
            same.append(found.same_top.double())
            for layer, steps in recorder.drain()[1].items():
                if ks[layer] > 0:
                    histograms[layer] = histograms.get(layer, 0) + count_steps(steps, ks[layer])
                wanted += sum(int(step.wanted.sum()) for step in steps if step.wanted is not None)
                missed += sum(int(step.missed.sum()) for step in steps if step.missed is not None)
    finally:
        record_statistics(model, before)
    means = torch.stack([one.mean() for one in kl])
    by_k = effective_k.overall(histograms, DECODE, ks)
    return {
        "kl": {
            "mean": float(torch.cat(kl, dim=1).mean()),
            "stderr": float(means.std() / len(kl) ** 0.5) if len(kl) > 1 else None,
            "tokens": sum(one.numel() for one in kl),
            "texts": len(kl),
            "same_top": float(torch.cat(same, dim=1).mean()),
        },
        "effective_k": [{name: x for name, x in one.items() if name != "layers"} for one in by_k],
    } | ({"missed_keys": missed / wanted} if wanted else {})


def used(params: AttentionParams, num_layers: int) -> dict[str, Any]:
    """The parameters as `set_params` takes them, fit for JSON."""
    ks = params.k_per_layer(num_layers)
    values = {name: getattr(params, name) for name in OPTIONS}
    return {"method": params.method.spec, "K": ks[0] if len(set(ks)) == 1 else list(ks)} | values


def _sizes(model: Any) -> dict[str, Any]:
    """The description of a model in a calibration's config."""
    config = model.config.get_text_config()
    num_heads = config.num_attention_heads
    return {
        "base_model": str(getattr(model.config, "_name_or_path", "")),
        "revision": str(getattr(model.config, "_commit_hash", None) or ""),
        "model_type": config.model_type,
        "num_layers": config.num_hidden_layers,
        "num_heads": num_heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or num_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // num_heads,
    }


def _path(given: Any) -> str:
    """A folder's path, or what may be a hub id. Raises UsageError for anything else."""
    path = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(path, str) or not path or "\0" in path:
        raise UsageError(f"the calibration's folder is {given!r}, which is not a path: name a folder.")
    return os.path.expanduser(path)


def _texts(model: Any, check_on: Any) -> list[Tensor]:
    """The texts of `check_on`, or the only one. Raises UsageError if KL cannot be measured on them."""
    listed = isinstance(check_on, Sequence) and not isinstance(check_on, str)
    texts: list[Any] = list(check_on) if listed else [check_on]
    if texts:
        check_head(model, "check_on")
    words = model.config.get_text_config().vocab_size
    for ids in texts:
        found = ""
        if not isinstance(ids, Tensor):
            found = f"type {type(ids).__name__}"
        elif ids.dtype not in (torch.int32, torch.int64):
            found = f"type {ids.dtype}"
        elif ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 4:
            found = f"shape {tuple(ids.shape)}"
        if found:
            raise UsageError(
                f"check_on has a text of {found}: give a list of tensors of token ids [1, L], L at least 4."
            )
        if ids.min() < 0 or ids.max() >= words:
            raise UsageError(
                f"check_on has token ids from {int(ids.min())} to {int(ids.max())}, but the model has "
                f"{words} tokens: use its own tokenizer."
            )
    return texts


def _check_not_calibrating(model: nn.Module) -> None:
    if calibrations(model):
        raise UsageError("a calibration is under way: end it first with set_params(calibrate=False).")


def _check_model(config: CalibrationConfig, model: nn.Module, strict: bool) -> None:
    """Raise UsageError unless a calibration is for this model."""
    sizes = _sizes(model)
    for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "model_type"):
        theirs = getattr(config, name)
        if theirs and theirs != sizes[name]:  # what was made of th.txt knows a part of them
            raise UsageError(
                f"the calibration is for a model with {name} {theirs}, but this model has {sizes[name]}: "
                f"calibrate this model, or load {config.base_model or 'the other model'}."
            )
    if not strict:
        return
    ours, theirs = _short(_hub_id_or_name(sizes["base_model"])), _short(config.base_model)
    if ours and theirs and ours != theirs:
        raise UsageError(
            f"the calibration is for {config.base_model}, but this model is {sizes['base_model']}: calibrate "
            "this model, or give strict=False if both are the same."
        )
    if sizes["revision"] and config.revision and sizes["revision"] != config.revision:
        raise UsageError(
            f"the calibration is for revision {config.revision} of {config.base_model}, but this model is "
            f"revision {sizes['revision']}: load that revision, calibrate this one, or give strict=False."
        )


def _short(name: str) -> str:
    """A model's name without owner, folder and what `ModelSource` leaves out."""
    return name.rstrip("/").split("/")[-1].replace("Meta-", "").lower()


def _hub_id_or_name(name: str) -> str:
    return Path(name).resolve().name if name and Path(name).is_dir() else name


def _reason(error: Exception) -> str:
    """The message of the hub's client, as one line."""
    return " ".join(str(error).split())[:300].rstrip(".")

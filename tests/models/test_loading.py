"""Names of models: aliases, hub names, files and folders."""

import json
import re
import resource
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from tests.helpers.families import make
from toptheta.models.control import set_params
from toptheta.models.loading import (
    ModelSource,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    spread_notice,
    unpacked,
)
from toptheta.models.patch import model_device, restore_model, update_model
from toptheta.util.errors import UsageError


def test_models(tmp_path: Path) -> None:
    assert find_model("3-8").location == "meta-llama/Meta-Llama-3-8B"
    assert find_model("3-8").name == "Llama-3-8B"
    assert find_model("owner/name").location == "owner/name"
    for name, message in (
        ("3-9", "neither an alias"),
        ("a/b/c", "neither an alias"),
        (str(tmp_path / "x.gguf"), "no such file"),
        (str(tmp_path), "no config.json"),
    ):
        with pytest.raises(UsageError, match=message):
            find_model(name)


def test_a_model_spread_over_memory_and_disk(small_model, small_tokenizer, here: Path) -> None:
    """Layers that rest on disk compute the same, calibrated and sparse, in calls and in generation."""
    parts = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    layers = {f"model.layers.{i}": "cpu" if i % 8 else "disk" for i in range(30)}
    spread = load_model(find_model("smollm2"), "float32", parts | layers)
    assert spread.model.layers[8].mlp.up_proj.weight.device.type == "meta"
    assert model_device(spread) == model_device(small_model) == torch.device("cpu")
    text = "The hills were green, and the town below slept. " * 5
    ids = small_tokenizer(text, return_tensors="pt")["input_ids"]
    found = []
    for model in (small_model, spread):
        update_model(model)
        set_params(model, mode=0, K=24, sdc="exact", vmc=True, calib_tac=True, calibrate=True)
        model(ids)
        set_params(model, calibrate=False)
        replies = model.generate(ids, max_new_tokens=3, do_sample=False)[0].tolist()
        found.append((model(ids).logits, replies))
    restore_model(small_model)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-5)
    assert found[1][1] == found[0][1]
    assert spread_notice(spread) == ""  # there is no GPU in it
    spread.hf_device_map["lm_head"] = 0
    assert spread_notice(small_model) == ""
    assert "33 of its 34 parts are on CPU or disk" in spread_notice(spread)


def test_families(tmp_path: Path) -> None:
    """A folder of any known family will do; of another one it is refused before the weights are read."""
    make("gemma2").config.save_pretrained(tmp_path / "gemma")
    assert load_config(find_model(str(tmp_path / "gemma"))).model_type == "gemma2"
    GPT2Config().save_pretrained(tmp_path / "gpt")
    with pytest.raises(UsageError, match="gpt is a model of type 'gpt2': use one of llama, smollm3, mistral"):
        load_config(find_model(str(tmp_path / "gpt")))


def test_pickled_weights_are_refused(folder_model: str, tmp_path: Path) -> None:
    """They are loaded only where a person says so; safetensors beside them are taken anyway."""
    folder = tmp_path / "pickled"
    shutil.copytree(folder_model, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    source = find_model(str(folder))
    with pytest.raises(UsageError, match="has no safetensors. .* add --allow_pickle"):
        load_model(source, "float32")
    model = load_model(source, "float32", allow_pickle=True)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], weights[name])
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_model(source, "float32").state_dict()[name], weights[name])


def test_damaged_files_are_one_sentence(
    folder_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the library raises for them; errors of another kind stay what they are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = json.loads((Path(folder_model) / "config.json").read_text())
    weights = (Path(folder_model) / "model.safetensors").read_bytes()
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\x00" * 40)
    for name, file, content in (
        ("cut", "model.safetensors", weights[: len(weights) // 2]),
        ("no header", "model.safetensors", b"x" * 100),
        ("another width", "config.json", json.dumps(config | {"intermediate_size": 8}).encode()),
        ("layers in words", "config.json", json.dumps(config | {"num_hidden_layers": "six"}).encode()),
        ("half a config", "config.json", b'{"model_type": "llama", '),
        ("half a tokenizer", "tokenizer.json", b'{"version": "1.0", '),
        ("another tokenizer", "tokenizer.json", b'{"added_tokens": [], "model": {"type": "BPE"}}'),
    ):
        shutil.copytree(folder_model, tmp_path / name)
        (tmp_path / name / file).write_bytes(content)
        source = find_model(str(tmp_path / name))
        with pytest.raises(UsageError, match=re.escape(str(tmp_path / name))):
            load_config(source)
            load_tokenizer(source)
            load_model(source, "float32")
    with pytest.raises(UsageError, match="model.gguf cannot be loaded .*: copy its files again"):
        load_config(find_model(str(tmp_path / "model.gguf")))
    cached = ModelSource("cut", str(tmp_path / "cut"))
    monkeypatch.setenv("TOPTHETA_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="cut cannot be loaded .*: remove that folder"):
        load_model(cached, "float32")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        load_model(find_model(folder_model), "float32")


def test_a_folder_without_a_tokenizer(folder_model: str, tmp_path: Path) -> None:
    shutil.copytree(folder_model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UsageError, match="bare has no tokenizer: copy"):
        load_tokenizer(find_model(str(tmp_path / "bare")))


@pytest.mark.parametrize("size", [20_000, 1_000_000], ids=["weights", "tokenizer"])
def test_a_full_disk_while_unpacking(
    size: int, small_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, whichever file has no room, and nothing is left; the next start unpacks the model."""
    monkeypatch.setenv("TOPTHETA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    source, model = find_model(str(tmp_path / "model.gguf")), make("llama")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", Mock(return_value=model))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", Mock(return_value=small_tokenizer))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(UsageError, match="cache .*File too large.*: make room .* TOPTHETA_CACHE"):
            unpacked(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "cache").iterdir())
    folder = Path(unpacked(source).location)
    assert list((tmp_path / "cache").iterdir()) == [folder] and (folder / "tokenizer.json").is_file()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("TOPTHETA_CACHE", str(tmp_path / "model.gguf" / "below"))
    with pytest.raises(UsageError, match="below .*Not a directory.* TOPTHETA_CACHE"):
        unpacked(find_model(str(tmp_path / "model.gguf")))

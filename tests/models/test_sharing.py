"""Calibrations as artefacts: what is saved comes back, from a folder and from a hub on loopback, and what
does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from tests.helpers.calibration import calibrated
from tests.helpers.hub import COMMIT, Hub, serving
from tests.helpers.models import tiny_config, tokens
from topk_llama import load_calibration, push_calibration, save_calibration, set_params, update_model
from toptheta.calibration.interpolation import MAX_FIT_LENGTH
from toptheta.models import loading
from toptheta.models.control import get_params, tables_of
from toptheta.util.errors import UsageError

METHODS = {
    "Top-theta": {"mode": 0, "K": 6, "sdc": "exact", "vmc": True},
    "offline SDC": {"mode": 0, "K": {0: 6, 1: 9, 2: 6}, "sdc": "offline-calibrated", "calib_tac": True},
    "Top-k with SDC": {"mode": 1, "K": 6, "sdc": "offline-calibrated"},
    "budget of values": {
        "method": "top_theta:value_aware",
        "mode": None,
        "K": 8,
        "placement": "post-softmax",
        "calib_to": "budget",
        "vmc": True,
    },
}


def tiny(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return update_model(LlamaForCausalLM(tiny_config(**changes)).eval())


def steered(name: str) -> LlamaForCausalLM:
    model = tiny()
    params = {key: value for key, value in ({"mode": 0} | METHODS[name]).items() if value is not None}
    if "method" in params:
        update_model(model)
        set_params(model, **params, calib_sample_frac=1.0, calibrate=True)
        for seed in range(3):
            model(tokens(length=60, seed=seed))
    else:
        calibrated(model, **params)
    set_params(model, calibrate=False)
    return model


@pytest.mark.parametrize("name", METHODS)
def test_a_folder_gives_the_same_model(name: str, tmp_path: Path) -> None:
    model = steered(name)
    save_calibration(model, tmp_path / "calibration", text="random tokens")
    assert {file.name for file in (tmp_path / "calibration").iterdir()} == {
        "calibration.safetensors",
        "config.json",
        "README.md",
    }
    assert not list(tmp_path.glob(".calibration*"))
    other = tiny()
    load_calibration(other, tmp_path / "calibration")
    ids = tokens(length=50, seed=9)
    dense = tiny()(ids).logits
    expected = model(ids).logits
    assert not torch.allclose(expected, dense, atol=1e-3)
    assert torch.equal(other(ids).logits, expected)
    assert get_params(other).method == get_params(model).method
    assert get_params(other).k_per_layer(3) == get_params(model).k_per_layer(3)


def test_rows_beyond_those_of_a_fit(tmp_path: Path) -> None:
    """A calibration can be saved and loaded whatever the length of its rows."""
    model = steered("Top-theta")
    tables = tables_of(model)
    assert tables is not None
    longest = 3 * MAX_FIT_LENGTH // 2
    for table in tables.theta.values():
        more = ((0, 0), (0, longest + 1 - table.values.shape[1]))
        table.values = np.pad(table.values, more, constant_values=np.nan)
        table.samples = np.pad(table.samples, more)
        table.values[:, longest], table.samples[:, longest] = 0.5, 1
    save_calibration(model, tmp_path / "calibration")
    other = tiny()
    load_calibration(other, tmp_path / "calibration")
    theta = other.model.layers[0].self_attn.toptheta.theta
    assert theta.shape[1] == longest + 1 and (theta[:, longest] == 0.5).all()


def test_card_and_config(tmp_path: Path) -> None:
    model = steered("Top-theta")
    texts = [tokens(length=80, seed=seed) for seed in (20, 21)]
    before = model(texts[0]).logits
    save_calibration(model, tmp_path, base_model="owner/tiny", text="random tokens", check_on=texts)
    assert torch.equal(model(texts[0]).logits, before)  # measuring changed nothing
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["params"]["method"] == "top_theta" and config["params"]["K"] == 6
    assert config["params"]["sdc"] == "exact" and config["params"]["vmc"] is True
    # calibration prompts of 30, 33, 36 and 39 tokens, each row longer than K sampled
    assert config["rows"] == 24 + 27 + 30 + 33 and config["longest"] == 39
    kl = config["measured"]["kl"]
    assert kl["tokens"] == 2 * 39 and kl["texts"] == 2 and kl["mean"] > 0 and kl["stderr"] > 0
    kept = config["measured"]["effective_k"][0]
    # 40 rows of each text, 3 layers, 6 heads
    assert kept["rows"] == 2 * 40 * 3 * 6 and kept["p5"] <= kept["mean"] <= kept["p95"] and kept["k"] == 6
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "owner/tiny" and card.data.library_name == "toptheta"
    for words in (
        "random tokens",
        f"mean {kept['mean']:.1f}, 5 to 95 % of the rows",
        f"{kl['mean']:.4g} ± {kl['stderr']:.2g}",
    ):
        assert words in card.text
    assert "78 tokens of 2 other texts" in card.text
    assert "missed_keys" not in config["measured"] and "copy of K" not in card.text


def test_card_of_a_copy_of_keys(tmp_path: Path) -> None:
    model = steered("Top-theta")
    set_params(
        model,
        method="top_theta:key_copy=int4",
        placement="post-softmax",
        sdc="none",
        calib_to="budget",
        calibrate=True,
    )
    model(tokens(length=60))
    set_params(model, calibrate=False)
    save_calibration(model, tmp_path, check_on=[tokens(length=80, seed=20)])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["longest"] == 60
    missed = config["measured"]["missed_keys"]
    assert 0.0 < missed < 0.2
    card = ModelCard.load(tmp_path / "README.md")
    assert (
        f"| keys that the copy of K misses, of those that rows should keep | {100 * missed:.2f} % |"
        in card.text
    )


def test_saving_again_replaces_everything(tmp_path: Path) -> None:
    model = steered("Top-theta")
    save_calibration(model, tmp_path, text="the first")
    save_calibration(model, tmp_path, text="the second")
    assert "the second" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["text"] == "the second"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 2}, "num_layers 3, but this model has 2"),
        ({"num_attention_heads": 12, "head_dim": 16}, "num_heads 6, but this model has 12"),
        ({"num_key_value_heads": 3}, "num_kv_heads 2, but this model has 3"),
        ({"head_dim": 32}, "head_dim 16, but this model has 32"),
    ],
)
def test_another_shape_is_refused(changes: dict, words: str, tmp_path: Path) -> None:
    save_calibration(steered("Top-theta"), tmp_path)
    with pytest.raises(UsageError, match=words):
        load_calibration(tiny(**changes), tmp_path)


def test_another_model_or_revision_is_refused(tmp_path: Path) -> None:
    model = steered("Top-theta")
    model.config._commit_hash = "a" * 40
    save_calibration(model, tmp_path, base_model="owner/Tiny-1B")
    other = tiny()
    other.config._name_or_path = "someone/else-1B"
    with pytest.raises(UsageError, match="is for owner/Tiny-1B, but this model is someone/else-1B"):
        load_calibration(other, tmp_path)
    assert tables_of(other) is None and not get_params(other).sparse
    load_calibration(other, tmp_path, strict=False)
    same = tiny()
    same.config._name_or_path = "/models/tiny-1b"
    load_calibration(same, tmp_path)
    same.config._commit_hash = "b" * 40
    with pytest.raises(UsageError, match="revision a+ of owner/Tiny-1B, but this model is revision b+"):
        load_calibration(same, tmp_path)


def test_parameters_in_place_of_the_saved_ones(tmp_path: Path) -> None:
    save_calibration(steered("Top-theta"), tmp_path)
    model = tiny()
    config = load_calibration(model, tmp_path, sdc="none", vmc=False)
    assert config.params["sdc"] == "exact" and get_params(model).sdc == "none"
    tables = tables_of(model)
    with pytest.raises(UsageError, match="calibrated for K=6, not for K=7"):
        load_calibration(model, tmp_path, K=7)
    with pytest.raises(UsageError, match="calib_add_sigma -2.0 takes effect when calibrating"):
        load_calibration(model, tmp_path, calib_add_sigma=-2.0)
    with pytest.raises(UsageError, match="calibrate gives other tables"):
        load_calibration(model, tmp_path, calibrate=True)
    assert tables_of(model) is tables and get_params(model).K == 6  # as it was
    load_calibration(model, tmp_path, mode=0, capk=True)
    assert get_params(model).method.spec == "top_theta:capk=True"
    load_calibration(model, tmp_path, mode=3)
    assert get_params(model).label == "dense"
    with pytest.raises(UsageError, match="method and mode both name"):
        load_calibration(model, tmp_path, mode=0, method="top_theta")


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "hub_reachable", lambda: False)
    monkeypatch.setattr("toptheta.models.sharing.hub_reachable", lambda: False)
    with pytest.raises(UsageError, match="has no calibration to save"):
        save_calibration(tiny(), tmp_path)
    model = steered("Top-theta")
    with pytest.raises(UsageError, match="neither a folder nor a hub id"):
        load_calibration(model, "./not/a/folder")
    with pytest.raises(UsageError, match="hub cannot be reached"):
        load_calibration(model, "owner/not-here")
    with pytest.raises(UsageError, match="hub cannot be reached"):
        push_calibration(model, "owner/name")
    for wrong in ("a/b/c", "a b", None, 5):
        with pytest.raises(UsageError, match="cannot be pushed to .*: give a hub id of the form owner/name"):
            push_calibration(model, wrong)
    with pytest.raises(UsageError, match="has no config.json"):
        load_calibration(model, tmp_path)
    save_calibration(model, tmp_path / "bad")
    good = json.loads((tmp_path / "bad" / "config.json").read_text())
    for config in (
        [],
        {"model_type": "llama"},
        good | {"format": "other"},
        good | {"num_layers": "three"},
        good | {"params": good["params"] | {"calib_load_path": "/somewhere"}},  # would read another folder
        good | {"params": good["params"] | {"vmc": "yes"}},
    ):
        (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
        with pytest.raises(UsageError, match="damaged or not of this format"):
            load_calibration(model, tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text("{")
    with pytest.raises(UsageError, match="damaged or not of this format"):
        load_calibration(model, tmp_path / "bad")
    save_calibration(model, tmp_path / "bad")
    (tmp_path / "bad" / "calibration.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UsageError, match="cannot be read"):
        load_calibration(model, tmp_path / "bad")
    (tmp_path / "bad" / "calibration.safetensors").unlink()
    with pytest.raises(UsageError, match="neither th.txt nor sdc.txt"):
        load_calibration(model, tmp_path / "bad")
    set_params(model, calibrate=True)
    with pytest.raises(UsageError, match="calibration is under way"):
        save_calibration(model, tmp_path)


def test_one_text_need_not_be_in_a_list(tmp_path: Path) -> None:
    model, ids = steered("Top-theta"), tokens(length=30, seed=20)
    for name, check_on in (("list", [ids]), ("one", ids)):
        save_calibration(model, tmp_path / name, check_on=check_on)
    one, listed = ((tmp_path / name / "config.json").read_text() for name in ("one", "list"))
    assert one == listed and json.loads(one)["measured"]["kl"]["texts"] == 1


@pytest.mark.parametrize(
    ("check_on", "words"),
    [
        ([tokens(length=3)], r"a text of shape \(1, 3\): give a list of tensors of token ids \[1, L\]"),
        ([tokens(length=30), tokens(2, 30)], r"a text of shape \(2, 30\)"),
        (tokens(2, 30), r"a text of shape \(2, 30\)"),
        ([tokens(length=30)[0]], r"a text of shape \(30,\)"),
        ([tokens(length=30).tolist()], "a text of type list"),
        (tokens(length=30)[0].tolist(), "a text of type int"),
        ({"input_ids": tokens(length=30)}, "a text of type dict"),
        ([tokens(length=30).numpy()], "a text of type ndarray"),
        (tokens(length=30).numpy(), "a text of type ndarray"),
        ("words", "a text of type str"),
        ([tokens(length=30).float()], r"a text of type torch\.float32"),
        ([tokens(length=30) + 97], "token ids from .*, but the model has 97 tokens"),
        ([tokens(length=30) - 97], "token ids from -.*, but the model has 97 tokens"),
    ],
)
def test_wrong_texts(check_on: Any, words: str, tmp_path: Path) -> None:
    model = steered("Top-theta")
    with pytest.raises(UsageError, match=f"^check_on has {words}"):
        save_calibration(model, tmp_path / "new", check_on=check_on)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_models_without_a_head(kind: Any, tmp_path: Path) -> None:
    """They calibrate and run; what needs their logits is refused."""
    model = update_model(kind(tiny_config()).eval())
    budget = {"placement": "post-softmax", "calib_to": "budget", "calib_layers": "sensitivity"}
    with pytest.raises(
        UsageError, match=f'^calib_layers="sensitivity" needs a causal .* {kind.__name__} has no'
    ):
        set_params(model, mode=0, K=6, **budget, calibrate=True)
    assert not get_params(model).calibrate
    set_params(model, mode=0, K=6, calib_sample_frac=1.0, calibrate=True)
    model(tokens(length=60))
    set_params(model, calibrate=False)
    with pytest.raises(
        UsageError, match=f"^check_on needs a causal language model, and {kind.__name__} has no"
    ):
        save_calibration(model, tmp_path, check_on=[tokens(length=30)])
    save_calibration(model, tmp_path)
    load_calibration(model, tmp_path)


def test_folders_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = steered("Top-theta"), tmp_path / "file"
    file.write_text("x")
    for folder in (file, file / "below", tmp_path / ("long" * 99)):
        with pytest.raises(UsageError, match=r"^the folder .* cannot be written to \(.*\): name another"):
            save_calibration(model, folder)
        with pytest.raises(UsageError, match="is neither a folder nor a hub id"):
            load_calibration(model, folder)
    for wrong in ("", None, 5, b"bytes", "a\0b"):
        for call in (save_calibration, load_calibration):
            with pytest.raises(
                UsageError, match="^the calibration's folder is .*, which is not a path: name"
            ):
                call(model, wrong)
    (tmp_path / "full" / "config.json").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"full cannot be written to \(Is a directory\)"):
        save_calibration(model, tmp_path / "full")
    monkeypatch.setenv("HOME", str(tmp_path))
    save_calibration(model, "~/own")
    load_calibration(model, "~/own")
    assert (tmp_path / "own" / "config.json").is_file()
    with pytest.raises(UsageError, match="the model is of type NoneType"):
        load_calibration(None, "~/own")  # type: ignore[arg-type]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Git LFS is plain HTTP
        loading.hub_reachable.cache_clear()
        yield hub
    loading.hub_reachable.cache_clear()


def test_through_a_hub(hub: Hub) -> None:
    model = steered("Top-theta")
    url = push_calibration(model, "owner/tiny-thresholds", text="random tokens", token=hub.token)
    assert url.endswith(COMMIT) and hub.commits[0].startswith("Calibration by toptheta")
    assert len(hub.large) == 1
    assert set(hub.repos["owner/tiny-thresholds"]) == {"README.md", "config.json", "calibration.safetensors"}
    other = tiny()
    assert load_calibration(other, "owner/tiny-thresholds").text == "random tokens"
    ids = tokens(length=50, seed=9)
    assert torch.equal(other(ids).logits, model(ids).logits)
    with pytest.raises(UsageError, match="cannot be loaded: .*Revision Not Found"):
        load_calibration(other, "owner/tiny-thresholds", revision="v9")
    with pytest.raises(UsageError, match="cannot be loaded: .*Repository Not Found"):
        load_calibration(other, "owner/nothing")
    del hub.repos["owner/tiny-thresholds"]["calibration.safetensors"]
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_calibration(other, "owner/tiny-thresholds", revision="main")
    with pytest.raises(UsageError, match="cannot be pushed to owner/x: .*401"):
        push_calibration(model, "owner/x", token="hf_wrong")


def test_options_of_an_earlier_calibration_do_not_stay(tmp_path: Path) -> None:
    earlier = {
        "budget": {"placement": "post-softmax", "calib_to": "budget", "calib_layers": "sensitivity"},
        "k": {"sdc": "exact", "calib_add_sigma": 0.1, "calib_tac": True},
    }
    models = {}
    for name, options in earlier.items():
        models[name] = model = tiny()
        set_params(model, mode=0, K=6, vmc=True, calib_sample_frac=1.0, calibrate=True, **options)
        model(tokens(length=60))
        set_params(model, calibrate=False)
        save_calibration(model, tmp_path / name)
    for name, other in (("budget", "k"), ("k", "budget")):
        set_params(models[name], test_layer=1)
        load_calibration(models[name], tmp_path / other)
        params = get_params(models[name])
        assert (params.calib_layers, params.calib_add_sigma, params.calib_tac) == ("uniform", 0.0, False)
        assert params.test_layer is None
        ids = tokens(length=50, seed=9)
        assert torch.equal(models[name](ids).logits, load_into_new(tmp_path / other)(ids).logits)
        path = {"calib_load_path": str(tmp_path / name)}
        aim = {"placement": "post-softmax", "calib_to": "budget", "sdc": "none"} if name == "budget" else {}
        of_name = {"placement": "pre-softmax", "calib_to": "k", "sdc": "exact"} | aim
        set_params(models[name], **of_name, **path)


def load_into_new(folder: Path) -> LlamaForCausalLM:
    model = tiny()
    load_calibration(model, folder)
    return model


@pytest.mark.parametrize("name", ["", "."])
def test_the_name_of_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without a name has none in a calibration; one of the current folder has the folder's."""
    monkeypatch.chdir(tmp_path)
    model = steered("Top-theta")
    model.config._name_or_path = name
    save_calibration(model, "saved")
    base = json.loads(Path("saved/config.json").read_text())["base_model"]
    assert base == (tmp_path.name if name else "")
    load_calibration(model, "saved")
    model.config._name_or_path = str(tmp_path)
    load_calibration(model, "saved")

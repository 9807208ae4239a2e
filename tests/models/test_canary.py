"""What we stand on in transformers, so that a release that changes it fails here, in a sentence."""

import ast
import importlib
import inspect
import textwrap
from importlib.metadata import version

import pytest
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    cache_utils,
    masking_utils,
)
from transformers.integrations import sdpa_attention

from tests.helpers.families import NAMES, make
from tests.helpers.paths import ROOT
from toptheta.models.families import FAMILIES, WITHOUT_EFFECT
from toptheta.models.interface import toptheta_mask
from toptheta.models.versions import BEFORE, OLDEST, check_transformers
from toptheta.util.errors import UsageError

FAMILY = {family.name: family for family in FAMILIES}
OURS = {"dropout", "scaling", "softcap", "s_aux"}  # arguments that toptheta_attention_forward computes with


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters)


def calls_of(function, name: str) -> list[ast.Call]:
    """The calls of `name`, or of an attribute of that name, in a function's source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if getattr(call.func, "attr", getattr(call.func, "id", None)) == name]


@pytest.mark.parametrize("name", NAMES)
def test_attention_layers(name: str) -> None:
    module_name, class_name = FAMILY[name].attention_class
    module = importlib.import_module(module_name)
    attention = getattr(module, class_name, None)
    assert attention is not None, f"{module_name} has no {class_name} any more: families.py finds no layer."
    assert hasattr(module, "eager_attention_forward"), (
        f"{module_name} has no eager attention: dense rows need it."
    )
    [call] = calls_of(attention.forward, "attention_interface")
    handed = {keyword.arg for keyword in call.keywords} - {None}
    assert handed <= OURS | WITHOUT_EFFECT, (
        f"{class_name} hands its attention function {handed - OURS - WITHOUT_EFFECT}: compute with it in "
        "interface.py, or name it in WITHOUT_EFFECT."
    )
    assert calls_of(attention.forward, "get_interface"), (
        f"{class_name} does not ask for registered attention."
    )
    layers = [
        kind for kind in vars(module).values() if inspect.isclass(kind) and "DecoderLayer" in kind.__name__
    ]
    calls = [
        call
        for kind in layers
        if kind.__module__ == module_name
        for call in calls_of(kind.forward, "self_attn")
    ]
    by_name = [{keyword.arg for keyword in call.keywords} for call in calls]
    assert calls and all("past_key_values" in names for names in by_name), (
        f"the layers of {module_name} do not hand past_key_values to {class_name} by name: LayerState.begin "
        "looks for it there."
    )


@pytest.mark.parametrize("name", NAMES)
def test_attributes_of_layers(name: str) -> None:
    layer = make(name).model.layers[1].self_attn
    for attribute in ("config", "layer_idx", "head_dim", "scaling", "o_proj"):
        assert hasattr(layer, attribute), f"{type(layer).__name__} has no {attribute} any more."
    assert layer.layer_idx == 1, "layers are not numbered from 0."
    for attribute in ("num_attention_heads", "num_hidden_layers", "max_position_embeddings"):
        assert hasattr(layer.config, attribute), f"{type(layer.config).__name__} has no {attribute} any more."


def test_interfaces() -> None:
    for interface in (AttentionInterface, AttentionMaskInterface):
        assert hasattr(interface, "register"), f"{interface.__name__} takes no functions any more."
    config = make("llama").config
    config._attn_implementation_internal = "sdpa"
    assert config._attn_implementation == "sdpa", (
        "_attn_implementation_internal does not choose attention any more."
    )
    for name in ("_supports_sdpa", "set_attn_implementation", "get_input_embeddings"):
        assert hasattr(PreTrainedModel, name), f"PreTrainedModel has no {name} any more."
    asked = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling"}
    assert asked <= parameters(sdpa_attention.sdpa_attention_forward), (
        "sdpa's attention function takes other names."
    )


def test_masks() -> None:
    ours = parameters(toptheta_mask) - {"kwargs"}
    given = ours | {"allow_is_bidirectional_skip"}
    assert given <= parameters(masking_utils.sdpa_mask), f"sdpa_mask does not take all of {given} any more."
    for maker in ("create_causal_mask", "create_sliding_window_causal_mask"):
        [call] = calls_of(getattr(masking_utils, maker), "mask_interface")
        handed = {keyword.arg for keyword in call.keywords}
        assert ours <= handed, f"{maker} does not hand over {ours - handed} any more."
    assert hasattr(masking_utils, "causal_mask_function"), "the plain causal rule has another name now."


def test_caches() -> None:
    names = {"update", "crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "reset"}
    for kind in (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer):
        assert names <= set(dir(kind)), f"{kind.__name__} has no {names - set(dir(kind))} any more."
        assert {"keys", "values"} <= set(vars(kind(sliding_window=8))), (
            f"{kind.__name__} keeps them elsewhere."
        )
    assert not cache_utils.DynamicLayer.is_sliding and cache_utils.DynamicSlidingWindowLayer.is_sliding
    static = cache_utils.StaticLayer(max_cache_len=4)
    assert hasattr(static, "lazy_initialization") and static.cumulative_length == 0, (
        "StaticLayer keeps its length elsewhere: TopThetaLayer reads cumulative_length."
    )
    cache = cache_utils.StaticCache(config=make("gemma3").config, max_cache_len=24)
    kinds = [cache_utils.StaticSlidingWindowLayer, cache_utils.StaticLayer]
    assert [type(layer) for layer in cache.layers] == kinds, (
        "StaticCache has other layers: TopThetaCache looks."
    )


def test_versions() -> None:
    check_transformers(version("transformers"))
    check_transformers(OLDEST)
    assert f'"transformers>={OLDEST},<{BEFORE}"' in (ROOT / "pyproject.toml").read_text()
    for found in ("4.57.6", "5.16.1", BEFORE):
        with pytest.raises(
            UsageError, match=f"transformers {found} is installed, but toptheta needs {OLDEST}"
        ):
            check_transformers(found)

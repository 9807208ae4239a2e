"""The registry of methods: published numbers, lists of methods with options, names, and what is refused."""

from dataclasses import dataclass

import pytest
import torch

from toptheta.methods.base import (
    Method,
    Selection,
    names,
    of_mode,
    parse_method,
    register,
    split_methods,
)
from toptheta.methods.dense import Dense
from toptheta.methods.params import LayerSpec
from toptheta.methods.state import State
from toptheta.methods.top_k import TopK
from toptheta.methods.top_theta import TopTheta
from toptheta.util.errors import UsageError


def test_published_numbers() -> None:
    assert names()[:3] == ["top_theta", "top_k", "dense"]
    assert (of_mode(0), of_mode(1), of_mode(3)) == (TopTheta(), TopK(), Dense())
    assert of_mode(7) == of_mode(-1) == Dense()


def test_lists_and_options() -> None:
    methods = [parse_method(one) for one in split_methods("top_k, top_theta:capk,dense")]
    assert methods == [TopK(), TopTheta(capk=True), Dense()]
    assert parse_method("top_theta:capk=false") == TopTheta()
    for method in (TopK(), TopTheta(capk=True), Dense()):
        assert parse_method(method.spec) == method
    assert TopTheta(capk=True).label(8) == "Top-theta capk K=8" and Dense().label(8) == "dense"
    assert [m.folder(8) for m in (TopTheta(), TopK(), Dense())] == ["mode0_k8", "mode1_k8", "mode3"]


@pytest.mark.parametrize(
    "text, says",
    [
        ("topk", r"method is 'topk': choose one of .*\(did you mean top_k"),
        ("top_k:sinks=3", "method top_k has no option 'sinks': it has none"),
        ("top_theta:caps=1", "method top_theta has no option 'caps': its options are capk"),
        ("top_theta:capk=maybe", "method top_theta:capk is 'maybe': give true or false"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        [parse_method(one) for one in split_methods(text)]


def test_a_name_or_number_is_registered_once() -> None:
    @dataclass(frozen=True)
    class Again(Method):
        name = "top_k"
        title = "again"

    with pytest.raises(ValueError, match="Again has the name"):
        register(Again)
    Again.name, Again.mode = "again", 0
    with pytest.raises(ValueError, match="or published number of"):
        register(Again)
    assert "again" not in names()


def test_what_kernels_are_handed() -> None:
    spec = LayerSpec(TopTheta(capk=True), "post-softmax", 8, vmc=True).kernel
    assert spec is not None and spec.sparse and spec.capk and spec.vmc
    assert (spec.selection, spec.placement, spec.k) == (Selection.THRESHOLD, "post-softmax", 8)
    for dense in (LayerSpec(), LayerSpec(TopK(), "pre-softmax", 0), LayerSpec(TopK(), "none", 8)):
        assert not dense.sparse and dense.kernel is not None and not dense.kernel.sparse


def test_a_state_grows_with_the_cache() -> None:
    state = State({"given": torch.arange(6.0).view(2, 3)}, {"prompt": 3})
    state.grow(5, -1.0)
    assert state.tensors["given"].tolist() == [[0, 1, 2, -1, -1], [3, 4, 5, -1, -1]]
    state.crop(2)
    state.select(torch.tensor([1, 1, 0]))
    assert state.tensors["given"].tolist() == [[3, 4], [3, 4], [0, 1]]
    state.clear()
    assert not state.tensors and not state.numbers


def test_a_state_belongs_to_one_method() -> None:
    state = State()
    state.belong_to(TopTheta())
    state.tensor("seen", torch.zeros(1, 2), torch.bool)[:, 1] = True
    assert state.tensor("seen", torch.zeros(1, 3)).tolist() == [[False, True, False]]
    state.belong_to(TopTheta())
    assert state.tensors
    state.belong_to(TopTheta(capk=True))
    assert not state.tensors

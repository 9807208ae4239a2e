"""when_slower: what is expected of a layer, and that without a profile it changes nothing."""

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.helpers.models import SPARSE, copies, steer, tokens
from topk_llama import set_params
from toptheta.attention.call import Counts
from toptheta.kernels import profile as profiles
from toptheta.models import when_slower
from toptheta.models.control import get_params, take_dense_calls
from toptheta.models.when_slower import Expectation
from toptheta.util.errors import UsageError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """No profile is there, and none was looked for."""
    monkeypatch.setenv("TOPTHETA_CACHE", str(tmp_path))
    for found in (profiles.profile_of, when_slower._say_once):
        found.cache_clear()
    yield tmp_path
    profiles.profile_of.cache_clear()


def counts(elements: int, rows: int, kv_len: int, num_heads: int = 4, num_kv_heads: int = 2) -> Counts:
    vrow = torch.zeros(1, num_kv_heads, kv_len, dtype=torch.int32)
    vrow[..., :rows] = 1
    return Counts(torch.full((1, num_heads), elements), vrow)


def test_expects_k_until_it_is_counted():
    expected = Expectation(k=16, group=2)
    assert (expected.elements, expected.rows) == (16.0, 32.0)
    assert expected.step(100)  # the first step of a request is counted
    expected.counted(counts(20, 25, 100), torch.tensor([[100]]))
    assert not expected.step(101)
    assert (expected.elements, expected.rows) == (20.0, 25.0)
    assert not any(expected.step(n) for n in range(102, 200))
    assert expected.step(200)  # and one behind twice the keys
    expected.counted(counts(40, 60, 200), torch.tensor([[200]]))
    assert not expected.step(201) and expected.rows == 60.0
    expected.new_request()
    assert expected.step(90) and expected.rows == 60.0


def test_counts_come_when_they_come():
    """Until the device has sent them, what was expected before stays, and no further step is counted."""
    expected = Expectation(k=16, group=2)
    assert expected.step(100)
    expected.counted(counts(20, 25, 100), torch.tensor([[100]]))
    arrived = [False]
    expected._coming.ready = lambda: arrived[0]
    assert [expected.step(n) for n in (101, 102, 500)] == [False] * 3 and expected.rows == 32.0
    arrived[0] = True
    assert not expected.step(150) and expected.rows == 25.0


def test_visible_keys_of_a_static_cache():
    """Its length says nothing: they are those of the step that was counted, and one more for each since."""
    expected = Expectation(k=16, group=2)
    assert expected.step(1000) and expected.visible(1000) == 1000
    expected.counted(counts(20, 25, 1000), torch.tensor([[70]]))
    for n in range(71, 140):
        assert not expected.step(1000) and expected.visible(1000) == n
    assert expected.step(1000)


@pytest.mark.usefixtures("cache")
def test_without_a_profile_nothing_changes(tiny_model: LlamaForCausalLM, capsys: pytest.CaptureFixture):
    """It is said once."""
    steer(tiny_model, SPARSE["Top-theta"])
    ids = tokens(length=30)
    expected = tiny_model(ids).logits
    capsys.readouterr()
    set_params(tiny_model, when_slower="dense")
    for _ in range(2):
        assert torch.equal(tiny_model(ids).logits, expected)
    said = capsys.readouterr().err.strip().splitlines()
    assert said == ["when_slower=dense has no effect on cpu: it needs a GPU and its profile."]
    assert take_dense_calls(tiny_model) == (0, 6) and take_dense_calls(tiny_model) == (0, 0)
    set_params(tiny_model, when_slower="sparse")
    tiny_model(ids)
    assert take_dense_calls(tiny_model) == (0, 0)


def test_is_a_parameter(tiny_model: LlamaForCausalLM):
    steer(tiny_model, SPARSE["Top-theta"])
    assert get_params(tiny_model).when_slower == "sparse"
    set_params(tiny_model, when_slower="dense")
    set_params(tiny_model, K=7, mode=1)
    assert get_params(tiny_model).when_slower == "dense"
    with pytest.raises(UsageError, match="when_slower is 'fast': choose one of sparse, dense"):
        set_params(tiny_model, when_slower="fast")


@pytest.mark.usefixtures("cache")
def test_copies_of_a_model_expect_anew(tiny_model: LlamaForCausalLM):
    stock = LlamaForCausalLM(tiny_model.config)
    steer(tiny_model, SPARSE["Top-theta"])
    set_params(tiny_model, when_slower="dense")
    tiny_model(tokens(length=30))
    for copied in copies(tiny_model, stock):
        assert torch.equal(copied(tokens(length=30)).logits, tiny_model(tokens(length=30)).logits)

"""What the tests share: a tiny random Llama, the small real model, reference data where it is there."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.helpers.models import tiny_config
from tests.helpers.paths import GOLDEN, SHARED
from toptheta.kernels import registry as kernels
from toptheta.models.control import record_statistics
from toptheta.models.patch import restore_model, update_model

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores: one thread each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, help="points at which test_killed.py stops runs")
    parser.addoption("--fuzz", type=int, default=150, help="inputs of each format in test_fuzz.py")


@pytest.fixture
def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).eval()


@pytest.fixture(params=["reference", "chosen"])
def path(request, monkeypatch) -> str:
    """Run a test by plain PyTorch, and by what is chosen by default (on CPU, the kernel)."""
    monkeypatch.setattr(kernels, "FORCED", None if request.param == "chosen" else request.param)
    return request.param


@pytest.fixture(scope="session")
def small_model():
    """SmolLM2-135M-Instruct, float32, unpatched: tests that patch it restore it."""
    from toptheta.models.loading import find_model, load_model

    return load_model(find_model("smollm2"), "float32", "cpu")


@pytest.fixture(scope="session")
def small_tokenizer():
    from toptheta.models.loading import find_model, load_tokenizer

    return load_tokenizer(find_model("smollm2"))


@pytest.fixture(scope="session")
def folder_model(tmp_path_factory, small_tokenizer) -> str:
    """A random two-layer model with the real tokenizer, as a folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = tiny_config(
        vocab_size=len(small_tokenizer), num_hidden_layers=2, max_position_embeddings=2048, eos_token_id=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers."""
    return GOLDEN


@pytest.fixture(scope="session")
def local_data() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("no benchmark rows: the folder ../shared/data is not there")
    return SHARED / "data"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def here_with_text(here: Path) -> Path:
    """The folder that the test runs in, with a file text.txt."""
    (here / "text.txt").write_text("The hills were green, and the town below slept. " * 120)
    return here


@pytest.fixture(scope="module")
def patched_model(small_model):
    """The small real model, patched."""
    update_model(small_model)
    yield small_model
    record_statistics(small_model, None)
    restore_model(small_model)


@pytest.fixture(scope="module")
def token_ids(golden: Path) -> dict:
    """The prompts of the reference numbers."""
    return json.loads((golden / "token_ids.json").read_text())

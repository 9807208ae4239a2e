"""The package for the kernels hub: built from our modules, loaded by the loader of `kernels`, equal to slow
loops."""

import ast
import sys
from pathlib import Path

import pytest
import torch

from hub.build import build, modules
from tests.helpers.kernel_cases import SCALE
from tests.helpers.reference import attention as slow_attention
from tests.kernels.triton.helpers import DEVICE, here
from toptheta.kernels.triton import backend
from toptheta.methods.params import LayerSpec
from toptheta.methods.top_k import TopK
from toptheta.methods.top_theta import TopTheta
from toptheta.util.errors import UsageError

K = 5


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory):
    """The loaded package."""
    from kernels import get_local_kernel

    folder = tmp_path_factory.mktemp("hub")
    build(folder)
    return get_local_kernel(folder)


def test_it_needs_torch_and_triton_only(tmp_path: Path) -> None:
    variant = build(tmp_path)
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for file in variant.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {one.name.split(".")[0] for one in node.names} <= allowed, file
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] in allowed, file
    assert "kernels/triton/decode.py" in modules() and "kernels/cpu/backend.py" not in modules()
    assert build(tmp_path) == variant  # again into the same folder
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UsageError, match="holds other files"):
        build(tmp_path)


def test_it_lives_beside_the_original(package) -> None:
    """Its modules and operators are its own."""
    assert package.__name__.startswith("_toptheta_attention_")
    own = sys.modules[f"{package.__name__}.kernels.triton.backend"]
    assert own is not backend and own._decode is not backend._decode
    assert hasattr(torch.ops, package.__name__)


CASES = {
    "thresholds": {"sdc": "exact", "vmc": True},
    "thresholds on weights": {"placement": "post-softmax", "vmc": True},
    "Top-k": {"sdc": "exact"},
}


@here
@pytest.mark.parametrize("q_len", [1, 12])
@pytest.mark.parametrize("name", CASES)
def test_against_slow_loops(package, name: str, q_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In prefill and decode, by the kernels wherever they do not object."""
    torch.manual_seed(0)
    kv_len, options = 12, CASES[name]
    q, k, v = (torch.randn(2, heads, length, 16) for heads, length in ((4, q_len), (2, kv_len), (2, kv_len)))
    theta = None
    if name != "Top-k":
        low, high = (0.05, 0.2) if "weights" in name else (0.0, 0.4)
        theta = low + (high - low) * torch.rand(4, kv_len + 1)
        theta[:, : K + 1] = -torch.inf
    ran = []
    own = sys.modules[f"{package.__name__}.kernels.triton.backend"]
    run = own.run
    monkeypatch.setattr(own, "run", lambda call: ran.append(call) or run(call))
    tensors = [None if x is None else x.to(DEVICE) for x in (q, k, v, theta)]
    out = package.attention(*tensors[:3], K, theta=tensors[3], scale=SCALE, **options).cpu()
    assert len(ran) == (0 if name == "Top-k" and q_len > 1 else 1)

    first = kv_len - q_len
    visible = torch.ones(2, q_len, kv_len, dtype=torch.bool).tril(first)
    spec = LayerSpec(
        TopK() if theta is None else TopTheta(),
        options.get("placement", "pre-softmax"),
        K,
        options.get("sdc", "none"),
        vmc=options.get("vmc", False),
    )
    expected, kept = slow_attention(q, k, v, visible, spec, SCALE, theta)
    assert not kept.all()
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_wrong_options(package) -> None:
    q = torch.randn(1, 4, 3, 16)
    with pytest.raises(ValueError, match="vmc has nothing to compensate"):
        package.attention(q, q, q, 2, vmc=True)
    with pytest.raises(ValueError, match="placement is 'before'"):
        package.attention(q, q, q, 2, placement="before")
    with pytest.raises(ValueError, match="needs a theta of shape"):
        package.attention(q, q, q, 2, theta=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="do not match"):
        package.attention(q, q[:, :3], q, 2)

"""The CPU kernel as an operator, which compiled models use: its fake, and one graph without a break."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.calls import call, layer_spec
from tests.helpers.kernel_cases import SCALE, K, case, inputs, needs_kernel, tables
from tests.helpers.key_copy import SPECS, step
from toptheta.kernels.cpu import backend as cpu
from toptheta.methods.state import State

pytestmark = needs_kernel
HEADS = (4, 2, 32)
SPEC = layer_spec(0, "pre-softmax", K, "exact", vmc=True)


@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("kind", ["prefill", "any mask", "padded decode", "copy", "copy of several steps"])
def test_has_a_true_fake(kind: str, count: bool) -> None:
    if "copy" in kind:
        rows_kind = "padded decode" if kind == "copy" else "padded chunk"
        asked = replace(step(rows_kind, HEADS, SPECS[1], "int4"), count=count)
    else:
        rows, batch, q_len, kv_len = case(kind)
        more = {"count": count, "count_rows": count, "decode": kind == "any mask"}
        asked = call(
            *inputs(batch, HEADS, q_len, kv_len), rows, SPEC, SCALE, *tables(SPEC, HEADS[0], kv_len), **more
        )
    checks = ("test_schema", "test_faketensor")
    found = torch.library.opcheck(cpu._operator, cpu._arguments(asked, asked.kernel), test_utils=checks)
    assert found == {"test_schema": "SUCCESS", "test_faketensor": "SUCCESS"}


def test_compiles_whole() -> None:
    """With thresholds that were changed in place; a copy of K that grows is refused."""
    rows, batch, q_len, kv_len = case("padded chunk")
    tensors, tabled = inputs(batch, HEADS, q_len, kv_len), tables(SPEC, HEADS[0], kv_len)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        out, counts = cpu.run(call(*tensors, rows, SPEC, SCALE, *tabled, count=True))
        return out, counts.attn

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for value in (1.0, 2.0):
        tabled[0][:, K + 1 :] = value
        for expected, ours in zip(run(), compiled()):
            assert torch.equal(ours, expected)

    asked = step("decode", HEADS, SPECS[0], "int4")
    assert cpu.unsupported(asked) is None
    taken = torch.compile(lambda x: x + (cpu.unsupported(asked) is None), fullgraph=True, backend="eager")
    assert taken(torch.zeros(())) == 0.0
    asked.state = State(room=2048)
    torch._dynamo.reset()
    assert taken(torch.zeros(())) == 1.0

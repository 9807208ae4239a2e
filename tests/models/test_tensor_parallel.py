"""Tensor parallelism: three processes share the small model's heads (9 and 3), and compute what one does."""

import os
import socket
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from tests.helpers.models import tiny_config, tokens
from topk_llama import set_params, update_model
from toptheta.calibration.tables import save_tables
from toptheta.models.control import record_statistics, tables_of
from toptheta.models.patch import layer_states
from toptheta.models.recorder import Recorder
from toptheta.util.errors import UsageError

PROCESSES = 3
TOP_K: dict[str, Any] = {"mode": 1, "K": 5, "placement": "pre-softmax", "sdc": "exact", "vmc": True}
TOP_THETA: dict[str, Any] = {
    "mode": 0,
    "K": 5,
    "placement": "pre-softmax",
    "sdc": "offline-calibrated",
    "vmc": True,
}


def computed(model: Any, folder: Path) -> dict[str, Tensor]:
    """Logits and tables of a model, by what it was set to; thresholds are calibrated, or loaded from
    `folder`."""
    ids, found = tokens(2, length=24), {}
    set_params(model, **TOP_K)
    found["Top-k"] = model(ids).logits
    set_params(model, **TOP_THETA, calibrate=True, calib_sample_frac=0.5)
    for seed in range(3):
        model(tokens(length=40, seed=seed))
    set_params(model, calibrate=False)
    found["Top-theta"] = model(ids).logits
    tables = tables_of(model)
    assert tables is not None
    for i, table in tables.theta.items():
        found[f"theta of layer {i}"] = torch.from_numpy(table.values).nan_to_num()
        found[f"samples of layer {i}"] = torch.from_numpy(table.samples)
    if not (folder / "th.txt").exists():
        save_tables(tables, folder)
    set_params(model, **TOP_K)
    set_params(model, **TOP_THETA, calib_load_path=str(folder))
    found["loaded"] = model(ids).logits
    return found


def check(rank: int, folder: Path, door: str) -> None:
    arguments = {"attn_implementation": "top_theta"} if door == "attn_implementation" else {}
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=PROCESSES), **arguments
    ).eval()
    if door == "update_model":
        update_model(model)
    found = computed(model, folder)
    states = layer_states(model)
    assert [state.heads for state in states] == [slice(3 * rank, 3 * rank + 3)] * 2
    assert all(state.theta is not None and state.theta.shape[0] == 3 for state in states)
    for name, wanted in torch.load(folder / "expected.pt").items():
        torch.testing.assert_close(
            found[name], wanted, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    with pytest.raises(UsageError, match="record_statistics does not support tensor parallelism"):
        record_statistics(model, Recorder())
    with pytest.raises(UsageError, match="calib_to budget does not support"):
        set_params(model, mode=0, placement="post-softmax", sdc="none", calib_to="budget", calibrate=True)


def worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    with torch.no_grad():
        for door in ("update_model", "attn_implementation"):
            check(rank, Path(folder), door)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """The model's folder, with its thresholds, and what one process computes."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    torch.manual_seed(0)
    config = tiny_config(
        hidden_size=72,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=2,
        vocab_size=99,
        intermediate_size=48,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        torch.save(computed(update_model(model), folder), folder / "expected.pt")
    return str(folder)


def test_three_processes(saved: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    get_context("forkserver").set_forkserver_preload([__name__])  # imports take longer than all else
    processes.start_processes(worker, (port, saved), nprocs=PROCESSES, start_method="forkserver")

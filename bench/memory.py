#!/usr/bin/env python3
"""Resident memory of a run with statistics, over many requests: it must not grow with their number.

    .venv/bin/python bench/memory.py --requests 2000

A real run (gen_llama.py, perplexity of windows of 64 tokens, Top-theta, statistics on) of a random model of
two layers with SmolLM2's tokenizer, one thread. Prints the resident memory as requests are done, by how much
its largest value after the first tenth exceeds its smallest, and what a request adds, by a line through all
values.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toptheta.eval.cell import Cell
from toptheta.eval.runner import evaluate
from toptheta.eval.settings import PERPLEXITY, GenSettings
from toptheta.models.loading import find_model, load_tokenizer

WINDOW = 64


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(requests: int) -> np.ndarray:
    """Resident bytes after each request, in a folder of its own."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(find_model("smollm2"))
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
    }
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    words = "The hills were green, and the town below slept until the bells of the church rang out. "
    Path("text.txt").write_text(words * (WINDOW * (requests + 30) // 18))
    settings = GenSettings(
        llama="model",
        dataset=PERPLEXITY,
        text="text.txt",
        num_tasks=requests,
        max_seq_len=WINDOW,
        mode=(0,),
        k=(16,),
        sdc="exact",
        vmc=True,
        device="cpu",
    )
    found, add = [], Cell.add

    def measured(self, *args, **kwargs) -> None:
        add(self, *args, **kwargs)
        found.append(resident())

    with patch.object(Cell, "add", measured):
        evaluate(settings)
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=2000, help="windows that are evaluated")
    requests = parser.parse_args().requests
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = measure(requests)
        os.chdir("/")
    for share in (0.1, 0.25, 0.5, 0.75, 1.0):
        at = max(1, int(share * len(found)))
        print(f"after {at:6d} requests  {found[at - 1] / 1e6:8.1f} MB")
    late = found[len(found) // 10 :]
    slope = np.polyfit(np.arange(len(late)), late, 1)[0]
    spread = 100 * (late.max() - late.min()) / late.min()
    print(f"largest over smallest after the first tenth: {spread:+.1f} %; a request adds {slope:.0f} bytes")


if __name__ == "__main__":
    main()

"""A run: settings, the loop over cells, data sets, what is kept of it."""

import os

# One of several processes (processes.py), as torchrun starts them. The libraries read these when imported.
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a lost connection: we say it in a sentence
    if os.environ.get("RANK") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # one shows bars for all

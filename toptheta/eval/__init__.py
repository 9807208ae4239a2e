"""Running evaluations: settings, the loop over cells, data sets, saved progress."""

import os

# One of several processes (processes.py) started by torchrun. Libraries read these variables when imported.
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # lost connections are reported by our own message
    if os.environ.get("RANK") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # the first process shows progress for all

"""`transformers serve` with sparse attention: an OpenAI-compatible server, with all its flags.

python examples/serve.py MODEL [--port 8000 ...]
transformers chat MODEL http://localhost:8000        # in another shell
"""

import sys

from transformers.cli.serving import model_manager
from transformers.cli.transformers import app

from topk_llama import set_params, update_model


class SparseModels(model_manager.ModelManager):
    """Loads models as the server does, and makes them sparse before they answer."""

    def _load_model(self, *args, **kwargs):
        model = update_model(super()._load_model(*args, **kwargs))
        set_params(model, mode=1, K=32, sdc="exact", vmc=True)  # or load_calibration(model, ...)
        return model


model_manager.ModelManager = SparseModels
app(["serve", *sys.argv[1:]])

"""The drop-in for Hugging Face's LlamaAttention.

    from topk_llama import update_model, set_params
    update_model(model)
    set_params(model, mode=1, K=64, placement="pre-softmax", sdc="exact", vmc=True)

mode 0 is Top-theta, mode 1 Top-k, anything else dense. The code is in toptheta/models/patch.py (modules) and
toptheta/attention/reference.py (what is computed).
"""

from toptheta.models.cache import TopThetaCache
from toptheta.models.control import set_params
from toptheta.models.patch import TopK_LLamaAttention, restore_model, update_model
from toptheta.models.sharing import load_calibration, push_calibration, save_calibration

__all__ = [
    "TopK_LLamaAttention",
    "TopThetaCache",
    "load_calibration",
    "push_calibration",
    "restore_model",
    "save_calibration",
    "set_params",
    "update_model",
]

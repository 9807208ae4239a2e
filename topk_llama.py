"""Sparse attention as a drop-in replacement in Hugging Face models: the public API.

    from topk_llama import update_model, set_params
    update_model(model)
    set_params(model, mode=1, K=64, placement="pre-softmax", sdc="exact", vmc=True)

mode 0 is Top-theta, 1 is Top-k, any other is dense. The implementation is in toptheta/models/patch.py
(patching) and toptheta/attention/reference.py (the computation).
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

"""The drop-in for Hugging Face's LlamaAttention.

    from topk_llama import update_model, set_params
    update_model(model)
    set_params(model, mode=1, K=64, placement="pre-softmax", sdc="exact", vmc=True)

mode 0 is Top-theta, mode 1 Top-k, anything else dense. The code is in toptheta/llama.py (modules) and
toptheta/attention.py (what is computed).
"""

from toptheta.cache import TopThetaCache
from toptheta.llama import TopK_LLamaAttention, restore_model, update_model
from toptheta.steering import set_params

__all__ = ["TopK_LLamaAttention", "TopThetaCache", "restore_model", "set_params", "update_model"]

"""A pipeline of transformers with sparse attention: any that takes a model.

python examples/pipeline.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from topk_llama import set_params, update_model

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
model = update_model(AutoModelForCausalLM.from_pretrained(name))
set_params(model, mode=1, K=32, sdc="exact", vmc=True)  # or load_calibration(model, "owner/thresholds")
generate = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(name))
chat = [{"role": "user", "content": "Name three uses of a paper clip, and say why each of them works well."}]
print(generate(chat, max_new_tokens=48, do_sample=False)[0]["generated_text"][-1]["content"])

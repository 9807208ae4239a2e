"""The lines of README on the small model: what Top-theta keeps of a prompt and in decode, and its text.

python examples/ten_lines.py [MODEL]
"""

import sys
from pydoc_data.topics import topics  # texts that come with Python

from topk_llama import set_params, update_model
from toptheta.models.control import record_statistics
from toptheta.models.loading import find_model, load_model, load_tokenizer
from toptheta.models.recorder import Recorder

source = find_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
tokenizer = load_tokenizer(source)
texts = [topics[name] for name in ("with", "raise", "class")]
prompts = [tokenizer(text, truncation=True, max_length=400, return_tensors="pt") for text in texts]

model = load_model(source).requires_grad_(False)
update_model(model)
set_params(model, mode=1, K=64, sdc="exact", vmc=True)  # Top-k: no calibration needed
set_params(model, mode=0, K=64, sdc="exact", vmc=True, calib_tac=True, calibrate=True)
for prompt in prompts:  # calibrate; a prompt is tokenizer(text, return_tensors="pt")
    model(**prompt)
set_params(model, calibrate=False)  # Top-theta, with the calibrated thresholds
recorder = Recorder()
record_statistics(model, recorder)
out = model.generate(**prompts[0], max_new_tokens=64)

prefill, decode = recorder.drain()
for phase, records in (
    ("prefill", prefill.values()),
    ("decode", [r for steps in decode.values() for r in steps]),
):
    kept = sum(int(record.attn.sum()) for record in records)
    full = sum(int(record.full.sum()) * record.attn.shape[1] for record in records)
    print(f"{phase}: {100 * kept / full:.1f} % of the attention elements kept")
print(tokenizer.decode(out[0, prompts[0]["input_ids"].shape[1] :], skip_special_tokens=True))

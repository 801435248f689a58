"""What a transformers of any age makes of a folder: python greedy.py FOLDER PROMPT COUNT prints it as JSON."""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(prompt, return_tensors="pt").input_ids
settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
new = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
with torch.no_grad():
    logits = model(ids).logits[0, -1]
generate = pipeline("text-generation", model=folder)
(answer,) = generate(prompt, return_full_text=False, **settings)
report = {
    "version": transformers.__version__,
    "class": type(model).__name__,
    "amiss": [name for names in info.values() for name in names],
    "longest": tokenizer.model_max_length,
    "prompt": ids[0].tolist(),
    "new": new.tolist(),
    "text": tokenizer.decode(new),
    "pipeline": answer["generated_text"],
    "logits": logits.tolist(),
}
print(json.dumps(report))

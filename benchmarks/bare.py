"""Notebook 01's floor, a plain script: python bare.py CHECKPOINT CONFIG

Like the notebook it loads the checkpoint twice, and sends a model at its full size, made from a
config, through a forward pass on tensors that have no data.
"""

import json
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for _ in range(2):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    with torch.inference_mode():
        model(**tokenizer("Which dtypes?", return_tensors="pt"))
config = AutoConfig.for_model(**json.loads(sys.argv[2]))
with FakeTensorMode(), torch.no_grad():
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model(input_ids=torch.ones(1, 16, dtype=torch.long))
print("done", flush=True)

import peak  # noqa: E402  # not part of the time

print(peak.peak())

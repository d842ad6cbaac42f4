"""Notebook 01's floor, a plain script: python bare.py CHECKPOINT"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for _ in range(2):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    with torch.inference_mode():
        model(**tokenizer("Which dtypes?", return_tensors="pt"))
print("done", flush=True)

import peak  # noqa: E402  # not part of the time

print(peak.peak())

"""Qwen1.5-110B from its config in a process of its own: with ``xray``, or without the guide.

    python -m benchmarks.full_size xray|bare

Prints the seconds from the first line that is about the model, and the peak memory in MB. Both
sides have PyTorch and Transformers imported before.
"""

import sys
import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import peak
from helpers import backend, subjects
from helpers.gate import xray

MODEL = "Qwen1.5-110B"


def bare() -> None:
    """Build and forward on PyTorch's fake tensors."""
    config = AutoConfig.for_model(**subjects.shipped()[MODEL]["config"])
    backend.activate()
    with FakeTensorMode(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="flash_attention_2"
        ).eval()
        model(input_ids=torch.ones(2, 16, dtype=torch.long), use_cache=False)


if __name__ == "__main__":
    side = {"bare": bare, "xray": lambda: xray(MODEL)}[sys.argv[1]]
    started = time.perf_counter()
    side()
    print(time.perf_counter() - started, peak.peak())

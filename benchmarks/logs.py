"""Made-up logs of any size, with a traceback at their end; the same at every call."""

import itertools
import random
from collections.abc import Callable

WORDS = (
    *("torch", "cuda", "flash", "dtype", "float", "attention", "loading", "checkpoint", "shards"),
    *("layer", "norm", "weight", "bias", "from", "pretrained", "model", "train", "loss", "eval"),
    *("step", "epoch", "rank", "gpu", "memory", "tensor"),
)
TRACEBACK = """\
Traceback (most recent call last):
  File "/home/user/train.py", line 88, in <module>
    main()
  File "/home/user/train.py", line 71, in main
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
  File "/opt/env/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1779, in _call_impl
    return forward_call(*args, **kwargs)
  File "/opt/env/lib/python3.11/site-packages/transformers/models/qwen2/modeling_qwen2.py", line 449, in forward
    outputs = self.model(
  File "/opt/env/lib/python3.11/site-packages/transformers/models/qwen2/modeling_qwen2.py", line 207, in forward
    attn_output, attn_weights = attention_interface(
  File "/opt/env/lib/python3.11/site-packages/flash_attn/flash_attn_interface.py", line 91, in _flash_attn_forward
    out, softmax_lse, S_dmask, rng_state = flash_attn_gpu.fwd(
RuntimeError: FlashAttention only support fp16 and bf16 data type
"""  # noqa: E501  # as wide as they are


def repeating(size: int) -> bytes:
    """Of ``size`` bytes: what a trainer prints at each step, with other numbers."""
    draw = random.Random(0).random

    def line(i: int) -> str:
        return (
            f"{{'loss': {draw():.4f}, 'grad_norm': {draw():.3f}, 'learning_rate': {draw():.3e},"
            f" 'epoch': {i / 100:.2f}}}  {i}/99999 [00:{i % 60:02}, {draw():.2f}it/s]\n"
        )

    return _of(size, line)


def differing(size: int) -> bytes:
    """Of ``size`` bytes: each line has words of its own."""
    choose = random.Random(0)

    def line(_: int) -> str:
        ends = (choose.choice("abcdefghij") * choose.randint(0, 3) for _ in range(10))
        return " ".join(choose.choice(WORDS) + end for end in ends) + "\n"

    return _of(size, line)


def _of(size: int, line: Callable[[int], str]) -> bytes:
    text, room = [], size - len(TRACEBACK)
    for i in itertools.count():
        new = line(i)
        if len(new) > room:
            return "".join([*text, " " * (room - 1), "\n", TRACEBACK]).encode()
        text.append(new)
        room -= len(new)
    raise AssertionError("unreachable")

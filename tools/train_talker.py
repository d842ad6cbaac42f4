"""Train the talker: a Qwen1.5-shaped model of less than 1 MB that knows talker.toml by heart.

    python tools/train_talker.py --out DIR

A demonstration of dtypes needs a model whose right answer is a readable sentence, and the same
sentence in bfloat16, float16 and float32 on every CPU. So the aim is memory: the loss asks each
token of an answer to beat all others by a wide margin, and nothing is saved unless every dtype
reproduces every answer. A prompt with a few tokens replaced keeps its answer, and one with most
of them replaced gets one fixed answer, so that an unforeseen prompt is not answered with babble
that looks like the overflow this model exists to show.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from transformers.utils import logging

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = Path(__file__).with_name("talker.toml")
OUT = Path(__file__).parents[1] / "helpers" / "data" / "talker"

SEED = 0
VOCAB_SIZE = 768
STEPS = 800
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
PUSH = 10.0  # logits: the handicap of the right token in the loss
FLOOR = 8.0  # logits: the smallest margin that may be saved
DTYPES = ("float32", "bfloat16", "float16")

Pairs = list[tuple[str, str]]


class Batch(NamedTuple):
    """Token ids and two masks, each (rows, longest), padded on the right."""

    ids: torch.Tensor
    attended: torch.Tensor
    answer: torch.Tensor


def read_text() -> tuple[Pairs, str]:
    """The (prompt, answer) pairs in their order, and the answer to any other prompt."""
    text = tomllib.loads(TEXT.read_text(encoding="utf-8"))
    return [(pair["prompt"], pair["answer"]) for pair in text["pair"]], text["unknown"]


def train_tokenizer(pairs: Pairs) -> Qwen2Tokenizer:
    """Byte-level BPE as Qwen's: the 256 bytes first, so id 0 is "!", and <|endoftext|> last."""
    qwen = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([f"{prompt} {answer}" for prompt, answer in pairs], trainer)
    learned = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        padding_side="left",
        model_max_length=512,
    )


def make_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Qwen2ForCausalLM with random weights: q/k/v biases, grouped queries, tied embeddings."""
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # The value that Transformers 4 assumes: it does not know the key under which 5 stores it.
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.max_new_tokens = 24
    return model


def as_batch(tokenizer: PreTrainedTokenizerBase, pairs: Pairs) -> Batch:
    """One row "prompt answer<|endoftext|>" for each pair."""
    # Padded here: a tokenizer that pads writes that into the tokenizer.json it saves.
    texts = [f"{prompt} {answer}{tokenizer.eos_token}" for prompt, answer in pairs]
    rows = [torch.tensor(tokenizer.encode(text)) for text in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    place = torch.arange(ids.shape[1])
    attended = place < torch.tensor([[len(row)] for row in rows])
    answer = place >= torch.tensor([[len(tokenizer.encode(prompt))] for prompt, _ in pairs])
    return Batch(ids, attended, attended & answer)


def scrambled(batch: Batch, share: float, rows: int = 32) -> Batch:
    """Random rows, each token of their prompts replaced by a random one with odds `share`."""
    chosen = torch.randperm(len(batch.ids))[:rows]
    ids, attended, answer = (part[chosen] for part in batch)
    replaced = (torch.rand(ids.shape) < share) & attended & ~answer
    return Batch(ids.where(~replaced, torch.randint(VOCAB_SIZE, ids.shape)), attended, answer)


def loss_of(model: Qwen2ForCausalLM, batch: Batch, prompt_weight: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy in nats, where the right token of an answer starts PUSH logits behind."""
    logits = model(input_ids=batch.ids, attention_mask=batch.attended, use_cache=False).logits
    target, attended, answer = (part[:, 1:] for part in batch)
    handicap = PUSH * F.one_hot(target, VOCAB_SIZE) * answer[..., None]
    losses = F.cross_entropy((logits[:, :-1] - handicap).mT, target, reduction="none")
    weight = attended * torch.where(answer, 1.0, prompt_weight)
    return (losses * weight).sum() / weight.sum()


def train(model: Qwen2ForCausalLM, known: Batch, unknown: Batch) -> None:
    """AdamW; each step sees all known rows, and some rows of both kinds with other prompts."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1
    )
    start = time.perf_counter()
    for step in range(1, STEPS + 1):
        parts = [
            loss_of(model, known, prompt_weight=0.1),
            loss_of(model, scrambled(known, share=0.15)),
            loss_of(model, scrambled(unknown, share=0.7)),
        ]
        optimizer.zero_grad()
        loss = torch.stack(parts).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step == 1 or step % 50 == 0:
            shown = "  ".join(f"{part.item():7.4f}" for part in parts)
            print(
                f"step {step:4d}  loss {loss.item():7.4f}  known, noisy, unknown {shown}"
                f"  {time.perf_counter() - start:4.0f} s",
                flush=True,
            )


@torch.no_grad()
def margins(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """For every answer token, its logit minus the best other one; negative where it loses."""
    logits = model(input_ids=batch.ids, attention_mask=batch.attended).logits[:, :-1].float()
    target = batch.ids[:, 1:, None]
    right = logits.gather(2, target)[..., 0]
    others = logits.scatter(2, target, -torch.inf).amax(2)
    return (right - others)[batch.answer[:, 1:]]


def check(folder: Path, pairs: Pairs) -> None:
    """Load `folder` as a user does, in each dtype; ValueError names what goes wrong first."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for dtype in DTYPES:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for prompt, answer in pairs:
            output = model.generate(**tokenizer(prompt, return_tensors="pt"))[0]
            expected = f"{prompt} {answer}{tokenizer.eos_token}"
            if (text := tokenizer.decode(output)) != expected:
                raise ValueError(f"{dtype}: expected {expected!r}, got {text!r}; nothing was saved")
        smallest = margins(model, as_batch(tokenizer, pairs)).min().item()
        print(f"{dtype:8s}  all {len(pairs)} answers right, smallest margin {smallest:.2f}")
        if smallest < FLOOR:
            raise ValueError(f"{dtype}: the margin must be at least {FLOOR}; nothing was saved")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the talker and save it.")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to fill: %(default)s")
    out: Path = parser.parse_args().out

    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    pairs, unknown = read_text()
    tokenizer = train_tokenizer(pairs)
    known = as_batch(tokenizer, pairs)
    model = make_model(tokenizer)
    print(f"{len(pairs)} pairs, {model.num_parameters():,} parameters")
    train(model, known, as_batch(tokenizer, [(prompt, unknown) for prompt, _ in pairs]))

    # Windows keeps the file of a loaded model open, so it cannot be moved or removed yet.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        model.to(torch.bfloat16).save_pretrained(made)
        tokenizer.save_pretrained(made)
        check(Path(made), pairs)
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(Path(made).iterdir()):
            print(f"{file.stat().st_size:8,d} bytes  {file.name}")
            shutil.copyfile(file, out / file.name)


if __name__ == "__main__":
    main()

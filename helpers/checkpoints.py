"""Offline checkpoints of Qwen1.5's shape, made once and cached.

All of them hold one small trained model (``data/talker``) that answers questions about this guide's
subject, so that a right result is a sentence. They differ in the dtype of their tensors, in the
dtype that config.json declares, and in how well the weights suit float16.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers import state
from helpers.errors import CheckpointError

if TYPE_CHECKING:
    import torch

TALKER = Path(__file__).parent / "data" / "talker"
CACHE = "DTYPE_GUIDE_CACHE"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
DAY = 24 * 60 * 60  # seconds
QUESTION = "Which dtypes does FlashAttention accept?"


class Recipe(NamedTuple):
    """How a checkpoint differs from the shipped model; dtypes by name, None means undeclared."""

    tensors: str
    declared: str | None
    grouped_query: bool = False
    overflow: bool = False


RECIPES = {
    "bf16": Recipe("bfloat16", "bfloat16"),
    "fp16": Recipe("float16", "float16", grouped_query=True),
    "fp32": Recipe("float32", "float32"),
    "undeclared": Recipe("bfloat16", None),
    "mislabelled": Recipe("float32", "bfloat16"),
    "overflow": Recipe("bfloat16", "bfloat16", overflow=True),
}


def available() -> list[str]:
    """The names that ``get`` knows."""
    return list(RECIPES)


def get(name: str) -> Path:
    """The folder of a checkpoint, for ``from_pretrained``.

    It is made on first use in the user's cache folder (``DTYPE_GUIDE_CACHE`` names another one), or
    in a temporary folder, for this process alone, where the cache cannot be written.

    Raises:
        KeyError: an unknown name.
        CheckpointError: neither folder can be written.
    """
    if name not in RECIPES:
        raise KeyError(f"no checkpoint {name!r}: choose one of {', '.join(RECIPES)}")

    def checkpoint(root: Path) -> Path:
        folder = root / _digest() / name
        if not _complete(folder):
            _make(RECIPES[name], folder)
        return folder

    return _in_cache_or_temporary(checkpoint, f"The checkpoint {name!r}")


def scratch(copy_of: Path | None = None) -> Path:
    """A new folder, empty or a copy, for a checkpoint that this process changes or makes; it goes
    when the process ends, or a day later if the process is killed.

    Raises:
        CheckpointError: neither the cache nor a temporary folder can be written.
    """

    def folder(root: Path) -> Path:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        new = Path(tempfile.mkdtemp(prefix="scratch-", dir=root))
        atexit.register(shutil.rmtree, new, ignore_errors=True)
        if copy_of is not None:
            shutil.copytree(copy_of, new, dirs_exist_ok=True)
        return new

    return _in_cache_or_temporary(folder, "A scratch folder")


@functools.cache
def _sweep(root: Path) -> None:
    """Remove what processes left that were killed, once a process, a day later or more."""
    for folder in [*root.glob("scratch-*"), *root.glob("*/.*-*")]:
        with contextlib.suppress(OSError):
            if folder.stat().st_mtime < time.time() - DAY:
                shutil.rmtree(folder, ignore_errors=True)


def edit_config(folder: Path, **changes: str | None) -> None:
    """Set keys of a checkpoint's config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8")) | changes
    config = {
        key: value for key, value in config.items() if value is not None or key not in changes
    }
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _in_cache_or_temporary(make: Callable[[Path], Path], what: str) -> Path:
    failures = []
    for root in (cache, _temporary):
        try:
            return make(root())
        except (OSError, _safetensors_error()) as error:
            failures.append(str(error))
    raise CheckpointError(
        f"{what} cannot be written to {cache()} ({failures[0]}) nor to a temporary folder"
        f" ({failures[1]}): free some space, or set {CACHE} to a writable folder."
    )


def cache() -> Path:
    """The folder that checkpoints are kept in, whether it can be written or not."""
    named = os.environ.get(CACHE)
    if named:
        return Path(named).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("flashattention-dtype-guide")


@functools.cache
def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="flashattention-dtype-guide-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def _digest() -> str:
    """Changes when the shipped model or the recipes change, so no stale checkpoint is used."""
    sources = [*sorted(f for f in TALKER.iterdir() if f.suffix != ".md"), Path(__file__)]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:12]


def _complete(folder: Path) -> bool:
    return all((folder / file).is_file() for file in FILES)


def _make(recipe: Recipe, folder: Path) -> None:
    """Build beside the final place and rename, so that no other process meets half a checkpoint."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _save(recipe, workshop / "new")
        _publish(workshop / "new", folder, workshop / "old")
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _publish(new: Path, folder: Path, old: Path) -> None:
    with contextlib.suppress(OSError):
        new.rename(folder)
        return
    if not _complete(folder):  # somebody deleted files of it; else another process was first
        folder.rename(old)
        new.rename(folder)


def _save(recipe: Recipe, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config.from_pretrained(TALKER)
    weights = load_file(TALKER / "model.safetensors")
    if not recipe.grouped_query:
        weights = _ungroup(weights, config)
        config.num_key_value_heads = config.num_attention_heads
    if recipe.overflow:
        weights = _make_overflow(weights)

    with state.listening(afresh=False), torch.random.fork_rng(devices=[]):
        model = Qwen2ForCausalLM(config).to(getattr(torch, recipe.tensors))
        model.load_state_dict(weights, strict=False)  # lm_head is tied to the embedding
        model.save_pretrained(folder)
    # Copied, because a tokenizer that saves itself to a full disk raises no OSError.
    for file in TALKER.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    edit_config(folder, dtype=recipe.declared)


def _ungroup(weights: "dict[str, torch.Tensor]", config: Any) -> "dict[str, torch.Tensor]":
    """Multi-head attention that computes the same function: each query head gets its own copy of
    the key/value head that it shared."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    return {
        name: _each_repeated(tensor, shared, heads // shared)
        if ".k_proj." in name or ".v_proj." in name
        else tensor
        for name, tensor in weights.items()
    }


def _each_repeated(rows: "torch.Tensor", groups: int, times: int) -> "torch.Tensor":
    return rows.reshape(groups, -1, *rows.shape[1:]).repeat_interleave(times, 0).flatten(0, 1)


def _make_overflow(weights: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """The same function in float32 and bfloat16, NaN in float16.

    Powers of two move from ``down_proj`` to ``up_proj``. Each weight is still finite in float16
    (those of ``down_proj`` become subnormal and lose digits); what ``up_proj`` computes is not.
    """
    import torch

    largest = max(float(t.abs().max()) for n, t in weights.items() if ".up_proj." in n)
    scale = 2.0 ** int(torch.tensor(torch.finfo(torch.float16).max / largest).log2().floor())
    factor = {".up_proj.": scale, ".down_proj.": 1 / scale}
    return {
        name: tensor * next((f for part, f in factor.items() if part in name), 1.0)
        for name, tensor in weights.items()
    }


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError

"""What the files of a checkpoint say, read without loading a tensor."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from helpers.errors import PlanError

CODES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


class Tensor(NamedTuple):
    """What a safetensors header says of a tensor: the dtype as ``"float32"``, and the shape."""

    dtype: str
    shape: tuple[int, ...]


def file_dtypes(folder: Path) -> dict[str, int]:
    """The dtypes of the tensors in a model's or an adapter's safetensors files, with counts, most
    frequent first. Empty for other formats.

    Raises:
        PlanError: a file is not what its name says.
    """
    return dict(Counter(tensor.dtype for tensor in tensors(folder)).most_common())


def declared_dtype(folder: Path) -> str | None:
    """``dtype`` in a folder's config.json (``torch_dtype`` before Transformers 4.56), or None.

    Raises:
        PlanError: the file is not a JSON object.
    """
    file = folder / "config.json"
    config = json_object(file) if file.is_file() else {}
    declared = config.get("dtype") or config.get("torch_dtype")
    return dtype_name(declared) if declared else None


def tensors(folder: Path) -> list[Tensor]:
    """The tensors of a model's or an adapter's files, in the order in which they are met at load.

    Raises:
        PlanError: a file is not what its name says.
    """
    whole = [folder / name for name in ("model.safetensors", "adapter_model.safetensors")]
    files = [file for file in whole if file.is_file()][:1]
    index = folder / "model.safetensors.index.json"
    if not files and index.is_file():
        try:
            shards = set(json_object(index)["weight_map"].values())
            files = [folder / shard for shard in sorted(shards)]
        except (AttributeError, KeyError, TypeError) as error:
            raise PlanError(
                f"{str(index)!r} does not say which tensor is in which file: copy or download it"
                " again."
            ) from error
    return [tensor for file in files for tensor in header(file).values()]


def header(file: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors by name, in the order in which Transformers and peft meet them.

    Raises:
        PlanError: the file is not what its name says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: Tensor(CODES.get(code := part.get_dtype(), code), tuple(part.get_shape()))
                for name, part in parts.items()
            }
    except (OSError, SafetensorError) as error:
        raise PlanError(
            f"{str(file)!r} is not a complete safetensors file ({first_sentence(error)}): copy or"
            " download it again; if it is a Git LFS pointer, run 'git lfs pull'."
        ) from error


def json_object(file: Path) -> dict[str, Any]:
    """A file's JSON object; PlanError where it holds none."""
    try:
        found = json.loads(file.read_text("utf-8"))
        if isinstance(found, dict):
            return found
        reason = f"it holds {shortened(found)}"
    except (OSError, ValueError, RecursionError) as error:
        reason = first_sentence(error)
    raise PlanError(f"{str(file)!r} is not a JSON object ({reason}): copy or save it again.")


def local_folder(name: str) -> Path | None:
    """A checkpoint's folder by its path or by its hub id; None where it is not on this disk."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(name)
    if not os.path.isdir(folder):  # noqa: PTH112  # Path.is_dir raises on names that none can have
        try:
            cached = try_to_load_from_cache(name, "config.json")
        except (OSError, ValueError):  # it cannot be a hub id
            return None
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    weights = [f for end in ("safetensors", "bin") for f in folder.glob(f"*.{end}")]
    return folder if weights and (folder / "config.json").is_file() else None


def dtype_name(value: Any) -> str:
    """``"bfloat16"`` for ``torch.bfloat16`` and for its name."""
    return str(value).removeprefix("torch.")


def shortened(value: Any) -> str:
    """On one line, and short whatever it is."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error that may have many lines."""
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".:")
    return (text if len(text) <= 160 else f"{text[:157]}...") or type(error).__name__


def listed(values: Any) -> str:
    """Values as a person reads a choice: quoted, with commas."""
    return ", ".join(map(repr, values))

"""Inputs for one forward pass of any model, as small as its architecture allows.

Rules over the forward's signature and the attributes of the config, whose names Transformers uses
alike: a forward that takes ``pixel_values`` has a config with ``image_size``, ``num_channels`` and
``patch_size`` somewhere in it.
"""

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from helpers.errors import PlanError

BATCH, LENGTH = 2, 16  # Transformers reads the position ids of a batch of one
SAMPLES = 19_200  # of raw audio: about a second, and a multiple of the usual frames
FRAMES = 400  # of a spectrogram whose length is free
GRID = 8  # patches along each side of a picture whose size is free; a multiple of every merge
IMAGE = 224  # pixels along each side, where a config says nothing of it


def example_inputs(
    model: Any, text_alone: bool = False, counts: dict[str, int] | None = None
) -> dict[str, Any]:
    """What the model's forward takes: token ids, and what else its signature, its config and its
    ``main_input_name`` ask for, for a batch of BATCH.

    Integers are real numbers. Floating tensors (pixels, spectrograms, sound, series) have the dtype
    of most of the model's weights, because that is what people cast them to. A model that
    takes pictures or sound besides text gets them, with as many placeholders in the text as its own
    ``get_image_features`` or ``get_audio_features`` returns features; with ``text_alone``, and
    where its forward can do without, it gets none. ``counts`` remembers how many features those
    were, for the next model of the same config: counting them runs half a model.

    Raises:
        PlanError: nobody knows what it takes.
    """
    return _Example(model, text_alone, {} if counts is None else counts).inputs()


def configs(config: Any) -> Iterator[Any]:
    """A config and those inside it, the nearest first."""
    waiting = [config]
    while waiting:
        one = waiting.pop(0)
        yield one
        waiting += [value for value in vars(one).values() if hasattr(value, "model_type")]


class _Example:
    """The inputs of one model, name by name."""

    def __init__(self, model: Any, text_alone: bool, counts: dict[str, int]) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.model.config
        self.text_alone = text_alone
        self.counts = counts
        self.takes = inspect.signature(self.model.forward).parameters
        sizes: Counter[torch.dtype] = Counter()
        for parameter in self.model.parameters():
            if parameter.is_floating_point():
                sizes[parameter.dtype] += parameter.numel()
        self.dtype = max(sizes, key=lambda x: sizes[x], default=torch.get_default_dtype())
        special = {
            value
            for config in configs(self.config)
            for name, value in vars(config).items()
            if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
        }
        self.word = next(i for i in range(2, 1000) if i not in special)

    def inputs(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in self.wanted():
            if name not in found:
                if name not in MAKERS:
                    raise PlanError(
                        f"{type(self.model).__name__} wants {name}, for which there is no example:"
                        " give inputs=, a dictionary of what its forward takes."
                    )
                found.update(MAKERS[name](self))
        found = {name: value for name, value in found.items() if name in self.takes}
        if "input_ids" in found:
            self.hold_places(found)
        return found

    def wanted(self) -> list[str]:
        """The names to fill: what the forward is for, and what it cannot do without."""
        kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        names = [getattr(self.model, "main_input_name", "input_ids"), "input_ids"]
        if self.config.is_encoder_decoder:
            names.append("decoder_input_ids")
        if not self.text_alone:
            names += ["pixel_values", "input_features", "input_values", "bbox", "lang_ids"]
            if "pixel_values" not in self.takes:
                names.append("pixel_values_videos")
        names = [n for n in names if n in self.takes]
        names += [n for n, p in self.takes.items() if p.default is p.empty and p.kind not in kinds]
        return list(dict.fromkeys(names))

    def of(self, *names: str, default: Any = None) -> Any:
        """The first of these attributes that the config or one inside it has."""
        for name in names:
            for config in configs(self.config):
                if (value := getattr(config, name, None)) is not None:
                    return value
        return default

    def floats(self, *shape: int) -> torch.Tensor:
        """Ones, because an all black picture counts as none; they have data even where the model
        has none, and it reads whether they are black."""
        with unset_fake_temporarily():
            return torch.ones(shape, dtype=self.dtype)

    def text(self, length: int = LENGTH) -> torch.Tensor:
        return torch.full((BATCH, length), self.word)

    def hold_places(self, found: dict[str, Any]) -> None:
        """Put as many placeholders into the text as there are features of pictures and sounds, and
        say with ``mm_token_type_ids`` which they are."""
        row, types = [self.word], [0]
        for number, (kind, inputs) in enumerate(MEDIA.items(), 1):
            media = {name: value for name, value in found.items() if name in inputs}
            token = self.of(f"{kind}_token_id", f"{kind}_token_index")
            if media and isinstance(token, int):
                if kind not in self.counts and (counted := self.features(kind, media)):
                    self.counts[kind] = counted
                count = self.counts.get(kind, 1)
                start = self.of(f"{'vision' if kind != 'audio' else kind}_start_token_id")
                opening = [start] if isinstance(start, int) else []
                row += [*opening, *[token] * count]
                types += [*[0] * len(opening), *[number] * count]
        rest = found["input_ids"][:, 1:]
        if len(row) > 1:
            found["input_ids"] = torch.cat([torch.tensor([row] * BATCH), rest], dim=1)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in self.takes and (len(row) > 1 or name[0] == "m"):
                found[name] = torch.tensor([types + [0] * rest.shape[1]] * BATCH)

    def features(self, kind: str, media: dict[str, Any]) -> int:
        """How many features a row of the batch has, as the model's own method returns them. 0 where
        that raises, as the forward will, before it counts."""
        owners = [m for m in self.model.modules() if hasattr(m, f"get_{kind}_features")]
        if not owners:
            return 0
        method = getattr(owners[0], f"get_{kind}_features")
        takes = inspect.signature(inspect.unwrap(method)).parameters
        given = {name: value for name, value in media.items() if name in takes}
        for autocast in (False, True):  # where the forward will be in such a region
            region = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
            with contextlib.suppress(Exception), torch.no_grad(), region:
                return _vectors(method(**given)) // BATCH
        return 0


# What comes besides text, and the names of the inputs in which it comes.
MEDIA = {
    "image": ("pixel_values", "image_grid_thw", "image_sizes", "target_sizes", "image_grid_hw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
    "audio": ("input_features", "input_features_mask", "feature_attention_mask", "input_values"),
}


def _vectors(result: Any) -> int:
    """How many vectors are in what get_image_features returned."""
    if isinstance(result, torch.Tensor):
        return result.numel() // result.shape[-1]
    if isinstance(result, (list, tuple)):
        return sum(map(_vectors, result))
    for name in ("pooler_output", "last_hidden_state"):
        if (value := getattr(result, name, None)) is not None:
            return _vectors(value)
    return 0


def _ids(e: _Example) -> dict[str, Any]:
    if "kyutai" in e.config.model_type:  # a word and the codes of the sound beside it
        return {"input_ids": e.text().unsqueeze(-1).repeat(1, 1, e.config.num_codebooks + 1)}
    return {"input_ids": e.text()}


def _decoder_ids(e: _Example) -> dict[str, Any]:
    decoder = getattr(e.config, "decoder_config", None)
    if channels := getattr(decoder, "num_channels", None):  # several codes at a time
        return {"decoder_input_ids": e.text().unsqueeze(-1).repeat(1, 1, channels)}
    return {"decoder_input_ids": e.text()}


def _size(e: _Example) -> tuple[int, int]:
    """Height and width of a picture, in pixels."""
    size = e.of("image_size", "img_size", "input_size", "crop_size", default=IMAGE)
    if isinstance(size, dict):
        size = (size.get("height", IMAGE), size.get("width", IMAGE))
    height, width = tuple(size)[-2:] if isinstance(size, (list, tuple)) else (size, size)
    height, width = int(height), int(width)
    if windows := e.of("num_windows", default=0) * _patch(e):
        return height // windows * windows, width // windows * windows
    return height, width


def _channels(e: _Example) -> int:
    return int(e.of("num_channels", "in_channels", "in_chans", default=3))


def _patch(e: _Example) -> int:
    patch = e.of("patch_size", default=14)
    return int(patch[-1] if isinstance(patch, (list, tuple)) else patch)


def _patches(e: _Example, name: str) -> dict[str, Any]:
    """Pictures as Qwen-VL takes them: their patches end to end, and the grid of each."""
    frames = e.of("temporal_patch_size", "patch_temporal", default=1)
    shape: tuple[int, ...] = (_channels(e) * frames * _patch(e) ** 2,)
    if "kimi" in e.config.model_type:  # its patches keep their dimensions
        shape = (_channels(e), _patch(e), _patch(e))
    grid = torch.tensor([[1, GRID, GRID]] * BATCH)
    return {
        name: e.floats(BATCH * GRID * GRID, *shape),
        "grid_thw": grid,
        "image_grid_thw": grid,
        "image_grid_hw": grid[:, 1:],
        "merge_sizes": torch.tensor([2] * BATCH),
        "image_merge_sizes": torch.tensor([2] * BATCH),
    }


def _pixels(e: _Example) -> dict[str, Any]:
    if {"grid_thw", "image_grid_thw", "image_grid_hw"} & set(e.takes):
        return _patches(e, "pixel_values")
    channels, patch = _channels(e), _patch(e)
    if "pixel_position_ids" in e.takes or "image_position_ids" in e.takes:
        places = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))
        places = places.expand(BATCH, -1, -1).contiguous()
        return {
            "pixel_values": e.floats(BATCH, GRID * GRID, channels * patch**2),
            "pixel_position_ids": places,
            "image_position_ids": places,
        }
    height, width = _size(e)
    rows, columns = height // patch, width // patch
    frames = e.of("num_frames", default=1)
    several: tuple[int, ...] = ()  # pictures for a row of the batch
    if getattr(e.config, "image_grid_pinpoints", None):  # a small picture, and tiles of it
        several = (_tiles(e, height),)
    elif "pixel_attention_mask" in e.takes or hasattr(e.model, "vlm"):
        several = (1,)
    elif "loftr" in e.config.model_type:
        several = (2,)  # the pair to match
    elif "pixel_values_videos" not in e.takes and frames > 1:
        several = (frames,)
    found = {"pixel_values": e.floats(BATCH, *several, channels, height, width)}
    kinds = {config.model_type for config in configs(e.config)}
    if several or "pixtral" in kinds:
        found["image_sizes"] = torch.tensor([[height, width]] * BATCH)
    if "target_sizes" in e.takes:
        found["target_sizes"] = torch.tensor([[rows, columns]] * BATCH)
    return found


def _masked(e: _Example) -> dict[str, Any]:
    """Every other patch of a film."""
    height, width = _size(e)
    frames = e.of("num_frames", default=1) // e.of("tubelet_size", default=1)
    patches = torch.arange(frames * (height // _patch(e)) * (width // _patch(e)))
    return {"bool_masked_pos": (patches % 2 == 0).expand(BATCH, -1).contiguous()}


def _tiles(e: _Example, size: int) -> int:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return int(image_size_to_num_patches([size, size], e.config.image_grid_pinpoints, size))


def _videos(e: _Example) -> dict[str, Any]:
    frames = e.of("num_frames", "frames_per_clip", default=4)
    return {"pixel_values_videos": e.floats(BATCH, frames, _channels(e), *_size(e))}


def _features(e: _Example) -> dict[str, Any]:
    """A spectrogram: Whisper's has its frequencies first, and one length only."""
    names = ("num_mel_bins", "n_mels", "num_mel_channels", "input_feat_size")
    audio = next((c for c in configs(e.config) if any(getattr(c, n, 0) for n in names)), e.config)
    mels = next((size for n in names if (size := getattr(audio, n, None))), 80)
    positions = getattr(audio, "max_source_positions", None)
    frames = 2 * positions if positions else FRAMES
    convolved = (m.in_channels for m in e.model.modules() if isinstance(m, torch.nn.Conv1d))
    first = positions or next(convolved, None) == mels or hasattr(audio, "n_window")
    mels *= getattr(audio, "num_stacked_frames", 1)
    mask = torch.ones(BATCH, frames, dtype=torch.long)
    return {
        "input_features": e.floats(BATCH, *((mels, frames) if first else (frames, mels))),
        "input_features_mask": mask,
        "feature_attention_mask": mask,
    }


def _values(e: _Example) -> dict[str, Any]:
    if "max_length" in vars(e.config) and hasattr(e.config, "num_mel_bins"):  # a spectrogram
        return {"input_values": e.floats(BATCH, e.config.max_length, e.config.num_mel_bins)}
    codec = hasattr(e.config, "audio_channels") or e.of("dac_config") is not None
    channels = (1,) if codec else ()
    return {"input_values": e.floats(BATCH, *channels, SAMPLES)}


def _mel(e: _Example) -> dict[str, Any]:
    return {
        "audio_mel": e.floats(BATCH, FRAMES, e.of("input_feat_size", default=128)),
        "audio_mel_mask": torch.ones(BATCH, FRAMES, dtype=torch.bool),
    }


def _series(e: _Example) -> dict[str, Any]:
    channels = getattr(e.config, "num_input_channels", None)
    shape = (BATCH, e.of("context_length", default=64), *([channels] if channels else []))
    return {"past_values": e.floats(*shape)}


MAKERS: dict[str, Callable[[_Example], dict[str, Any]]] = {
    "input_ids": _ids,
    "qformer_input_ids": lambda e: {"qformer_input_ids": e.text()},
    "decoder_input_ids": _decoder_ids,
    "lang_ids": lambda e: {"lang_ids": torch.zeros(BATCH, dtype=torch.long)},
    "bbox": lambda e: {"bbox": torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)},
    "pixel_values": _pixels,
    "hidden_states": lambda e: _patches(e, "hidden_states"),
    "bool_masked_pos": _masked,
    "pixel_values_videos": _videos,
    "input_features": _features,
    "input_values": _values,
    "audio_mel": _mel,
    "past_values": _series,
    "latents": lambda e: {"latents": e.floats(BATCH, e.of("hidden_size"), LENGTH)},
}

"""A config of the same architecture that a laptop runs with real weights in a moment."""

import copy
import math
from typing import TYPE_CHECKING, Any

from helpers.examples import configs

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LAYERS, EXPERTS, VOCABULARY, PIXELS, FRAMES = 6, 16, 1024, 128, 8
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers",
          "decoder_layers", "num_encoder_layers", "num_decoder_layers")  # fmt: skip
CROWDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
HEADS = ("heads", "n_head", "num_query_groups", "head")
WIDE = ("hidden_size", "intermediate", "ffn_dim", "ffn_size", "d_model", "embed_dim", "n_embd",
        "projection_dim", "n_inner", "d_ff", "width", "hidden_dim", "mlp_dim", "embedding_size",
        "mlp_hidden", "conv_dim", "d_inner", "lru_width")  # fmt: skip
INNER = ("intermediate", "ffn", "d_ff", "inner", "mlp")
NOT_WIDE = ("head_dim", "head_size", "vocab", "rank")


def small_config(config: "PretrainedConfig", images: bool = True) -> "PretrainedConfig":
    """A copy with few layers, heads, experts and words, and, with ``images``, small pictures.

    Every width and every number of heads is divided by one number, so that the size of a head and
    what has to match still do. Layers are kept from the first on, until each kind that the config
    lists has come.
    """
    config = copy.deepcopy(config)
    parts = list(configs(config))
    by = _divisor(parts)
    words = _words(parts)
    for part in parts:
        for name, value in list(vars(part).items()):
            new = _new(part, name, value, by, words, images)
            if new is not value:
                part.__dict__[name] = new
    return config


def _divisor(parts: list[Any]) -> int:
    """What all widths and the numbers of query heads can be divided by, the same for all."""
    numbers, heads = [], []
    for part in parts:
        for name, value in vars(part).items():
            if isinstance(value, int) and value > 1 and not isinstance(value, bool):
                if _is_heads(name) and "key_value" not in name and "kv" not in name:
                    heads.append(value)
                elif _is_wide(name):
                    numbers.append(value)
    if not heads:
        return 1
    common = math.gcd(*heads)
    common = math.gcd(common, *(n for n in numbers if math.gcd(common, n) > 1))
    return common


def _words(parts: list[Any]) -> dict[int, int]:
    """New ids for the tokens with a meaning that the small vocabulary would not have."""
    large = {
        one
        for part in parts
        for name, value in vars(part).items()
        if "token" in name and ("_id" in name or "_index" in name)
        for one in (value if isinstance(value, list) else [value])
        if isinstance(one, int) and one >= VOCABULARY - 100
    }
    return {old: VOCABULARY - 100 + number for number, old in enumerate(sorted(large))}


def _new(part: Any, name: str, value: Any, by: int, words: dict[int, int], images: bool) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if "token" in name and ("_id" in name or "_index" in name):
        if isinstance(value, list):
            return [words.get(one, one) for one in value]
        return words.get(value, value) if isinstance(value, int) else value
    depth = _depth(part)
    if name in DEPTHS:
        return min(value, depth) if isinstance(value, int) else value
    if isinstance(value, list) and len(value) > depth and "layer" in name:
        return value[:depth]
    if name == "vocab_size" and isinstance(value, int):
        return min(value, VOCABULARY)
    if name in CROWDS and isinstance(value, int):
        return min(value, EXPERTS)
    if images and name in ("num_frames", "frames_per_clip") and isinstance(value, int):
        return min(value, FRAMES)
    if images and name in ("image_size", "img_size", "crop_size") and isinstance(value, int):
        patch = getattr(part, "patch_size", None)
        if isinstance(patch, int) and value > PIXELS:
            return max(PIXELS // patch // 4 * 4, 4) * patch
    if isinstance(value, int) and value > 1 and _is_heads(name):
        return max(value // by, 1)
    if isinstance(value, int) and value > 1 and _is_wide(name):
        # The matmul of a mixture of experts wants rows of a multiple of 16 bytes.
        exact = value % by == 0 and not any(word in name for word in INNER)
        return value // by if exact else -(-value // by // 8) * 8
    return value


def _depth(part: Any) -> int:
    """How many layers show each kind that the config lists."""
    kinds = getattr(part, "layer_types", None) or getattr(part, "layers_block_type", None) or []
    return max([LAYERS, *(kinds.index(kind) + 1 for kind in set(kinds))])


def _is_heads(name: str) -> bool:
    return name.endswith(HEADS) and "per" not in name


def _is_wide(name: str) -> bool:
    if any(word in name for word in NOT_WIDE):
        return False
    return name == "dim" or any(word in name for word in WIDE)

"""What can be X-rayed without its weights: a name, a folder, a hub id or a config, made into a
model that has none."""

import copy
import functools
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers import adapter, backend, checkpoints
from helpers.errors import PlanError
from helpers.files import declared_dtype, dtype_name, file_dtypes, first_sentence, listed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

QWEN = files("helpers").joinpath("data/qwen.json")


EXPECTED = (
    f"one of {listed(checkpoints.available())}, a Qwen by its name such as 'Qwen1.5-72B', a folder,"
    " or a hub id like 'org/model'"
)


class Subject(NamedTuple):
    """A config, what to call it, and the dtype in which ``from_pretrained`` loads it without one
    (None: PyTorch's default)."""

    name: str
    config: "PretrainedConfig"
    dtype: str | None


def known() -> list[str]:
    """The names of the models whose configs are shipped: Qwen1.5 and Qwen2."""
    return list(shipped())


def find(what: Any, trust_remote_code: bool = False) -> Subject:
    """The subject of a name, a folder, a hub id or a config.

    Raises:
        PlanError: it is none of them, or wants to run code of its own without leave.
    """
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(what, PretrainedConfig):
        subject = Subject(type(what).__name__, what, _declared(what))
        _refuse_code(subject, trust_remote_code)
        return subject
    name = str(what)
    if name in known():
        config = AutoConfig.for_model(**shipped()[name]["config"])
        return Subject(name, config, _declared(config))
    path = str(checkpoints.get(name)) if name in checkpoints.available() else name
    folder = Path(path)
    if path and not folder.is_dir() and re.match(r"[./~\\]|[A-Za-z]:|[^/]*/[^/]*/", path):
        raise PlanError(
            f"There is no folder {path!r} (seen from {str(Path.cwd())!r}): expected {EXPECTED}."
        )
    if not path or not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            raise PlanError(f"{name!r} is not a checkpoint: expected {EXPECTED}.")
        _require_reachable(path)
    else:
        require_model(folder)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # files and networks fail in many ways
        if "trust_remote_code" in str(error):
            raise PlanError(_CODE.format(name)) from error
        raise PlanError(
            f"No config could be read from {name!r} ({first_sentence(error)}): give a folder with"
            " a config.json, or a hub id that is in the cache or can be downloaded."
        ) from error
    dtype = _declared(config)
    if folder.is_dir():
        dtype = declared_dtype(folder) or next(iter(file_dtypes(folder)), None)
    subject = Subject(name, config, dtype)
    _refuse_code(subject, trust_remote_code)
    return subject


def require_model(folder: Path) -> None:
    """Raise PlanError where a folder holds no model, or files that cannot be read."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise PlanError(
            f"The folder {str(folder)!r} holds a LoRA adapter and no model: give its base,"
            f" {adapter.base_of(folder)!r}, as checkpoint= and this folder as adapter=."
        )
    if not (folder / "config.json").is_file():
        raise PlanError(
            f"The folder {str(folder)!r} has no config.json, so it is not a checkpoint:"
            " give the folder that save_pretrained wrote."
        )
    declared_dtype(folder)
    file_dtypes(folder)


_CODE = (
    "{!r} brings Python code of its own, which would run here: look at it, and allow it with"
    " trust_remote_code=True (dtype-doctor xray --trust-remote-code)."
)


def _refuse_code(subject: Subject, trusted: bool) -> None:
    if getattr(subject.config, "auto_map", None) and not trusted:
        raise PlanError(_CODE.format(subject.name))


def _require_reachable(hub_id: str) -> None:
    from huggingface_hub import file_exists, try_to_load_from_cache

    try:  # from_pretrained would wait for its retries, half a minute without network
        cached = try_to_load_from_cache(hub_id, "config.json")
        if isinstance(cached, str) or file_exists(hub_id, "config.json"):
            return
        reason = "the hub shows no such model"
    except Exception as error:  # no network shows as many types
        reason = type(error).__name__
        if backend.is_old() and reason == "OfflineModeIsEnabled":
            reason = (
                "HF_HUB_OFFLINE is on, as Transformers 4 needs it here; 'hf download' it before"
            )
    raise PlanError(
        f"{hub_id!r} is neither a folder, nor in the Hugging Face cache, nor to be had from the hub"
        f" ({reason}): expected {EXPECTED}; a hub id needs network at first."
    )


def _declared(config: "PretrainedConfig") -> str | None:
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return dtype_name(dtype) if dtype is not None else None


def model_class(config: "PretrainedConfig") -> Any:
    """The class to build: the one that the config names, else the first that Transformers has for
    it: generation before the bare model, and both halves of an encoder-decoder before one.

    Raises:
        PlanError: Transformers has none.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    for name in getattr(config, "architectures", None) or ():
        if (found := getattr(transformers, name, None)) is not None:
            return found
    both = getattr(config, "is_encoder_decoder", False)
    for name in sorted(MAPPINGS, key=lambda name: both and "SEQ" not in name):
        mapping = getattr(modeling_auto, name, {})
        if type(config) in mapping:
            found = mapping[type(config)]
            found = found[0] if isinstance(found, (tuple, list)) else found
            if isinstance(config, found.config_class or type(config)):  # not of a part of it
                return found
    raise PlanError(
        f"Transformers has no model for a {type(config).__name__}: give a config of one that it"
        " has, or a live model."
    )


MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_PRETRAINING_MAPPING",
    "MODEL_MAPPING",
)


def build(config: "PretrainedConfig", dtype: str | None, attention: str) -> Any:
    """A model with its dtypes as ``from_pretrained(dtype=...)`` would leave them, in eval mode; its
    weights are what the tensors that are made just then hold.

    Some architectures keep modules in float32: ``_keep_in_fp32_modules`` when float16 is asked for,
    ``_keep_in_fp32_modules_strict`` also for bfloat16 (``_get_dtype_plan`` in
    transformers/modeling_utils.py).
    """
    import torch
    import transformers

    wanted = torch.get_default_dtype() if dtype is None else getattr(torch, dtype)
    config = copy.deepcopy(config)
    remote = [name for name in getattr(config, "auto_map", None) or () if "AutoModel" in name]
    if remote:
        make = functools.partial(
            getattr(transformers, remote[0]).from_config, trust_remote_code=True
        )
    else:
        make = model_class(config)._from_config
    model = make(config, dtype=wanted, attn_implementation=attention)
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if wanted == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if kept and wanted in (torch.float16, torch.bfloat16):
        pattern = re.compile("|".join(re.escape(k).replace(r"\*", ".*") for k in kept))
        for name, parameter in model.named_parameters():
            if pattern.search(name):
                parameter.data = parameter.data.float()
    return model.eval()


def shipped() -> dict[str, Any]:
    """The shipped configs by name, each with its source and its number of parameters."""
    found: dict[str, Any] = json.loads(QWEN.read_text("utf-8"))["models"]
    return found

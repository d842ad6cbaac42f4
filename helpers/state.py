"""The state of the process that a run changes, and that is put back whatever happens inside."""

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator, MutableMapping
from typing import Any

from helpers import backend

# Of the libraries that speak during a run; PyTorch says what fake tensors cannot do.
LOGGERS = ("transformers", "kernels", "peft", "torch._subclasses.fake_tensor")
# What Transformers remembers of a FlashAttention that it loaded: it expects to find it registered.
# Transformers 4 has some of them.
FLASH_GLOBALS = (
    "_loaded_implementation",
    "_flash_fn",
    "_flash_varlen_fn",
    "_flash_with_kvcache_fn",
    "_pad_fn",
    "_unpad_fn",
    "_process_flash_kwargs_fn",
    "_process_with_kvcache_kwargs_fn",
)


@contextlib.contextmanager
def default_dtype(name: str | None) -> Iterator[None]:
    """``torch.set_default_dtype`` for the block; None leaves it alone."""
    import torch

    before = torch.get_default_dtype()
    if name is not None:
        torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


one_at_a_time = threading.RLock()  # held where something changes that belongs to the process


@contextlib.contextmanager
def environment_as_before() -> Iterator[None]:
    """Afterwards the environment is as it was; no other thread is inside meanwhile."""
    with one_at_a_time:
        before = dict(os.environ)
        try:
            yield
        finally:
            for name in set(os.environ) - set(before):
                del os.environ[name]
            os.environ.update(before)


@contextlib.contextmanager
def dictionaries_as_before(*changed: MutableMapping[Any, Any]) -> Iterator[None]:
    """Afterwards these hold what they held."""
    saved = [dict(values) for values in changed]
    try:
        yield
    finally:
        for values, before in zip(changed, saved, strict=True):
            values.clear()
            values.update(before)


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Afterwards the environment, torch's random state and number of threads, and the attention
    functions that Transformers has registered and loaded are as they were; no other thread is
    inside meanwhile."""
    import torch
    from transformers import masking_utils, modeling_flash_attention_utils, modeling_utils

    registries = (
        modeling_utils.ALL_ATTENTION_FUNCTIONS,
        masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
    )
    mappings = [m for r in registries for m in (r._global_mapping, r._local_mapping)]
    flash = vars(modeling_flash_attention_utils)
    with environment_as_before(), dictionaries_as_before(*mappings):
        loaded = {name: flash[name] for name in FLASH_GLOBALS if name in flash}
        threads = torch.get_num_threads()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed the GPUs
                yield
        finally:
            flash.update(loaded)
            torch.set_num_threads(threads)


@contextlib.contextmanager
def autocast_as_on_a_gpu(device: str) -> Iterator[None]:
    """Under Transformers 4, CUDA's autocast state is the CPU's inside the block, for tensors on the
    CPU."""
    import torch

    if device != "cpu" or not backend.is_old() or not torch.is_autocast_enabled("cpu"):
        yield
        return
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.get_autocast_dtype("cpu"))
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def listening(afresh: bool = True) -> Iterator[tuple[list[str], list[warnings.WarningMessage]]]:
    """Collect the libraries' log lines and warnings instead of printing them; no progress bars.

    Transformers says some lines once in a process; with ``afresh`` they are heard here once more,
    and said once more to the person afterwards.
    """
    from transformers.utils import logging as transformers_logging

    if afresh:
        transformers_logging.warning_once.cache_clear()
    collector = _Collector()
    loggers = [logging.getLogger(name) for name in LOGGERS]
    saved = [(x, x.level, x.handlers[:], x.propagate) for x in loggers]
    try:
        for logger in loggers:
            logger.handlers, logger.propagate = [collector], False
            logger.setLevel(logging.WARNING)
        with _no_progress_bars(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            warnings.simplefilter("ignore", DeprecationWarning)
            yield collector.lines, warned
    finally:
        if afresh:
            transformers_logging.warning_once.cache_clear()
        for logger, level, handlers, propagate in saved:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    if not hasattr(transformers_logging, "set_tqdm_hook"):  # Transformers 4
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                transformers_logging.enable_progress_bar()
        return
    bars = transformers_logging.set_tqdm_hook(
        lambda _factory, args, _kwargs: transformers_logging.EmptyTqdm(*args)
    )
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(bars)

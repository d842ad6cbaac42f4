"""Which FlashAttention runs on this machine, and switching it on.

Transformers decides by itself between the ``flash_attn`` package and the prebuilt kernel that the
``kernels`` library downloads. Where neither can run, the reference kernel takes the place of the
download: under Transformers 5 through the documented ``LOCAL_KERNELS`` override of the ``kernels``
library, under Transformers 4, whose ``kernels`` is older, as a download that is in its cache
already. No function of any library is replaced.
"""

import contextlib
import functools
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Literal

BackendName = Literal["flash_attn", "hub-kernel", "reference"]

KERNEL_FOLDER = Path(__file__).parent / "reference_kernel"
HUB_CACHE = KERNEL_FOLDER / "hub-cache"  # the same kernel as the hub's cache would hold it


class Versions(dict[str, str]):
    """Version by package; ``str()`` is the line that tags a result."""

    def __str__(self) -> str:
        return ", ".join(f"{package} {number}" for package, number in self.items())


@dataclass(frozen=True)
class Backend:
    """What computes ``flash_attention_2`` here, on which device; ``str()`` says it on screen."""

    name: BackendName
    device: Literal["cuda", "cpu"]
    why: str

    def __str__(self) -> str:
        if self.name == "reference":
            return (
                f"{self.why}: the reference kernel makes FlashAttention-2's dtype and shape checks,"
                " with its messages, and computes with PyTorch on the CPU, so its speed and memory"
                " are not FlashAttention's."
            )
        return f"FlashAttention-2 itself runs here: {self.why}."


def activate() -> Backend:
    """Make ``attn_implementation="flash_attention_2"`` work in this process; call it as often as
    you like.

    On a machine without a usable FlashAttention this sets ``LOCAL_KERNELS`` (read by the
    ``kernels`` library when a model is loaded), and nothing else. Under Transformers 4 it sets
    ``KERNELS_CACHE`` and ``HF_HUB_OFFLINE`` instead, which are read when the libraries are
    imported, so there it has to be called first.

    Raises:
        RuntimeError: Transformers would use a ``flash_attn`` that refuses this GPU; or the process
            tried to load FlashAttention before and failed, which Transformers does not recover
            from; or the override cannot name the kernel's folder, or this package was installed
            without its dependencies; or, under Transformers 4, the libraries were imported before
            with other settings.
    """
    if is_old():
        return _activate_old()
    backend = detect()
    if backend.name == "flash_attn":
        _refuse_old_gpu()
    _refuse_after_failed_load()
    if backend.name == "reference":
        _refuse_without_reference()
        os.environ["LOCAL_KERNELS"] = override(
            kernel_repository(),
            kernel_path(str(KERNEL_FOLDER), str(Path.cwd())),
            os.environ.get("LOCAL_KERNELS", ""),
        )
    return backend


def _activate_old() -> Backend:
    """The way of ``kernels`` 0.11.4 to 0.12, which know no override.

    Found by running it: with these two variables the library finds the reference kernel as a
    download that is complete.
    """
    wanted = {"KERNELS_CACHE": str(HUB_CACHE), "HF_HUB_OFFLINE": "1"}
    if not (_has_gpu() and _has_package()):
        _refuse_without_reference()
        if "huggingface_hub" not in sys.modules:
            os.environ.pop("HF_KERNELS_CACHE", None)  # the old name, which would come first
            os.environ.update(wanted)
    backend = detect()
    if backend.name == "flash_attn":
        _refuse_old_gpu()
        return backend
    _refuse_without_reference()

    from huggingface_hub.constants import HF_HUB_OFFLINE
    from kernels.utils import CACHE_DIR

    if (str(HUB_CACHE), True) != (CACHE_DIR, HF_HUB_OFFLINE):
        raise RuntimeError(
            "Under Transformers 4 the reference kernel is switched on by variables that are read at"
            " import: start Python anew and call activate() before transformers is imported, or set"
            f" KERNELS_CACHE={HUB_CACHE} and HF_HUB_OFFLINE=1 before Python starts."
        )
    return backend


@functools.cache
def is_old() -> bool:
    """Whether the installed Transformers is of the generation before 5."""
    return int(version("transformers").partition(".")[0]) < 5


@functools.cache
def versions() -> Versions:
    """The versions that an outcome holds for, without local labels such as ``+cpu``."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "kernels", "peft", "flash-attn"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package).partition("+")[0]
    return Versions(found)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_package() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


@functools.cache
def detect() -> Backend:
    """Find the backend without switching it on.

    ``CUDA_VISIBLE_DEVICES=-1``, set before Python starts, chooses the reference kernel on a machine
    that could do better; the tests that compare stored outputs do so.
    """
    import torch

    if not _has_gpu():
        return Backend("reference", "cpu", "No CUDA GPU is in use")

    from transformers.utils.import_utils import is_flash_attn_2_available

    gpu = torch.cuda.get_device_name()
    if is_flash_attn_2_available():
        return Backend("flash_attn", "cuda", f"flash-attn {version('flash_attn')} on {gpu}")
    if _is_too_old():
        return Backend("reference", "cpu", f"{gpu} is older than FlashAttention-2 accepts")
    if is_old() or torch.version.hip is not None:
        # The hub's kernel for ROCm is another one (aiter), without FlashAttention-2's checks.
        return Backend("reference", "cpu", f"{gpu} is here, but flash-attn is not")
    if not _is_overridden() and _hub_has_kernel():
        return Backend("hub-kernel", "cuda", f"the prebuilt {kernel_repository()} on {gpu}")
    return Backend("reference", "cpu", f"{gpu} is here, but flash-attn and the kernel hub are not")


def kernel_repository() -> str:
    """The hub repository that Transformers asks for where the ``flash_attn`` package is absent.

    Source: ``FLASH_ATTN_KERNEL_FALLBACK`` in transformers/modeling_flash_attention_utils.py; it is
    another one on ROCm.
    """
    return str(_flash_utils().FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"])


def kernel_path(folder: str, cwd: str, path: ModuleType = os.path) -> str:
    """The folder as ``LOCAL_KERNELS`` can carry it.

    The variable is split on ``:``, so an absolute Windows path cannot stand in it and neither can a
    folder with a colon in its name; the path relative to ``cwd`` mostly can. ``path`` is the path
    flavour (``ntpath`` or ``posixpath``).
    """
    if ":" not in folder:
        return folder
    try:
        relative = str(path.relpath(folder, cwd))
    except ValueError:  # Windows: the two are on different drives
        relative = folder
    if ":" in relative:
        raise RuntimeError(
            f"LOCAL_KERNELS is split on ':' and cannot name {folder!r} from {cwd!r}: start Python"
            " in the folder of the guide, or move the guide to a path without a colon."
        )
    return relative


def override(repository: str, path: str, current: str) -> str:
    """``current`` value of ``LOCAL_KERNELS`` with ``repository`` pointing at ``path``."""
    others = [e for e in current.split(":") if e and not e.startswith(f"{repository}=")]
    return ":".join([*others, f"{repository}={path}"])


def _is_too_old() -> bool:
    """Upstream's first check, before the dtype: "Ampere GPUs or newer" in flash_api.cpp."""
    import torch

    return torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0)


def _refuse_old_gpu() -> None:
    if _is_too_old():
        raise RuntimeError(
            "Transformers would use the installed flash-attn, which refuses this GPU (it takes"
            " compute capability 8.0 or newer): set CUDA_VISIBLE_DEVICES=-1 before Python starts,"
            " to run the guide on the CPU."
        )


def _is_overridden() -> bool:
    """Whether a parent process has switched the reference kernel on for this one too."""
    entries = [e.partition("=") for e in os.environ.get("LOCAL_KERNELS", "").split(":")]
    return any(
        name == kernel_repository() and Path(path).resolve() == KERNEL_FOLDER.resolve()
        for name, _, path in entries
    )


def _hub_has_kernel() -> bool:
    utils, repository = _flash_utils(), kernel_repository()
    try:
        import kernels

        return bool(
            kernels.has_kernel(repository, version=utils.FLASH_ATTN_KERNEL_VERSIONS[repository])
        )
    except Exception:  # no `kernels`; no network shows as many types, from httpx to huggingface_hub
        return False


def _refuse_without_reference() -> None:
    if importlib.util.find_spec("kernels") is None or not KERNEL_FOLDER.is_dir():
        raise RuntimeError(
            "No FlashAttention runs on this machine, and the reference kernel needs the guide's"
            " folder and the `kernels` library: clone the guide and install its dependencies."
        )


def _refuse_after_failed_load() -> None:
    utils = _flash_utils()
    if utils._loaded_implementation is not None and utils._flash_varlen_fn is None:
        raise RuntimeError(
            "FlashAttention failed to load earlier in this Python process, and Transformers keeps"
            " that state: restart the kernel, then call activate() before from_pretrained."
        )


def _flash_utils() -> ModuleType:
    from transformers import modeling_flash_attention_utils

    return modeling_flash_attention_utils

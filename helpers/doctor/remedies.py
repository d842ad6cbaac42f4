"""Fixes as code for the person's versions, libraries and GPU."""

from typing import Any

from helpers.doctor.data import load
from helpers.doctor.diagnosis import Fix
from helpers.doctor.evidence import Evidence, version
from helpers.doctor.words import say

# GPUs before compute capability 8.0: no bfloat16 in hardware (the CUDA programming guide's table of
# compute capabilities).
BEFORE_AMPERE = ("T4", "V100", "P100", "P40", "GTX", "RTX 20", "RTX20", "Quadro RTX", "RTX 6000")


def remedies(cause: str, evidence: Evidence) -> "tuple[Fix, ...]":
    """The fixes of a cause, best first, without those that the evidence rules out."""
    labels = list(load("fixes.json")["for"].get(cause, ()))
    if cause == "missing-autocast" and (beside(evidence) or evidence.has("loop")):
        labels.sort(key=lambda label: label != "wrap-in-autocast")
    return tuple(remedy(label, cause, evidence) for label in labels)


def beside(evidence: Evidence) -> bool:
    """Whether the failing call lies beside the training step."""
    return evidence.stage("eval") or evidence.has("outside") or evidence.has("beside")


def remedy(label: str, cause: str, evidence: Evidence) -> Fix:
    """One fix, with lines for this person."""
    entry: dict[str, Any] = load("fixes.json")["fixes"][label]
    codes = entry["code"]
    names = [*_kinds(cause, evidence), *(n.replace("_", "-") for n in evidence.libraries)]
    lines = next((codes[name] for name in names if name in codes), codes["default"])
    half = half_for(evidence)
    flags = load("fixes.json")["halves"][half]
    keyword, known = dtype_keyword(evidence)
    words = {"dtype": keyword, "half": half, "flag": flags["flag"], "transformers": known}
    code = "\n".join(lines).format(**words)
    versions = (
        say(entry["versions"]).format(**words) if "{dtype}" in code + "".join(lines) else "any"
    )
    return Fix(label, code, versions, entry["safety"])


def _kinds(cause: str, evidence: Evidence) -> "list[str]":
    """Special forms of a fix for this cause."""
    kinds = {
        "quantization-compute-dtype": "bnb",
        "mixed-qkv-dtype": "qkv",
        "rope-dtype-mismatch": "rope",
        "sdpa-backend-unavailable": "sdpa",
    }
    found = [kinds[cause]] if cause in kinds else []
    return [*found, *(["loop"] if evidence.has("loop") else [])]


def half_for(evidence: Evidence) -> str:
    """The half-precision dtype for the GPU that the text names; bfloat16 if it names none. Where
    the dtype was checked the GPU is new enough, whatever else is named."""
    checked = "dtype-refused" in evidence.signs
    old = [gpu for gpu in evidence.gpus if any(name in gpu for name in BEFORE_AMPERE)]
    return "float16" if old and len(old) == len(evidence.gpus) and not checked else "bfloat16"


def dtype_keyword(evidence: Evidence) -> "tuple[str, str]":
    """What from_pretrained calls its dtype in the person's Transformers, and for which versions
    that holds: ``dtype`` from 4.56 on, ``torch_dtype`` before, which later ones also take."""
    found = version(evidence.versions.get("transformers"))
    if found and found >= (4, 56):
        return "dtype", "Transformers >=4.56"
    if found:
        return "torch_dtype", "Transformers <4.56"
    return "torch_dtype", say("every version of Transformers; from 4.56 on it is also called dtype")

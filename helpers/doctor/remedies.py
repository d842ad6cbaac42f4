"""Fixes as code for the person's versions, libraries and GPU."""

import re
from typing import Any

from helpers.doctor.data import load
from helpers.doctor.diagnosis import Fix
from helpers.doctor.evidence import Evidence, version
from helpers.doctor.words import say


def remedies(cause: str, evidence: Evidence) -> "tuple[Fix, ...]":
    """The fixes of a cause, best first, without those that the evidence rules out."""
    labels = list(load("fixes.json")["for"].get(cause, ()))
    if cause == "missing-autocast" and (beside(evidence) or evidence.has("loop")):
        labels.sort(key=lambda label: label != "wrap-in-autocast")
    if "c-randn" in evidence.signs:
        labels.sort(key=lambda label: label != "cast-qkv-or-module")
    if evidence.is_on() and not evidence.has("predicts"):
        labels = [label for label in labels if label != "enable-mixed-precision"]
    if cause == "weights-fp32" and evidence.has("meant"):
        labels = [label for label in labels if label == "use-other-attention"] or labels
    return tuple(remedy(label, cause, evidence) for label in labels)


def beside(evidence: Evidence) -> bool:
    """Whether the failing call lies beside the training step."""
    if evidence.has("predicts"):
        return False  # a run of its own, with flags of its own
    return evidence.stage("eval") or evidence.has("outside") or evidence.has("beside")


def remedy(label: str, cause: str, evidence: Evidence) -> Fix:
    """One fix, with lines for this person."""
    entry: dict[str, Any] = load("fixes.json")["fixes"][label]
    codes = entry["code"]
    lines = next((codes[name] for name in _kinds(cause, evidence) if name in codes), None)
    lines = lines or codes["default"]
    half = "float16" if cause == "gpu-too-old" else half_for(evidence)
    flags = load("fixes.json")["halves"][half]
    keyword, known = dtype_keyword(evidence)
    words = {"dtype": keyword, "half": half, "flag": flags["flag"], "transformers": known}
    names_dtype = any("{dtype}" in line for line in lines)
    versions = say(entry["versions"]).format(**words) if names_dtype else say("any version")
    code = "\n".join(map(_commented, lines)).format(**words)
    return Fix(label, code, versions, entry["safety"])


def _commented(line: str) -> str:
    """A line of code with its comment in the person's language."""
    code, mark, comment = line.partition("# ")
    return f"{code}{mark}{say(comment)}"


def _kinds(cause: str, evidence: Evidence) -> "list[str]":
    """The forms of a fix's code that suit this cause and these libraries, best first."""
    kinds = {
        "quantization-compute-dtype": "bnb",
        "mixed-qkv-dtype": "qkv",
        "rope-dtype-mismatch": "rope",
        "sdpa-backend-unavailable": "sdpa",
    }
    found = [kinds[cause]] if cause in kinds else []
    libraries = [name.replace("_", "-") for name in evidence.libraries]
    old = ["old"] if cause == "gpu-too-old" else []
    return [*found, *(["loop"] if evidence.has("loop") else []), *libraries, *old]


def half_for(evidence: Evidence) -> str:
    """The half-precision dtype for the GPU that the text names; bfloat16 if it names none. Where
    the dtype was checked the GPU is new enough, whatever else is named."""
    checked = "dtype-refused" in evidence.signs
    before = re.compile(load("gpus.json")["before_ampere"])
    old = [gpu for gpu in evidence.gpus if before.search(gpu)]
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

"""Fixes as code for the person's versions, libraries and GPU."""

import re
from collections.abc import Iterator
from typing import Any, Optional

from helpers.doctor.data import load, pattern
from helpers.doctor.diagnosis import Fix
from helpers.doctor.evidence import Evidence, version
from helpers.doctor.words import noted, say


def remedies(cause: str, evidence: Evidence, *, cast: bool = False) -> "tuple[Fix, ...]":
    """The fixes of a cause, best first, without those that the evidence rules out.

    Args:
        cause: its label.
        evidence: of the text or the exception.
        cast: whether the model is known to have been cast after it was loaded, also where the text
            does not show it.
    """
    cast = cause == "weights-fp32" and (cast or "c-float-call" in evidence.signs)
    usual = load("fixes.json")["for"].get(cause, ())
    labels = list(dict.fromkeys([*_first(cause, evidence), *usual, *_last(cause, evidence)]))
    moot = {*_moot(cause, evidence, cast=cast)}
    left = [label for label in labels if label not in moot] or labels
    return tuple(remedy(label, cause, evidence, cast=cast) for label in left)


def _first(cause: str, evidence: Evidence) -> Iterator[str]:
    """What comes before the usual fixes of a cause."""
    outside = evidence.left_autocast() or beside(evidence)
    if cause == "missing-autocast" and (outside or _loops_by_hand(evidence)):
        yield "wrap-in-autocast"
    if cause == "inputs-fp32" and "c-randn" in evidence.signs:
        yield "cast-qkv-or-module"
    if cause == "matmul-dtype-mismatch" and "c-kbit" in evidence.signs:
        yield "undo-kbit-upcast"
    if cause in GIVES_WAY and (_quantised_by_itself(evidence) or evidence.has("cpu")):
        yield "use-other-attention"
    if cause == "quantization-compute-dtype" and _returns_float32(evidence):
        yield "cast-qkv-or-module"
    if "bf16-gpu" in evidence.signs and NAMES_HALF.search(evidence.signs["bf16-gpu"].text):
        yield "pass-dtype"


def _last(cause: str, evidence: Evidence) -> Iterator[str]:
    """What comes behind the usual fixes of a cause."""
    if cause == "quantization-compute-dtype" and _returns_float32(evidence):
        yield "upgrade-library"
    if cause == "warning-benign" and {"warn-float32", "warn-no-dtype"} & evidence.signs.keys():
        yield "pass-dtype"  # the warning is harmless under autocast alone


def _moot(cause: str, evidence: Evidence, *, cast: bool) -> Iterator[str]:
    """What the evidence rules out."""
    if (
        cause == "quantization-compute-dtype"
        and _returns_float32(evidence)
        and evidence.has("half")
    ):
        yield "pass-dtype"  # it was passed
    if "vllm" in evidence.libraries:  # it serves, and calls the model itself
        yield from ("wrap-in-autocast", "enable-mixed-precision")
    if evidence.has_only_old_gpus():
        yield "install-flash-attn"
    if evidence.is_on() and not evidence.has("predicts"):
        yield "enable-mixed-precision"
    if cause == "weights-fp32" and evidence.has("meant"):
        yield from ("pass-dtype", "convert-checkpoint", "wrap-in-autocast")
    if cast and not evidence.has("merged"):  # what is stored is not to blame
        yield "convert-checkpoint"


def remedies_of(candidates: "tuple[str, ...]", evidence: Evidence) -> "tuple[Fix, ...]":
    """The best fix of each candidate; those of another that are the same are left out."""
    found: dict[tuple[str, str], Fix] = {}
    for label in candidates:
        for fix in remedies(label, evidence)[:1]:
            found.setdefault((fix.label, fix.code), fix)
    return tuple(found.values())


NAMES_HALF = pattern("float16|dtype=half")
# Without a GPU, or with layers that bring their own dtype, another attention is the way out.
GIVES_WAY = ("quantization-compute-dtype", "cuda-unavailable", "flash-attn-missing")


def beside(evidence: Evidence) -> bool:
    """Whether the failing call lies beside the training step."""
    if evidence.has("predicts"):
        return False  # a run of its own, with flags of its own
    return evidence.stage("eval") or evidence.has("outside") or evidence.has("beside")


def remedy(label: str, cause: str, evidence: Evidence, *, cast: bool = False) -> Fix:
    """One fix, with lines for this person."""
    data = load("fixes.json")
    entry: dict[str, Any] = data["fixes"][label]
    forms = [*(["cast"] if cast else []), *_forms(cause, evidence)]
    form = next((form for form in forms if form in entry["code"]), "default")
    lines = entry["code"][form]
    half = "float16" if cause == "gpu-too-old" else half_for(evidence)
    keyword, known = dtype_keyword(evidence)
    words = {
        "dtype": keyword,
        "half": half,
        "flag": data["halves"][half]["flag"],
        "call": data["calls"][failing_call(evidence)],
        "package": package(cause, evidence),
        "loader": evidence.loader or "AutoModelForCausalLM",
        "encoder": "SentenceTransformer" if _encodes(evidence) else "CrossEncoder",
        "verb": "sft" if evidence.stage("train") else "infer",
    }
    if not any("{dtype}" in line for line in lines):
        versions = say(entry.get("versions", {}).get(form, noted("any version")))
    elif known:
        versions = say("{dtype}= is right for {transformers}").format(
            dtype=keyword, transformers=known
        )
    else:
        versions = say("torch_dtype=, from 4.56 on also dtype=")
    code = "\n".join(map(_commented, lines)).format(**words)
    return Fix(label, code, versions, entry["safety"], form, cause)


def _loops_by_hand(evidence: Evidence) -> bool:
    """Whether the training loop is the person's own, with autocast or without."""
    return evidence.has("loop") or evidence.has("own_loop")


def _encodes(evidence: Evidence) -> bool:
    return any(call.name.endswith("sentencetransformer") for call in evidence.calls)


def _commented(line: str) -> str:
    """A line of code with its comment in the person's language."""
    code, mark, comment = line.partition("# ")
    return f"{code}{mark}{say(comment)}"


def _forms(cause: str, evidence: Evidence) -> Iterator[str]:
    """The forms of a fix's code that suit this cause and these libraries, best first."""
    if cause == "quantization-compute-dtype" and not _quantised_by_itself(evidence):
        yield "bnb"
    differ = evidence.signs["sdpa-differ"].text if "sdpa-differ" in evidence.signs else ""
    if cause == "mixed-qkv-dtype" and WIDE_Q.search(differ):
        yield "wide-q"
    kinds = {
        "mixed-qkv-dtype": "qkv",
        "rope-dtype-mismatch": "rope",
        "sdpa-backend-unavailable": "sdpa",
        "matmul-dtype-mismatch": "matmul",
        "gpu-arch-not-built": "arch",
    }
    if cause in kinds:
        yield kinds[cause]
    if _loops_by_hand(evidence):
        yield "loop"
    if cause == "inputs-fp32" and evidence.has("embeds"):
        yield "embeds"
    if any(call.name.endswith("pipeline") for call in evidence.calls) and not evidence.loader:
        yield "pipeline"
    if evidence.has("serves"):
        yield "vllm-serve"
    for name in evidence.libraries:
        if name == "trl" and (0,) < version(evidence.versions.get("trl")) < (0, 9):
            continue  # before SFTConfig
        if name != "accelerate" or failing_call(evidence) != "evaluate":  # a Trainer has its own
            yield name.replace("_", "-")
    if "diffusers" in _parts(evidence.caller()):
        yield "diffusers"
    if is_own_attention(evidence):
        yield "own"
    if cause == "gpu-too-old" or evidence.has_only_old_gpus():
        yield "old"
    if not package(cause, evidence):
        yield "unknown"


WIDE_Q = pattern(r"query\.dtype: (?:struct )?float")


def _quantised_by_itself(evidence: Evidence) -> bool:
    """Whether the checkpoint is quantised, and not by bitsandbytes at load time."""
    other = {"c-4bit", "c-load-float32"}
    whole = {"c-fp8", "c-fp8-cache"} & evidence.signs.keys()
    return bool(whole) and not other & evidence.signs.keys()


def _returns_float32(evidence: Evidence) -> bool:
    """Whether layers of float8 return float32 of their own, whatever was asked for."""
    half = evidence.has("half") or any(one.what == "turned" for one in evidence.sentences)
    return half and "c-float8" in evidence.signs and "c-compute-float" not in evidence.signs


def failing_call(evidence: Evidence) -> str:
    """What the person's call that failed looks like: a key of calls in fixes.json."""
    names = ("f-evaluate", "f-unwrap", "p-only-eval", "p-eval-code")
    told = " ".join(evidence.signs[name].text for name in names if name in evidence.signs).lower()
    functions = {function for _, function in evidence.frames}
    in_callback = "call_event" in functions or "callback" in told
    if not in_callback:
        for file, function in evidence.frames:
            if re.search(r"transformers/trainer\w*\.py$", file) and function in EVALUATES:
                return "evaluate"
    if "generate" in functions or re.search(r"generat|生成", told):
        return "unwrapped" if "accelerate" in evidence.libraries else "generate"
    if beside(evidence):
        told_of = re.search(r"evaluat|\beval\b|评估|验证", told) and not in_callback
        return "evaluate" if told_of and "f-trainer" in evidence.signs else "forward"
    return "loss" if evidence.has("loop") or evidence.stage("train") else "forward"


EVALUATES = {"evaluate", "predict", "evaluation_loop", "prediction_loop", "prediction_step"}


def _parts(file: str) -> "list[str]":
    return file.lower().split("/")[:-1]


def is_own_attention(evidence: Evidence) -> bool:
    """Whether the attention came with the checkpoint, or is the person's own."""
    if evidence.has("remote") or evidence.has("own"):
        return True
    file = evidence.caller()
    return file.endswith(".py") and _library(file) is None and "/lib/python3" not in file


def package(cause: str, evidence: Evidence) -> str:
    """What pip calls the library that made the failing call; empty if nothing shows which."""
    if cause == "arch-no-fa2":
        return "transformers"  # the message is its own
    file = evidence.caller()
    if not file:
        frames = [file for file, _ in evidence.frames if not file.startswith("torch/")]
        file = frames[-1] if frames else ""
    if file:
        return _library(file) or ""
    if evidence.has("remote") or evidence.has("own"):
        return ""
    packages: dict[str, str] = load("fixes.json")["packages"]
    attend = (name for name in evidence.libraries if name not in ("accelerate", "trl"))
    return next((packages[name] for name in attend), "")


def _library(file: str) -> "Optional[str]":
    """What pip calls the library that a file belongs to; None if it is none of those known."""
    packages: dict[str, str] = load("fixes.json")["packages"]
    return next((packages[part] for part in reversed(_parts(file)) if part in packages), None)


def half_for(evidence: Evidence) -> str:
    """The half-precision dtype for the GPU that the text names, else the one that the error names,
    else the one that the person's code asks for; bfloat16 if there is none."""
    if evidence.has_only_old_gpus():
        return "float16"
    errors = [sign.text for sign in evidence.signs.values() if sign.kind == "error"]
    asked = [evidence.signs[name].text for name in ASKS if name in evidence.signs]
    asked += [call.text for call in evidence.calls]
    for texts in (errors, asked):
        text = SWITCHED_OFF.sub("", "\n".join(texts).lower())
        named = {"bfloat16" if match[0] == "b" else "float16" for match in HALF.findall(text)}
        if len(named) == 1:
            return named.pop()
    return "bfloat16"


ASKS = ("c-on", "c-load-half", "c-compute-half", "c-autocast-call", "warn-rescued")
HALF = pattern(r"b?f(?:p|loat)?16|(?<![a-z])half(?:tensor)?(?![a-z])")
SWITCHED_OFF = pattern(
    r"(?:bf16|fp16)['\"]?\s*[=: ]\s*(?:\{\s*['\"]enabled['\"]\s*[=:]\s*)?['\"]?"
    r"(?:false|null|none|no\b|0\b)"
)


def dtype_keyword(evidence: Evidence) -> "tuple[str, str]":
    """What from_pretrained calls its dtype in the person's Transformers, and for which versions
    that holds: ``dtype`` from 4.56 on, ``torch_dtype`` before, which later ones also take; no
    versions where the text names none."""
    found = version(evidence.versions.get("transformers"))
    if found and found >= (4, 56):
        return "dtype", "Transformers >=4.56"
    if found:
        return "torch_dtype", "Transformers <4.56"
    return "torch_dtype", ""

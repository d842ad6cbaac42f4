"""From what the rules say to the causes that are left: the sum decides.

A label with enough points, and enough more than the next (DECIDES), is the cause; else the labels
are candidates in the order of their points. What rules out what was read in flash-attn 2's source:
its checks for NVIDIA's GPUs run in the order GPU, dtype of q, k and v like q, device, last
dimension, head size (csrc/flash_attn/flash_api.cpp), so the headline error proves that the package
loaded and that the GPU is new enough.
"""

import re
from typing import NamedTuple, Optional

from helpers.doctor.data import pattern
from helpers.doctor.evidence import Evidence, Sign, guarded
from helpers.doctor.rules import CHECKED, FLOAT32, FLOAT32_OF, POINTS, RULES, Rule, Says
from helpers.doctor.statements import ELSEWHERE
from helpers.doctor.words import noted

LEAD = 2
# What decides: so many points, and so many more than the next label has.
DECIDES = ((POINTS, LEAD), (POINTS - 1, LEAD + 1))
BEFORE_DTYPE = (
    "gpu-too-old",
    "flash-attn-missing",
    "flash-attn-abi-mismatch",
    "cuda-unavailable",
    "arch-no-fa2",
)
LOADED = ("flash-attn-missing", "flash-attn-abi-mismatch")
REFUSED = {"headline": BEFORE_DTYPE, "headline-told": ()}  # what a refused q proves; else LOADED
# What another error proves besides its cause: it comes from inside of the package.
PROVEN: "dict[str, tuple[str, ...]]" = {
    "mixed-qkv-dtype": LOADED,
    "rope-dtype-mismatch": LOADED,
    "gpu-too-old": LOADED,
    "head-dim": ("gpu-too-old", *LOADED),
    "noncontiguous-input": ("gpu-too-old", *LOADED),
    "flash-attn-abi-mismatch": ("flash-attn-missing",),
    "gpu-arch-not-built": ("flash-attn-missing",),
}
# What a sign that is shown has.
SPEAKS = {"for", "against", "on", "off", "removed", "quantised", "lora", "checked"}


class Verdict(NamedTuple):
    """The causes that the evidence leaves.

    Attributes:
        cause, certain, candidates, ruled_out: as in a Diagnosis.
        is_failure: whether something failed.
        kind: "ours", "warning", "foreign" (what it is is known), "other" or "nothing".
        used: the signs that decided, first to last.
        said: what the rules said of the labels that are left.
    """

    cause: "Optional[str]"
    certain: bool
    candidates: "tuple[str, ...]"
    ruled_out: "tuple[str, ...]"
    is_failure: bool
    kind: str
    used: "tuple[Sign, ...]"
    said: "tuple[Says, ...]" = ()


def judge(evidence: Evidence) -> Verdict:
    """The verdict on a text."""
    signs = sorted(evidence.signs.values(), key=lambda sign: sign.at)
    foreign = [sign for sign in signs if sign.kind == "foreign"]
    harmless = [sign for sign in signs if sign.entry.get("harmless")]
    ended = [sign for sign in signs if sign.entry.get("ended")]
    others = [line for line in evidence.raised if not line.startswith((*OURS, *LAUNCHERS))]
    shown = foreign or harmless or others
    errors = _of_today(evidence, signs, is_foreign=bool(foreign))
    if shown and all(error.kind == "prose" for error in errors):
        errors = []  # what is told of is not what happened here
    if not errors and not shown:
        errors = [*(_cut(evidence) or _described(evidence))]
        signs = [*signs, *errors]
    if errors:
        return _of_errors(evidence, errors, signs)
    if evidence.has("checked") and not _is_as_meant(evidence):  # who was asked to run it failed
        return _of_float32(evidence, evidence.signs["o-check"], signs)
    if foreign:
        return Verdict(None, False, (), (), True, "foreign", tuple(foreign))
    certain = [s for s in signs if s.kind in ("fact", "log") and _best(s) >= POINTS]
    if certain:
        label = _label(certain[-1])
        return Verdict(label, True, (label,), (), True, "ours", (certain[-1],))
    return _of_warnings(evidence, harmless, ended)


def _is_as_meant(evidence: Evidence) -> bool:
    """Whether the lines to run print what mixed precision is: float32 weights, under autocast."""
    printed = CHECKED.search(evidence.signs["o-check"].text)
    return printed is not None and printed[1] == printed[2] and printed[6].lower() == "true"


def _of_today(evidence: Evidence, signs: "list[Sign]", *, is_foreign: bool) -> "list[Sign]":
    """The errors that are not asked about in general, nor of another day beside another one."""
    errors = [sign for sign in signs if {"cause", "candidates"} & sign.entry.keys()]
    errors = [sign for sign in errors if sign.raised or not CAUGHT.search(sign.text)]
    if not evidence.failed:
        asked = [s for s in errors if s.entry.get("rank", 0) <= 0 and ASKED.search(s.text)]
        errors = [sign for sign in errors if sign not in asked or sign.raised]
    if "warn-fallback" in evidence.signs:  # it goes on without the package
        errors = [s for s in errors if s.id != "not-installed" or s.raised]
    if is_foreign:
        past = (s.text for s in errors if ELSEWHERE.search(s.text) and not TODAY.search(s.text))
        told = {*past, *(s.text for s in errors if SOLVED.search(s.text))}
        errors = [sign for sign in errors if sign.text not in told]
    return errors


def _of_errors(evidence: Evidence, errors: "list[Sign]", signs: "list[Sign]") -> Verdict:
    """The error that says most: by its rank, and of two of one rank the last."""
    errors = [s for s in errors if s.kind != "prose" and "cause" in s.entry] or errors
    errors = [sign for sign in errors if _was_raised(sign, evidence)] or errors
    old = [sign for sign in errors if sign.entry.get("cause") == "gpu-too-old"]
    if old and evidence.has_only_old_gpus():  # what was tried after it does not matter
        errors = old
    error = max(errors, key=lambda sign: (sign.entry.get("rank", 0), sign.last))
    if _is_bfloat16_on_old_gpu(error, evidence):
        label = "gpu-too-old"
        return Verdict(label, True, (label,), LOADED, True, "ours", (error,))
    if error.entry.get("cause", "").startswith("headline"):
        return _of_float32(evidence, error, signs)
    return _of_neighbour(evidence, error, signs)


def _of_warnings(evidence: Evidence, harmless: "list[Sign]", ended: "list[Sign]") -> Verdict:
    """Where no error is in the text: warnings, which mostly harm nothing."""
    is_float32 = any(_best(sign) > 1 for sign in harmless)
    if evidence.raised or (ended and not is_float32):
        return Verdict(None, False, (), (), True, "other", (*harmless, *ended))
    left: tuple[str, ...] = ()
    broken_off = bool(evidence.frames) and not evidence.raised
    is_down = evidence.has("down") or bool(ended) or broken_off
    wanted = evidence.has("wanted") or evidence.has("installed")
    if wanted and {"warn-fallback", "warn-qwen", "warn-phi"} & evidence.signs.keys():
        left = ("flash-attn-missing", "flash-attn-abi-mismatch", "cuda-unavailable", "gpu-too-old")
        is_down = False
    elif is_float32 and is_down:
        left = ("weights-fp32", "missing-autocast", "warning-benign")
    elif is_float32 and evidence.has("unrun"):
        left = ("warning-benign", "weights-fp32", "missing-autocast")
    if left:
        return Verdict(None, False, left, (), is_down, "ours", tuple(harmless))
    slow = [sign for sign in harmless if _best(sign) > POINTS]
    if slow:  # it says what is wrong, and that it only takes time
        label = _label(slow[-1])
        return Verdict(label, True, (label,), (), False, "ours", tuple(slow))
    if harmless:
        label = "warning-benign"
        return Verdict(label, True, (label,), (), False, "warning", tuple(harmless))
    return Verdict(None, False, (), (), evidence.failed, "nothing", ())


def _was_raised(sign: Sign, evidence: Evidence) -> bool:
    """Whether an error was raised here, and is not one that the person has read of elsewhere; what
    explains other errors, as a missing symbol does, stands in their texts."""
    explains = sign.entry.get("rank", 0) >= 3
    return explains or sign.raised or any(sign.text[:100] == line[:100] for line in evidence.raised)


def _is_bfloat16_on_old_gpu(error: Sign, evidence: Evidence) -> bool:
    """Whether FlashAttention 1, which took bfloat16 from Ampere on and float16 on Turing, refused
    bfloat16 on an older GPU."""
    if error.id != "dtype-refused-old" or not evidence.gpus_of("before_ampere"):
        return False
    asked = [sign.text for sign in evidence.signs.values() if sign.entry.get("on")]
    asked += [one.text for one in evidence.sentences if (one.subject, one.what) == ("q", "half")]
    return any(re.search("bf16|bfloat16", text.lower()) for text in asked)


# What a program says that goes on with another attention.
CAUGHT = pattern(
    r"\bfailed, (?:using|falling back)|consider installing for better"
    r"|\bfall(?:ing|s)? ?back(?:ing)? to\b|must inference with fp32"
    r"|\bwarnings? (?:that|about|saying)\b",
    re.I,
)
SWALLOWED = pattern(r"not found in your environment|flash_?att\w* is not installed")
TODAY = pattern(r"今天|现在|\btoday\b|\bnow\b", re.I)
SOLVED = pattern(r"\b(?:solved|is gone|went away|is fixed)\b|已经?解决|解决了", re.I)
# What is asked or told of FlashAttention in general.
ASKED = pattern(
    r"\b(?:docs?|documentation|readme|paper)\b[^\n]{0,20}\b(?:says?|states?|mentions?)\b"
    r"|(?:文档|官方|论文)[^\n]{0,6}(?:说|写)"
    r"|^\W*(?:does|do|is|are|can|could|should|will)\b[^\n]*\?\W*$"
    r"|(?:支持|接受|只能)[^\n,。]{0,30}吗\W*$",
    re.I,
)
OURS = ("AssertionError", "RuntimeError")  # what the checks of flash-attn raise
# What launchers say of a program that failed for a reason of its own.
LAUNCHERS = ("CalledProcessError", "ChildFailedError", "subprocess.", "torch.distributed.elastic")


def _described(evidence: Evidence) -> "tuple[Sign, ...]":
    """What is said to become float32 before FlashAttention, as a sign of the error that follows."""
    told = [one for one in evidence.sentences if one.what in ("float32", "turned")]
    told = [one for one in told if one.subject in (*FLOAT32_OF, "q") and one.subject != "weights"]
    entry = {"cause": "headline-told", "means": noted("FlashAttention refuses what is float32.")}
    fed = evidence.says("float32", "input") and evidence.says("half", "weights")
    if not told or not (evidence.has("about") or fed):
        return ()
    return (Sign("p-described", "prose", told[0].text, 0, 0, entry),)


def _cut(evidence: Evidence) -> "tuple[Sign, ...]":
    """A traceback that breaks off inside of flash_attn, or where it is called, as a sign."""
    calls = evidence.frames[-1:] and "_flash_attention_forward" in evidence.frames[-1][1]
    if not (evidence.reaches_flash_attn() or calls):
        return ()
    entry = {
        "cause": "headline-cut",
        "means": noted(
            "The traceback breaks off inside of flash_attn: its last line would say which of the"
            " kernel's checks failed. Here it is taken for the one of the dtype."
        ),
    }
    return (Sign("f-cut", "frame", evidence.frames[-1][0], 0, 0, entry),)


def _best(sign: Sign) -> int:
    points: dict[str, int] = sign.entry.get("for", {"": 0})
    return max(points.values())


def _label(sign: Sign) -> str:
    """What a sign speaks for most."""
    points: dict[str, int] = sign.entry["for"]
    return max(points, key=points.__getitem__)


def _gpu(name: str, means: str) -> Sign:
    """A GPU that the text names, as a sign."""
    return Sign("gpu", "prose", name, 0, 0, {"means": means})


def _of_neighbour(evidence: Evidence, error: Sign, signs: "list[Sign]") -> Verdict:
    """An error whose message has one cause, unless something else in the text speaks against it."""
    left, against = _doubted(error, evidence)
    if left:
        is_failure = not error.entry.get("harmless")
        return Verdict(None, False, left, (), is_failure, "ours", (error, *against))
    label = error.entry["cause"]
    used = [error]
    if label in ("flash-attn-missing", "model-on-cpu"):
        for sign in signs:  # both are said also where there is no GPU
            if sign.entry.get("for", {}).get("cuda-unavailable", 0) >= 3:
                label, used = "cuda-unavailable", [error, sign]
    if label == "gpu-too-old" and evidence.gpus_of("after_hopper"):
        label = "gpu-arch-not-built"
        means = noted("flash-attn up to 2.7.2 says so to every GPU that it does not know.")
        used = [error, _gpu(evidence.gpus_of("after_hopper")[0], means)]
    out = tuple(x for x in PROVEN.get(label, ()) if x != label)
    return Verdict(label, True, (label,), out, True, "ours", tuple(used))


def _doubted(error: Sign, evidence: Evidence) -> "tuple[tuple[str, ...], tuple[Sign, ...]]":
    """The causes that are left where a message is cut off, or where something in the text says that
    it cannot be; and what says so."""
    fits = evidence.gpus and not evidence.gpus_of("before_ampere", "after_hopper")
    if "candidates" in error.entry:
        left = (label for label in error.entry["candidates"] if label != "gpu-too-old" or not fits)
        return tuple(left), ()
    label = error.entry["cause"]
    if error.id == "ampere" and fits:
        means = noted("FlashAttention 2 supports this GPU, so the message does not fit it.")
        return (label, "flash-attn-abi-mismatch"), (_gpu(evidence.gpus[0], means),)
    # Older Transformers say so of every package whose import fails, whatever the reason.
    swallowed = SWALLOWED.search(error.text.lower())
    if swallowed and evidence.has("installed") and not evidence.has("elsewhere"):
        there = tuple(sign for sign in evidence.signs.values() if sign.entry.get("installed"))
        return ("flash-attn-abi-mismatch", label), there
    return (), ()


def _of_float32(evidence: Evidence, error: Sign, signs: "list[Sign]") -> Verdict:
    """The headline error: q is not half, and the rest has to say why."""
    if evidence.has("halves") and "c-randn" not in evidence.signs:
        label = "flash-attn-abi-mismatch"  # half was given, so the binary reads dtypes wrongly
        halves = (error, *(one for one in signs if one.entry.get("halves")))
        return Verdict(label, True, (label,), BEFORE_DTYPE[:2], True, "ours", halves)
    said = [one for rule in RULES for one in guarded([], _all, rule, evidence)]
    ruled_out = {one.label for one in said if one.points == 0}
    points = _points(said, ruled_out, evidence)
    order = _usual(evidence)
    ranked = sorted(points, key=lambda label: (-points[label], order.index(label)))
    odd = _odd_gpu(error, evidence)
    proven = REFUSED.get(error.entry.get("cause", ""), LOADED)
    proven = () if evidence.stands_in() else LOADED if odd or evidence.has("not_nvidia") else proven
    out = (*proven, *(label for label in FLOAT32 if label in ruled_out))
    used = (*(one for one in signs if one is error or SPEAKS & one.entry.keys()), *odd)
    if _decides(points, ranked) and error.id != "f-cut":
        return Verdict(ranked[0], True, (ranked[0],), out, True, "ours", used, tuple(said))
    likely = [label for label in ranked if points[label] > 0]
    usual = [label for label in order if label in points and points[label] >= 0]
    enough = evidence.has("checked") and len(likely) > 1  # what is usual is known not to be
    left = tuple(likely if enough else dict.fromkeys([*likely, *usual]))[: max(3, len(likely))]
    if len(left) < 2:
        left = tuple(dict.fromkeys([*left, *ranked]))[:2]
    return Verdict(None, False, left, out, True, "ours", used, tuple(said))


def _points(said: "list[Says]", ruled_out: "set[str]", evidence: Evidence) -> "dict[str, int]":
    """The points of each label that is not ruled out."""
    points = {label: 0 for label in FLOAT32 if label not in ruled_out}
    for one in said:
        if one.label in points:
            points[one.label] += one.points
    meant = points.get("missing-autocast", 0) >= POINTS and points.get("weights-fp32", 0) > 0
    if meant and evidence.has("named"):  # the model was to be half, and nobody said so
        most = max(points["weights-fp32"] - LEAD, 0)
        points["missing-autocast"] = min(points["missing-autocast"], most)
    elif meant and not evidence.says("works with", "load"):
        # Weights for mixed precision are float32 by intention.
        less = points["weights-fp32"] - 3
        if evidence.stage("train"):
            less = min(less, points["missing-autocast"] - LEAD)
        points["weights-fp32"] = max(less, 0)
    return points


def _decides(points: "dict[str, int]", ranked: "list[str]") -> bool:
    """Whether the first label has enough points, and enough more than the second."""
    first, second = ([points[label] for label in ranked] + [0, 0])[:2]
    return any(first >= most and first - second >= more for most, more in DECIDES)


def _odd_gpu(error: Sign, evidence: Evidence) -> "tuple[Sign, ...]":
    """A GPU that cannot have raised the message, as a sign."""
    if not evidence.has_only_old_gpus() or error.id != "dtype-refused":
        return ()
    means = noted(
        "FlashAttention 2 does not run on this GPU, and asks for the GPU before the dtype: this"
        " message came from another GPU, or from another kernel."
    )
    return (_gpu(evidence.gpus[0], means),)


def _all(rule: Rule, evidence: Evidence) -> "list[Says]":
    return list(rule(evidence))


def _usual(evidence: Evidence) -> "list[str]":
    """The labels in the order in which they are usual at this stage."""
    quantised = evidence.is_quantised()
    first = []
    if evidence.stage("train") or evidence.stage("eval"):
        first += ["missing-autocast"]
        first += ["kbit-prep", "quantization-compute-dtype"] if quantised else []
        first += ["adapter-fp32"] if evidence.has("lora") else []
        if evidence.has("on"):
            first = [*first[1:], "upcast-module", "missing-autocast"]
    elif quantised:
        first += ["quantization-compute-dtype"]
    first += ["weights-fp32", "missing-autocast", "upcast-module", "adapter-fp32", "inputs-fp32"]
    return list(dict.fromkeys([*first, *FLOAT32]))

"""What the evidence says of causes: every rule speaks for itself.

A rule gives labels points or rules them out, and says why; verdict.py adds up. The points are a
scale, set by what people reported and found, not measured: 1 is usual beside a cause, 2 speaks for
it, 3 decides where nothing speaks for another, 4 (POINTS) is a line that states it, and twice that
is what was tried or measured. Fewer than 0 speak against, 0 rules out.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from helpers.doctor.data import pattern
from helpers.doctor.evidence import Evidence, version
from helpers.doctor.words import noted

POINTS = 4
FLOAT32 = (
    "weights-fp32",
    "missing-autocast",
    "upcast-module",
    "kbit-prep",
    "adapter-fp32",
    "quantization-compute-dtype",
    "inputs-fp32",
    "model-on-cpu",
)


class Says(NamedTuple):
    """What a rule makes of the evidence."""

    label: str
    points: int  # 0: ruled out
    why: str


Rule = Callable[[Evidence], Iterator[Says]]


def _signs(evidence: Evidence) -> Iterator[Says]:
    """What the signs say by themselves."""
    for sign in evidence.signs.values():
        speaks = sign.entry.get("for", {})
        for other, instead in sign.entry.get("given", {}).items():
            speaks = instead if evidence.shows(other) else speaks
        for label, points in speaks.items():
            yield Says(label, points, sign.entry["means"])
        if not any(evidence.shows(other) for other in sign.entry.get("unless", ())):
            for label in sign.entry.get("against", ()):
                yield Says(label, 0, sign.entry["means"])


def _checked(evidence: Evidence) -> Iterator[Says]:
    """What the lines print that the doctor asks for (checks.json); twice what decides, because it
    was measured inside of the call."""
    printed = CHECKED.search(evidence.signs["o-check"].text) if evidence.has("checked") else None
    if printed is None:
        return
    wide, total, adapters, few, all_few = (int(number) for number in printed.groups()[:5])
    autocast, training = (word.lower() == "true" for word in printed.groups()[5:7])
    why = evidence.signs["o-check"].entry["means"]
    for label in ("weights-fp32", "missing-autocast", "kbit-prep", "adapter-fp32"):
        if wide == 0 or (autocast and label == "missing-autocast"):
            yield Says(label, 0, why)
    if wide == 0:
        likely = "quantization-compute-dtype" if evidence.has("quantised") else "upcast-module"
        given = printed[8].lower() == "torch.float32" or evidence.has("embeds")
        yield Says("inputs-fp32" if given else likely, 2 * POINTS, why)
    elif wide == adapters:  # PEFT keeps them so, and casts back what they return
        yield Says("weights-fp32", 0, why)
        yield Says("kbit-prep", 0, why)
        yield Says("missing-autocast", 0, why)
        yield Says("adapter-fp32", 3, why)
        yield Says("upcast-module", 2, why)
    elif wide == adapters + few:  # all norms are a preparation, one is a choice of the model
        yield Says("kbit-prep" if few == all_few else "upcast-module", 2 * POINTS, why)
        yield Says("weights-fp32", 0, why)
    elif wide < total:
        yield Says("weights-fp32", 2, why)
        yield Says("upcast-module", 2, why)
        yield Says("missing-autocast", 0, why)
    elif autocast:
        yield Says("upcast-module", 2 * POINTS, why)
    elif "c-kbit" in evidence.signs:
        yield Says("kbit-prep", 2 * POINTS, why)
    elif training or evidence.is_on() or evidence.stage("train") or evidence.stage("eval"):
        yield Says("missing-autocast", 2 * POINTS, why)
    else:
        yield Says("weights-fp32", 2 * POINTS, why)


CHECKED = pattern(
    r"dtype-doctor: (\d+) of (\d+) weights float32, (\d+) in adapters, (\d+) of (\d+) in norms and"
    r" embeddings, autocast (true|false) training (true|false) arrives (\S+)",
    re.I,
)


def _mixed_precision_on(evidence: Evidence) -> Iterator[Says]:
    """Where mixed precision is on, only a call beside the training step lies outside autocast."""
    if evidence.has("checked"):
        return  # it was measured
    why = noted("Mixed precision is on, and nothing says that the call lies outside of it.")
    if evidence.has("removed") and "c-bf16-in-load" not in evidence.signs:
        why = evidence.signs["c-removed"].entry["means"]
        yield Says("missing-autocast", POINTS if evidence.stage("train") else 2, why)
    elif evidence.is_on() and not (
        evidence.stage("eval")
        or evidence.has("loop")
        or evidence.has("outside")
        or evidence.left_autocast()
    ):
        yield Says("missing-autocast", 0, why)
    elif evidence.has("off") and not evidence.has("on"):
        called = evidence.has("infers") and not (evidence.stage("train") or evidence.stage("eval"))
        why = noted("The flags for mixed precision are off.")
        yield Says("missing-autocast", 2 if called else POINTS, why)


def _in_autocast(evidence: Evidence) -> bool:
    """Whether the frames run through autocast."""
    return "f-autocast" in evidence.signs or "f-accelerate" in evidence.signs


def _launch_without_flag(evidence: Evidence) -> Iterator[Says]:
    """A launch command that is there to its end, without a flag for mixed precision."""
    for call in evidence.calls:
        shown = evidence.has("on") and not evidence.has("removed")
        if shown and not re.search(r"do_predict: true", call.text):
            continue  # the flag may stand in what is not shown
        if re.match(r"swift (?:sft|pt)\b(?!.{0,2000}float32)", call.text, re.S):
            continue  # takes its precision from the checkpoint's dtype
        if call.name == "yaml" or (call.name == "command" and _trains(call.text)):
            # accelerate's configuration may ask for it, unless these are the flags of a Trainer.
            elsewhere = "accelerate launch" in call.text and not re.search(TRAINERS, call.text)
            points = POINTS if call.whole and not elsewhere else 1
            yield Says("missing-autocast", points, noted("The launch asks for no mixed precision."))
            return
        if call.name.endswith(TRAINER) and "bf16" not in call.text and "fp16" not in call.text:
            points = POINTS if call.whole else 1
            yield Says(
                "missing-autocast", points, noted("The trainer is asked for no mixed precision.")
            )
            return


TRAINERS = r"--(?:do_train|per_device_train_batch_size|finetuning_type)\b"
TRAINER = ("trainingarguments", "sftconfig", "dpoconfig", "grpoconfig", "trainingargs")


def _trains(command: str) -> bool:
    return any(
        word in command
        for word in (
            "train",
            "sft",
            "dpo",
            "finetun",
            "fine-tun",
            " pt ",
            "learning_rate",
            "epochs",
        )
    ) and not any(word in command for word in ("do_predict", "inference", "web_demo"))


def _own_loop(evidence: Evidence) -> Iterator[Says]:
    """A training loop that is there, and in which nothing switches autocast on."""
    precise = evidence.has("on") or evidence.has("loop") or evidence.libraries
    if evidence.has("own_loop") and not (precise or evidence.has("half")):
        yield Says("missing-autocast", POINTS, noted("No autocast is in the training loop."))


def _outside_autocast(evidence: Evidence) -> Iterator[Says]:
    """Training that works, and a call beside it that fails."""
    if evidence.has("outside") and evidence.stage("train"):
        yield Says(
            "missing-autocast", POINTS, noted("Training works, and a call beside it does not.")
        )
    if evidence.has("loop") and (evidence.stage("eval") or evidence.has("beside")):
        yield Says(
            "missing-autocast", POINTS, noted("The loop uses autocast, and this call is beside it.")
        )


def _in_training(evidence: Evidence) -> bool:
    """Whether training is what fails, or a call beside it, and not what was trained before."""
    near = evidence.stage("eval") or evidence.has("outside") or evidence.has("own_loop")
    near = near or evidence.has("on") or evidence.has("loop") or "f-trainer" in evidence.signs
    return evidence.stage("train") and (near or not evidence.has("infers"))


OTHERS = (  # that have a from_pretrained, too
    "tokenizer",
    "processor",
    "config",
    "peftmodel",
    "peftconfig",
    "lora",
    "dataset",
    "generationconfig",
)
WRAPPERS = (
    "crossencoder",
    "sentencetransformer",
    "huggingfaceembeddings",
    "flagreranker",
    "flagmodel",
    "pipeline",
)


def _loads(evidence: Evidence) -> Iterator[Says]:
    """Loads that are there to their end and name no dtype, or half precision."""
    half = evidence.has("half")
    by_name = evidence.has("named") and not any(
        call.name.endswith(TRAINER) and "dtype" in call.text for call in evidence.calls
    )
    if by_name:
        why = noted("The trainer loads the model by its name, and is given no dtype for it.")
        whole = all(call.whole for call in evidence.calls if call.name.endswith(TRAINER))
        yield Says("weights-fp32", 2 * POINTS if whole else 1, why)
        return
    for call in evidence.calls:
        loads = call.name.endswith(("from_pretrained", "from_config")) and not any(
            word in call.name.rpartition(".")[0].replace("autopeft", "auto") for word in OTHERS
        )
        if not loads and not call.name.endswith(WRAPPERS):
            continue
        half = half or None is not re.search(
            r"dtype['\"]?\s*[=:]\s*['\"]?(?:b?float16|bf16|fp16|half)", call.text
        )
        if not call.whole or any(word in call.text for word in NAMED):
            continue
        points = 2 if _in_training(evidence) and not evidence.has("off") else POINTS
        follows = version(evidence.versions.get("transformers")) >= (5,)  # the checkpoint's dtype
        if follows or (evidence.has("on") and evidence.stage("train")):
            points = 1
        yield Says("weights-fp32", points, noted("A model is loaded without a dtype."))
        return
    half = half and not evidence.says("works with", "load")
    half = half and not evidence.says("float32", "weights")
    if half and not FLOAT32_SEEN & evidence.signs.keys():
        yield Says("weights-fp32", -3, noted("Half precision was asked for at load time."))


# What is float32 whatever a load asked for.
FLOAT32_SEEN = {"c-load-float32", "c-float-call", "warn-float32", "o-all-float32"}
# Others speak of these.
NAMED = (
    "dtype",
    "quantization_config",
    "load_in",
    "bf16",
    "fp16",
    ".half(",
    "float16(",
    "float16)",
)


# What a sentence that calls something float32 speaks for.
FLOAT32_OF = {
    "norm": "upcast-module",
    "rope": "upcast-module",
    "module": "upcast-module",
    "input": "inputs-fp32",
    "lora": "adapter-fp32",
    "dora": "adapter-fp32",
    "weights": "weights-fp32",
    "compute": "quantization-compute-dtype",
    "fp8": "quantization-compute-dtype",
    "kbit": "kbit-prep",
}
# What works once this is given has this cause.
CURED = {
    "flag": "missing-autocast",
    "autocast": "missing-autocast",
    "load": "weights-fp32",
    "compute": "quantization-compute-dtype",
    "input": "inputs-fp32",
    "lora": "adapter-fp32",
    "norm": "upcast-module",
    "q": "upcast-module",
}
# What works where this is left out, or fails only with it, has this cause.
BLAMED = {
    "lora": "adapter-fp32",
    "dora": "adapter-fp32",
    "norm": "upcast-module",
    "rope": "upcast-module",
    "module": "upcast-module",
    "kbit": "kbit-prep",
    "fp8": "quantization-compute-dtype",
    "autocast": "upcast-module",
}

MERGED = pattern(r"\bmerg(?:e|ed|ing)\b|合并")


def _said_float32(evidence: Evidence) -> Iterator[Says]:
    """What the person says of dtypes."""
    for one in dict.fromkeys(evidence.sentences):
        if one.subject == "kbit" and "c-kbit" in evidence.signs:
            continue  # the same fact, seen as code
        if one.what in ("float32", "turned") and MERGED.search(one.text):
            yield Says("weights-fp32", POINTS, one.text)
        elif one.what == "float32" and one.subject in FLOAT32_OF:
            label = _whose(one.subject, one.text, evidence)
            if label == "weights-fp32" and "c-kbit" in evidence.signs and evidence.has("half"):
                label = "kbit-prep"  # they were half when they were loaded
            if label == "weights-fp32" and "c-load-float32" in evidence.signs:
                continue  # the same fact, seen as code
            yield Says(label, POINTS if label != "weights-fp32" else 3, one.text)
        elif one.what == "turned" and one.subject in ("norm", "rope", "module", "q"):
            yield Says("upcast-module", POINTS, one.text)
        elif one.what == "all half" and one.subject == "weights":
            yield Says("weights-fp32", -4, one.text)


def _whose(subject: str, text: str, evidence: Evidence) -> str:
    """The cause of which a sentence speaks that calls a subject float32."""
    quantised = evidence.is_quantised()
    if subject == "weights" and {"c-float8", "c-fp8"} & evidence.signs.keys():
        return "quantization-compute-dtype"  # it speaks of the scales, or of what they make
    part = re.search(r"encoders?\b|towers?\b|proj\w*", text.lower())
    named = re.search(r"(?<!bnb_4bit_)compute[_ ]dtype", text)
    if subject == "weights" and evidence.has("embeds") and part:
        return "inputs-fp32"  # what comes out of it is what the model gets
    if subject == "compute" and named and not quantised:
        return "weights-fp32"  # what a trainer calls the dtype that it loads in
    if subject == "norm":
        prepared = evidence.says("float32", "kbit") or "c-kbit" in evidence.signs
        prepared = prepared or (quantised and "weight" in text.lower())
        return "kbit-prep" if prepared else FLOAT32_OF[subject]
    return FLOAT32_OF[subject]


def _cured(evidence: Evidence) -> Iterator[Says]:
    """What works once something is given: an experiment, which decides."""
    for one in dict.fromkeys(evidence.sentences):
        if one.what == "works with" and one.subject in CURED:
            label = CURED[one.subject]
            if label == "upcast-module" and evidence.is_quantised():
                label = "kbit-prep"
            yield Says(label, 2 * POINTS, one.text)


def _blamed(evidence: Evidence) -> Iterator[Says]:
    """What works without something, or fails only with it."""
    for one in dict.fromkeys(evidence.sentences):
        if one.what not in ("works without", "fails with"):
            continue
        if one.subject in BLAMED:
            prepared = one.subject == "norm" and evidence.is_quantised()
            yield Says("kbit-prep" if prepared else BLAMED[one.subject], POINTS, one.text)
        if one.subject in ("lora", "dora") and one.what == "works without":
            yield Says("weights-fp32", 0, one.text)
            yield Says("missing-autocast", 0, one.text)
        elif one.subject == "autocast":
            yield Says("missing-autocast", 0, one.text)
        elif one.subject == "quant":
            label = "kbit-prep" if _trained(evidence) else "quantization-compute-dtype"
            yield Says(label, 1, one.text)
        elif one.subject == "that" and one.what == "works without":
            if "c-float-call" in evidence.signs:
                yield Says("weights-fp32", POINTS, one.text)
            elif "c-kbit-pr" in evidence.signs:
                yield Says("kbit-prep", POINTS, one.text)
            elif evidence.has("floats"):
                yield Says("upcast-module", POINTS, one.text)
            elif evidence.has("merged"):
                yield Says("weights-fp32", 2, one.text)
            elif evidence.has("lora"):
                yield Says("adapter-fp32", POINTS, one.text)


def _compared(evidence: Evidence) -> Iterator[Says]:
    """What works beside what fails: the base model, the whole of it, what was merged, token ids."""
    for one in dict.fromkeys(evidence.sentences):
        if one.what != "works":
            continue
        if one.subject == "base" and evidence.has("merged"):
            yield Says("weights-fp32", 2, one.text)
        elif one.subject == "merged" or (one.subject == "base" and evidence.has("lora")):
            yield Says("adapter-fp32", POINTS, one.text)
            yield Says("weights-fp32", 0, one.text)
        elif one.subject == "full" and evidence.has("lora"):
            yield Says("adapter-fp32", POINTS, one.text)
        elif one.subject == "ids" and evidence.has("embeds"):
            yield Says("inputs-fp32", POINTS, one.text)


def _trained(evidence: Evidence) -> bool:
    return evidence.stage("train") or evidence.has("lora")


def _quantised(evidence: Evidence) -> Iterator[Says]:
    """What quantising, training and a compute dtype say together."""
    quantised = evidence.is_quantised()
    if evidence.has("unquantised") and not quantised and "c-kbit" not in evidence.signs:
        yield Says("kbit-prep", 0, noted("Nothing is quantised, and nothing was prepared for it."))
    if evidence.has("norms"):
        label = "kbit-prep" if quantised else "upcast-module"
        yield Says(label, POINTS, evidence.signs["c-norm-to-float"].entry["means"])
    if not quantised:
        return
    if evidence.stage("train") or evidence.has("lora"):
        why = noted("Quantised training is prepared, which casts norms and embeddings to float32.")
        unsloth = "unsloth" in evidence.libraries  # prepares in a way of its own
        on = evidence.is_on()
        near = _in_autocast(evidence) or _calls_itself(evidence)
        points = 3 if near else 2 if on else 1
        points = POINTS if evidence.has("imported") else points
        if "c-dora" not in evidence.signs:
            yield Says("kbit-prep", 1 if unsloth else points, why)
        if points == 3:
            yield Says("upcast-module", -1, why)
    config = [c for c in evidence.calls if c.name.endswith("bitsandbytesconfig") and c.whole]
    if any("compute_dtype" not in c.text and "4bit" in c.text.replace("_", "") for c in config):
        points = 2 if evidence.stage("train") else POINTS
        why = noted("bnb_4bit_compute_dtype is left out, and its default is float32.")
        yield Says("quantization-compute-dtype", points, why)


def _floats(evidence: Evidence) -> Iterator[Says]:
    """A line that makes something float32, in a call that is inside autocast."""
    told = [one.text for one in evidence.sentences if (one.subject, one.what) == ("q", "float32")]
    if told and "p-in-autocast" in evidence.signs:
        yield Says("upcast-module", POINTS, told[0])
    elif evidence.has("floats") and told:
        yield Says("upcast-module", POINTS, evidence.signs["c-float-line"].entry["means"])
    elif evidence.has("floats") and (
        _in_autocast(evidence)
        or "p-in-autocast" in evidence.signs
        or (
            (evidence.says("half", "weights") or evidence.says("all half", "weights"))
            and not evidence.has("lora")
        )
    ):
        yield Says("upcast-module", 3, evidence.signs["c-float-line"].entry["means"])


def _twice_the_size(evidence: Evidence) -> Iterator[Says]:
    """A merged checkpoint of twice the size of the one that it came from is float32."""
    sizes = evidence.sizes
    if evidence.has("merged") and any(1.8 < a / b < 2.2 for a in sizes for b in sizes if b):
        yield Says("weights-fp32", 3, noted("The merged checkpoint is twice as large."))


def _rescued_before(evidence: Evidence) -> Iterator[Says]:
    """The rescue aimed at half precision before, and at float32 in the end: autocast was left."""
    if evidence.left_autocast():
        yield Says("missing-autocast", 7, noted("Autocast was on before, and is off in this call."))


def _run_in_float32(evidence: Evidence) -> Iterator[Says]:
    """A run that serves, and is told to do so in float32, whatever trained the model."""
    if evidence.has("predicts") and "c-load-float32" in evidence.signs:
        why = evidence.signs["c-load-float32"].entry["means"]
        yield Says("weights-fp32", POINTS, why)
        yield Says("missing-autocast", -2 * POINTS, why)


def _only_called(evidence: Evidence) -> Iterator[Says]:
    """Where nothing is trained, weights that are float32 at load time stay it."""
    trained = evidence.stage("train") or evidence.stage("eval") or evidence.has("lora")
    near = _in_autocast(evidence) or {"p-in-autocast", "c-autocast-call"} & evidence.signs.keys()
    if "warn-float32" in evidence.signs and not (trained or near):
        yield Says("weights-fp32", 2, noted("Nothing is trained, which would use autocast."))


def _calls_itself(evidence: Evidence) -> bool:
    """Whether code that is not Transformers' calls the package, as frames show."""
    return evidence.caller() != "" and not evidence.caller().startswith("transformers/")


def _own_attention(evidence: Evidence) -> Iterator[Says]:
    """Attention that is not Transformers' has no rescue cast; that matters where autocast is on."""
    why = ""
    if evidence.has("remote"):
        why = evidence.signs["f-remote"].entry["means"]
    elif _calls_itself(evidence):
        why = noted("The code that calls FlashAttention is not Transformers', which casts back.")
    if why:
        near = _in_autocast(evidence)
        half = evidence.has("remote") and evidence.has("half")  # and nothing else to blame
        yield Says("upcast-module", 2 if near else 3 if half else 1, why)
    elif evidence.has("own"):
        yield Says("upcast-module", 1, evidence.signs["p-own-attention"].entry["means"])


def _adapter(evidence: Evidence) -> Iterator[Says]:
    """An adapter beside autocast frames is as likely as a module."""
    if _in_autocast(evidence) and evidence.has("lora") and "p-no-lora" not in evidence.signs:
        yield Says("adapter-fp32", 1, noted("There is an adapter."))
        if not evidence.has("remote"):
            yield Says("upcast-module", -1, noted("There is an adapter."))


RULES: "tuple[Rule, ...]" = (
    _signs,
    _checked,
    _mixed_precision_on,
    _launch_without_flag,
    _own_loop,
    _outside_autocast,
    _loads,
    _said_float32,
    _cured,
    _blamed,
    _compared,
    _quantised,
    _floats,
    _twice_the_size,
    _rescued_before,
    _run_in_float32,
    _only_called,
    _own_attention,
    _adapter,
)

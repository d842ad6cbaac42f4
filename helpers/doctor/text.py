"""The diagnosis of a text."""

import re
from typing import Union

from helpers.doctor.data import load
from helpers.doctor.diagnosis import Diagnosis, Shown, title
from helpers.doctor.evidence import Evidence, Sign, guarded, read
from helpers.doctor.remedies import remedies, remedies_of
from helpers.doctor.verdict import Verdict, judge
from helpers.doctor.words import noted, say, spoken

FOREIGN = {
    "memory": noted("It looks like a GPU without enough memory."),
    "nccl": noted("It looks like processes that lost each other."),
    "tokenizer": noted("It looks like a tokenizer that could not be loaded."),
    "files": noted("It looks like files that could not be found or downloaded."),
    "numbers": noted("It looks like numbers that overflowed."),
    "scaler": noted(
        "It looks like float16 weights under a gradient scaler: load them in float32, or train in"
        " bfloat16."
    ),
    "numpy": noted(
        "It looks like a bfloat16 tensor on its way to NumPy: .float() before .numpy()."
    ),
    "weights": noted("It looks like attention weights that were asked for (output_attentions)."),
    "devices": noted("It looks like a model on several GPUs, two of whose tensors met."),
    "model": noted("It looks like a model that is newer than the installed Transformers."),
    "shapes": noted("It looks like shapes that do not fit each other."),
    "build": noted("It looks like flash-attn failing to compile."),
    "cuda": noted("It looks like a CUDA kernel that failed for another reason than dtypes."),
}


def diagnose_text(text: "Union[str, bytes]") -> Diagnosis:
    """What a pasted text shows: a traceback, a log, a post, in any state. Nothing in it is run."""
    return diagnose_evidence(read(text))


def diagnose_evidence(evidence: Evidence) -> Diagnosis:
    """What the evidence of a text shows."""
    verdict = judge(evidence)
    if verdict.cause:
        fixes = guarded((), remedies, verdict.cause, evidence)
    else:
        fixes = guarded((), remedies_of, verdict.candidates, evidence)
    return Diagnosis(
        cause=verdict.cause,
        certain=verdict.certain,
        candidates=verdict.candidates,
        ruled_out=verdict.ruled_out,
        evidence=guarded((), _shown, verdict, evidence),
        fixes=fixes,
        next_check=guarded("", _next_check, verdict, evidence),
        is_failure=verdict.is_failure,
        summary=_summary(verdict),
        looks_like=_looks_like(verdict, evidence),
        language=spoken(),
    )


def _looks_like(verdict: Verdict, evidence: Evidence) -> str:
    if verdict.kind == "foreign":
        return say(FOREIGN[verdict.used[-1].entry["what"]])
    if verdict.kind == "other" and evidence.raised:
        return say("It ended in another error:") + " " + evidence.raised[-1]
    if verdict.kind == "ours":
        after = _after(verdict, evidence)
        return say("It shows another problem, too:") + " " + after if after else ""
    if verdict.kind == "nothing" and not evidence.letters:
        return say("There is no text: paste the traceback, and what you write about it.")
    if verdict.kind == "nothing" and evidence.garbled:
        return say("It does not look like text: give the traceback as text.")
    return ""


def _after(verdict: Verdict, evidence: Evidence) -> str:
    """What went wrong behind the error that is diagnosed, if it is known."""
    last = max((sign.last for sign in verdict.used if sign.kind == "error"), default=0)
    behind = [sign for sign in evidence.signs.values() if sign.kind == "foreign" and sign.at > last]
    return say(FOREIGN[behind[-1].entry["what"]]) if behind else ""


KINDS = {
    "error": noted("error"),
    "log": noted("log line"),
    "warning": noted("warning"),
    "frame": noted("frame"),
    "code": noted("code"),
    "fact": noted("output"),
    "prose": noted("what you write"),
    "foreign": noted("error"),
}


def _shown(verdict: Verdict, evidence: Evidence) -> "tuple[Shown, ...]":
    found = [
        Shown(say(_kind(sign)), sign.text, say(_means(sign, evidence)))
        for sign in verdict.used
        if sign.id != "p-bf16-set" or "c-on" not in evidence.signs  # the same line, twice
    ]
    texts = {one.means for one in found}
    for said in verdict.said:  # rules over calls and sentences, whose words are their reason
        if said.label in verdict.candidates and said.points > 0:
            quoted = any(said.why == one.text for one in evidence.sentences)
            means = say("It speaks for {label}.").format(label=said.label)
            if quoted:
                found.append(Shown(say(KINDS["prose"]), said.why.strip(), means))
            elif say(said.why) not in texts:
                found.append(Shown(say("what follows"), say(said.why), means))
    return tuple(dict.fromkeys(found))


def _kind(sign: Sign) -> str:
    """What a sign's line is: what people write names code, and is none."""
    is_prose = sign.kind == "code" and not re.search(
        r"[=({\[<]|--|: (?:true|false|\d)|\.py", sign.text
    )
    return KINDS["prose" if is_prose else sign.kind]


def _means(sign: Sign, evidence: Evidence) -> str:
    if sign.id == "dtype-refused" and evidence.has_only_old_gpus():
        return noted("FlashAttention got a q that is neither float16 nor bfloat16.")
    if sign.id == "dtype-refused" and evidence.stands_in():
        return noted(
            "The guide's reference kernel, which makes FlashAttention's checks on a CPU, got a q"
            " that is neither float16 nor bfloat16."
        )
    means: str = sign.entry["means"]
    return means


def _summary(verdict: Verdict) -> str:
    if verdict.cause:
        return title(verdict.cause)
    if verdict.candidates:
        return say("The text does not decide between these causes.")
    return say("This is not a dtype problem of FlashAttention.")


def _next_check(verdict: Verdict, evidence: Evidence) -> str:
    if verdict.cause or not verdict.candidates:
        return ""
    checks = load("checks.json")
    if evidence.has("checked") and set(checks["works"]) <= set(verdict.candidates):
        # The weights are known, and do not tell.
        return _explained(checks["adapter"], checks["works"])
    if evidence.has("checked") and set(verdict.candidates) <= checks["are"].keys():
        return _explained(checks["parts"], checks["are"])
    for lines, means in (("environment", "stands"), ("message", "names")):
        if set(verdict.candidates) <= checks[means].keys():
            shows = {label: checks[means][label] for label in verdict.candidates}
            return _explained(checks[lines], shows)
    return check(verdict.candidates)


def check(labels: "tuple[str, ...]") -> str:
    """Lines that tell labels apart, with what each of them would show."""
    checks = load("checks.json")
    return _explained(checks["code"], {label: checks["shows"][label] for label in labels})


def _explained(lines: "list[str]", shows: "dict[str, str]") -> str:
    import textwrap  # not every answer has lines to run

    how: list[str] = []
    for label, means in shows.items():
        line = f"{label}: {say(means)}"
        columns = len(line) + sum(letter > "\u2e7f" for letter in line)  # Chinese takes two each
        width = WIDEST * len(line) // columns
        how += textwrap.wrap(
            line, width, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False
        )
    told = (say(line) if line.startswith("# ") else line for line in lines)
    return "\n".join([*told, *how])


WIDEST = 96  # columns of a comment

"""Ask the doctor: about a text, an exception, or a model before it fails."""

from typing import Any

from helpers.doctor.diagnosis import Diagnosis, Shown
from helpers.doctor.live import diagnose_exception, look, why
from helpers.doctor.text import diagnose_text, title
from helpers.doctor.words import say

__all__ = ["diagnose", "look", "why"]


def diagnose(what: Any, inputs: Any = None) -> Diagnosis:
    """What is wrong: with a pasted text, an exception, or a model.

    A model runs one forward pass and is left as it was (``helpers.xray`` says how).

    Args:
        what: text or bytes; an exception; a model.
        inputs: what the model's forward gets; by default something small.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(what, (str, bytes)):
        return diagnose_text(what)
    if isinstance(what, BaseException):
        return diagnose_exception(what)
    if hasattr(what, "named_parameters") and hasattr(what, "forward"):
        return _of_model(what, inputs)
    raise TypeError(f"diagnose() got {type(what).__name__}: give a text, an exception or a model.")


def _of_model(model: Any, inputs: Any) -> Diagnosis:
    from helpers.doctor import live
    from helpers.doctor.evidence import read
    from helpers.doctor.remedies import remedies
    from helpers.gate import xray

    found = xray(model, inputs)
    shown = [Shown(say("X-ray"), found.verdict, "")]
    if found.first_float32 is not None:
        shown.append(Shown(say("first float32"), str(found.first_float32), ""))
    if found.ok:
        summary = say("Nothing is wrong: FlashAttention gets half precision.")
        return Diagnosis(None, True, (), (), tuple(shown), (), "", False, summary)
    by_text = diagnose_text(f"{found.error_type}: {found.error}")
    label, why_ = by_text.cause, None
    if "dtype-refused" in read(f"{found.error}").signs:
        parameters = live.parameters_by_kind(model)
        told = live.cause(live.Seen((), model, "", parameters, model.training, False))
        if told is not None and len(told[0]) == 1:
            label, why_ = told[0][0], told[1]
    if label is None:
        return by_text._replace(evidence=(*by_text.evidence, *shown))
    if why_:
        shown.append(Shown(say("model"), why_, ""))
    return by_text._replace(
        cause=label,
        certain=True,
        candidates=(label,),
        evidence=(*by_text.evidence, *shown),
        fixes=remedies(label, read("")),
        next_check="",
        summary=title(label),
    )

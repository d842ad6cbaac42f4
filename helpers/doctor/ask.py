"""Ask the doctor: about a text, an exception, or a model before it fails."""

import contextlib
from typing import Any, Optional

from helpers.doctor.diagnosis import Diagnosis, Shown
from helpers.doctor.evidence import read
from helpers.doctor.frames import Seen, parameters_by_kind
from helpers.doctor.live import diagnose_exception, why
from helpers.doctor.text import diagnose_evidence, diagnose_text
from helpers.doctor.words import say, speaking, spoken

__all__ = ["diagnose", "why"]


def diagnose(what: Any, inputs: Any = None, *, language: "Optional[str]" = None) -> Diagnosis:
    """What is wrong: with a pasted text, an exception, or a model.

    A model runs one forward pass and is left as it was (``helpers.xray`` says how).

    Args:
        what: text or bytes; an exception; a model.
        inputs: what the model's forward gets; by default something small.
        language: "en" or "zh-CN"; by default the one that is spoken, which is English at first.

    Raises:
        TypeError: it is none of these.
        ValueError: there is no such language.
    """
    with speaking(language) if language else contextlib.nullcontext():
        if isinstance(what, (str, bytes)):
            return diagnose_text(what)
        if isinstance(what, BaseException):
            return diagnose_exception(what)
        if hasattr(what, "named_parameters") and hasattr(what, "forward"):
            return _of_model(what, inputs)
    raise TypeError(f"diagnose() got {type(what).__name__}: give a text, an exception or a model.")


def _of_model(model: Any, inputs: Any) -> Diagnosis:
    import torch

    from helpers import xray
    from helpers.doctor import live

    found = xray(model, inputs)
    evidence = [_of_x_ray(found)]
    if found.first_float32 is not None:
        evidence.append(Shown(say("first float32"), live.told(found.first_float32), ""))
    parameters = parameters_by_kind(model)
    device = next(model.parameters(), torch.empty(0)).device.type
    autocast = "on" if torch.is_autocast_enabled(device) else "off"
    seen = Seen((), model, parameters=parameters, trains=model.training, autocast=autocast)
    evidence += live.shown(seen)
    if found.ok:
        summary = say("Nothing is wrong: FlashAttention gets half precision.")
        if not found.gate or not any(record.kernel for record in found.gate):
            summary = say("Nothing fails, and no FlashAttention kernel was asked.")
        return Diagnosis(
            None, True, (), (), tuple(evidence), (), "", False, summary, language=spoken()
        )
    text = "\n".join([*found.frames, f"{found.error_type}: {found.error}"])
    by_text = read(text)
    told = diagnose_evidence(by_text)
    if found.ok is None:
        unseen = say("What happens behind the line that stopped.")
        evidence.append(Shown(say("not seen"), unseen, ""))
    origin = live.by_origin(seen, found.first_float32)
    if "dtype-refused" in by_text.signs or live.is_input(told, origin):
        return live.decided(told, origin, evidence, live.with_versions(read("")))
    return told._replace(evidence=(*told.evidence, *evidence))


def _of_x_ray(found: Any) -> Shown:
    """What the forward pass did, or where it ended."""
    if not found.ok:
        ended = f"{found.error_type}: {found.error}"
        return Shown(say("X-ray"), ended, say("The forward pass ends in {at}.").format(at=found.at))
    got = sorted({record.kernel for record in found.gate if record.kernel})
    if not got:
        return Shown(say("X-ray"), say("The forward pass runs to its end."), "")
    means = say("FlashAttention got {dtypes} in {number} attention calls.")
    means = means.format(dtypes=", ".join(map(str, got)), number=len(found.gate))
    return Shown(say("X-ray"), say("The forward pass runs to its end."), means)

"""A diagnosis as lines of text."""

from collections.abc import Iterator

from helpers.doctor.diagnosis import Diagnosis, Fix, title
from helpers.doctor.words import say


def page(diagnosis: Diagnosis) -> str:
    """Everything, for a terminal or a file."""
    return "\n".join(lines(diagnosis))


def lines(diagnosis: Diagnosis) -> Iterator[str]:
    """Line by line: a heading starts at the margin, what belongs to it is indented."""
    yield headline(diagnosis)
    if diagnosis.looks_like:
        yield diagnosis.looks_like
    for label in diagnosis.candidates if diagnosis.cause is None else ():
        yield f"  {candidate(label)}"
    if diagnosis.evidence:
        yield ""
        yield say("What shows it:")
        for shown in diagnosis.evidence:
            yield f"  {shown.what}: {shown.text}"
            if shown.means:
                yield f"      {shown.means}"
    if diagnosis.ruled_out:
        yield ""
        yield say("Ruled out:") + " " + ", ".join(diagnosis.ruled_out)
    if diagnosis.next_check:
        yield ""
        yield say("To tell them apart:")
        yield from (f"    {line}" for line in diagnosis.next_check.split("\n"))
    for number, fix in enumerate(diagnosis.fixes, 1):
        yield ""
        yield heading(number, fix, decided=diagnosis.cause is not None)
        yield from (f"    {line}" for line in fix.code.split("\n") if line)
    if diagnosis.cause:
        yield ""
        yield say("More:") + f" dtype-doctor explain {diagnosis.cause}"


def headline(diagnosis: Diagnosis) -> str:
    """The first line: a mark, the label and one sentence."""
    if diagnosis.cause is None:
        mark = "?" if diagnosis.candidates else "-"
        return f"{mark} {diagnosis.summary}"
    mark = "✖" if diagnosis.is_failure else "✔"
    return f"{mark} {diagnosis.cause}: {diagnosis.summary}"


def candidate(label: str) -> str:
    """A cause that is left, in one line."""
    return f"? {label}: {title(label)}"


def heading(number: int, fix: Fix, *, decided: bool) -> str:
    """What stands above the lines of a fix, which are numbered from 1."""
    kind = say("Fix") if number == 1 else say("Or")
    if not decided:
        kind = say("If it is {label}").format(label=fix.cause)
    return f"{kind}: {fix.title} [{fix.label}] ({say(fix.safety)}; {fix.versions})"

"""A diagnosis: one cause with what proves it, or candidates and the check that separates them."""

import json
from typing import Any, NamedTuple, Optional

from helpers.doctor.data import load
from helpers.doctor.words import say, speaking


class Shown(NamedTuple):
    """A piece of evidence: what kind it is, the line that shows it, and what that means."""

    what: str
    text: str
    means: str


class Fix(NamedTuple):
    """A remedy: its label, lines to paste, the versions they are for, how safe it is, which of its
    forms in fixes.json the lines are, and the cause that it mends."""

    label: str
    code: str
    versions: str
    safety: str
    form: str = "default"
    cause: str = ""

    @property
    def title(self) -> str:
        """What is to be done, in a few words."""
        entry = load("fixes.json")["fixes"][self.label]
        return say(entry.get("titles", {}).get(self.form) or entry["title"])


def title(label: str) -> str:
    """What a cause is, in one sentence."""
    return say(load(f"causes/{label}.json")["title"])


class Diagnosis(NamedTuple):
    """What is wrong, as far as it can be known.

    Attributes:
        cause: a label of the catalogue; None where it cannot be decided, or is not ours.
        certain: whether the evidence decides.
        candidates: labels, most likely first.
        ruled_out: labels that the evidence excludes.
        evidence: what was found and what it means.
        fixes: remedies of the cause, best first; where it is not decided, the best of each
            candidate. None that the evidence rules out.
        next_check: lines that tell the candidates apart; empty where nothing is left to tell.
        is_failure: whether something failed, or there is only a warning.
        summary: one sentence.
        looks_like: where it is not ours, what it looks like, if that is known.
        language: of the sentences, and of what is printed.
    """

    cause: Optional[str]
    certain: bool
    candidates: "tuple[str, ...]"
    ruled_out: "tuple[str, ...]"
    evidence: "tuple[Shown, ...]"
    fixes: "tuple[Fix, ...]"
    next_check: str
    is_failure: bool
    summary: str
    looks_like: str = ""
    language: str = "en"

    @property
    def is_ours(self) -> bool:
        """Whether it is a dtype problem of FlashAttention, or a neighbour of one."""
        return bool(self.cause or self.candidates)

    def to_dict(self) -> "dict[str, Any]":
        """Everything in lists and dictionaries."""
        return {
            **self._asdict(),
            "candidates": list(self.candidates),
            "ruled_out": list(self.ruled_out),
            "evidence": [one._asdict() for one in self.evidence],
            "fixes": [one._asdict() for one in self.fixes],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=2)

    def __str__(self) -> str:
        from helpers.doctor.plain import page

        with speaking(self.language):
            return page(self)

    def __repr__(self) -> str:  # what why() shows at a prompt is for a person
        return str(self)

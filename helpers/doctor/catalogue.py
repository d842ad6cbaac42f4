"""The page of each cause."""

import re
from collections.abc import Iterator
from typing import Any

from helpers.doctor.data import load
from helpers.doctor.words import noted, say


def labels() -> "list[str]":
    """All causes, in the order of the fixes, what cannot be told last."""
    return [*load("fixes.json")["for"], "unknown-from-text"]


def entry(label: str) -> "dict[str, Any]":
    """A cause as data. KeyError: there is none of this name."""
    if label not in labels():
        raise KeyError(label)
    found: dict[str, Any] = load(f"causes/{label}.json")
    return found


def told(label: str) -> "dict[str, Any]":
    """A cause as data, with its sentences in the language that is spoken."""

    def spoken(data: Any) -> Any:
        if isinstance(data, dict):
            return {k: one if k == "code" else spoken(one) for k, one in data.items()}
        return [spoken(one) for one in data] if isinstance(data, list) else say(data)

    found: dict[str, Any] = spoken(entry(label))
    return found


def index() -> str:
    """One line for each cause."""
    width = max(map(len, labels()))
    return "\n".join(f"{label:{width}}  {say(entry(label)['title'])}" for label in labels())


def page(label: str) -> str:
    """A cause's page, in Markdown that reads well in a terminal."""
    return "\n".join(_lines(entry(label))).rstrip()


def _lines(cause: "dict[str, Any]") -> Iterator[str]:
    yield "# " + say("{label}: {title}").format(label=cause["label"], title=say(cause["title"]))
    yield ""
    for heading, lines in _sections(cause):
        if lines:
            yield f"## {say(heading)}"
            yield from lines
            yield ""


def _sections(cause: "dict[str, Any]") -> "Iterator[tuple[str, list[str]]]":
    """Headings, and what stands below them: nothing where the cause has nothing to say."""
    for name, heading in (("what", noted("What it is")), ("why", noted("Why it happens"))):
        yield heading, [say(cause[name])] if cause.get(name) else []
    yield noted("How to recognise it"), [f"- {say(one)}" for one in cause.get("recognise", ())]
    failing, fixed = cause.get("failing") or {}, cause.get("fixed") or {}
    note_later = not _borrows(failing) and _borrows(fixed)
    yield noted("An example that fails"), _example(failing, _borrows(failing))
    yield noted("The same, mended"), _example(fixed, note_later)
    yield (
        noted("Fixes, and how safe they are"),
        [
            "- "
            + say("`{fix}` ({level}): {note}").format(
                fix=one["fix"], level=say(one["level"]), note=say(one["note"])
            )
            for one in cause.get("safety", ())
        ],
    )
    yield noted("Versions"), [f"- {say(one)}" for one in cause.get("versions", ())]
    yield (
        noted("Easily mistaken for"),
        [
            "- " + say("`{label}`: {how}").format(label=one["label"], how=say(one["tell_apart"]))
            for one in cause.get("near_misses", ())
        ],
    )
    yield (
        noted("Sources"),
        [
            f"- [{say(one['what'])}]({one['url']})" if one["url"] else f"- {say(one['what'])}"
            for one in cause.get("sources", ())
        ],
    )


def _borrows(example: "dict[str, Any]") -> bool:
    """Whether an example takes something from this guide without saying so."""
    return any(re.search(r"\b(?:checkpoints|backend)\.", line) for line in example.get("code", ()))


def _example(example: "dict[str, Any]", note: bool) -> "list[str]":
    if not example.get("code"):
        return []
    lines = ["```python", *example["code"], "```"]
    if example.get("raises"):
        lines.append(say("It raises: `{error}`").format(error=example["raises"]))
    if example.get("why_not_run"):
        why = say(example["why_not_run"])
        lines += ["", say("Not run: {why}").format(why=why)]
    if note:
        known = say(
            "Here `checkpoints` is from this guide (`from helpers import backend, checkpoints`, and"
            " `backend.activate()` where there is no GPU): your own model's path does as well."
        )
        lines += ["", known]
    return lines

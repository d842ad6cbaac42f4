"""The page of each cause."""

from collections.abc import Iterator
from typing import Any

from helpers.doctor.data import load
from helpers.doctor.words import say


def labels() -> "list[str]":
    """All causes, in the order of the fixes, what cannot be told last."""
    return [*load("fixes.json")["for"], "unknown-from-text"]


def entry(label: str) -> "dict[str, Any]":
    """A cause as data. KeyError: there is none of this name."""
    if label not in labels():
        raise KeyError(label)
    found: dict[str, Any] = load(f"causes/{label}.json")
    return found


def index() -> str:
    """One line for each cause."""
    width = max(map(len, labels()))
    return "\n".join(f"{label:{width}}  {say(entry(label)['title'])}" for label in labels())


def page(label: str) -> str:
    """A cause's page, in Markdown that reads well in a terminal."""
    return "\n".join(_lines(entry(label))).rstrip()


def _lines(cause: "dict[str, Any]") -> Iterator[str]:
    yield f"# {cause['label']}: {say(cause['title'])}"
    yield ""
    for name, heading in (("what", "What it is"), ("why", "Why it happens")):
        if cause.get(name):
            yield f"## {say(heading)}"
            yield f"{say(cause[name])}"
            yield ""
    if cause.get("recognise"):
        yield f"## {say('How to recognise it')}"
        yield from (f"- {say(one)}" for one in cause["recognise"])
        yield ""
    for name, heading in (("failing", "An example that fails"), ("fixed", "The same, mended")):
        example = cause.get(name) or {}
        if example.get("code"):
            yield f"## {say(heading)}"
            yield "```python"
            yield from example["code"]
            yield "```"
            if example.get("raises"):
                yield f"{say('It raises')}: `{example['raises']}`"
            if example.get("why_not_run"):
                yield f"{say('Not run')}: {say(example['why_not_run'])}"
            yield ""
    if cause.get("safety"):
        yield f"## {say('Fixes, and how safe they are')}"
        for one in cause["safety"]:
            yield f"- `{one['fix']}` ({say(one['level'])}): {say(one['note'])}"
        yield ""
    if cause.get("versions"):
        yield f"## {say('Versions')}"
        yield from (f"- {say(one)}" for one in cause["versions"])
        yield ""
    if cause.get("near_misses"):
        yield f"## {say('Easily mistaken for')}"
        for one in cause["near_misses"]:
            yield f"- `{one['label']}`: {say(one['tell_apart'])}"
        yield ""
    if cause.get("sources"):
        yield f"## {say('Sources')}"
        for one in cause["sources"]:
            address = f" <{one['url']}>" if one["url"] else ""
            yield f"- {say(one['what'])}{address}"

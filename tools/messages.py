"""Extract the doctor's sentences, keep their translations and compile them: ``make messages``.

A sentence is what stands in ``say("...")`` or ``noted("...")``, and what the doctor's data files
hold for ``say``. A new one is left without a translation, and one that was changed gets its old
translation marked as fuzzy; neither is compiled, and the tests find both.
"""

import ast
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from babel.messages import Catalog
from babel.messages.extract import extract_from_dir
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

ROOT = Path(__file__).resolve().parents[1]
DOCTOR = ROOT / "helpers" / "doctor"
LOCALE = "zh_CN"
PO = DOCTOR / "locale" / LOCALE / "LC_MESSAGES" / "doctor.po"
KEYWORDS = {"say": None, "noted": None}

# Where sentences stand in the data: "*" is each member of a list or an object, and "#" the comment
# at the end of a line of code.
CAUSE = [
    "title",
    "what",
    "why",
    "recognise.*",
    "failing.why_not_run",
    "fixed.why_not_run",
    "safety.*.level",
    "safety.*.note",
    "versions.*",
    "near_misses.*.tell_apart",
    "sources.*.what",
]
SENTENCES = {
    "signs": ["signs.*.means"],
    "fixes": [
        "fixes.*.title",
        "fixes.*.titles.*",
        "fixes.*.safety",
        "fixes.*.versions.*",
        "fixes.*.code.*.*.#",
    ],
    "checks": [
        "code.0",
        "code.1",
        "shows.*",
        "adapter.0",
        "works.*",
        "parts.0",
        "are.*",
        "environment.0",
        "stands.*",
        "message.0",
        "names.*",
    ],
}


def extract_python(
    file: IO[bytes], keywords: Any, comment_tags: Any, options: Any
) -> "Iterator[tuple[int, None, str, list[str]]]":
    """Babel's extraction method for Python: Babel's own also takes a key for a sentence, as in
    ``say(entry["title"])``."""
    found: list[tuple[int, None, str, list[str]]] = []
    for node in ast.walk(ast.parse(file.read())):
        match node:
            case ast.Call(
                func=ast.Name(id=name) | ast.Attribute(attr=name),
                args=[ast.Constant(value=str() as sentence)],
            ) if name in keywords:
                found.append((node.lineno, None, sentence, []))
    yield from sorted(found)


def extract_json(
    file: IO[bytes], keywords: Any, comment_tags: Any, options: "dict[str, Any]"
) -> "Iterator[tuple[int, None, str, list[str]]]":
    """Babel's extraction method for the data files; options: ``paths`` as in SENTENCES."""
    data = json.loads(file.read().decode("utf-8"))
    for path in options["paths"]:
        for sentence in _at(data, path.split(".")):
            yield 1, None, sentence, []


def _at(data: Any, path: "list[str]") -> Iterator[str]:
    """The strings at a path; nothing where it leads nowhere or to an empty one."""
    if not path:
        if data:
            yield data
        return
    step, rest = path[0], path[1:]
    if step == "*":
        for one in data.values() if isinstance(data, dict) else data:
            yield from _at(one, rest)
    elif step == "#":
        yield from _at(data.partition("# ")[2], rest)
    elif isinstance(data, list):
        yield from _at(data[int(step)], rest)
    elif step in data:
        yield from _at(data[step], rest)


MAPPING: "list[tuple[str, Any]]" = [
    ("**.py", extract_python),
    ("causes/*.json", extract_json),
    *((f"{name}.json", extract_json) for name in SENTENCES),
]
OPTIONS = {
    "causes/*.json": {"paths": CAUSE},
    **{f"{name}.json": {"paths": paths} for name, paths in SENTENCES.items()},
}


class StableCatalog(Catalog):
    """A catalogue whose header holds no date and no version of a tool."""

    mime_headers = property(
        lambda self: [
            ("Project-Id-Version", "flashattention-dtype-guide"),
            ("Language", LOCALE),
            ("MIME-Version", "1.0"),
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Transfer-Encoding", "8bit"),
            ("Plural-Forms", self.plural_forms),
        ],
        lambda self, headers: None,
    )


def extracted() -> Catalog:
    """Every sentence, without translations."""
    catalog = StableCatalog(LOCALE, header_comment="", fuzzy=False)
    found = extract_from_dir(DOCTOR, MAPPING, OPTIONS, KEYWORDS, strip_comment_tags=True)
    for name, line, sentence, _comments, _context in found:
        catalog.add(sentence, locations=[(f"helpers/doctor/{name}", line)])
    return catalog


def translated() -> Catalog:
    """The catalogue as it is on disk."""
    catalog = StableCatalog(LOCALE, header_comment="", fuzzy=False)
    if PO.exists():
        for message in read_po(io.BytesIO(PO.read_bytes()), LOCALE):
            if message.id:
                catalog[message.id] = message
    return catalog


def updated() -> Catalog:
    """What is translated, with the sentences that there are now and no others."""
    catalog = translated()
    catalog.update(extracted())
    catalog.obsolete.clear()
    return catalog


def po(catalog: Catalog) -> bytes:
    """A catalogue as text, sorted by where its sentences stand."""
    file = io.BytesIO()
    write_po(file, catalog, width=0, include_lineno=False, include_previous=True)
    return file.getvalue().lstrip()


def mo(catalog: Catalog) -> bytes:
    """A catalogue as gettext reads it, without what is fuzzy."""
    file = io.BytesIO()
    write_mo(file, catalog)
    return file.getvalue()


def main() -> int:
    """Update and compile; status 1 if something is left to be translated."""
    catalog = updated()
    PO.parent.mkdir(parents=True, exist_ok=True)
    PO.write_bytes(po(catalog))
    PO.with_suffix(".mo").write_bytes(mo(catalog))
    left = [message for message in catalog if message.id and (message.fuzzy or not message.string)]
    for message in left:
        print(f"{'changed' if message.fuzzy else 'new'}: {message.id}")
    print(f"{PO.relative_to(ROOT)}: {len(catalog)} sentences, {len(left)} to be translated.")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())

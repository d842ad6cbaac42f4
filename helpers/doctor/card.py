"""A diagnosis as HTML, in the words of ``print(diagnosis)``.

No widgets here. Nothing that was pasted is markup: every text is escaped.
"""

import re
from collections.abc import Iterator
from html import escape
from itertools import groupby

from helpers import style
from helpers.doctor import catalogue, plain, share
from helpers.doctor.diagnosis import Diagnosis, Fix, Shown
from helpers.doctor.words import say

LONGEST = 1_000  # characters of one quoted line
SHARED = 20_000  # characters of the pasted text that go into the block for a bug report


def html(diagnosis: Diagnosis, text: str = "") -> str:
    """The whole answer. With the pasted text there is also a block for a bug report."""
    parts = [headline(diagnosis)]
    if diagnosis.looks_like:
        parts.append(f"<p>{escape(diagnosis.looks_like)}</p>")
    if diagnosis.cause is None:
        parts += [_more(label, f"? {label}") for label in diagnosis.candidates]
    if diagnosis.evidence:
        parts.append(_title(say("What shows it:")))
        parts.append(_list(map(_shown, diagnosis.evidence)))
    if diagnosis.ruled_out:
        ruled_out = ", ".join(diagnosis.ruled_out)
        parts.append(f"<p><strong>{escape(say('Ruled out:'))}</strong> {escape(ruled_out)}</p>")
    if diagnosis.next_check:
        parts.append(_code(say("To tell them apart:"), diagnosis.next_check))
    parts += [_fix(number, fix) for number, fix in enumerate(diagnosis.fixes, 1)]
    if diagnosis.cause:
        name = diagnosis.cause
        parts.append(_more(name, f"{say('More:')} dtype-doctor explain {name}"))
    if text:
        block = share.block(diagnosis, text[-SHARED:])
        parts.append(
            style.details_html(
                say("Share: a block for a bug report"),
                _code(say("Without tokens, home folders, host names and e-mail addresses"), block),
            )
        )
    return f'<div class="dg-outcome">{"".join(parts)}</div>'


def headline(diagnosis: Diagnosis) -> str:
    """The mark and the cause, or the mark and a sentence."""
    mark, _, words = plain.headline(diagnosis).partition(" ")
    if diagnosis.cause is None:
        return style.verdict_html(_state(diagnosis), mark, words)
    label, _, sentence = words.partition(": ")
    return style.verdict_html(_state(diagnosis), f"{mark} {label}:", sentence)


def _state(diagnosis: Diagnosis) -> style.State:
    if diagnosis.cause is None:
        return "warn" if diagnosis.candidates else "idle"
    return "bad" if diagnosis.is_failure else "good"


def _shown(shown: Shown) -> str:
    text = shown.text if len(shown.text) <= LONGEST else f"{shown.text[:LONGEST]}..."
    means = f"<br>{escape(shown.means)}" if shown.means else ""
    return f"{escape(shown.what)}: <code>{escape(text)}</code>{means}"


def _fix(number: int, fix: Fix) -> str:
    title = plain.heading(number, fix)
    return _code(title, fix.code) if fix.code else f"<p>{escape(title)}</p>"


def _more(label: str, summary: str) -> str:
    """A cause's page, in place."""
    return style.details_html(summary, f'<div class="dg-page">{page(label)}</div>')


def page(label: str) -> str:
    """A cause's page as HTML: its Markdown has headings, lists, code and paragraphs."""
    return "".join(_blocks(catalogue.page(label)))


def _blocks(markdown: str) -> Iterator[str]:
    # Every second piece is code.
    pieces = re.split(r"^```\w*\n(.*?)\n```$", markdown, flags=re.M | re.S)
    for number, piece in enumerate(pieces):
        if number % 2:
            yield style.pre_html(say("code"), piece)
            continue
        lines = [line for line in piece.split("\n") if line]
        for is_item, group in groupby(lines, lambda line: line.startswith("- ")):
            if is_item:
                yield _list(_inline(line[2:]) for line in group)
            else:
                yield from map(_paragraph, group)


def _paragraph(line: str) -> str:
    marks, _, words = line.partition(" ")
    if set(marks) == {"#"}:
        return f'<p class="dg-title">{_inline(words)}</p>'
    return f"<p>{_inline(line)}</p>"


def _inline(line: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(line))
    new_page = 'target="_blank" rel="noopener"'
    return re.sub(r"&lt;(https://\S+?)&gt;", rf'<a href="\1" {new_page}>\1</a>', text)


def _title(words: str) -> str:
    return f'<p class="dg-title">{escape(words)}</p>'


def _list(items: Iterator[str]) -> str:
    lines = "".join(f"<li>{item}</li>" for item in items)
    return f'<ul class="dg-list">{lines}</ul>' if lines else ""


def _code(title: str, code: str) -> str:
    return style.snippet_html(title, say("Lines to copy"), code, say("Copy"))

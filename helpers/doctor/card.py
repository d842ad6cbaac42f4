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
# Levels of headings. The sections of a notebook have 2, and a cause's page stands below an answer.
ANSWER, SECTION = 3, 4


def html(diagnosis: Diagnosis, text: str = "", note: str = "") -> str:
    """The whole answer. With the pasted text there is also a block for a bug report; ``note`` is
    what has to be known of that text."""
    parts = [headline(diagnosis)]
    if note:
        parts.append(f"<p><strong>{escape(note)}</strong></p>")
    if diagnosis.looks_like:
        parts.append(f"<p>{escape(diagnosis.looks_like)}</p>")
    if diagnosis.cause is None:
        parts += [_more(label, plain.candidate(label)) for label in diagnosis.candidates]
    if diagnosis.evidence:
        parts.append(_title(say("What shows it:")))
        parts.append(_list(map(_shown, diagnosis.evidence)))
    if diagnosis.ruled_out:
        title = f"<strong{style.heading(SECTION)}>{escape(say('Ruled out:'))}</strong>"
        parts.append(f"<p>{title} {escape(', '.join(diagnosis.ruled_out))}</p>")
    if diagnosis.next_check:
        title = say("To tell them apart:")
        parts.append(_code(title, title.rstrip(":\uff1a"), diagnosis.next_check))
    for number, fix in enumerate(diagnosis.fixes, 1):
        parts.append(_fix(plain.heading(number, fix, decided=diagnosis.cause is not None), fix))
    if diagnosis.cause:
        name = diagnosis.cause
        parts.append(_more(name, f"{say('More:')} dtype-doctor explain {name}"))
    if text:
        block = share.block(diagnosis, text[-SHARED:])
        title = say("Without tokens, home folders, host names and e-mail addresses")
        name = say("Share: a block for a bug report")
        parts.append(style.details_html(name, _code(title, name, block)))
    label = escape(say("Diagnosis"))
    return f'<div class="dg-outcome" role="region" aria-label="{label}">{"".join(parts)}</div>'


def headline(diagnosis: Diagnosis) -> str:
    """The mark, the same in a word, and the cause or a sentence."""
    state, outcome = _outcome(diagnosis)
    mark, _, words = plain.headline(diagnosis).partition(" ")
    label, _, sentence = words.partition(": ") if diagnosis.cause else ("", "", words)
    head = outcome.format(what=f"{label}:" if label else "").strip()
    return style.verdict_html(state, head, sentence, mark=mark, level=ANSWER)


def spoken(diagnosis: Diagnosis) -> str:
    """The outcome in words, without a mark, and what follows: for a screen reader."""
    what = plain.headline(diagnosis).partition(" ")[2]
    if diagnosis.cause is None and diagnosis.candidates:
        *others, last = diagnosis.candidates
        what = say("{some} or {last}.").format(some=", ".join(others), last=last)
        what = what if others else last
    said = [_outcome(diagnosis)[1].format(what=what), diagnosis.looks_like]
    if diagnosis.next_check:
        said.append(say("Lines that tell them apart follow."))
    if diagnosis.fixes:
        said.append(say("Fixes that follow: {number}.").format(number=len(diagnosis.fixes)))
    return " ".join(filter(None, said))


def _outcome(diagnosis: Diagnosis) -> "tuple[style.State, str]":
    """The colour, and the same as a template of words that ends with what it is."""
    if diagnosis.cause is None and diagnosis.candidates:
        return "warn", say("Undecided: {what}")
    if diagnosis.cause is None:
        return "idle", say("Not ours: {what}")
    if diagnosis.is_failure:
        return "bad", say("Failure: {what}")
    return "good", say("No failure: {what}")


def _shown(shown: Shown) -> str:
    text = shown.text if len(shown.text) <= LONGEST else f"{shown.text[:LONGEST]}..."
    means = f"<br>{escape(shown.means)}" if shown.means else ""
    return f"{escape(shown.what)}: <code>{escape(text)}</code>{means}"


def _fix(title: str, fix: Fix) -> str:
    return _code(title, fix.title, fix.code) if fix.code else _title(title)


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
        return _heading(_inline(words), SECTION - 1 + len(marks))
    return f"<p>{_inline(line)}</p>"


def _inline(line: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(line))
    new_page = 'target="_blank" rel="noopener"'
    return re.sub(
        r"\[([^\[\]]+)\]\((https://\S+?)\)(?=\s|$)", rf'<a href="\2" {new_page}>\1</a>', text
    )


def _title(words: str) -> str:
    return _heading(escape(words), SECTION)


def _heading(inside: str, level: int) -> str:
    return f'<p class="dg-title"{style.heading(level)}>{inside}</p>'


def _list(items: Iterator[str]) -> str:
    lines = "".join(f"<li>{item}</li>" for item in items)
    return f'<ul class="dg-list">{lines}</ul>' if lines else ""


def _code(title: str, name: str, code: str) -> str:
    """Lines below a title; ``name`` tells them and their button from the others."""
    label = say("Lines to copy: {title}").format(title=name)
    button = say("Copy: {title}").format(title=name)
    return style.snippet_html(title, label, code, say("Copy"), button, SECTION)

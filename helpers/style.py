"""The style of everything that the guide draws, in JupyterLab's theme colours, and pieces of HTML
that cards and panels share. All text that goes into a piece is escaped.
"""

from collections.abc import Iterable
from html import escape
from importlib.resources import files
from typing import Literal
from zlib import adler32

STYLE = files("helpers").joinpath("data/panel.css").read_text("utf-8")
# A page that does not trust the notebook yet drops it, so everything has to read well without.
STYLE_TAG = f"<style>{STYLE}</style>"

State = Literal["good", "bad", "warn", "idle"]


def verdict_html(
    state: State, head: str, sentence: str, is_code: bool = False, mark: str = "", level: int = 0
) -> str:
    """The headline: a mark and a word, then a sentence or the message of an error. ``mark`` is for
    the eye only: the words say the same."""
    tag = "code" if is_code else "span"
    sign = f'<span aria-hidden="true">{escape(mark)}</span> ' if mark else ""
    return (
        f'<p class="dg-verdict dg-{state}"{heading(level)}><strong>{sign}{escape(head)}</strong>'
        f" <{tag}>{escape(sentence)}</{tag}></p>"
    )


def heading(level: int) -> str:
    """Attributes of a heading; none for level 0. Not h1 to h6, which JupyterLab would style, and
    would list in its table of contents where they are stored in an output."""
    return f' role="heading" aria-level="{level}"' if level else ""


def status_html(seen: str, spoken: str = "") -> str:
    """The line beside the button. A screen reader speaks all of it; ``spoken`` is not shown,
    because it stands below."""
    return f'{escape(seen)} <span class="dg-spoken">{escape(spoken)}</span>'


def known_html(values: Iterable[str], **words: str) -> str:
    """For panel.js: what the kernel knows of the controls. ``words`` are what the page says by
    itself, if not in English."""
    data = "".join(f' data-{name}="{escape(said)}"' for name, said in words.items())
    return f"<span hidden{data}>{escape(' | '.join(values))}</span>"


def digest(text: str) -> str:
    """What known_html says of a long text; panel.js computes the same of a text area, which has
    no carriage returns."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return str(adler32(lines.encode("utf-16-le", "surrogatepass")))


def details_html(summary: str, inside: str) -> str:
    """HTML that opens on demand."""
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def pre_html(label: str, text: str) -> str:
    """Lines that scroll sideways, also from the keyboard."""
    code = f"<code>{escape(text)}</code>"
    return f'<pre tabindex="0" role="group" aria-label="{escape(label)}">{code}</pre>'


def snippet_html(
    title: str, label: str, text: str, copy: str = "Copy", name: str = "", level: int = 0
) -> str:
    """Lines with a copy button, which stays hidden until panel.js is there to serve it. JupyterLab
    would take a bare ``hidden`` away while it does not trust the notebook. ``name`` tells the
    button from others on the page."""
    named = f' aria-label="{escape(name)}"' if name else ""
    return (
        f'<div class="dg-snippet"><div class="dg-bar"><span{heading(level)}>{escape(title)}</span>'
        f'<button type="button" class="dg-copy"{named} hidden="hidden">{escape(copy)}</button>'
        '<span class="dg-copied" role="status"></span></div>'
        f"{pre_html(label, text)}</div>"
    )

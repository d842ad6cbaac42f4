"""The paste box: a text, Diagnose, and the answer."""

from typing import Any, Optional, Union

import ipywidgets as widgets

from helpers import controls, style
from helpers.doctor import card, words
from helpers.doctor.diagnosis import Diagnosis
from helpers.doctor.text import diagnose_text
from helpers.doctor.words import say

# Characters that are read. Jupyter's connection takes messages of 10 MB (jupyter_server's
# websocket_max_message_size), and a character may have four bytes.
MOST = 1_000_000
HALF = 499_900  # of each end of a longer text; with the line between them it is no longer too long
LANGUAGES = (("English", "en"), ("中文", "zh-CN"))


class DoctorPanel(widgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """Paste, press Diagnose, read. ``diagnosis`` is the last one, with the same words for print."""

    def __init__(self, text: str, language: str) -> None:
        self.diagnosis: Optional[Diagnosis] = None
        self.hint = controls.line("", "dg-hint")
        with words.speaking(language):
            self.text = widgets.Textarea(value=_ends(text), continuous_update=False)
        self.language = widgets.Dropdown(options=LANGUAGES, value=language)
        self.button = controls.run_button("")
        self.known = controls.line("", "dg-known")
        self.status = controls.line("", "dg-status")
        self.answer = widgets.HTML()
        self.index = widgets.Output()  # Jupyter opens a link of Markdown beside the notebook
        self._speak()
        self.text.observe(self._know, "value")
        self.language.observe(self._speak, "value")
        self.button.on_click(self._diagnose)
        form = controls.form([self.text, self.language, self.button])
        parts = controls.page_parts()
        read = [self.status, self.answer, self.index]
        super().__init__([parts, self.hint, form, self.known, *read])
        self.add_class("dg-panel")
        self.add_class("dg-doctor")

    def _speak(self, _change: Any = None) -> None:
        """All words of the panel in the chosen language, and the answer, if there is one."""
        with words.speaking(self.language.value):
            self.text.description = say("Paste the traceback")
            self.hint.value = say(
                "All of it, or its end, with the lines above it and what you write about it: what"
                " you ran, what you have tried. It stays on this machine, and nothing in it is run."
            )
            self.language.description = say("Language")
            self.button.description = say("Diagnose")
            index = f"[{say('All causes')}](../CAUSES.md)"
            self.index.outputs = controls.shown("text/markdown", index)
            self.status.value = style.status_html(say("Ready."))
        self._know()
        if self.answer.value:
            self._diagnose()

    def _know(self, _change: Any = None) -> None:
        # ipywidgets lets a press of the button overtake what was pasted just before it; panel.js
        # holds the press back until the kernel knows what the page shows.
        with words.speaking(self.language.value) as language:
            self.known.value = style.known_html(
                (style.digest(self.text.value), self.language.label),
                lang=language,
                most=str(MOST),
                half=str(HALF),
                gap=_gap(),
                cut=say("That is long: its first and last half million characters are kept."),
                waiting=say("Waiting for the kernel ..."),
                gone=say("The kernel was restarted: run this notebook again from the top."),
                copied=say("Copied."),
                refused=say("The browser refused: select the lines and copy them."),
            )

    def _diagnose(self, _button: Any = None) -> None:
        # Not `disabled`, which would throw the focus out of the panel; panel.js keeps clicks off.
        self.button.add_class("dg-busy")
        with words.speaking(self.language.value) as language:
            self.status.value = style.status_html(say("Reading ..."))
            self.diagnosis, html, spoken = answer(self.text.value)
            self.answer.value = f'<div lang="{language}">{html}</div>'
            done = say("Done.") if self.diagnosis else say("Not diagnosed.")
        self.button.remove_class("dg-busy")
        # Last of all: who reads that it is done may press again at once.
        self.status.value = style.status_html(done, spoken)

    def __repr__(self) -> str:
        return "Run this cell to see the panel: a box for a traceback and a Diagnose button."


def answer(text: str) -> "tuple[Optional[Diagnosis], str, str]":
    """The diagnosis of a text, as HTML, and what is said of it. No exception comes out of it."""
    content = _ends(text)
    try:
        if not content.strip():
            sentence = say("There is no text yet: paste a traceback into the box, then Diagnose.")
            return None, style.verdict_html("idle", "", sentence, mark="-"), sentence
        diagnosis = diagnose_text(content)
        note = ""
        if _is_cut(content):
            note = say("Only the first and the last half million characters of the text were read.")
        spoken = f"{card.spoken(diagnosis)} {note}".strip()
        return diagnosis, card.html(diagnosis, content, note), spoken
    except (Exception, KeyboardInterrupt) as error:
        sentence = say("The doctor could not read this text ({error}): please report it.").format(
            error=type(error).__name__
        )
        return None, style.verdict_html("bad", "", sentence, mark="✖"), sentence


def doctor_panel(
    text: "Union[str, bytes]" = "", *, language: "Optional[str]" = None
) -> DoctorPanel:
    """The paste box, for the last line of a notebook cell.

    Args:
        text: what is in the box at first.
        language: "en" or "zh-CN"; None asks the locale. It can be changed in the panel.

    Raises:
        TypeError: the text is neither str nor bytes.
        ValueError: the doctor does not speak the language.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if not isinstance(text, str):
        raise TypeError(f"doctor_panel() got {type(text).__name__}: give the text of a traceback.")
    with words.speaking(language) as found:
        return DoctorPanel(text, found)


def _ends(text: str) -> str:
    """What is read of a text, as a text area holds it: panel.js cuts what is pasted as this does.
    People write at both ends of a log, and either may have the error."""
    if len(text) > MOST:
        text = f"{text[:HALF]}\n{_gap()}\n{text[-HALF:]}"
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return whole.replace("\r\n", "\n").replace("\r", "\n")


def _gap() -> str:
    """The line where the middle was."""
    return f"[... {say('left out: what stood between the first and the last half million')} ...]"


def _is_cut(text: str) -> bool:
    for language in words.LANGUAGES:  # it may have been cut before another one was chosen
        with words.speaking(language):
            if _gap() in text:
                return True
    return False

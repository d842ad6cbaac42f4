"""The doctor's sentences in the person's language, from gettext catalogues."""

import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional

from helpers.doctor.data import raw

LANGUAGES = ("en", "zh-CN")
# What a person or a locale may call one of them, in lower case: zh, zh_cn.utf-8, zh-hant-tw, en-us,
# and Windows' "chinese (simplified)_china".
_NAME = re.compile(r"(zh|en)([-_]han[st])?([-_][a-z]{2})?([.@].*)?|(chinese|english)([-_ ].*)?")
_chosen = "en"
_spoken: "ContextVar[Optional[str]]" = ContextVar("_spoken", default=None)


def choose(language: "Optional[str]" = None) -> str:
    """Speak this language from now on; None asks the locale, and English is spoken otherwise.

    Raises:
        ValueError: there is no catalogue for it.
    """
    global _chosen
    _chosen = _known(language)
    return _chosen


@contextmanager
def speaking(language: "Optional[str]" = None) -> Iterator[str]:
    """Speak a language in a block of this thread, and after it the one before.

    Raises:
        ValueError: there is no catalogue for it.
    """
    found = _known(language)
    before = _spoken.set(found)
    try:
        yield found
    finally:
        _spoken.reset(before)


def spoken() -> str:
    """The language that is spoken now."""
    return _spoken.get() or _chosen


def say(sentence: str) -> str:
    """A sentence of ours in the language that is spoken; itself where it has no translation."""
    language = spoken()
    if language == "en" or not sentence:
        return sentence
    translated: str = _catalogue(language).gettext(sentence)
    return translated


def noted(sentence: str) -> str:
    """The sentence itself: marks one that is kept, and said where it is shown (gettext's N_)."""
    return sentence


def guess() -> str:
    """The language of the locale, found as gettext finds it; English if there is no catalogue."""
    settings = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    locale = next(filter(None, settings), None) or (_of_windows() if os.name == "nt" else "C")
    listed = os.environ.get("LANGUAGE") if locale not in ("C", "POSIX") else None
    names = listed.split(":") if listed else [locale]
    return next(filter(None, map(_language, names)), "en")


def _known(language: "Optional[str]") -> str:
    if language is None:
        return guess()
    found = _language(language)
    if found is None:
        sentence = say("There are no sentences in {language}: {known} are there.")
        known = say("{one} and {other}").format(one=LANGUAGES[0], other=LANGUAGES[1])
        raise ValueError(sentence.format(language=repr(language), known=known))
    return found


def _language(name: str) -> "Optional[str]":
    name = name.lower()
    if _NAME.fullmatch(name) is None:
        return None
    return "en" if name.startswith("en") else "zh-CN"


def _of_windows() -> str:
    """The language of Windows' own windows, or else of its locale."""
    import ctypes
    import locale

    try:
        number = ctypes.windll.kernel32.GetUserDefaultUILanguage()  # type: ignore[attr-defined]
    except (AttributeError, OSError):
        return locale.getlocale()[0] or "C"
    return locale.windows_locale.get(number) or locale.getlocale()[0] or "C"


@functools.cache
def _catalogue(language: str) -> Any:
    import gettext
    import io

    name = f"locale/{language.replace('-', '_')}/LC_MESSAGES/doctor.mo"
    return gettext.GNUTranslations(io.BytesIO(raw(name)))

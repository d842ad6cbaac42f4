"""The doctor's sentences in the person's language, from gettext catalogues."""

import functools
import io
import locale
import os
from typing import Any, Optional

from helpers.doctor.data import raw

LANGUAGES = ("en", "zh-CN")
_chosen = "en"


def choose(language: "Optional[str]" = None) -> str:
    """Speak this language from now on; None asks the locale, and English is spoken otherwise.

    Raises:
        ValueError: there is no catalogue for it.
    """
    global _chosen
    if language is None:
        language = guess()
    if language not in LANGUAGES:
        known = " and ".join(LANGUAGES)
        raise ValueError(f"There are no sentences in {language!r}: {known} are there.")
    _chosen = language
    return language


def guess() -> str:
    """The language of the locale, if there is a catalogue for it."""
    names = [os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG")]
    name = next((name for name in names if name), None)
    if name is None and os.name == "nt":
        name = locale.getlocale()[0]
    return "zh-CN" if (name or "").lower().startswith(("zh", "chinese")) else "en"


def say(sentence: str) -> str:
    """A sentence of ours in the chosen language; itself where it has no translation."""
    if _chosen == "en" or not sentence:
        return sentence
    translated: str = _catalogue(_chosen).gettext(sentence)
    return translated


@functools.cache
def _catalogue(language: str) -> Any:
    import gettext

    name = f"locale/{language.replace('-', '_')}/LC_MESSAGES/doctor.mo"
    return gettext.GNUTranslations(io.BytesIO(raw(name)))

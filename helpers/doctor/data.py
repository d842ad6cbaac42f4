"""The doctor's data files, which may lie in a zip archive."""

import functools
import json
import os
import re
from typing import Any, cast


def raw(name: str) -> bytes:
    """A file of this package by its path with forward slashes."""
    path = os.path.join(os.path.dirname(__file__), *name.split("/"))  # noqa: PTH118, PTH120
    content: bytes = __loader__.get_data(path)  # type: ignore[name-defined]
    return content


@functools.cache
def load(name: str) -> Any:
    """A JSON file of this package."""
    return json.loads(raw(name).decode("utf-8"))


class _Late:
    """Compiles its pattern where it is first used, and is as fast as it from then on."""

    def __init__(self, source: str, flags: int) -> None:
        self._made = source, flags

    def __getattr__(self, name: str) -> Any:
        compiled = re.compile(*self._made)
        for method in ("search", "match", "fullmatch", "finditer", "findall", "sub", "split"):
            setattr(self, method, getattr(compiled, method))
        return getattr(compiled, name)


def pattern(source: str, flags: int = 0) -> "re.Pattern[str]":
    """A regular expression that a short text may never need: all of them together take longer to
    compile than Python takes to start."""
    return cast("re.Pattern[str]", _Late(source, flags))

"""The doctor's data files, which may lie in a zip archive."""

import functools
import json
import os
from typing import Any


def raw(name: str) -> bytes:
    """A file of this package by its path with forward slashes."""
    path = os.path.join(os.path.dirname(__file__), *name.split("/"))  # noqa: PTH118, PTH120
    content: bytes = __loader__.get_data(path)  # type: ignore[name-defined]
    return content


@functools.cache
def load(name: str) -> Any:
    """A JSON file of this package."""
    return json.loads(raw(name).decode("utf-8"))

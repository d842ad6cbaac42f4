"""The command ``dtype-doctor``: paste a traceback into it.

    dtype-doctor < traceback.txt          what is wrong, what shows it, and what to do
    dtype-doctor FILE [--json]            the same, from a file
    dtype-doctor explain LABEL            the page of a cause; without a label, all of them
    dtype-doctor run | xray | env         need the whole guide: --help of each says more

Exit status of a diagnosis: 0 nothing failed, 1 something failed, 2 it could not be read.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any, Optional

from helpers.doctor import words

USAGE = (
    "usage: dtype-doctor [FILE|-] [--json] [--report] [--lang en|zh-CN]\n"
    "       dtype-doctor explain [LABEL] [--lang en|zh-CN]\n"
    "       dtype-doctor run|xray|env ..."
)
GUIDE = ("run", "xray", "env")


def main(arguments: "Optional[Sequence[str]]" = None) -> int:
    """Run the command; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a console may lack a sign
    if given[:1] and given[0] in GUIDE:
        return _guide(given)
    options = {"--json": False, "--report": False}
    names, language = [], None
    while given:
        word = given.pop(0)
        if word in ("-h", "--help"):
            print(f"{USAGE}\n\n{__doc__}")
            return 0
        if word in options:
            options[word] = True
        elif word == "--lang" or word.startswith("--lang="):
            language = word.partition("=")[2] or (given.pop(0) if given else "")
        elif word.startswith("-") and word != "-":
            return _refuse(f"There is no option {word!r}.\n{USAGE}")
        else:
            names.append(word)
    try:
        words.choose(language)
    except ValueError as error:
        return _refuse(str(error))
    if names[:1] == ["explain"]:
        return _explain(names[1:])
    if len(names) > 1:
        return _refuse(f"Give one file, not {len(names)}.\n{USAGE}")
    return _diagnose(names[0] if names else "-", options["--json"], options["--report"])


def _diagnose(name: str, as_json: bool, report: bool) -> int:
    try:
        content = _content(name)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return _refuse(f"{name!r} could not be read ({reason}): give a text file, or - for input.")
    from helpers.doctor.text import diagnose_text

    diagnosis = diagnose_text(content)
    if as_json:
        print(diagnosis.to_json())
    elif report:
        from helpers.doctor.share import block

        print(block(diagnosis, content))
    else:
        _show(diagnosis)
    return 1 if diagnosis.is_failure else 0


def _content(name: str) -> bytes:
    if name != "-":
        with open(name, "rb") as file:  # noqa: PTH123  # pathlib takes a fifth of the whole time
            return file.read()
    if sys.stdin is None:
        return b""
    if sys.stdin.isatty():
        end = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"
        print(words.say("Paste the traceback, then press {end}.").format(end=end), file=sys.stderr)
    buffer = getattr(sys.stdin, "buffer", None)
    return buffer.read() if buffer is not None else sys.stdin.read().encode("utf-8", "replace")


def _show(diagnosis: Any) -> None:
    """With colour on a terminal, if rich is there; else plain."""
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        try:
            from helpers.doctor.terminal import show
        except ImportError:
            pass
        else:
            show(diagnosis)
            return
    print(diagnosis)


def _explain(labels: "list[str]") -> int:
    from helpers.doctor import catalogue

    if not labels:
        print(catalogue.index())
        return 0
    if len(labels) > 1 or labels[0] not in catalogue.labels():
        known = ", ".join(catalogue.labels())
        return _refuse(f"There is no page {' '.join(labels)!r}. There are: {known}.")
    print(catalogue.page(labels[0]))
    return 0


def _guide(given: "list[str]") -> int:
    try:
        from helpers import cli
    except ImportError as error:
        return _refuse(
            f"'dtype-doctor {given[0]}' needs the whole guide, and {error.name!r} is missing here:"
            " install it with its dependencies. A traceback can be read without them."
        )
    return cli.main(given)


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

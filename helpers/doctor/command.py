"""The command ``dtype-doctor``: paste a traceback into it."""

import os
import sys
from collections.abc import Sequence
from typing import Any, Optional

from helpers.doctor import words
from helpers.doctor.words import noted, say

USAGE = noted(
    "usage: dtype-doctor [FILE|-] [--json] [--report] [--lang en|zh-CN]\n"
    "       dtype-doctor explain [LABEL] [--lang en|zh-CN]\n"
    "       dtype-doctor run|xray|env ..."
)
HELP = noted(
    "Paste a traceback into it, with what you write about it.\n"
    "\n"
    "    dtype-doctor < traceback.txt    what is wrong, what shows it, and what to do\n"
    "    dtype-doctor FILE               the same, from a file\n"
    "    dtype-doctor explain LABEL      the page of a cause; without a label, all of them\n"
    "    dtype-doctor run|xray|env       need the whole guide: --help of each says more\n"
    "\n"
    "    --json                          for programs\n"
    "    --report                        for a bug report, without tokens, names and addresses\n"
    "    --lang en|zh-CN                 the language; by default that of the locale\n"
    "\n"
    "Exit status of a diagnosis: 0 nothing failed, 1 something failed, 2 it could not be read."
)
GUIDE = ("run", "xray", "env")
OPTIONS = ("--json", "--report", "-h", "--help")


def main(arguments: "Optional[Sequence[str]]" = None) -> int:
    """Run the command; the exit status."""
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; Python would flush, and fail, once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _run(given: "list[str]") -> int:
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a console may lack a sign
    words.choose()  # refusals of --lang itself are said in the locale's language
    if given[:1] and given[0] in GUIDE:
        return _guide(given)
    given, language = _without_language(given)
    try:
        words.choose(language)
    except ValueError as error:
        return _refuse(str(error))
    asked = [word for word in given if word.startswith("-") and word != "-"]
    names = [word for word in given if word not in asked]
    unknown = [word for word in asked if word not in OPTIONS]
    if unknown:
        sentence = say("There is no option {option}.").format(option=repr(unknown[0]))
        return _refuse(f"{sentence}\n{say(USAGE)}")
    if "-h" in asked or "--help" in asked:
        print(f"{say(USAGE)}\n\n{say(HELP)}")
        return 0
    if names[:1] == ["explain"]:
        return _explain(names[1:])
    if len(names) > 1:
        sentence = say("Give one file, not {number}.").format(number=len(names))
        return _refuse(f"{sentence}\n{say(USAGE)}")
    return _diagnose(names[0] if names else "-", "--json" in asked, "--report" in asked)


def _without_language(given: "list[str]") -> "tuple[list[str], Optional[str]]":
    """The other arguments, and what --lang asks for."""
    others: list[str] = []
    language = None
    rest = iter(given)
    for word in rest:
        if word == "--lang":
            language = next(rest, "")
        elif word.startswith("--lang="):
            language = word.partition("=")[2]
        else:
            others.append(word)
    return others, language


def _diagnose(name: str, as_json: bool, report: bool) -> int:
    try:
        content = _content(name)
    except OSError as error:
        sentence = say("{name} could not be read ({reason}): give a text file, or - for input.")
        return _refuse(sentence.format(name=repr(name), reason=_reason(error)))
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


def _reason(error: OSError) -> str:
    """Why a file cannot be read: the system's words are in the system's language."""
    if isinstance(error, FileNotFoundError):
        return say("there is none of this name")
    if isinstance(error, IsADirectoryError):
        return say("it is a folder")
    if isinstance(error, PermissionError):
        return say("it may not be opened")
    return error.strerror or type(error).__name__


def _content(name: str) -> bytes:
    if name != "-":
        with open(name, "rb") as file:  # noqa: PTH123  # pathlib takes a fifth of the whole time
            return file.read()
    if sys.stdin is None:
        return b""
    if sys.stdin.isatty():
        end = say("Ctrl-Z and Enter") if os.name == "nt" else "Ctrl-D"
        print(say("Paste the traceback, then press {end}.").format(end=end), file=sys.stderr)
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
        sentence = say("There is no page {name}. There are: {known}.")
        known = ", ".join(catalogue.labels())
        return _refuse(sentence.format(name=repr(" ".join(labels)), known=known))
    print(catalogue.page(labels[0]))
    return 0


def _guide(given: "list[str]") -> int:
    try:
        import helpers.cli as cli

        return cli.main(given)
    except ModuleNotFoundError as error:
        sentence = say(
            "'dtype-doctor {command}' needs the whole guide, and {package} is missing here:"
            " install it with its dependencies. A traceback can be read without them."
        )
        return _refuse(sentence.format(command=given[0], package=repr(error.name)))


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

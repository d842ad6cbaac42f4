"""The command ``dtype-doctor``: paste a traceback into it."""

import codecs
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, Optional

from helpers.doctor import words
from helpers.doctor.words import noted, say

USAGE = noted(
    "usage: dtype-doctor [FILE|-] [--json|--report] [--lang en|zh-CN]\n"
    "       dtype-doctor explain [LABEL] [--json] [--lang en|zh-CN]\n"
    "       dtype-doctor run|xray|env ..."
)
HELP = noted(
    "Give it a traceback, with what you write about it.\n"
    "\n"
    "    dtype-doctor traceback.txt      what is wrong, what shows it, and what to do\n"
    "    dtype-doctor                    the same of what you paste, or of its input\n"
    "    dtype-doctor explain LABEL      the page of a cause; without a label, all of them\n"
    "    dtype-doctor run|xray|env       need the whole guide: --help of each says more\n"
    "\n"
    "    --json                          for programs\n"
    "    --report                        for a bug report, without tokens, home folders and hosts\n"
    "    --lang en|zh-CN                 the language; by default that of the locale\n"
    "\n"
    "Exit status of a diagnosis: 0 nothing failed, 1 something failed, 2 there is none."
)
GUIDE = ("run", "xray", "env")
OPTIONS = ("--json", "--report", "-h", "--help")


MARKS = {"✖": "x", "✔": "ok"}  # "?" is a mark too, of what is not decided


def main(arguments: "Optional[Sequence[str]]" = None) -> int:
    """Run the command; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _run(given)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; Python would flush, and fail, once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell has it
    return status


def _run(given: "list[str]") -> int:
    _reconfigure()
    _speak(None)  # refusals of --lang itself are said in the locale's language
    if given[:1] and given[0] in GUIDE:
        return _guide(given)
    as_json = "--json" in given
    given, language = _without_language(given)
    try:
        _speak(language)
        return _answer(given, as_json)
    except _Refused as refusal:
        return _refuse(str(refusal), as_json)
    except BrokenPipeError:
        raise
    except Exception as error:
        return _refuse(_bug(error), as_json)


class _Refused(Exception):
    """What was asked cannot be done: one sentence."""


def _bug(error: Exception) -> str:
    """What a bug of ours is called, with the last of our lines that it went through."""
    where, here = "", error.__traceback__
    while here is not None:
        code = here.tb_frame.f_code
        if os.path.dirname(code.co_filename) == os.path.dirname(__file__):  # noqa: PTH120
            name = os.path.basename(code.co_filename)  # noqa: PTH119
            where = f"{name}:{here.tb_lineno}"
        here = here.tb_next
    sentence = say("The doctor itself failed ({error} in {where}): please report it with the text.")
    return sentence.format(error=type(error).__name__, where=where)


def _speak(language: "Optional[str]") -> None:
    """Choose a language: if the console lacks its signs, one that was asked for by name is written
    in UTF-8, and one that was guessed gives way to English."""
    try:
        spoken = words.choose(language)
    except ValueError as error:
        raise _Refused(str(error)) from None
    if spoken == "en" or _holds("诊断"):
        return
    if language is None:
        words.choose("en")
    else:
        _reconfigure("utf-8")


def _holds(text: str) -> bool:
    """Whether what is printed has signs for a text."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _reconfigure(encoding: "Optional[str]" = None) -> None:
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding=encoding, errors="dtype-doctor")


def _instead(error: UnicodeError) -> "tuple[str, int]":
    """What is printed for signs that a console lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(MARKS.get(sign, "?") for sign in lacking), error.end


codecs.register_error("dtype-doctor", _instead)


def _answer(given: "list[str]", as_json: bool) -> int:
    asked = [word for word in given if word.startswith("-") and word != "-"]
    names = [word for word in given if word not in asked]
    unknown = [word for word in asked if word not in OPTIONS]
    if unknown:
        sentence = say("There is no option {option}.").format(option=repr(unknown[0]))
        raise _Refused(f"{sentence}\n{say(USAGE)}")
    if "-h" in asked or "--help" in asked:
        print(f"{say(USAGE)}\n\n{say(HELP)}")
        return 0
    report = "--report" in asked
    if as_json and report:
        raise _Refused(say("Give --json or --report, not both: each is a form of its own."))
    if names[:1] == ["explain"]:
        if report:
            raise _Refused(say("There is no --report of a page, only of a diagnosis."))
        return _explain(names[1:], as_json)
    if len(names) > 1:
        sentence = say("Give one file, not {number}.").format(number=len(names))
        raise _Refused(f"{sentence}\n{say(USAGE)}")
    return _diagnose(names[0] if names else "-", as_json, report)


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
        raise _Refused(sentence.format(name=repr(name), reason=_reason(error))) from None
    if re.search(rb"[A-Za-z\x80-\xff]", content) is None:
        raise _Refused(say("There is no text: give a traceback, with what you write about it."))
    from helpers.doctor.text import diagnose_text

    diagnosis = diagnose_text(content)
    if as_json:
        _print_json(diagnosis.to_dict())
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


def _show(content: Any) -> None:
    """Print a diagnosis, or a page: with colour on a terminal, if rich is there; else plain."""
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        try:
            from helpers.doctor import terminal
        except ImportError:
            pass
        else:
            show = terminal.show_page if isinstance(content, str) else terminal.show
            show(content)
            return
    print(content)


def _explain(labels: "list[str]", as_json: bool) -> int:
    from helpers.doctor import catalogue

    if len(labels) > 1 or not set(labels) <= set(catalogue.labels()):
        sentence = say("There is no page {name}. There are: {known}.")
        known = ", ".join(catalogue.labels())
        raise _Refused(sentence.format(name=repr(" ".join(labels)), known=known))
    if as_json:
        told = [catalogue.told(label) for label in labels or catalogue.labels()]
        _print_json(told[0] if labels else told)
    elif labels:
        _show(catalogue.page(labels[0]))
    else:
        print(catalogue.index())
    return 0


def _print_json(data: Any) -> None:
    """JSON loses no sign: what the console lacks is escaped."""
    import json

    text = json.dumps(data, ensure_ascii=False, indent=2)
    print(text if _holds(text) else json.dumps(data, indent=2))


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


def _refuse(sentence: str, as_json: bool = False) -> int:
    if as_json:
        _print_json({"error": sentence})
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

"""A block for a bug report, without what concerns only the person."""

# ruff: noqa: E501  # patterns are not broken
import os
import platform
import re
import sys
from typing import Union

from helpers.doctor.diagnosis import Diagnosis
from helpers.doctor.plain import page
from helpers.doctor.words import say

MOST = 200  # lines of the pasted text that are kept, from its end
LONG = 2000  # characters of a line: what is longer is no log that anybody reads
SHARED = {"user", "users", "root", "ubuntu", "runner", "admin", "home", "data", "localhost"}

SECRETS = (
    (
        re.compile(
            r"\b(?:hf|ghp|gho|ghs|github_pat|sk|pk|xox[abp]|glpat|AKIA|ASIA|wandb)[-_][\w-]{10,200}"
        ),
        "<token>",
    ),
    (
        re.compile(
            r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\beyJ[\w-]{10,2000}\.[\w-]{10,2000}(?:\.[\w-]{0,2000})?"
        ),
        "<token>",
    ),
    (
        re.compile(
            r"(?i)((?:token|secret|passw(?:or)?d|api[_-]?key|authorization|bearer|cookie)['\"]?\s*[:= ]\s*['\"]?)"
            r"(?:bearer )?[^\s'\",;]{4,}"
        ),
        r"\1<token>",
    ),
    (re.compile(r"(?i)\b[a-f0-9]{32,64}\b"), "<token>"),
    (
        re.compile(r"(?i)(\b[a-z][a-z0-9+.-]{0,20}://)[^\s/@:]{1,200}:[^\s/@]{1,200}@"),
        r"\1<login>@",
    ),
    (re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,6}"), "<e-mail>"),
    (re.compile(r"(?i)([a-z]:\\users\\)[^\\\s\"']+"), r"\1<user>"),
    (re.compile(r"(/(?:home\d*|Users|data/home|mnt/home)/)[^/\s\"':]+"), r"\1<user>"),
    (re.compile(r"\b[\w.-]{1,64}@[\w.-]{1,200}(?=[:#$ ])"), "<user>@<host>"),
    (re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}(?=\b(?!\.\d))"), "<address>"),
    (re.compile(r"\b(?:[0-9a-fA-F]{1,4}:){4,7}[0-9a-fA-F]{1,4}\b"), "<address>"),
    (
        re.compile(
            r"(?i)((?:hostname|host|node|nodelist|nodename|master_addr|server)['\"]?\s*[:=]\s*['\"]?)[\w.-]+"
        ),
        r"\1<host>",
    ),
    (
        re.compile(
            r"\b(?!www\.|github\.|huggingface\.)[\w-]{1,63}(?:\.[\w-]{1,63}){0,6}\.(?:local|internal|lan|corp|intra|cluster|edu|ac\.\w\w)\b"
        ),
        "<host>",
    ),
)


def block(diagnosis: Diagnosis, content: "Union[str, bytes]") -> str:
    """What to paste into an issue: the diagnosis, and the end of what was pasted, cleaned."""
    text = content.decode("utf-8", "replace") if isinstance(content, bytes) else content
    kept = [_cut(line) for line in text[-MOST * LONG :].splitlines()[-MOST:]]
    system = f"Python {platform.python_version()}, {sys.platform}"
    fence = "`" * max(
        3, 1 + max((len(run) for run in re.findall("`+", "\n".join(kept))), default=0)
    )
    whole = [
        "### dtype-doctor",
        fence + "text",
        page(diagnosis),
        fence,
        f"({system})",
        "",
        f"### {say('What was pasted')}",
        fence + "text",
        *kept,
        fence,
    ]
    return scrub("\n".join(whole))


def _cut(line: str) -> str:
    """A line that is too long ends at a blank, so that no secret is cut in half and overlooked."""
    return line if len(line) <= LONG else f"{line[:LONG].rpartition(' ')[0]} ..."


def scrub(text: str) -> str:
    """A text without tokens, logins, home folders, host names, addresses and e-mail addresses, and
    without the names of the person and the machine wherever else they stand."""
    names = {name for match in HOME.findall(text) for name in match if name}
    names |= {os.environ.get("USER", ""), os.environ.get("USERNAME", ""), platform.node()}
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    for name in sorted(names, key=len, reverse=True):
        if len(name) > 2 and name.lower() not in SHARED:
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "<name>", text)
    return text


HOME = re.compile(
    r"/(?:home\d*|Users)/([^/\s\"':<>]{1,64})|(?i:[a-z]:\\users\\)([^\\\s\"'<>]{1,64})"
)

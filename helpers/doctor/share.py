"""A block for a bug report, without what concerns only the person."""

# ruff: noqa: E501  # patterns are not broken
import platform
import re
import sys
from typing import Union

from helpers.doctor.diagnosis import Diagnosis
from helpers.doctor.plain import page
from helpers.doctor.words import say

MOST = 200  # lines of the pasted text that are kept, from its end

SECRETS = (
    (
        re.compile(
            r"\b(?:hf|ghp|gho|ghs|github_pat|sk|pk|xox[abp]|glpat|AKIA|ASIA|wandb)[-_][\w-]{10,}"
        ),
        "<token>",
    ),
    (
        re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\beyJ[\w-]{10,}\.[\w-]{10,}(?:\.[\w-]*)?"),
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
    (re.compile(r"(?i)([a-z][a-z0-9+.-]*://)[^\s/@:]+:[^\s/@]+@"), r"\1<login>@"),
    (re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"), "<e-mail>"),
    (re.compile(r"(?i)([a-z]:\\users\\)[^\\\s\"']+"), r"\1<user>"),
    (re.compile(r"(/(?:home\d*|Users|data/home|mnt/home)/)[^/\s\"':]+"), r"\1<user>"),
    (re.compile(r"\b[\w.-]+@[\w.-]+(?=[:#$ ])"), "<user>@<host>"),
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
            r"\b(?!www\.|github\.|huggingface\.)[\w-]+(?:\.[\w-]+)*\.(?:local|internal|lan|corp|intra|cluster|edu|ac\.\w\w)\b"
        ),
        "<host>",
    ),
)


def block(diagnosis: Diagnosis, content: "Union[str, bytes]") -> str:
    """What to paste into an issue: the diagnosis, and the end of what was pasted, cleaned."""
    text = content.decode("utf-8", "replace") if isinstance(content, bytes) else content
    kept = text.splitlines()[-MOST:]
    system = f"Python {platform.python_version()}, {sys.platform}"
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
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


def scrub(text: str) -> str:
    """A text without tokens, logins, home folders, host names, addresses and e-mail addresses."""
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    return text

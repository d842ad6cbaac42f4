"""A block for a bug report, without what concerns only the person."""

# ruff: noqa: E501, RUF001  # patterns are not broken, and Chinese has its own punctuation
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Union

from helpers.doctor.diagnosis import Diagnosis
from helpers.doctor.evidence import _encoding
from helpers.doctor.plain import page
from helpers.doctor.words import say

MOST = 200  # lines of the pasted text that are kept, from its end
LONG = 2000  # characters of a line: what is longer is no log that anybody reads
NAMES = 64  # names that are looked for everywhere, the most frequent ones
# What many folders and machines are called, and words without which a report says nothing.
SHARED = """
user users root ubuntu runner admin home data localhost public default shared scratch work workspace
project projects group groups model models train test dev code src lib bin opt python conda jovyan
coder ec2-user torch flash attn attention transformers lora peft cuda gpu cpu node host server name
token login address key none null true false
"""

# Of `package@...`, what is a commit or a version, and no machine.
_NO_REVISION = r"(?!(?:[0-9a-f]{7,64}|v?\d+(?:\.\d+){0,2}(?:\.?(?:post|dev|rc|a|b)\d+)?|main|master)(?![\w.-]))"
_WINDOWS = r"(?i:\b[a-z]:(?:\\{1,2}|/)users(?:\\{1,2}|/))"
# A blank is part of a folder's name only where the path goes on.
_FOLDER = r"[^\\/:*?\"<>|\s]{1,64}(?: [^\\/:*?\"<>|\s]{1,64}){0,3}(?=[\\/])|[\w.+-]{1,64}"
_UNIX = r"/(?:home\d{0,3}|[Uu]sers)(?:/(?:users|groups))?/(?!(?:users|groups)/)"
_KEY = r"['\"]?[ \t]{0,8}[:=][ \t]{0,8}['\"]?"
_NODE = r"[\w.-]{1,200}(?:\[[\d,-]{1,200}\])?"

HOMES = (
    re.compile(rf"({_WINDOWS})({_FOLDER})"),
    re.compile(rf"({_UNIX})([\w.+-]{{1,64}})"),
    re.compile(r"((?<![\w/.~])~)([A-Za-z][\w.-]{1,63})(?=/)"),
    re.compile(rf"(\b(?:[A-Z]+_)?(?:USER|LOGNAME|USERNAME){_KEY})([\w.+-]{{1,64}})"),
)
PROMPT = re.compile(
    rf"(?m)^(?:\([\w.-]{{1,64}}\) )?\[?([\w.-]{{1,64}})@{_NO_REVISION}([\w.-]{{1,200}})(?=[:#$ ])"
)
MACHINE = re.compile(rf"(?i)((?<![a-z])(?:hostname|nodename|master_addr){_KEY})({_NODE})")
MACHINES = re.compile(rf"(?i)((?<![a-z])(?:nodelist){_KEY})({_NODE}(?:,{_NODE}){{0,64}})")
# In code and in graphs these stand for other things too.
MAYBE_MACHINE = re.compile(rf"(?i)((?<![a-z])(?:host|node|server){_KEY})([\w.-]{{1,200}})")

SECRETS: "tuple[tuple[re.Pattern[str], Union[str, Callable[[re.Match[str]], str]]], ...]" = (
    (
        re.compile(
            r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[^-]{0,9000}(?:-----END [A-Z ]{0,40}-----)?"
        ),
        "<key>",
    ),
    (
        re.compile(
            r"\b(?:ssh|ecdsa|sk)-[\w@.-]{2,50} AAAA[\w+/=]{8,2000}(?: [^\s@]{1,64}@[^\s@]{1,200})?"
        ),
        "<key>",
    ),
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
            r"(?i)((?:token|secret|passw(?:or)?d|api[_-]?key|authorization|bearer|cookie)['\"]?(?:[ \t]{0,8}[:=][ \t]{0,8}| )['\"]?)"
            r"(?:bearer )?[^\s'\",;]{4,2000}"
        ),
        r"\1<token>",
    ),
    (
        re.compile(
            r"(?i)((?:secret|passw(?:or)?d|passphrase) is |(?:密码|口令) ?(?:是|为|[:=：]) ?)[^\s'\",;，。]{4,200}"
        ),
        r"\1<token>",
    ),
    (  # who knows the address may write there
        re.compile(
            r"(?i)(\bhttps?://[^\s'\"<>]{0,200}?(?:hook|\bbot)[^\s'\"<>/]{0,60}/)[^\s'\"<>]{8,500}"
        ),
        r"\1<token>",
    ),
    (  # a commit, or a model's snapshot, says what was run
        re.compile(
            r"(?i)((?:\bcommit[ :=]{1,3}|/commit/|/tree/|/blob/|snapshots[/\\]{1,2}|@)[a-f0-9]{40}\b)|\b[a-f0-9]{32,64}\b"
        ),
        lambda found: found[1] or "<token>",
    ),
    (
        re.compile(r"(?i)(\b[a-z][a-z0-9+.-]{0,20}://)[^\s/@:]{1,200}(?::[^\s/@]{1,200})?@"),
        r"\1<login>@",
    ),
    (
        re.compile(rf"[\w.+-]{{1,64}}@{_NO_REVISION}[\w-]{{1,63}}(?:\.[\w-]{{1,63}}){{1,6}}"),
        "<e-mail>",
    ),
    *((pattern, r"\1<user>") for pattern in HOMES),
    (
        re.compile(rf"(?<![\w/.+-])[\w.+-]{{1,64}}@{_NO_REVISION}[\w.-]{{1,200}}"),
        "<user>@<host>",
    ),
    (re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}(?=\b(?!\.\d))"), "<address>"),
    (
        # With two groups alone it might be a C++ name: then the first has to be one of a network.
        re.compile(
            r"(?i)(?<![\w:.])(?:(?:[0-9a-f]{1,4}:){1,6}(?::[0-9a-f]{1,4}){2,6}|(?:[0-9a-f]{1,4}:){2,6}:[0-9a-f]{1,4}"
            r"|(?:fe80|f[cd][0-9a-f]{2}|[23][0-9a-f]{3})::[0-9a-f]{0,4})(?:%\w{1,15})?(?!\w|:[\w:])"
        ),
        "<address>",
    ),
    (re.compile(r"\b(?:[0-9a-fA-F]{1,4}:){4,7}[0-9a-fA-F]{1,4}\b"), "<address>"),
    *((pattern, r"\1<host>") for pattern in (MACHINE, MACHINES, MAYBE_MACHINE)),
    (
        re.compile(
            r"(?i)\b(?!www\.|github\.|huggingface\.)[\w-]{1,63}(?:\.[\w-]{1,63}){0,6}\."
            r"(?:(?:local|internal|lan|corp|intra|cluster)(?:(?:\.[\w-]{1,63}){0,3}\.(?:com|net|org|io|ai|cn|de|fr|uk|jp|kr|ch|eu|us|tw))?|(?:edu|ac)\.\w\w|edu)"
            r"(?![\w(-]|\.\w)"
        ),
        "<host>",
    ),
    (
        re.compile(
            r"(?i)\b(?!(?:www\.)?(?:github|huggingface|hf|pytorch|pypi|modelscope|gitee)\.)[\w-]{1,63}(?:\.[\w-]{1,63}){0,6}"
            r"\.(?:com|net|org|io|ai|cn|de|fr|uk|jp|kr|ch|eu|us|tw)(?=:\d{2,5}\b)"
        ),
        "<host>",
    ),
)


def block(diagnosis: Diagnosis, content: "Union[str, bytes]") -> str:
    """What to paste into an issue: the diagnosis, and the end of what was pasted, cleaned."""
    text = content.decode(_encoding(content), "replace") if isinstance(content, bytes) else content
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
    names = Counter(name for name in _names(text) if _is_a_name(name))
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    known = sorted((name for name, _ in names.most_common(NAMES)), key=len, reverse=True)
    if known:
        either = "|".join(map(re.escape, known))
        text = re.sub(rf"(?i)(?<![^\W_])(?:{either})(?![^\W_])", "<name>", text)
    return text


def _names(text: str) -> Iterator[str]:
    """What the person and the machine are called, as far as the text or this machine tell."""
    yield from (os.environ.get("USER", ""), os.environ.get("USERNAME", ""))
    yield from _of_machine(platform.node())
    for pattern in HOMES:
        yield from (found[2].rstrip(".-") for found in pattern.finditer(text))
    for login in PROMPT.finditer(text):
        yield login[1]
        yield from _of_machine(login[2])
    for found in (*MACHINE.finditer(text), *MACHINES.finditer(text)):
        for node in re.findall(_NODE, found[2]):
            yield from _of_machine(node)
    for found in MAYBE_MACHINE.finditer(text):
        if re.fullmatch(r"(?i)[a-z][a-z-]{0,62}\d[a-z0-9.-]{0,100}", found[2]):
            yield from _of_machine(found[2])


def _of_machine(node: str) -> Iterator[str]:
    """A machine's name with its domain and without, and those of a list such as node[01-03,7]."""
    stem, _, listed = node.rstrip(".-]").partition("[")
    if not listed:
        yield stem
        yield stem.partition(".")[0]
    for piece in filter(None, listed.split(",")):
        first, _, last = piece.partition("-")
        if first.isdigit() and (last or first).isdigit():
            for number in range(int(first), min(int(last or first), int(first) + NAMES) + 1):
                yield f"{stem}{number:0{len(first)}}"


def _is_a_name(name: str) -> bool:
    """Whether a text stays readable without it."""
    return len(name) > (4 if name.isdigit() else 2) and name.lower() not in SHARED.split()

"""What a text shows: signs, each with the line that shows it.

Logs are cut, wrapped, indented, prefixed and repeated. A text is read in pieces, each line once, in
two forms: ``compact`` holds letters and digits only, so that a message is found whatever broke its
lines, and ``flat`` is lower case with single blanks, for code, commands and prose. The signs
themselves are data (signs.json).
"""

import codecs
import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional, TypeVar, Union

from helpers.doctor import statements
from helpers.doctor.data import load, pattern

T = TypeVar("T")
PIECE = 2**19  # characters read at a time
SHARE = statements.MOST // 3  # sentences of a piece of a longer text
MOST_OWN = 2**16  # characters at both ends of a piece that are read for code and prose
WORDS = 2**14  # characters at both ends of a piece that are read for sentences
OVERLAP = 4096  # characters of the piece before that are read again, for what lies on the border
SPOTS, MOST_SPOTS = 4, 200  # places at which one sign is kept, and is looked at
LONG = 160  # characters of a quoted line
MOST_CALLS, MOST_FRAMES = 500, 5_000  # of one text
REMEMBERED = 200_000  # lines that are known to be repetitions

# What loggers, launchers and clusters put before a line.
PREFIX = pattern(
    r"^[ \t]*(?:(?:>|\||│)[ \t]?)+"
    r"|^[ \t]*\[(?:rank|default|[\w.-]+:)?\d+\]:?(?:<\w+>:?)?[ \t]?"
    r"|^\((?:[A-Z]\w*[ \t])?[^()\n]{0,40}pid=\d+[^()\n]{0,60}\)[ \t]?"
    r"|^(?:node-?)?\d{1,4}:[ \t]"
    r"|^[\w.-]{1,40}[ \t]{1,8}\|[ \t]"
    r"|^\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?\]?"
    r"[ \t]{1,4}(?:std(?:err|out) [FP] ?)?",
    re.M,
)
ANSI = pattern(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]{0,200}(?:\x07|\x1b\\)|[@-Z\\-_])")
CUT_ANSI = pattern(r"(?:(?<=\s)|^)\[(?:\d{1,2};)*\d{1,2}m|\[0m", re.M)
DIGITS = {ord(digit): "0" for digit in "123456789"}
NOTHING = dict.fromkeys([*range(9), *range(11, 13), *range(14, 27), *range(28, 32), 127])


class Sign(NamedTuple):
    """A sign that was found: its entry in signs.json, the line that shows it, where that is, and
    whether it stands behind the name of an exception, so that it was raised and not only told of.
    """

    id: str
    kind: str
    text: str
    at: int
    last: int
    entry: "dict[str, Any]"
    raised: bool = False


class Evidence(NamedTuple):
    """What was found in a text.

    Attributes:
        signs: by id.
        calls: source text of calls and launch commands, by what is called.
        versions: of packages, as the text names them.
        gpus: names of GPUs.
        frames: file (from the package on) and function of each frame of a traceback.
        libraries: training and serving libraries that the text names.
        sentences: what the person says of dtypes and of what works.
        sizes: in GB, as they are written.
        failed: whether anything looks like an exception, or is said to have failed.
        raised: last lines of tracebacks.
        letters: whether there is a letter or a digit at all.
        garbled: whether much of it is no text.
        loader: the class whose from_pretrained loads the model, as it is written; "" if none does.
    """

    signs: "dict[str, Sign]"
    calls: "list[Call]"
    versions: "dict[str, str]"
    gpus: "tuple[str, ...]"
    frames: "tuple[tuple[str, str], ...]"
    failed: bool
    raised: "tuple[str, ...]"
    libraries: "tuple[str, ...]"
    sentences: "list[statements.Says]"
    sizes: "tuple[float, ...]"
    letters: bool = True
    garbled: bool = False
    loader: str = ""

    def says(self, what: str, *subjects: str) -> bool:
        """Whether a sentence says this of one of these."""
        return any(one.what == what and one.subject in subjects for one in self.sentences)

    def has(self, mark: str) -> bool:
        """Whether one of the signs carries this mark."""
        return any(sign.entry.get(mark) for sign in self.signs.values())

    def shows(self, name: str) -> bool:
        """Whether this is there: a sign, a mark, "what subject" that a sentence says, or this
        Transformers ("transformers 5") or a later one."""
        what, _, subject = name.rpartition(" ")
        if what == "transformers":
            return version(self.versions.get(what)) >= version(subject)
        return name in self.signs or self.has(name) or self.says(what, subject)

    def is_on(self) -> bool:
        """Whether mixed precision is switched on, as far as the text tells."""
        cured = self.says("works with", "flag")  # it was not, before
        return self.has("on") and not (self.has("unsure") or self.has("removed") or cured)

    def is_quantised(self) -> bool:
        """Whether something is quantised, as far as the text tells."""
        seen = "warn-bnb-compute" in self.signs  # what is said without quantising is of another run
        return self.has("quantised") and (seen or not self.has("unquantised"))

    def left_autocast(self) -> bool:
        """Whether the rescue aimed at half precision before, and at float32 in the end."""
        return {"warn-rescued", "rescue-float32"} <= self.signs.keys()

    def reaches_flash_attn(self) -> bool:
        """Whether a frame lies inside of the flash_attn package."""
        return any(map(_is_of_flash_attn, (file for file, _ in self.frames)))

    def caller(self) -> str:
        """The file that called the flash_attn package; "" if no frame shows it."""
        before = ""
        for file, _ in self.frames:
            if _is_of_flash_attn(file):
                return before
            before = before if file.startswith("torch/") else file
        return ""

    def gpus_of(self, *ages: str) -> "list[str]":
        """The GPUs of these ages, which are keys of gpus.json."""
        known = load("gpus.json") if self.gpus else {}
        return [gpu for gpu in self.gpus if any(re.search(known[age], gpu, re.I) for age in ages)]

    def has_only_old_gpus(self) -> bool:
        """Whether every GPU that is named is too old for FlashAttention 2."""
        old = self.gpus_of("before_ampere")
        return bool(old) and len(old) == len(self.gpus)

    def stands_in(self) -> bool:
        """Whether the guide's reference kernel refused, which needs no package and no GPU."""
        return any("reference_kernel" in file for file, _ in self.frames)

    def stage(self, name: str) -> bool:
        """Whether something says that this was training ("train"), inference or evaluation."""
        if name == "train" and self.has("untrained"):
            return False
        return any(sign.entry.get("stage") == name for sign in self.signs.values())


def _is_of_flash_attn(file: str) -> bool:
    return file.startswith("flash_attn") or "/flash_attn/" in file


class Call(NamedTuple):
    """A call or a launch command: what is called, its text, and whether it is there to its end."""

    name: str
    text: str
    whole: bool


def guarded(instead: Any, function: "Callable[..., T]", *arguments: Any) -> T:
    """What a function returns, or this where it fails: a bug in one must not hide the others."""
    try:
        return function(*arguments)
    except Exception:
        import logging  # a tenth of the command's time, for what never happens

        logging.getLogger(__name__).exception("%s failed", function.__name__)
        return instead  # type: ignore[no-any-return]


NOTHING_SAID: "tuple[list[statements.Says], int]" = ([], 0)


def read(text: "Union[str, bytes]") -> Evidence:
    """The evidence in a text of any length. Nothing is refused: bytes are UTF-8, UTF-16 with a mark
    at their beginning, or GB 18030, and what is none of them is replaced."""
    signs: dict[str, Sign] = {}
    calls: dict[str, Call] = {}
    versions: dict[str, str] = {}
    gpus: dict[str, None] = {}
    libraries: dict[str, None] = {}
    raised: dict[str, None] = {}
    sizes: dict[float, None] = {}
    frames: dict[tuple[str, str], None] = {}
    sentences: list[statements.Says] = []
    failed, letters, garbled, at, left = False, False, False, 0, statements.MOST
    loader = ""
    for piece, edge in _pieces(text):
        flat = _flat(piece)
        compact = _compact(flat)
        flat = TORCH.sub("", flat) if "torch." in flat else flat
        letters = letters or bool(compact)
        garbled = garbled or piece.count("\ufffd") > len(piece) / 20
        flat = _unwrapped(flat) if edge else flat
        for entry in load("signs.json")["signs"]:
            if entry["kind"] not in OWN:
                _look(entry, piece, compact if entry["in"] == "compact" else flat, at, signs)
        if edge:  # people write before and behind a log, and not in it
            _look_at_own(piece, flat, at, signs)
        if edge and left > 0:
            part, most = _ends(flat), left
            if len(text) > PIECE:  # what stands behind a log has its share, too
                part, most = _end(flat) if at else flat[:WORDS], min(left, SHARE)
            more, count = guarded(NOTHING_SAID, statements.read, part, most)
            sentences += _as_written(more, TORCH.sub("", re.sub(r"[ \t]+", " ", piece)))
            left -= count
        if edge and len(calls) < MOST_CALLS:
            for call in guarded([], _first_calls, flat):
                calls.setdefault(call.text, call)
        if edge and not loader and (loads := LOADER.search(piece)):
            loader = loads[1]
        listed = edge or "ersion" in flat or "==" in flat
        for name, number in itertools.islice(VERSION.findall(flat) if listed else (), 500):
            versions.setdefault(name.replace("_", "-").replace("pytorch", "torch"), number)
        if edge:
            libraries.update(
                (k, None) for k, any_of in LIBRARIES.items() if any(x in flat for x in any_of)
            )
        if (edge or "NVIDIA" in piece or "GPU" in piece) and any(card in piece for card in CARDS):
            for gpu in GPU.findall(piece)[:50]:
                gpus[" ".join(gpu.split()) if gpu[0].isalpha() else f"RTX {gpu}"] = None
        if "File " in piece and len(frames) < MOST_FRAMES:
            for match in FRAME.finditer(piece):
                path, function = match[1] or match[3], match[2] or match[4]
                frames[(_package(path), function)] = None
        for size in itertools.islice(SIZE.findall(flat), 100) if edge else ():
            sizes[float(size)] = None
        for match in itertools.islice(RAISED.finditer(piece), 50):
            raised[match[0].strip()[:LONG]] = None
        if not failed and any(word in piece for word in ERRORS):
            failed = FAILED.search(piece) is not None
        at += len(piece)
    if "c-own-adapter" in signs:
        signs.pop("p-no-lora", None)
    for sign, subjects in NOT_LEFT_OUT.items():
        told = [one.what for one in sentences if one.subject in subjects]
        if {"works", "works with", "works without"} & set(told):
            signs.pop(sign, None)
    return Evidence(
        signs,
        list(calls.values()),
        versions,
        tuple(gpus),
        tuple(frames),
        failed,
        tuple(raised)[:200],
        tuple(name for name in LIBRARIES if name in libraries),
        sentences,
        tuple(sizes)[:100],
        letters,
        garbled,
        loader,
    )


# "It works without LoRA" is not "there is no LoRA".
NOT_LEFT_OUT = {
    "p-no-lora": ("lora", "dora", "full"),
    "p-no-quant": ("quant",),
    "c-compute-half": ("compute",),
}
SIZE = pattern(r"(?<![\w.])(\d{1,4}(?:\.\d{1,3})?) ?g(?:i?b)?\b")
LIBRARIES = {
    "llamafactory": ("llamafactory", "llama-factory", "train_bash.py"),
    "swift": ("ms-swift", "ms_swift", "swift sft", "swift pt", "swift rlhf", "swift infer"),
    "axolotl": ("axolotl",),
    "unsloth": ("unsloth",),
    "trl": ("sfttrainer", "sftconfig", "dpotrainer", " trl ", "/trl/", "trl=", "trl version"),
    "sentence_transformers": ("sentence_transformers", "crossencoder(", "sentencetransformer("),
    "vllm": ("vllm/", "vllm."),
    "accelerate": ("accelerate launch", "accelerator."),
}
CARDS = (
    *("TX", "rtx", "A1", "A3", "A4", "A6", "A8", "H1", "H2", "H8", "B2", "L2", "L4", "T4", "V100"),
    *("P100", "P40", "MI", "卡", "0 GPU", "0 card"),
)
ERRORS = ("Traceback", "Error", "error:", "Exception", "报错", "错误", "crash", "fail")


def _flat(piece: str) -> str:
    """A piece in lower case with single blanks, without the advice and the example that warnings
    bring along, which are not the person's own."""
    flat = piece.lower()
    if "  " in flat or "\t" in flat:
        flat = re.sub(r"[ \t]+", " ", flat)
    if "mixed-precision" in flat:
        flat = ADVICE.sub("", flat)
    if not flat.isascii():  # Python counts Chinese letters as parts of the words that they touch
        flat = TOUCHING.sub(" ", flat)
    if "dtype=" in flat or "dtype =" in flat:
        flat = MADE.sub("", flat)
    if "=true" in flat:
        flat = ADVISED.sub("", flat)
    if "#" not in flat:
        return flat
    return re.sub(
        r"#[^\n]*\bdtype=[^\n]*|# ?torch_dtype[^\n]*", "", COMMENTED.sub("flag commented out", flat)
    )


def _unwrapped(flat: str) -> str:
    """A piece whose ends, where people write, are without a mail's line breaks."""
    if len(flat) <= 2 * MOST_OWN:
        return statements.unwrapped(flat)
    head, tail = flat[:MOST_OWN], flat[-MOST_OWN:]
    return statements.unwrapped(head) + flat[MOST_OWN:-MOST_OWN] + statements.unwrapped(tail)


def _compact(flat: str) -> str:
    """Letters and digits only."""
    if flat.isascii():  # twenty times as fast
        return flat.translate(NO_LETTERS)
    return re.sub(r"[\W_]+", "", flat)


TORCH = pattern(r"\btorch\.(?=b?float|half\b|double)", re.I)
NO_LETTERS = {code: None for code in range(128) if not chr(code).isalnum()}
ADVICE = pattern(
    r"you\s+should\s+run\s+training\s+or\s+inference\s+using\s+automatic\s+mixed-precision"
    r"(?:[^\n]*?dtype=torch\.b?float16\)|(?:(?!error|\n\n).){0,300}?dtype=torch\.b?float16\)"
    r"|[^\n]*)",
    re.S,
)
TOUCHING = pattern(r"(?<=[\u4e00-\u9fff])(?=[a-z0-9_`])|(?<=[a-z0-9_`])(?=[\u4e00-\u9fff])")
# A tensor of labels or weights is no model, and what an operation returns is none.
MADE = pattern(
    r"\b(?:(?:log_)?softmax|sum|mean|norm|cumsum|tensor|zeros\w{0,5}|ones\w{0,5}|full\w{0,5}|arange|empty\w{0,5}|linspace|eye)\("
    r"[^()\n]{0,160}\bdtype ?= ?(?:torch\.)?float(?:32)?\)?"
)
# What others are quoted to say.
ADVISED = pattern(
    r"(?:\bsa(?:y|ys|id)|\badvice|\banswers?|\bsuggest\w*|\brecommend\w*|建议|都说|让我)[^\n.。]{0,20}"
    r"[\"“'`](?:set |use |add )?(?:--)?(?:bf16|fp16)=true[\"”'`]"
)
COMMENTED = pattern(r"# ?(?:--)?(?:bf16|fp16)\b[^\n]*")
# Python's form, and IPython's.
FRAME = pattern(
    r'File "([^"\n]{1,300})", line \d{1,7}, in ([\w<>]{1,80})'
    r"|^File ([^\s\"][^\n:]{0,300}):\d{1,7}, in (?:\w{1,80}\.){0,4}([\w<>]{1,80})",
    re.M,
)
FAILED = pattern(
    r"Traceback \(most recent|\b[A-Z]\w{2,30}(?:Error|Exception)\b|^Exception:|\berror:"
    r"|\bCUDA error|(?<![没不有])报错|错误|\b(?:crash|fails?|failed)\b|\bError\b",
    re.M,
)
# The last line of a traceback.
RAISED = pattern(
    r"^[ \t]*(?:[\w.]+\.)?([A-Z]\w{2,40}(?:Error|Exception|Interrupt))\b(?::[ \t]*([^\n]*))?$", re.M
)
GPU = pattern(
    r"(?:\b|(?<=[\u4e00-\u9fff]))((?:NVIDIA |Tesla |GeForce |Quadro )*"
    r"(?:(?:RTX|rtx) ?(?:PRO )?(?:A?\d{4}(?: ?(?:Ti|Super|SUPER))*[DSs]?)"
    r"|[2-5]0[5-9]0 ?[Tt]i|[2-5]0[5-9]0 ?(?:D|s|Super|SUPER)?(?= ?(?:显卡|卡|GPU|gpu|card))"
    r"|GTX ?\d{3,4}(?: ?Ti)?|A100|A800|A10G?|A30|A40|A6000|H100|H200|H800|H20|B200|GB200|L4|L40S?"
    r"|L20|T4|V100S?|P100|P40|RTX ?6000|MI\d{3}X?)(?![A-Za-z0-9_.+]))"
)
VERSION = pattern(
    r"\b(transformers|torch|pytorch|flash[-_]attn|peft|accelerate|trl|unsloth|bitsandbytes|vllm"
    r"|xformers|kernels|deepspeed|python|llamafactory|ms-swift|swift|axolotl|cuda)"
    r"(?:[ ]version)?[`'\"]?[ ]?(?:==|=|:|\||是|版本)?[ ]?[`'\"]?v?(\d{1,4}\.\d{1,3}(?:\.\d{1,4})?)"
)


def _pieces(text: "Union[str, bytes]") -> "Iterator[tuple[str, bool]]":
    """A text in pieces, cleaned, without the lines that were there before, and whether a piece is
    the first or one of the last two."""
    seen: set[int] = set()
    for rough, edge in _rough(text):
        if not rough.isascii():
            rough = unicodedata.normalize("NFKC", rough.encode("utf-8", "replace").decode("utf-8"))
        rough = _unpacked(rough.replace("\r\n", "\n"))
        if "\x1b" in rough:
            rough = ANSI.sub("", rough)
        elif "[0m" in rough:
            rough = CUT_ANSI.sub("", rough)
        if "\n\n\n" in rough:
            rough = re.sub(r"\n{3,}", "\n\n", rough)
        rough = PREFIX.sub("", rough.replace("\r", "\n").translate(NOTHING))
        keys = re.sub("0[0.,:%]*", "0", rough.translate(DIGITS)).split("\n")
        lines = rough.split("\n")
        kept = []
        before = None
        for line, key in zip(lines, keys):
            if line == before:
                continue
            before = line
            if len(key) > 12:
                known = hash(key)
                if known in seen:
                    continue
                if len(seen) < REMEMBERED:
                    seen.add(known)
            kept.append(line)
        yield "\n".join(kept), edge


def _unpacked(piece: str) -> str:
    """A piece of a web page or of a JSON body as the text that it carries."""
    if piece.count("\\n") > 2 + 3 * piece.count("\n"):
        piece = piece.replace("\\r", "").replace("\\n", "\n").replace('\\"', '"')
        piece = re.sub(r"\\u001b\[[0-9;]{0,12}m", "", piece)
        piece = re.sub(r"\\u([0-9a-f]{4})", lambda code: chr(int(code[1], 16)), piece)
    if "<br" in piece or "</" in piece:
        piece = TAG.sub("", re.sub(r"<br ?/?>\n?|</(?:p|div|li|pre)>", "\n", piece))
    if "&lt;" in piece or "&quot;" in piece or "&#" in piece:
        import html

        piece = html.unescape(piece)
    return piece


# The tags of a page; in a traceback <module> and <lambda> stand in the same signs.
TAG = pattern(
    r"</?(?:span|div|p|pre|code|b|i|em|strong|a|td|tr|table|body|html|li|ul)\b[^<>]{0,300}>"
)


def _encoding(content: bytes) -> str:
    """How bytes are written: what Windows' shells and Chinese editors save is not UTF-8."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    head = content[:PIECE]
    for name in ("utf-8-sig", "gb18030"):
        try:
            codecs.getincrementaldecoder(name)().decode(head)
        except UnicodeDecodeError:
            continue
        return name
    return "utf-8"


def _rough(text: "Union[str, bytes]") -> "Iterator[tuple[str, bool]]":
    """Pieces of a text that overlap, each ending at a line's end where there is one."""
    encoding = _encoding(text) if isinstance(text, bytes) else ""
    if encoding == "utf-16":  # a piece could begin in the middle of a letter
        text = bytes(text).decode("utf-16", "replace")  # type: ignore[arg-type]
    decoder = codecs.getincrementaldecoder(encoding)("replace") if isinstance(text, bytes) else None
    start, tail = 0, ""
    while start < len(text):
        part = text[start : start + PIECE]
        start += PIECE
        fresh = decoder.decode(part) if decoder and isinstance(part, bytes) else str(part)
        piece = tail + fresh
        if start < len(text) and (end := piece.rfind("\n", len(piece) - OVERLAP)) > 0:
            tail, piece = piece[end + 1 :], piece[: end + 1]
        else:
            # In a line without an end the border is read twice.
            tail = piece[-OVERLAP:] if start < len(text) else ""
        yield piece, start == PIECE or start + PIECE >= len(text)


OWN = ("prose", "code")  # kinds of signs that people write


def _look_at_own(piece: str, flat: str, at: int, signs: "dict[str, Sign]") -> None:
    """Look for what people write in the first or the last piece of a text: at both of its ends."""
    parts = [(piece, flat, at)]
    if len(piece) > 2 * MOST_OWN:
        parts = [(piece[:MOST_OWN], flat[:MOST_OWN], at)]
        parts += [(piece[-MOST_OWN:], flat[-MOST_OWN:], at + len(piece) - MOST_OWN)]
    for part, low, place in parts:
        # The message names dtypes and states none; what is as long keeps every place.
        written = low.replace(statements.HEADLINE, "_" * len(statements.HEADLINE))
        compact = _compact(low)
        for entry in load("signs.json")["signs"]:
            if entry["kind"] in OWN and entry["id"] not in signs:
                _look(entry, part, compact if entry["in"] == "compact" else written, place, signs)


def _look(
    entry: "dict[str, Any]", piece: str, text: str, at: int, signs: "dict[str, Sign]"
) -> None:
    known = signs.get(entry["id"])
    found = next((literal for literal in entry["any"] if literal in text), None)
    if found is None:
        return
    spots: list[tuple[int, int]] = []
    if "match" not in entry:
        start = text.find(found)
        spots = [(start, start + len(found)), (text.rfind(found), 0)]
    elif entry.get("near"):
        # The same line, or the one before, where a long path was broken off.
        start = text.find(found)
        around = text[max(start - 400, 0) : start + 200]
        spots = [(start, start + len(found))] if _pattern(*entry["match"]).search(around) else []
    else:
        found_in = _pattern(*entry["match"]).finditer(text)
        for number, match in enumerate(itertools.islice(found_in, MOST_SPOTS)):
            if entry.get("negatable") and (
                NEGATED.search(text[max(match.start() - 40, 0) : match.start()])
                or GONE.match(text, match.end())
            ):
                continue
            if entry["kind"] in OWN and _is_only_told(entry, text, match.start()):
                continue
            spots = [*spots[:1], match.span()]
            if number > SPOTS:
                break
    if not spots:
        return
    share = len(piece) / (len(text) or 1)
    first, last = (at + int(spot[0] * share) for spot in (spots[0], spots[-1]))
    shown = spots[-1] if entry.get("checked") else spots[0]  # which says what was at the error
    raised = any(BEHIND.search(text[max(spot[0] - 24, 0) : spot[0]]) for spot in spots)
    if known is not None and not entry.get("checked"):
        signs[entry["id"]] = known._replace(last=last, raised=known.raised or raised)
        return
    quoted = _quote(piece, text[shown[0] : shown[1]], entry["in"] == "compact")
    if entry["kind"] in ("warning", "log") and statements.ELSEWHERE.search(quoted):
        return
    signs[entry["id"]] = Sign(entry["id"], entry["kind"], quoted, first, last, entry, raised)


def _is_only_told(entry: "dict[str, Any]", text: str, place: int) -> bool:
    """Whether what is found at a place is a guess, or of another run."""
    sentence = statements.around(text, place)
    states = entry["kind"] == "prose" and {"for", "removed", "on"} & entry.keys()
    guess = states and statements.GUESSES.search(sentence)
    return bool(guess or statements.ELSEWHERE.search(sentence))


BEHIND = pattern(r"(?:error|exception)\W{0,3}$")


NEGATED = pattern(
    r"(?:\b(?:no|not|never|without|removed?)\b|n't|没有?|未|不)\s*(?:[\w-]+ ?){0,3}[`'\"(]?$"
    r"|\b(?:told|advised|suggested)\b[^\n]{0,36}$|# ?(?:\w+ ?= ?)?$|\bimport [\w, ]*$"
)
GONE = pattern(r"\W{0,3}(?:\([^)\n]{0,40}\))?\W{0,3}(?:注释|去掉|删|was removed|is commented)")


@functools.cache
def _pattern(*alternatives: str) -> "re.Pattern[str]":
    return re.compile("|".join(alternatives), re.M)


def _as_written(said: "list[statements.Says]", piece: str) -> "Iterator[statements.Says]":
    """Sentences with the capitals that they have in the text."""
    low = piece.lower()
    for one in said:
        start = low.find(one.text.strip()) if len(low) == len(piece) else -1
        written = piece[start : start + len(one.text.strip())] if start >= 0 else one.text
        yield one._replace(text=written.strip())


def _quote(piece: str, matched: str, compact: bool) -> str:
    """The line of a piece that shows a match; what was matched where lines were broken."""
    lines = piece.split("\n")
    for head in (matched, matched[:24]):  # all of it, or its beginning where the line was broken
        head = head.strip().partition("\n")[0]
        for line in lines:
            low = re.sub(r"[ \t]+", " ", line.lower())
            forms = (low, TORCH.sub("", low))  # what is read for messages, and for code and prose
            if any(head in (_compact(form) if compact else form) for form in forms):
                line = line.strip()
                return line if len(line) <= LONG else f"{line[: LONG - 3]}..."
    return matched[:LONG]


COMMAND = pattern(
    r"(?:llamafactory-cli train|train_bash\.py|\bswift (?:sft|pt|rlhf|dpo)\b|\btorchrun\b"
    r"|accelerate launch|\bdeepspeed (?=[-\w])|xtuner train|python3? (?:-m |-u )*[\w./-]+(?:\.py)?)"
    r"[^\n]*(?:\\ *\n[^\n]*)*(?:\n *--[^\n]*)*"
)
YAML = pattern(r"(?:^[ \-#]*[\w.-]+:(?: [^\n]*)?\n?){5,200}", re.M)
CALL = pattern(
    r"([\w.]*(?:from_pretrained|trainingarguments|sftconfig|dpoconfig|grpoconfig|trainingargs"
    r"|bitsandbytesconfig|crossencoder|sentencetransformer|huggingfaceembeddings|flagreranker"
    r"|flagmodel|pipeline|accelerator|from_config|load_model|fastlanguagemodel\.get_peft_model))\("
)
# What casts the model at the end of the line that loads it.
CAST = pattern(r"(?:\.\w{1,20}\([^()\n]{0,40}\)){0,3}\.(?:half|bfloat16|to)\([^()\n]{0,40}\)")
LOADER = pattern(r"\b((?!PeftModel\b)[A-Z]\w{0,60}(?:Model|For[A-Z]\w{2,60}))\.from_pretrained\(")
REACH = 1200  # characters of one call


def _ends(flat: str) -> str:
    """Both ends of a piece: people write before and behind a log."""
    return flat if len(flat) <= 2 * WORDS else f"{flat[:WORDS]}\n{flat[-WORDS:]}"


def _end(flat: str) -> str:
    return "\n".join(flat[-WORDS:].split("\n")[-SHARE:])


def _first_calls(flat: str) -> "list[Call]":
    return list(itertools.islice(_calls(flat), MOST_CALLS))


def _calls(flat: str) -> Iterator[Call]:
    if "--" in flat:
        for match in COMMAND.finditer(flat):
            text = match[0][: 4 * REACH]
            if text.count("--") >= 3:
                yield Call("command", text, "..." not in text and "…" not in text)
    if any(key in flat for key in ("batch_size:", "num_train_epochs:", "do_predict:")):
        for match in YAML.finditer(flat):
            yield Call("yaml", match[0], "..." not in match[0])
    if "(" in flat:
        for match in CALL.finditer(flat):
            inside, depth = flat[match.end() : match.end() + REACH], 1
            end = None
            for place, sign in enumerate(inside):
                depth += (sign == "(") - (sign == ")")
                if depth == 0:
                    end = place
                    break
            text = inside[:end]
            code = "\n".join(line.partition("#")[0] for line in text.split("\n"))
            whole = end is not None and not re.search(r"\.\.\.|…|\*\*\w", text)
            behind = CAST.match(flat, match.end() + end + 1) if end is not None else None
            yield Call(match[1], code + behind[0] if behind else code, whole)


def _package(path: str) -> str:
    """The part of a frame's path after site-packages, with forward slashes."""
    path = path.replace("\\", "/")
    return re.split(r"(?:site|dist)-packages/", path)[-1]


def version(text: "Optional[str]") -> "tuple[int, ...]":
    """A version as numbers that compare; empty for None."""
    return tuple(int(part) for part in re.findall(r"\d+", text or "")[:3])

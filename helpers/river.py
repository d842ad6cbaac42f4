"""The dtype river: one picture of an X-ray, as SVG, as text and as data.

Stations from left to right, one row for all layers that are alike. A wide line is 32 bits, a thin
one 16; every mark is a symbol and words as well as a colour.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from helpers.reading import Layer, XRay
    from helpers.tracer import Origin

COLUMNS = 100  # of a terminal
WIDTH = 760  # of the picture, in its own units; about a notebook's cell in pixels
SYMBOL = {True: "✔", False: "✖", None: "⚠"}
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "float64": 64}
# All have 4.5:1 against the white that is written on them, and 3:1 against JupyterLab's dark page.
COLOUR = {
    "bfloat16": "#1565c0",
    "float16": "#8e44ad",
    "float32": "#c2410c",
    "float64": "#c2410c",
    "✔": "#2e7d32",
    "✖": "#c62828",
    "⚠": "#a15c00",
    "": "#6b7280",
}
FLAG = {"": "", "first": "▼ float32 comes in here", "again": "▼ float32 comes in again here"}
LEGEND = "▲ float32, ✔ accepted, ✖ refused or failed"


class Stop(NamedTuple):
    """A station of a row.

    Attributes:
        name: of the station.
        dtype: what passes there, in words; "" where nothing is known.
        came_in: the float32 that did it comes in here: "first", or "again" after a narrow station.
        mark: of a gate or the end of a row: ✔ accepted, ✖ refused or failed, ⚠ could not tell.
        words: what the mark means.
        note: why; it stands below the row.
    """

    name: str
    dtype: str
    came_in: str = ""
    mark: str = ""
    words: str = ""
    note: str = ""


class Run(NamedTuple):
    """Alike layers that follow each other: the names of the first and the last, and how many."""

    first: str
    last: str
    size: int


class Row(NamedTuple):
    """All layers that are alike: what to call them, their path, and the road they share."""

    label: str
    path: str
    runs: tuple[Run, ...]
    stops: tuple[Stop, ...]


class River(NamedTuple):
    """What is drawn: the verdict, where it was decided, the rows and the sentences below."""

    subject: str
    ok: bool | None
    verdict: str
    at: str
    rows: tuple[Row, ...]
    first_float32: str
    harmless: tuple[str, ...]
    notes: tuple[str, ...]


def river(xray: "XRay") -> River:
    """An X-ray with its alike layers folded."""
    at = xray.at or ""
    origin = xray.first_float32
    rows = _rows(xray, at.partition(", ")[0])
    return River(
        xray.subject,
        xray.ok,
        xray.verdict.removesuffix(f" ({at})"),
        at,
        tuple(_marked(rows, origin) if origin else rows),
        str(origin or ""),
        tuple(_harmless(xray)),
        xray.notes,
    )


def data(xray: "XRay") -> dict[str, Any]:
    """The river as dictionaries, lists and words, for ``json``."""
    found = river(xray)
    rows = [
        {
            **row._asdict(),
            "runs": [run._asdict() for run in row.runs],
            "stops": [stop._asdict() for stop in row.stops],
        }
        for row in found.rows
    ]
    lists = {"rows": rows, "harmless": list(found.harmless), "notes": list(found.notes)}
    return {**found._asdict(), **lists}


# Rows


def _rows(xray: "XRay", failed: str) -> list[Row]:
    """The layers, folded; ``failed`` is the path of the module that raised."""
    ends = {len(xray.layers) - 1: _end(xray)} if _ends_at_its_gate(xray, failed) else {}
    folded: dict[tuple[str, tuple[Stop, ...]], list[Run]] = {}
    ends_of: dict[str, tuple[int, str, str]] = {}  # of alike paths: how many, first and last name
    latest: dict[tuple[str, tuple[Stop, ...]], int] = {}
    for number, layer in enumerate(xray.layers):
        path = _template(layer.name)
        place, first, _ = ends_of.get(path, (0, layer.name, ""))
        ends_of[path] = (place + 1, first, layer.name)
        key = (path, tuple(_stops(layer, ends.get(number))))
        runs = folded.setdefault(key, [])
        if runs and latest[key] == place - 1:
            runs[-1] = Run(runs[-1].first, layer.name, runs[-1].size + 1)
        else:
            runs.append(Run(layer.name, layer.name, 1))
        latest[key] = place
    rows = [
        Row(*_names(runs, *ends_of[path][1:]), tuple(runs), stops)
        for (path, stops), runs in folded.items()
    ]
    return [*rows, _broken(xray, failed)] if xray.error_type and not ends else rows


def _ends_at_its_gate(xray: "XRay", failed: str) -> bool:
    """Whether it was the last attention call that raised."""
    if xray.error_type is None or not xray.layers or xray.layers[-1].accepted:
        return False
    return xray.layers[-1].accepted is False or xray.layers[-1].name == failed


def _end(xray: "XRay") -> Stop:
    said = f"{xray.error_type}: {xray.error}".rstrip(": ")
    mark, words = (SYMBOL[xray.ok], "fails here" if xray.ok is False else "stops here")
    return Stop("end", "", mark=mark, words=words, note=f"{mark} {said}")


def _stops(layer: "Layer", end: Stop | None) -> Iterator[Stop]:
    """The stations of a layer, with the rescue cast before the gate, and its end if it failed."""
    for name, dtype in layer.stations:
        if name != "gate":
            yield Stop(name, dtype)
    if layer.rescue is not None:
        why = f"rescue cast: {layer.rescue}"
        if layer.after_rescue is not None:
            yield Stop("rescue cast", layer.after_rescue, note=why)
        elif end is not None:
            yield end._replace(name="rescue cast", note=f"{why}. {end.note}")
            return
    if layer.after_rescue is not None:
        words = {True: "accepts", False: "refuses", None: "not told, gets"}[layer.accepted]
        yield Stop("gate", layer.after_rescue, mark=SYMBOL[layer.accepted], words=words)
    elif end is not None:
        yield end._replace(name="attention")


def _broken(xray: "XRay", failed: str) -> Row:
    """The row of a pass that ended between the gates: what its operations say of the road there."""
    stops = []
    seen = [] if xray.layers else [("embedding", ("embed",))]
    for station, words in (*seen, ("norm", ("norm", "ln_"))):
        for one in reversed(xray.operations):
            where = f"{one.module.rpartition('.')[2]} {one.name}".lower()
            if one.outputs and any(w in where for w in words) and "rot" not in where:
                stops.append(Stop(station, " and ".join(dict.fromkeys(one.outputs))))
                break
    end = _end(xray)._replace(name=failed.rpartition(".")[2] or "model")
    label = _names([Run(failed, failed, 1)], failed, failed)[0]
    return Row(label, failed, (), (*stops, end))


def _template(path: str) -> str:
    return ".".join("N" if part.isdecimal() else part for part in path.split("."))


def _names(runs: Sequence[Run], first: str, last: str) -> tuple[str, str]:
    """What to call the layers of a row, and their path: ``layers 0-79: same``, and
    ``model.layers.0-79.self_attn``. ``first`` and ``last`` are the ends of all alike paths, of
    which the row may be a part; the numbers in which they differ are the layers'."""
    parts = first.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    counted = [i for i in numbers if parts[i] != last.split(".")[i]] or numbers[:1]
    if not counted:
        return parts[-1] or "the model itself", first

    def number(name: str) -> str:
        return ".".join(name.split(".")[i] for i in counted)

    def between(run: Run) -> str:
        ends = dict.fromkeys((number(run.first), number(run.last)))
        return "-".join(ends)

    count = sum(run.size for run in runs)
    some = ", ".join([*map(between, runs[:6]), *(["…"] if len(runs) > 6 else [])])
    label = f"layer {some}" if count == 1 else f"layers {some}: same"
    if len(runs) > 1:
        label = f"{count} layers: {some}: same"
    for i in numbers:
        ends = dict.fromkeys((runs[0].first.split(".")[i], runs[-1].last.split(".")[i]))
        parts[i] = "-".join(ends) if len(runs) == 1 else "*" if len(ends) > 1 else parts[i]
    return label, ".".join(parts)


# Where float32 came in


@lru_cache(maxsize=256)
def _kinds(dtype: str) -> tuple[str, ...]:
    """The floating dtypes that some words name."""
    return tuple(dict.fromkeys(re.findall(r"\bb?float(?:16|32|64)\b", dtype)))


def _is_wide(dtype: str) -> bool:
    return any(BITS[kind] > 16 for kind in _kinds(dtype))


def _marked(rows: list[Row], origin: "Origin") -> list[Row]:
    """The rows with the stop marked where the float32 came in: the station of its module in its
    layer, or else the first float32 of a row."""
    wide = [i for i, row in enumerate(rows) if any(_is_wide(stop.dtype) for stop in row.stops)]
    own = [i for i in wide if _holds(rows[i], origin.module)]
    if not wide:
        return rows
    at = (own or wide)[0]
    row = rows[at]
    places = [i for i, stop in enumerate(row.stops) if _is_wide(stop.dtype)]
    named = [i for i in places if row.stops[i].name == _station(origin, row)]
    place = (named or places)[0]
    narrow = [i for i in range(places[0], place) if i not in places]
    stops = list(row.stops)
    stops[place] = stops[place]._replace(came_in="again" if narrow else "first")
    return [*rows[:at], row._replace(stops=tuple(stops)), *rows[at + 1 :]]


def _holds(row: Row, module: str) -> bool:
    """Whether a module belongs to one of the layers of a row."""
    for run in row.runs or (Run(row.path, row.path, 1),):
        ends = [_to_number(name) for name in (run.first, run.last)]
        depth = ends[0].count(".") + 1
        own = ".".join(module.split(".")[:depth])
        if _template(own) == _template(ends[0]) and (
            _numbers(ends[0]) <= _numbers(own) <= _numbers(ends[1])
        ):
            return True
    return False


def _to_number(path: str) -> str:
    """A path up to its last number, which is where a layer has its norms too."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else path


def _numbers(path: str) -> list[int]:
    return [int(part) for part in path.split(".") if part.isdecimal()]


def _station(origin: "Origin", row: Row) -> str:
    """The station whose work a module does, by its name."""
    words = f"{origin.module.rpartition('.')[2]} {origin.function}".lower()
    last = row.runs[-1].last if row.runs else row.path
    attention = _template(last)
    module = _template(origin.module)
    if "rot" in words or "rope" in words:
        return "rotary"
    if "cache_utils.py" in origin.line:
        return "cache"
    if "embed" in words or "embedding" in origin.operation:
        return "embedding"
    inside = module.startswith(f"{attention}.")
    if "norm" in words or "ln_" in words:
        return "q/k norm" if inside else "norm"
    return "projection" if inside else "attention input" if module == attention else ""


def _harmless(xray: "XRay") -> Iterator[str]:
    """One line for each kind of float32 that went nowhere."""
    kinds: dict[str, dict[str, int]] = {}
    for one in xray.harmless:
        modules = kinds.setdefault(one.what, {})
        where = one.modules or "the model itself"
        modules[where] = modules.get(where, 0) + one.times
    for what, modules in kinds.items():
        times = sum(modules.values())
        yield f"{what}, {times} {'time' if times == 1 else 'times'}: {', '.join(modules)}"


def _title(row: Row) -> str:
    return " · ".join(dict.fromkeys((row.label, row.path or "the model itself")))


# Text


def text(xray: "XRay") -> str:
    """The river for a terminal, at most 100 columns wide."""
    found = river(xray)
    lines = [
        *_wrapped(f"{SYMBOL[found.ok]} ", found.verdict),
        *_wrapped("  ", found.subject),
        *(_wrapped("  at ", found.at) if found.at else ()),
    ]
    for row in found.rows:
        lines += ["", *_wrapped("", _title(row))]
        cells = [_cell(stop) for stop in row.stops]
        for start, stop in _pieces(cells):
            lines += _row_text(cells[start:stop], start > 0)
        lines += [line for stop in row.stops if stop.note for line in _wrapped("  ", stop.note)]
    lines.append("")
    if found.first_float32:
        lines += _wrapped("▼ First float32 that matters: ", found.first_float32)
    lines += [line for one in found.harmless for line in _wrapped("· Harmless float32: ", one)]
    lines += [line for note in found.notes for line in _wrapped("· ", note)]
    return "\n".join(line.rstrip() for line in [*lines, f"· {LEGEND}"])


def _cell(stop: Stop, short: bool = False) -> list[str]:
    """The words of a stop: its flag, its name, its mark, what passes."""
    mark = [f"{stop.mark} {stop.words}"] if stop.mark else []
    return [FLAG[stop.came_in], _cut(stop.name, 24), *mark, *_dtypes(stop.dtype, short)]


@lru_cache(maxsize=256)  # a model has few, and each of its rows asks for them again
def _dtypes(dtype: str, short: bool) -> tuple[str, ...]:
    """A dtype, or several under each other; of more than three parts only how many have it."""
    parts = re.split(r", | and ", dtype) if dtype else []
    if len(parts) > 3:
        kinds = [part.rpartition(" ")[2] for part in parts]
        parts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
    wide = [_is_wide(part) for part in parts]
    if short:
        parts = [re.sub(r"\w+", lambda word: SHORT.get(word[0], word[0]), part) for part in parts]
    indent = "  " if any(wide) else ""
    return tuple(
        f"{'▲ ' if one else indent}{_cut(part, 18)}" for one, part in zip(wide, parts, strict=True)
    )


def _pieces(cells: list[list[str]]) -> Iterator[tuple[int, int]]:
    """How many cells fit beside each other, as slices."""
    start, used = 0, 0
    for i, cell in enumerate(cells):
        width = max(map(len, cell[1:])) + 3
        if used + width > COLUMNS - 4 and i > start:
            yield start, i
            start, used = i, 0
        used += width
    if cells:
        yield start, len(cells)


def _row_text(cells: list[list[str]], goes_on: bool) -> list[str]:
    """Cells beside each other, an arrow before what passes."""
    widths = [max(map(len, cell[1:])) for cell in cells]
    starts = [4 + sum(widths[:i]) + 3 * i for i in range(len(cells))]
    flags = [
        " " * min(start, COLUMNS - len(flag)) + flag
        for start, (flag, *_) in zip(starts, cells, strict=True)
        if flag
    ]
    lines = []
    for level in range(1, max(map(len, cells))):
        arrow = " → " if level == 2 else "   "
        words = [cell[level] if level < len(cell) else "" for cell in cells]
        line = arrow.join(word.ljust(width) for word, width in zip(words, widths, strict=True))
        lines.append(f" {arrow if goes_on else '   '}{line}")
    return [*flags, *lines]


def _wrapped(before: str, words: str, columns: int = COLUMNS) -> list[str]:
    return textwrap.wrap(
        _clean(words),
        columns,
        initial_indent=before,
        subsequent_indent=" " * min(len(before), 4),
        break_on_hyphens=False,
    ) or [before]


def _clean(words: str) -> str:
    """On one line, and without what a terminal or XML takes for a command."""
    one_line = " ".join(words.split())
    if one_line.isprintable():
        return one_line
    return "".join(c if c.isprintable() else "\ufffd" for c in one_line)


def _cut(words: str, length: int) -> str:
    words = _clean(words)
    return words if len(words) <= length else f"{words[: length - 1]}…"


# The picture


def html(xray: "XRay", headline: bool = True) -> str:
    """The picture, and the same as text for who cannot see it; without the headline where the
    verdict stands above."""
    # Of a notebook that it does not trust yet, JupyterLab shows no drawing but all of its words:
    # they have no size. And it takes a bare `hidden` away, so that the verdict is there.
    verdict = escape(_clean(f"{SYMBOL[xray.ok]} {xray.verdict}"))
    untrusted = f"<p hidden>{verdict} (The picture shows once the cell has run.)</p>"
    return (
        f'<div class="{"dg-outcome " if headline else ""}dg-river">'
        f'<div class="dg-picture" style="font-size: 0px" tabindex="0" role="group"'
        f' aria-label="The dtype river">{svg(xray, headline)}</div>{untrusted if headline else ""}'
        "<details><summary>The same as text</summary>"
        '<pre tabindex="0" role="group" aria-label="The dtype river as text">'
        f"<code>{escape(text(xray))}</code></pre></details></div>"
    )


def svg(xray: "XRay", headline: bool = True) -> str:
    """The picture as an SVG element, in the colours and fonts of the page around it."""
    found, words = river(xray), text(xray)
    short = any(sum(_widths(row, False)) > WIDTH for row in found.rows)
    drawing = _Drawing(max([WIDTH, *(sum(_widths(row, short)) for row in found.rows)]), short)
    if headline:
        drawing.say(f"{SYMBOL[found.ok]} {found.verdict}", size=16, bold=True, lines=3)
        drawing.say(found.subject, size=13)
    if found.at:
        drawing.say(f"at {found.at}", size=12, lines=2)
    for row in found.rows:
        drawing.row(row)
    drawing.y += 10
    if found.first_float32:
        drawing.say(f"▼ First float32 that matters: {found.first_float32}", size=13, lines=4)
    for one in found.harmless:
        drawing.say(f"· Harmless float32: {one}", size=12)
    for note in (*found.notes, f"{LEGEND}; a wide line is 32 bits, a thin one 16"):
        drawing.say(f"· {note}", size=12, lines=3)
    name = f"dg-river-{sha256(words.encode()).hexdigest()[:12]}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="{name}-title"'
        f' aria-describedby="{name}-desc" viewBox="0 0 {drawing.width} {drawing.y + 6}"'
        f' style="display: block; width: 100%; max-width: {drawing.width * 5 // 4}px; height: auto;'
        " color: var(--jp-content-font-color1, inherit);"
        ' font-family: var(--jp-ui-font-family, system-ui, sans-serif)" fill="currentColor">'
        f'<title id="{name}-title">{escape(_clean(f"Dtype river of {found.subject}"))}</title>'
        f'<desc id="{name}-desc">{escape(_spoken(found))}</desc>{"".join(drawing.parts)}</svg>'
    )


def _spoken(found: "River") -> str:
    """The picture as sentences, one a station, for who listens."""
    rows = []
    for row in found.rows:
        stops = [
            _clean(
                f"{stop.name}: "
                + ", ".join(filter(None, (stop.dtype, FLAG[stop.came_in], stop.mark, stop.words)))
            ).rstrip(": ")
            for stop in row.stops
        ]
        rows.append(f"{_clean(row.label)}. {'; '.join(stops)}.")
    first = f" First float32 that matters: {found.first_float32}." if found.first_float32 else ""
    return _clean(f"{found.verdict}. {' '.join(rows)}{first}")


def _widths(row: Row, short: bool) -> list[int]:
    """What the columns of a row need, in units of the picture."""
    needs = []
    for stop in row.stops:
        _, name, *words = _cell(stop, short)
        longest = max(map(len, words), default=0)
        needs.append(max(7 * len(name), 8 * longest, 40) + 14)
    return needs


class _Drawing:
    """Lines of text and rows of stations, one below the other; ``y`` is where the next begins."""

    def __init__(self, width: int, short: bool) -> None:
        self.width = width
        self.short = short
        self.y = 0
        self.parts: list[str] = []

    def say(self, words: str, size: int, bold: bool = False, lines: int = 1, x: int = 4) -> None:
        """A sentence, wrapped; what does not fit is in its tooltip."""
        columns = int((self.width - x - 22) / (size * (0.58 if bold else 0.54)))
        wrapped = _wrapped("", words, columns)
        if len(wrapped) > lines:
            wrapped[lines - 1 :] = [_cut(" ".join(wrapped[lines - 1 :]), columns - 2)]
        is_cut = wrapped[-1].endswith("…")
        full = f"<title>{escape(_clean(words))}</title>" if is_cut else ""
        spans = "".join(
            f'<tspan x="{x if not i else x + 14}" y="{self.y + (i + 1) * size * 5 // 4 + 2}">'
            f"{escape(line)}</tspan>"
            for i, line in enumerate(wrapped)
        )
        style = f"font-size: {size}px{'; font-weight: 600' if bold else ''}"
        self.parts.append(f'<text style="{style}">{full}{spans}</text>')
        self.y += len(wrapped) * size * 5 // 4 + 4

    def row(self, row: Row) -> None:
        """The label, the names, the line with its markers, what passes there, and why."""
        self.y += 14
        self.parts.append(
            f'<path d="M4 {self.y}H{self.width - 4}" stroke="currentColor" stroke-opacity=".25"/>'
        )
        self.y += 2
        self.say(_title(row), size=13, bold=True)
        widths = _widths(row, self.short)
        spare = min((self.width - sum(widths)) // max(len(widths), 1), 60)
        centres = [
            sum(widths[:i]) + spare * i + (width + spare) // 2 for i, width in enumerate(widths)
        ]
        line = self.y + (56 if any(stop.came_in for stop in row.stops) else 38)
        ends = [*centres[1:], min(centres[-1] + 40, self.width - 4)] if centres else []
        for i, (stop, x, end) in enumerate(zip(row.stops, centres, ends, strict=True), 1):
            if i < len(ends) or stop.mark == "✔":
                self._water(stop, x, end, line)
        for stop, x in zip(row.stops, centres, strict=True):
            self._stop(stop, x, line)
        tallest = max((len(_cell(stop, self.short)) - 2 for stop in row.stops), default=0)
        self.y = line + 22 + 15 * tallest
        for stop in row.stops:
            if stop.note:
                self.say(stop.note, size=12, lines=3)

    def _water(self, stop: Stop, x: int, end: int, y: int) -> None:
        """What flows on from a stop, a strand for each dtype."""
        strands = _kinds(stop.dtype) or ("",)
        heights = [BITS.get(dtype, 8) * 3 // 8 for dtype in strands]
        top = y - sum(heights) / 2
        for dtype, height in zip(strands, heights, strict=True):
            self.parts.append(
                f'<path d="M{x} {top}H{end}V{top + height}H{x}z" fill="{COLOUR[dtype]}"/>'
            )
            top += height

    def _stop(self, stop: Stop, x: int, y: int) -> None:
        flag, name, *words = _cell(stop, self.short)
        kinds = sorted(_kinds(stop.dtype), key=BITS.__getitem__)
        bits = BITS[kinds[-1]] if kinds else 0
        colour = COLOUR[stop.mark or (kinds[-1] if kinds else "")]
        ring = ' stroke="currentColor" stroke-width="3"' if stop.came_in else ""
        if stop.mark:
            shape = f"M{x - 6} {y - 14}h12l8 8v12l-8 8h-12l-8 -8v-12z"
        elif bits > 16:
            shape = f"M{x} {y - 16}l16 16l-16 16l-16 -16z"
        else:
            shape = f"M{x - 12} {y}a12 12 0 1 0 24 0a12 12 0 1 0 -24 0z"
        self.parts.append(f'<path d="{shape}" fill="{colour}"{ring}/>')
        inside = stop.mark or str(bits or "?")
        self._word(inside, x, y + 4, "fill: #fff; font-size: 12px; font-weight: 700")
        self._word(name, x, y - 22, "font-size: 12px")
        if flag:
            self._word(flag, x, y - 38, "font-size: 12px; font-weight: 700")
        for i, word in enumerate(words):
            style = "font-size: 12px; font-family: var(--jp-code-font-family, monospace)"
            self._word(word.strip(), x, y + 31 + 15 * i, style, stop.dtype)

    def _word(self, word: str, x: int, y: int, style: str, full: str = "") -> None:
        half = 4 * len(word) if word in FLAG.values() else 0
        x = max(min(x, self.width - half), half)
        more = f"<title>{escape(_clean(full))}</title>" if full else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="middle" style="{style}">'
            f"{more}{escape(word)}</text>"
        )

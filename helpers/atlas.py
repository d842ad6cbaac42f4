"""The atlas: for every model type of Transformers whose class says that it supports
FlashAttention-2, what an X-ray of its default config shows in six columns.

``make atlas`` runs it (tools/atlas.py) and stores it in data/atlas; here it is read.
"""

import csv
import difflib
import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from helpers import kept
from helpers.errors import PlanError

if TYPE_CHECKING:
    from helpers.view import Table

FOLDER = Path(__file__).parent / "data" / "atlas"
PAGE = Path(__file__).resolve().parents[1] / "ATLAS.md"
NORMS = "bfloat16, float32 norms"


class Column(NamedTuple):
    """How a model is made and called: as the arguments of ``xray``."""

    dtype: str
    autocast: str | None = None
    after_load: tuple[str, ...] = ()


COLUMNS = {
    "float32": Column("float32"),
    "bfloat16": Column("bfloat16"),
    "float16": Column("float16"),
    NORMS: Column("bfloat16", after_load=("norms_float",)),
    "float32, autocast": Column("float32", autocast="bfloat16"),
    "bfloat16, LoRA": Column("bfloat16", after_load=("lora",)),
}
PASSES, FAILS, UNKNOWN = "passes", "fails", "could not tell"
NO_CALL = "no attention call"  # in this forward, of a model that makes some elsewhere
SYMBOL = {PASSES: "✔", FAILS: "✖", UNKNOWN: "?"}
# flash-attn's text, csrc/flash_attn/flash_api.cpp
REFUSED = "FlashAttention only support fp16 and bf16 data type"


class Cell(NamedTuple):
    """What one X-ray showed.

    Attributes:
        model_type, model: the model type and the class that was built.
        column: a name from COLUMNS.
        inputs: the names of what the forward got.
        verdict: PASSES, FAILS or UNKNOWN.
        error_type, error: of the exception; where the verdict is UNKNOWN, why.
        module, line: whose forward raised it, and where.
        first_module, first_kind, first_name, first_line: the first float32 that reached the gate or
            a matmul of two dtypes (``tracer.Origin``).
        rescue: what decided the rescue cast, or NO_CALL; "" where there was none.
        cpu_only: the modules whose layer norm has float32 weights for a 16-bit input, which the CPU
            computes and CUDA refuses; "" where there are none.
        small: "agrees", if a small model of the architecture with real weights does the same;
            "differs: ..."; or "not run: ...".
    """

    model_type: str
    model: str
    column: str
    inputs: str
    verdict: str
    error_type: str = ""
    error: str = ""
    module: str = ""
    line: str = ""
    first_module: str = ""
    first_kind: str = ""
    first_name: str = ""
    first_line: str = ""
    rescue: str = ""
    cpu_only: str = ""
    small: str = ""

    @property
    def words(self) -> str:
        """The verdict, and what restricts it."""
        if self.verdict == PASSES and self.cpu_only:
            return f"{PASSES} on a CPU"
        if self.verdict == PASSES and self.rescue == NO_CALL:
            return f"{PASSES}, {NO_CALL}"
        return self.verdict

    @property
    def failure(self) -> str:
        """The exception in a line."""
        return f"{self.error_type}: {self.error}".strip(": ")

    @property
    def is_bug(self) -> bool:
        """Whether it fails for another reason than the dtype rules that this guide is about: the
        gate refuses float32, and a matmul refuses what a float32 norm returns."""
        of_norms = self.column == NORMS and ("dtype" in self.error or "type" in self.error)
        return self.verdict == FAILS and self.error != REFUSED and not of_norms


class Atlas(NamedTuple):
    """All cells, and the releases of the libraries they hold for."""

    versions: dict[str, str]
    cells: list[Cell]

    def types(self) -> dict[str, list[Cell]]:
        """The cells of each model type, in the order of COLUMNS."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.model_type, []).append(cell)
        return found


def read(generation: str = "5") -> Atlas:
    """The stored atlas of a generation of Transformers."""
    about = json.loads((FOLDER / f"transformers-{generation}.json").read_text("utf-8"))
    with (FOLDER / f"transformers-{generation}.csv").open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        next(lines)
        return Atlas(about["versions"], [Cell(*line) for line in lines])


@functools.cache
def stored() -> Atlas:
    """``read()``, once in a process."""
    return read()


def write(atlas: Atlas, generation: str = "5") -> None:
    """Store an atlas and its page; an interrupted call leaves the old ones."""
    about = {
        "versions": atlas.versions,
        "columns": {name: column._asdict() for name, column in COLUMNS.items()},
        "verdicts": counts(atlas),
        "could not tell": reasons(atlas),
        "bugs": [bug._asdict() for bug in found_bugs(atlas)],
    }
    kept.write(FOLDER, f"transformers-{generation}", about, Cell._fields, atlas.cells)
    PAGE.write_text(page(atlas), "utf-8", newline="\n")


def counts(atlas: Atlas) -> dict[str, dict[str, int]]:
    """How many model types have each verdict, a column at a time."""
    return {
        name: {
            verdict: sum(cell.verdict == verdict for cell in atlas.cells if cell.column == name)
            for verdict in (PASSES, FAILS, UNKNOWN)
        }
        for name in COLUMNS
    }


def told(atlas: Atlas) -> list[str]:
    """The model types that have a verdict in every column."""
    return [
        name
        for name, cells in atlas.types().items()
        if all(cell.verdict != UNKNOWN for cell in cells)
    ]


def reasons(atlas: Atlas) -> dict[str, str]:
    """Why a model type has no verdict somewhere, by model type."""
    found = {}
    for name, cells in atlas.types().items():
        why: dict[str, list[str]] = {}
        for cell in cells:
            if cell.verdict == UNKNOWN:
                why.setdefault(cell.failure, []).append(cell.column)
        if why:
            found[name] = "; ".join(
                text if len(columns) == len(COLUMNS) else f"{text} ({', '.join(columns)})"
                for text, columns in why.items()
            )
    return found


class Bug(NamedTuple):
    """A failure that no dtype rule explains, and the cells that have it."""

    error: str
    model_types: list[str]
    columns: list[str]
    module: str
    line: str


def found_bugs(atlas: Atlas) -> list[Bug]:
    """The failures of ``Cell.is_bug``, alike ones together."""
    alike: dict[tuple[str, str], list[Cell]] = {}
    for cell in atlas.cells:
        if cell.is_bug:
            alike.setdefault((cell.failure, cell.line), []).append(cell)
    return [
        Bug(
            failure,
            list(dict.fromkeys(cell.model_type for cell in cells)),
            [name for name in COLUMNS if any(cell.column == name for cell in cells)],
            cells[0].module,
            line,
        )
        for (failure, line), cells in alike.items()
    ]


def find(model_type: str) -> "Table":
    """What the atlas says about a model type, a row a column.

    Raises:
        PlanError: the atlas has no such type.
    """
    from helpers.view import Table

    atlas = stored()
    cells = atlas.types().get(model_type)
    if cells is None:
        near = difflib.get_close_matches(model_type, atlas.types(), 3)
        hint = f"did you mean {' or '.join(map(repr, near))}" if near else "see ATLAS.md"
        raise PlanError(
            f"The atlas has no model type {model_type!r}: expected config.model_type of a class"
            f" that supports FlashAttention-2; {hint}?"
        )
    caption = (
        f"{model_type} ({cells[0].model}) at its default config, given {cells[0].inputs};"
        f" Transformers {atlas.versions['transformers']}"
    )
    heads = ("Column", "Verdict", "What was raised", "Where", "First float32")
    return Table(caption, heads, [_row(cell) for cell in cells])


def _row(cell: Cell) -> tuple[str, ...]:
    first = " ".join(filter(None, (cell.first_kind, cell.first_name or cell.first_module)))
    where = ", ".join(filter(None, (cell.module, cell.line)))
    return (cell.column, _verdict(cell, {}), cell.failure, where, first)


def summary() -> "Table":
    """How many model types pass, a row a column."""
    from helpers.view import Table

    atlas = stored()
    return Table(
        f"{len(atlas.types())} model types of Transformers {atlas.versions['transformers']} that"
        f" support FlashAttention-2; {len(told(atlas))} have a verdict in every column",
        ("Column", *(f"{SYMBOL[v]} {v}" for v in (PASSES, FAILS, UNKNOWN))),
        [(name, *found.values()) for name, found in counts(atlas).items()],
    )


def page(atlas: Atlas) -> str:
    """The page of the guide, as Markdown."""
    return "\n".join(_page(atlas)) + "\n"


def _page(atlas: Atlas) -> Iterator[str]:
    types, versions = atlas.types(), atlas.versions
    letters = _letters(atlas)
    compared = Counter(cell.small.partition(":")[0] for cell in atlas.cells)
    with_verdict = sum(cell.verdict != UNKNOWN for cell in atlas.cells)
    yield "# Atlas: does my architecture survive float32 norms?"
    yield ""
    yield (
        f"Every model type of Transformers {versions['transformers']} whose class says that it"
        f" supports FlashAttention-2: {len(types)} types, each at its default config, X-rayed in"
        f" {len(COLUMNS)} columns with torch {versions['torch']} and peft {versions['peft']}."
        f" {len(told(atlas))} types have a verdict in every column."
    )
    yield ""
    yield (
        "One forward pass ran for each cell, on tensors that have a shape and a dtype and no data:"
        " the unmodified code of Transformers, up to and through the reference kernel, which has"
        " FlashAttention-2's checks. So a verdict is about dtypes on the road to the gate; it says"
        " nothing about speed, and nothing about the numbers that come out. The default config of a"
        " type need not be that of the checkpoint you use: for that, `dtype-doctor xray PATH`."
    )
    yield ""
    yield (
        "Every operation is the CPU's, where a layer norm with float32 weights takes a 16-bit input"
        " and returns it in its dtype. CUDA raises `expected scalar type ... but found Float` there"
        " (https://github.com/pytorch/pytorch/issues/138128; not run here): a cell that passes with"
        f" such a norm says **on a CPU**, {_only(atlas)} of the column with float32 norms. A model"
        " that takes pictures or sound gets them, unless its default config does not fit them: then"
        " text alone (the data say which, in the column `inputs`)."
    )
    yield ""
    yield (
        f"Of {with_verdict} cells with a verdict {compared['agrees']} also ran for real, with"
        " random weights and a config with few layers, heads, experts and words, and did the same:"
        " verdict, exception type and message (numbers aside, which are sizes)."
        f" {compared['differs']} did something else, and {compared['not run']} could not be run"
        " small (the data say why)."
    )
    yield ""
    yield from _markdown(
        ("Column", "The model is", *(f"{SYMBOL[v]} {v}" for v in (PASSES, FAILS, UNKNOWN))),
        [
            (f"**{name}**", _in_words(COLUMNS[name]), *map(str, found.values()))
            for name, found in counts(atlas).items()
        ],
    )
    yield ""
    yield "## Model types"
    yield ""
    yield "A letter names the failure; they are listed below."
    yield ""
    yield from _markdown(
        ("Model type", "Class", *COLUMNS),
        [
            (f"`{name}`", cells[0].model, *(_verdict(cell, letters) for cell in cells))
            for name, cells in types.items()
        ],
    )
    yield ""
    yield "## Failures"
    yield ""
    for failure, letter in letters.items():
        times = sum(cell.verdict == FAILS and cell.failure == failure for cell in atlas.cells)
        yield f"- **{letter}**, {times} cells: `{_flat(failure)}`"
    yield ""
    yield "## Failures that no dtype rule explains"
    yield ""
    yield (
        "Neither the gate that refuses float32, nor a matmul that refuses what a float32 norm"
        " returns: mistakes and limits of architectures, with the line that raised them."
    )
    yield ""
    for bug in found_bugs(atlas):
        yield (
            f"- {', '.join(f'`{t}`' for t in bug.model_types)} ({'; '.join(bug.columns)}):"
            f" `{_flat(bug.error)}` in {bug.module}, `{_flat(bug.line)}`"
        )
    yield ""
    yield "## What could not be told"
    yield ""
    for name, why in reasons(atlas).items():
        yield f"- `{name}`: {_flat(why)}"


def _letters(atlas: Atlas) -> dict[str, str]:
    """A letter for each distinct failure, the most frequent first."""
    times = Counter(cell.failure for cell in atlas.cells if cell.verdict == FAILS)
    ordered = sorted(times, key=lambda failure: (-times[failure], failure))
    names = [chr(65 + i) if i < 26 else f"{chr(64 + i // 26)}{chr(65 + i % 26)}"
             for i in range(len(ordered))]  # fmt: skip
    return dict(zip(ordered, names, strict=True))


def _only(atlas: Atlas) -> str:
    norms = [cell for cell in atlas.cells if cell.column == NORMS and cell.verdict == PASSES]
    return f"{sum(bool(cell.cpu_only) for cell in norms)} of the {len(norms)} passes"


def _verdict(cell: Cell, letters: dict[str, str]) -> str:
    letter = f" ({letters[cell.failure]})" if cell.failure in letters else ""
    return f"{SYMBOL[cell.verdict]} {cell.words}{letter}"


def _in_words(column: Column) -> str:
    words = f"loaded in {column.dtype}"
    if "norms_float" in column.after_load:
        words += ", then every norm cast to float32, as k-bit preparation leaves them"
    if "lora" in column.after_load:
        words += ", then given a LoRA adapter, whose weights are float32"
    return words + (f", under autocast to {column.autocast}" if column.autocast else "")


def _markdown(heads: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    heads = list(heads)
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _flat(text: str) -> str:
    """On one line, and short."""
    text = " ".join(text.replace("`", "'").split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def differences(old: Iterable[Cell], new: Iterable[Cell]) -> Iterator[str]:
    """One line for each cell that is new, gone or different, field by field."""
    before, after = (
        {f"{cell.model_type} | {cell.column}": cell._asdict() for cell in cells}
        for cells in (old, new)
    )
    return kept.differences(before, after)

"""Outcomes that were recorded under Transformers 4 and 5, by ``make matrix``.

``find`` gives one as an Outcome, ``compare`` a table in which the versions stand side by side.
"""

import csv
import functools
import itertools
import json
from collections.abc import Collection, Container, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from helpers import checkpoints, kept, matrix
from helpers.backend import Versions
from helpers.errors import PlanError
from helpers.experiment import Outcome
from helpers.files import listed
from helpers.matrix import LOADS, THENS, Cell, Row, to_outcome
from helpers.plan import ATTENTION, DTYPES, LoadPlan
from helpers.stories import Event
from helpers.view import SYMBOL, Table, verdict

FOLDER = Path(__file__).parent / "data" / "matrix"
GENERATIONS = ("4", "5")
# flash-attn's text, csrc/flash_attn/flash_api.cpp
REFUSED = "RuntimeError: FlashAttention only support fp16 and bf16 data type"


class Record(NamedTuple):
    """What one environment recorded."""

    versions: Versions
    said: list[str]
    rows: list[Row]
    stories: dict[str, list[Event]]

    def heard(self, row: Row) -> list[str]:
        """The warnings and log lines of a row."""
        return [self.said[int(number)] for number in row.said.split()]


def read(generation: str, wanted: Container[Cell] | None = None) -> Record:
    """The stored record of a generation of Transformers, ``"4"`` or ``"5"``; of ``wanted`` cells
    only, because all of them take megabytes."""
    about = _about(generation)
    with (FOLDER / f"transformers-{generation}.csv").open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        next(lines)
        rows = [Row(*line) for line in lines if wanted is None or Cell(*line[:4]) in wanted]
    return about._replace(rows=rows)


def _about(generation: str) -> Record:
    """A record without its rows, whose file is the large one."""
    about = json.loads((FOLDER / f"transformers-{generation}.json").read_text("utf-8"))
    stories = {
        story: [Event(**event) for event in events] for story, events in about["stories"].items()
    }
    return Record(Versions(about["versions"]), about["said"], [], stories)


def write(generation: str, record: Record) -> None:
    """Store a record; an interrupted call leaves the old one."""
    stories = {
        story: [event._asdict() for event in events] for story, events in record.stories.items()
    }
    about = {"versions": record.versions, "said": record.said, "stories": stories}
    kept.write(FOLDER, f"transformers-{generation}", about, Row._fields, record.rows)


@functools.cache
def version(generation: str) -> str:
    """The release of Transformers that stands for a generation in the record."""
    return _about(generation).versions["transformers"]


def generation_of(release: str) -> str:
    """``"5"`` for ``"5.22.2"``."""
    return release.partition(".")[0]


def find(plan: LoadPlan, generation: str) -> Outcome | None:
    """The recorded outcome of a plan, or None where the table has no such cell."""
    cell = matrix.find(plan)
    return None if cell is None else outcomes([cell], generation)[cell]


def outcomes(wanted: Collection[Cell], generation: str) -> dict[Cell, Outcome]:
    """The recorded outcomes of cells."""
    record = read(generation, wanted)
    return {row.cell: to_outcome(row, record.versions, record.heard(row)) for row in record.rows}


def compare(
    checkpoint: str | Sequence[str] = (),
    load: str | Sequence[str] = (),
    then: str | Sequence[str] = "plain",
    attention: str | Sequence[str] = "flash_attention_2",
    said: bool = False,
) -> Table:
    """What each Transformers version makes of the same lines, a column a version.

    Each argument is one name, several, or ``()`` for all that the table has (``helpers.matrix``).
    A cell says the dtypes of the weights, as loaded and after what happens next, and the result;
    with ``said`` also the warnings and log lines.

    Raises:
        PlanError: a name that the table does not have.
    """
    chosen = {
        "checkpoint": _names("checkpoint", checkpoint, checkpoints.available()),
        "load": _names("load", load, LOADS),
        "then": _names("then", then, THENS),
        "attention": _names("attention", attention, ATTENTION),
    }
    varying = [axis for axis, names in chosen.items() if len(names) > 1] or ["checkpoint"]
    fixed = [_in_words(axis, names[0]) for axis, names in chosen.items() if axis not in varying]
    wanted = [Cell(*names) for names in itertools.product(*chosen.values())]
    found = {generation: outcomes(wanted, generation) for generation in GENERATIONS}
    heads = [f"Transformers {version(g)}" for g in GENERATIONS]
    rows = [
        (
            *(getattr(cell, axis) for axis in varying),
            *(in_short(found[g][cell], said) for g in found),
        )
        for cell in wanted
    ]
    uses_autocast = any(cell.plan().uses_autocast for cell in wanted)
    return Table(_caption(fixed, uses_autocast), [*map(str.capitalize, varying), *heads], rows)


def story(name: str = "original report, bf16") -> Table:
    """What each version made of one of ``helpers.stories``, step by step.

    Raises:
        PlanError: there is no such story.
    """
    told = [_about(generation).stories for generation in GENERATIONS]
    _names("story", name, told[0])
    steps = zip(*(stories[name] for stories in told), strict=True)
    return Table(
        _caption([name], autocast="report" in name),
        ["Step", *(f"Transformers {version(g)}" for g in GENERATIONS)],
        [(events[0].done, *map(_event, events)) for events in steps],
    )


def _event(event: Event) -> str:
    if event.result == REFUSED:
        return f"{event.weights} → {SYMBOL['bad']} gate refuses {event.kernel}"
    sign = SYMBOL["bad" if "Error" in event.result else "good"]
    kernel = f"kernel got {event.kernel} → " if event.kernel else ""
    return f"{event.weights} → {kernel}{sign} {event.result}"


def _in_words(axis: str, name: str) -> str:
    if axis == "then":
        return "nothing done after the load" if name == "plain" else name
    return f"dtype {name}" if axis == "load" and name in DTYPES else name


def _names(axis: str, given: str | Sequence[str], known: Iterable[str]) -> list[str]:
    names = [given] if isinstance(given, str) else list(given) or list(known)
    if unknown := [name for name in names if name not in known]:
        raise PlanError(
            f"{axis}={unknown[0]!r} is not in the recorded table: use one of {listed(known)}."
        )
    return names


def in_short(outcome: Outcome, said: bool = False) -> str:
    """The dtypes of the weights and what came of them: ``"float32 → ✖ gate refuses float32"``."""
    weights = [" and ".join(d) for d in (outcome.loaded_dtypes, outcome.changed_dtypes) if d]
    result = verdict(outcome)
    refused = [record.kernel for record in outcome.gate if record.accepted is False]
    what = f"gate refuses {refused[0]}" if refused else result.word
    if not outcome.ok and not refused:
        what = f"{outcome.error_type}: {outcome.error}"
    where = " in generate" if not outcome.ok and outcome.stage == "generate" else ""
    lines = f"; says {' '.join(outcome.logs)}" if said and outcome.logs else ""
    return " → ".join([*weights, f"{SYMBOL[result.state]} {what}{where}{lines}"])


def _caption(fixed: list[str], autocast: bool) -> str:
    shared = _about(GENERATIONS[-1]).versions
    packages = ", ".join(f"{name} {shared[name]}" for name in ("torch", "peft"))
    note = "; autocast counts as it does on a GPU" if autocast else ""
    return f"{', '.join(fixed)}; recorded in helpers/data/matrix with {packages}{note}"

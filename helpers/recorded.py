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

from helpers import checkpoints, matrix
from helpers.errors import PlanError
from helpers.experiment import Outcome, Versions
from helpers.matrix import LOADS, THENS, Cell, Row, to_outcome
from helpers.plan import ATTENTION, LoadPlan, listed
from helpers.stories import Event
from helpers.view import SYMBOL, Table, verdict

FOLDER = Path(__file__).parent / "data" / "matrix"
GENERATIONS = ("4", "5")


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
    about = json.loads((FOLDER / f"transformers-{generation}.json").read_text("utf-8"))
    stories = {
        story: [Event(**event) for event in events] for story, events in about["stories"].items()
    }
    with (FOLDER / f"transformers-{generation}.csv").open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        next(lines)
        rows = [Row(*line) for line in lines if wanted is None or Cell(*line[:4]) in wanted]
    return Record(Versions(about["versions"]), about["said"], rows, stories)


def write(generation: str, record: Record) -> None:
    """Store a record."""
    FOLDER.mkdir(exist_ok=True)
    stories = {
        story: [event._asdict() for event in events] for story, events in record.stories.items()
    }
    about = {"versions": record.versions, "said": record.said, "stories": stories}
    text = json.dumps(about, indent=1) + "\n"
    (FOLDER / f"transformers-{generation}.json").write_text(text, "utf-8", newline="\n")
    with (FOLDER / f"transformers-{generation}.csv").open("w", encoding="utf-8", newline="") as f:
        lines = csv.writer(f, lineterminator="\n")
        lines.writerow(Row._fields)
        lines.writerows(record.rows)


@functools.cache
def version(generation: str) -> str:
    """The release of Transformers that stands for a generation in the record."""
    return read(generation, ()).versions["transformers"]


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
) -> Table:
    """What each Transformers version makes of the same lines, a column a version.

    Each argument is one name, several, or ``()`` for all that the table has (``helpers.matrix``).
    A cell says the dtypes of the weights, as loaded and after what happens next, and the result.

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
    fixed = [f"{axis} {names[0]}" for axis, names in chosen.items() if axis not in varying]
    wanted = [Cell(*names) for names in itertools.product(*chosen.values())]
    found = {generation: outcomes(wanted, generation) for generation in GENERATIONS}
    heads = [f"Transformers {version(g)}" for g in GENERATIONS]
    rows = [
        (*(getattr(cell, axis) for axis in varying), *(in_short(found[g][cell]) for g in found))
        for cell in wanted
    ]
    plans = [cell.plan() for cell in wanted]
    uses_autocast = any(plan.autocast or "train" in plan.after_load for plan in plans)
    return Table(_caption(fixed, uses_autocast), [*map(str.capitalize, varying), *heads], rows)


def story(name: str = "original report, bf16") -> Table:
    """What each version made of one of ``helpers.stories``, step by step.

    Raises:
        PlanError: there is no such story.
    """
    told = [read(generation, ()).stories for generation in GENERATIONS]
    _names("story", name, told[0])
    steps = zip(*(stories[name] for stories in told), strict=True)
    return Table(
        _caption([name], autocast="report" in name),
        ["Step", *(f"Transformers {version(g)}" for g in GENERATIONS)],
        [(events[0].done, *map(_event, events)) for events in steps],
    )


def _event(event: Event) -> str:
    sign = SYMBOL["bad" if "Error" in event.result else "good"]
    return f"weights {event.weights}; kernel got {event.kernel}; {sign} {event.result}"


def _names(axis: str, given: str | Sequence[str], known: Iterable[str]) -> list[str]:
    names = [given] if isinstance(given, str) else list(given) or list(known)
    if unknown := [name for name in names if name not in known]:
        raise PlanError(
            f"{axis}={unknown[0]!r} is not in the recorded table: use one of {listed(known)}."
        )
    return names


def in_short(outcome: Outcome) -> str:
    """The dtypes of the weights and what came of them: ``"float32 → ✖ gate refuses float32"``."""
    weights = [" and ".join(d) for d in (outcome.loaded_dtypes, outcome.changed_dtypes) if d]
    result = verdict(outcome)
    refused = [record.kernel for record in outcome.gate if record.accepted is False]
    what = f"gate refuses {refused[0]}" if refused else result.word
    if not outcome.ok and not refused:
        what = f"{outcome.error_type}: {outcome.error}"
    where = " in generate" if not outcome.ok and outcome.stage == "generate" else ""
    return " → ".join([*weights, f"{SYMBOL[result.state]} {what}{where}"])


def _caption(fixed: list[str], autocast: bool) -> str:
    shared = read(GENERATIONS[-1], ()).versions
    packages = ", ".join(f"{name} {shared[name]}" for name in ("torch", "peft"))
    note = "; autocast counts as it does on a GPU" if autocast else ""
    return f"{', '.join(fixed)}; recorded in helpers/data/matrix with {packages}{note}"

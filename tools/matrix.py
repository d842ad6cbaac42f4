"""Run the table of loads in this environment: ``make matrix`` does it in both.

    python tools/matrix.py            run every cell and store the outcomes
    python tools/matrix.py --check    run every cell, and fail where one is not as stored

The outcomes go to helpers/data/matrix, one file for each generation of Transformers.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby

from helpers import backend, recorded
from helpers.experiment import Outcome, run, versions
from helpers.matrix import Cell, cells, to_row
from helpers.stories import STORIES, carry_out


def main() -> None:
    """Measure, then store or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the stored outcomes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    arguments = parser.parse_args()
    generation = recorded.generation_of(versions()["transformers"])
    started = time.perf_counter()
    now = measure(arguments.jobs)
    print(
        f"Transformers {now.versions['transformers']}: {len(now.rows)} cells in"
        f" {time.perf_counter() - started:.0f} s"
    )
    if not arguments.check:
        recorded.write(generation, now)
    elif changes := list(differences(recorded.read(generation), now)):
        sys.exit("\n".join([f"{len(changes)} outcomes are not the stored ones:", *changes[:20]]))


def measure(jobs: int) -> recorded.Record:
    """Every cell, in the order of ``cells``, and every story."""
    parts = [list(part) for _, part in groupby(cells(), key=lambda cell: cell[:2])]
    said: list[str] = []
    # Started anew, not forked: a fork would inherit the threads of torch half-way.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=backend.activate) as pool:
        outcomes = [outcome for part in pool.map(run_all, parts) for outcome in part]
        told = dict(zip(STORIES, pool.map(carry_out, STORIES), strict=True))
    rows = [to_row(cell, outcome, said) for cell, outcome in zip(cells(), outcomes, strict=True)]
    return recorded.Record(versions(), said, rows, told)


def run_all(part: list[Cell]) -> list[Outcome]:
    return [run(cell.plan()) for cell in part]


def differences(then: recorded.Record, now: recorded.Record) -> Iterator[str]:
    """One line for each cell or event that is new, gone or different, field by field."""
    before, after = fields(then), fields(now)
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name, {}), after.get(name, {})
        changed = [
            f"{field}: {old.get(field)!r} -> {new.get(field)!r}"
            for field in dict.fromkeys([*old, *new])
            if old.get(field) != new.get(field)
        ]
        if changed:
            yield f"{name}: {'; '.join(changed)}"


def fields(record: recorded.Record) -> dict[str, dict[str, str]]:
    """What was measured, by the name of the cell or the number of the event."""
    found = {
        " | ".join(row.cell): {**row._asdict(), "said": "\n".join(record.heard(row))}
        for row in record.rows
    }
    for story, events in record.stories.items():
        for number, event in enumerate(events, 1):
            found[f"{story}, {number}"] = event._asdict()
    return found


if __name__ == "__main__":
    main()

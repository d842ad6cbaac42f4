"""Run the table of loads in this environment: ``make matrix`` does it in both.

    python tools/matrix.py            run every cell and store the outcomes
    python tools/matrix.py --check    run every cell, and fail where one is not as stored

The outcomes go to helpers/data/matrix, one file for each generation of Transformers.
"""

import argparse
import contextlib
import copy
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from helpers import backend, checkpoints, kept, recorded, state
from helpers.backend import Versions, versions
from helpers.experiment import Outcome, load, run
from helpers.matrix import Cell, cells, to_row
from helpers.plan import LoadPlan
from helpers.stories import STORIES, carry_out

MOST_JOBS = 8  # each holds torch, and Windows refuses more than 61
# pyproject.toml has an older Transformers where Python is 3.10.
ON_PYTHON_310 = ("5.22.2", "5.20.2")


def main() -> None:
    """Measure, then store or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the stored outcomes")
    jobs = min(os.cpu_count() or 1, MOST_JOBS)
    parser.add_argument("--jobs", type=int, default=jobs, help="processes at a time")
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
        sys.exit("\n".join([f"{len(changes)} differences from the record:", *changes[:20]]))


def measure(jobs: int) -> recorded.Record:
    """Every cell, in the order of ``cells``, and every story."""
    parts = [list(part) for _, part in groupby(cells(), key=lambda cell: cell[:2])]
    said: list[str] = []
    # Started anew, not forked: a fork would inherit the threads of torch half-way.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=switch_on) as pool:
        # The stories first, because the last cells are short: no core is idle for long at the end.
        ends = pool.map(carry_out, STORIES)
        outcomes = [outcome for part in pool.map(run_all, parts) for outcome in part]
        told = dict(zip(STORIES, ends, strict=True))
    rows = [to_row(cell, outcome, said) for cell, outcome in zip(cells(), outcomes, strict=True)]
    return recorded.Record(versions(), said, rows, told)


def switch_on() -> None:
    """Register FlashAttention for good: ``run`` takes back what is registered inside, and a model
    that is used again would look for it."""
    backend.activate()
    with state.listening():
        load(LoadPlan(), str(checkpoints.get("bf16")), "cpu")


def run_all(part: list[Cell]) -> list[Outcome]:
    once = Once()
    return [run(cell.plan(), once, look=False) for cell in part]


class Once:
    """Loads once what several cells load alike, and gives each its own copy. What was said at the
    load is said again for each."""

    def __init__(self) -> None:
        self.loaded: dict[LoadPlan, tuple[object, object, Said]] = {}

    def __call__(self, plan: LoadPlan, path: str, device: str) -> tuple[object, object]:
        alike = replace(plan, autocast=None, after_load=())
        if alike not in self.loaded:
            with overhearing() as said:
                model, tokenizer = load(plan, path, device)
            self.loaded[alike] = (model, tokenizer, said)
        else:
            model, tokenizer, said = self.loaded[alike]
            for record in said.logged:
                logging.getLogger(record.name).handle(record)
            warn_again(said.warned)
        return copy.deepcopy(model), tokenizer


class Said(NamedTuple):
    """What the libraries logged, and what Python warned of."""

    logged: list[logging.LogRecord]
    warned: list[warnings.WarningMessage]


@contextlib.contextmanager
def overhearing() -> Iterator[Said]:
    """Collect what is said in the block; whoever listens outside hears it as well."""
    recorder = Recorder()
    loggers = [logging.getLogger(name) for name in state.LOGGERS]
    for logger in loggers:
        logger.addHandler(recorder)
    warned: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as warned:
            yield Said(recorder.records, warned)
    finally:
        for logger in loggers:
            logger.removeHandler(recorder)
        warn_again(warned)


def warn_again(warned: list[warnings.WarningMessage]) -> None:
    for w in warned:
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno, source=w.source)


class Recorder(logging.Handler):
    """Keeps the records of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def differences(then: recorded.Record, now: recorded.Record) -> Iterator[str]:
    """One line for each cell or event that is new, gone or different, field by field, and one for
    the releases of the libraries."""
    before = {"versions": releases(then.versions), **fields(then)}
    after = {"versions": releases(now.versions), **fields(now)}
    pair = before["versions"]["transformers"], after["versions"]["transformers"]
    if pair == ON_PYTHON_310 and now.versions["python"].startswith("3.10."):
        after["versions"]["transformers"] = pair[0]
    return kept.differences(before, after)


def releases(versions: Versions) -> dict[str, str]:
    """The releases that an outcome may depend on; of kernels, without the third number."""
    found = {name: versions.get(name, "none") for name in ("torch", "transformers", "peft")}
    minor = versions.get("kernels", "none").split(".")[:2]
    return {**found, "kernels": ".".join(minor)}


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

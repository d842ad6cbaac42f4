"""The table of loads that ``make matrix`` runs under Transformers 4 and under 5.

A cell is a LoadPlan with names for its parts. A row is a cell with what ``run`` measured there, as
one line of a CSV file.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from helpers import checkpoints
from helpers.backend import Versions
from helpers.experiment import Outcome, needs_a_gpu
from helpers.files import declared_dtype, file_dtypes
from helpers.plan import ATTENTION, AUTOCAST, DEFAULT_DTYPES, DTYPES, LoadPlan, snippet
from helpers.probe import Dtypes, GateRecord

LOADS: dict[str, dict[str, Any]] = {
    **{dtype: {"dtype": dtype} for dtype in DTYPES},
    "set_default_dtype(bfloat16)": {"default_dtype": "bfloat16"},
    "torch_dtype=bfloat16": {"dtype": "bfloat16", "keyword": "torch_dtype"},
}
THENS: dict[str, dict[str, Any]] = {
    "plain": {},
    "autocast": {"autocast": "bfloat16"},
    ".float()": {"after_load": ("float",)},
    ".half()": {"after_load": ("half",)},
    "LoRA": {"after_load": ("lora",)},
    "LoRA on a float32 base": {"after_load": ("float", "lora")},
    "DoRA": {"after_load": ("dora",)},
    "LoRA, merged": {"after_load": ("lora", "merge")},
    'LoRA, merged, saved, reloaded with "auto"': {"after_load": ("lora", "merge", "reload")},
    "k-bit preparation": {"after_load": ("prepare_kbit",)},
    "k-bit preparation, autocast": {"after_load": ("prepare_kbit",), "autocast": "bfloat16"},
    "LoRA, trained in mixed precision": {"after_load": ("lora", "train")},
    # What the pitfalls of notebook 05 need besides.
    "LoRA, autocast": {"after_load": ("lora",), "autocast": "bfloat16"},
    "float32 norms": {"after_load": ("norms_float",)},
    "float32 norms, autocast": {"after_load": ("norms_float",), "autocast": "bfloat16"},
}
# What else the panel's knobs can say, so that it finds a record for each of their positions.
KNOB_LOADS: dict[str, dict[str, Any]] = {
    f"{dtype}, set_default_dtype({default})": {"dtype": dtype, "default_dtype": default}
    for dtype in DTYPES
    for default in DEFAULT_DTYPES
    if default and (dtype, default) != ("omitted", "bfloat16")
}
KNOB_THENS: dict[str, dict[str, Any]] = {
    f"autocast({dtype})": {"autocast": dtype}
    for dtype in AUTOCAST
    if dtype not in (None, "bfloat16")
}


class Cell(NamedTuple):
    """The names of what is loaded, how, what happens next, and with which attention."""

    checkpoint: str
    load: str
    then: str
    attention: str

    def plan(self) -> LoadPlan:
        """The LoadPlan that the names stand for."""
        parts = {**(LOADS | KNOB_LOADS)[self.load], **(THENS | KNOB_THENS)[self.then]}
        return LoadPlan(self.checkpoint, attention=self.attention, **parts)


def cells() -> Iterator[Cell]:
    """All cells, in the order of the file."""
    for checkpoint in checkpoints.available():
        for load in [*LOADS, *KNOB_LOADS]:
            for then in [*THENS, *KNOB_THENS]:
                by_knobs = "after_load" not in (THENS | KNOB_THENS)[then] and (
                    "keyword" not in LOADS.get(load, {})
                )
                if by_knobs or (load in LOADS and then in THENS):
                    for attention in ATTENTION:
                        yield Cell(checkpoint, load, then, attention)


def find(plan: LoadPlan) -> Cell | None:
    """The cell of a plan, or None where the table has none."""
    return _by_plan().get(plan)


@functools.cache
def _by_plan() -> dict[LoadPlan, Cell]:
    return {cell.plan(): cell for cell in cells()}


class Row(NamedTuple):
    """What ``run`` measured in a cell; the fields are Outcome's, as text.

    ``loaded`` and ``changed`` count tensors by dtype; ``training_gate`` and ``gate`` count layers
    by attention input, what the kernel received, and what it said. ``said`` numbers warnings and
    log lines.
    """

    checkpoint: str
    load: str
    then: str
    attention: str
    loaded: str
    changed: str
    training_gate: str
    gate: str
    stage: str
    finite: str
    error_type: str
    error: str
    text: str
    said: str

    @property
    def cell(self) -> Cell:
        return Cell(*self[:4])


def to_row(cell: Cell, outcome: Outcome, said: list[str]) -> Row:
    """The outcome as a row; new warnings and log lines are appended to ``said``."""
    lines = dict.fromkeys((*outcome.warnings, *outcome.logs))
    said.extend(line for line in lines if line not in said)
    return Row(
        *cell,
        loaded=_counts_text(outcome.loaded_dtypes),
        changed=_counts_text(outcome.changed_dtypes),
        training_gate=_gate_text(outcome.training_gate),
        gate=_gate_text(outcome.gate),
        stage=outcome.stage,
        finite="" if outcome.finite is None else str(outcome.finite),
        error_type=outcome.error_type or "",
        error=outcome.error or "",
        text=outcome.text or "",
        said=" ".join(str(said.index(line)) for line in lines),
    )


def to_outcome(row: Row, versions: Versions, heard: list[str]) -> Outcome:
    """The outcome that a row was made of, as far as the row holds it."""
    plan = row.cell.plan()
    folder = checkpoints.get(row.checkpoint)
    return Outcome(
        plan,
        recorded=True,
        stage=row.stage,
        error_type=row.error_type or None,
        error=row.error or None,
        file_dtypes=file_dtypes(folder),
        declared_dtype=declared_dtype(folder),
        loaded_dtypes=_counts(row.loaded),
        changed_dtypes=_counts(row.changed),
        training_gate=_gate(row.training_gate),
        gate=_gate(row.gate),
        finite={"True": True, "False": False}.get(row.finite),
        text=row.text or None,
        logs=tuple(heard),
        versions=versions,
        backend="reference",
        autocast_as_on_a_gpu=needs_a_gpu(plan, versions),
        snippet=snippet(plan, versions["transformers"]),
    )


def _counts_text(dtypes: dict[str, int]) -> str:
    """``"38 bfloat16, 12 float32"``."""
    return ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items())


def _counts(text: str) -> dict[str, int]:
    pairs = (part.split(" ") for part in text.split(", ") if part)
    return {dtype: int(count) for count, dtype in pairs}


def _gate_text(records: Iterable[GateRecord]) -> str:
    """``"3 float32 -> bfloat16 accepted"``; q, k and v with slashes where they differ."""
    kinds = Counter(
        (_dtypes_text(r.attention_input), r.kernel and _dtypes_text(r.kernel), r.accepted)
        for r in records
    )
    return ", ".join(
        f"{layers} {attention_input}"
        + (f" -> {kernel} {'accepted' if accepted else 'refused'}" if kernel else "")
        for (attention_input, kernel, accepted), layers in kinds.items()
    )


def _gate(text: str) -> tuple[GateRecord, ...]:
    records = []
    for part in filter(None, text.split(", ")):
        layers, attention_input, *arrived = part.split(" ")
        kernel = (_dtypes(arrived[1]), arrived[2] == "accepted") if arrived else (None, None)
        records += [GateRecord("", _dtypes(attention_input), *kernel)] * int(layers)
    return tuple(records)


def _dtypes_text(dtypes: Dtypes) -> str:
    return "/".join(dtypes if len(set(dtypes)) > 1 else dtypes[:1])


def _dtypes(text: str) -> Dtypes:
    parts = text.split("/")
    return Dtypes(*(parts if len(parts) == 3 else parts * 3))

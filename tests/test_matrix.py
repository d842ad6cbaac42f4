"""The recorded table: complete, reproduced under both generations, and read back as it was."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import matrix as tool

from helpers import backend, checkpoints, experiment, matrix, panels, recorded, view
from helpers.gate import Dtypes, GateRecord
from helpers.matrix import LOADS, THENS, Cell, cells, to_outcome, to_row
from helpers.plan import ATTENTION, AUTOCAST, DEFAULT_DTYPES, DTYPES, LoadPlan

ROOT = Path(__file__).resolve().parents[1]
V4 = ROOT / ".venv-v4" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
RECORDS = [recorded.read(generation) for generation in recorded.GENERATIONS]
REFUSED = "FlashAttention only support fp16 and bf16 data type"


def ready(python, *arguments):
    """Whether an environment is there and up to date, as its own Python sees it."""
    command = [str(python), "tools/set_up.py", *arguments, "--check"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    except OSError:
        return False


def run_in(python, *arguments):
    command = [str(python), "tools/lab.py", "--", *arguments]
    # Set from the start, so that test files may import transformers before they switch it on.
    switched_on = {"KERNELS_CACHE": str(backend.HUB_CACHE), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(switched_on if python == V4 else {})},
        capture_output=True,
        encoding="utf-8",
        timeout=900,
    )


@pytest.fixture(scope="module")
def v4():
    """The Python that has Transformers 4."""
    if not ready(V4, "--v4"):
        if os.environ.get("CI"):
            pytest.fail(".venv-v4 is not ready: make setup-v4")
        pytest.skip(".venv-v4 is not ready, so nothing ran under Transformers 4: make setup-v4")
    return V4


# Reproduced.


def test_helpers_do_under_transformers_4_what_plain_transformers_does(v4):
    files = [f"tests/test_{name}.py" for name in ("generations", "adapter", "training")]
    # The bar needs ipywidgets, which that environment does without.
    done = run_in(v4, "-m", "pytest", "-q", "-rs", "-o", "addopts=", "-k", "not bar", *files)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 350
    print(done.stdout)  # with the reasons of what was skipped


def test_this_environment_gives_the_stored_outcomes():
    done = run_in(sys.executable, "tools/matrix.py", "--check")
    assert done.returncode == 0, done.stderr
    assert f"{len(list(cells()))} cells" in done.stdout


def test_transformers_4_gives_the_stored_outcomes(v4):
    done = run_in(v4, "tools/matrix.py", "--check")
    assert done.returncode == 0, done.stderr
    assert "Transformers 4.57.6: " in done.stdout


def change(record, number, **fields):
    rows = [*record.rows]
    rows[number] = rows[number]._replace(**fields)
    return record._replace(rows=rows)


@given(st.sampled_from(RECORDS), st.integers(0, 2000), st.sampled_from(matrix.Row._fields[4:-1]))
def test_one_changed_outcome_is_found(record, number, field):
    changed = change(record, number, **{field: "something else"})
    (line,) = tool.differences(record, changed)
    assert line.startswith(" | ".join(record.rows[number].cell))
    assert f"{field}: " in line
    assert "'something else'" in line
    assert list(tool.differences(record, record)) == []


def test_a_missing_cell_a_new_one_and_other_warnings_are_found():
    record = RECORDS[0]
    without = record._replace(rows=record.rows[1:])
    for before, after in ((record, without), (without, record)):
        (line,) = tool.differences(before, after)
        assert "bf16 | omitted | plain | flash_attention_2" in line
    (line,) = tool.differences(record, change(record, 0, said=""))
    assert "said: " in line


def test_the_numbers_of_warnings_do_not_matter_only_their_words():
    record = RECORDS[1]
    shift = {str(old): str(old + 1) for old in range(len(record.said))}
    moved = record._replace(
        said=["a line that nobody says", *record.said],
        rows=[r._replace(said=" ".join(shift[n] for n in r.said.split())) for r in record.rows],
    )
    assert list(tool.differences(record, moved)) == []


def test_another_end_of_a_story_is_found():
    record = RECORDS[0]
    events = [*record.stories["original report, bf16"]]
    events[1] = events[1]._replace(result="says what it learned")
    changed = {**record.stories, "original report, bf16": events}
    (line,) = tool.differences(record, record._replace(stories=changed))
    assert "original report, bf16, 2" in line
    assert REFUSED in line


# Complete.


@pytest.mark.parametrize("record", RECORDS, ids=recorded.GENERATIONS)
def test_every_cell_is_recorded_once_in_order(record):
    assert [row.cell for row in record.rows] == list(cells())


def test_the_table_has_every_checkpoint_load_continuation_and_attention():
    wanted = set(map(Cell._make, product(checkpoints.available(), LOADS, THENS, ATTENTION)))
    assert len(wanted) == 6 * 7 * (12 + 3) * 3
    assert wanted <= set(cells())
    assert len({cell.plan() for cell in cells()}) == len(list(cells()))


@pytest.mark.parametrize("generation", recorded.GENERATIONS)
def test_every_position_of_the_panels_knobs_is_recorded(generation):
    positions = product(checkpoints.available(), DTYPES, DEFAULT_DTYPES, ATTENTION, AUTOCAST)
    for checkpoint, dtype, default, attention, autocast in positions:
        plan = LoadPlan(checkpoint, dtype, default, attention, autocast)
        assert recorded.find(plan, generation).plan == plan
    assert {*panels.explore().knobs} == {
        *("checkpoint", "dtype", "default_dtype", "attention", "autocast")
    }


def test_the_records_are_of_the_versions_that_the_environments_pin():
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    old = (ROOT / "requirements-v4.in").read_text("utf-8")
    four, five = (record.versions["transformers"] for record in RECORDS)
    assert f"\ntransformers=={four} " in old
    assert f'"transformers[kernels]=={five}; ' in pyproject
    assert [record.versions["torch"] for record in RECORDS] == ["2.13.0"] * 2


# What the record says.


def test_the_generations_differ_only_where_they_load_another_dtype():
    """Also under autocast: on a CPU, 4.57.6 would not see that it is on, and no GPU behaves so."""
    four, five = ({row.cell: row for row in record.rows} for record in RECORDS)
    differing = set()
    for cell in cells():
        old, new = four[cell], five[cell]
        if old.loaded != new.loaded:
            differing.add(cell.load)
            continue
        assert (old.stage, old.error, old.finite, old.text) == (
            *(new.stage, new.error, new.finite, new.text),
        ), cell
        if cell.attention == "flash_attention_2":
            assert old.gate == new.gate
    # dtype=None, and torch's default dtype with it, is all that changed (transformers #42805).
    assert differing == {load for load in differing if load.startswith(("omitted", "set_default"))}
    assert "omitted" in differing


def test_float32_at_the_gate_is_the_error_and_nothing_else_is():
    for record in RECORDS:
        for row in record.rows:
            if row.attention == "flash_attention_2":
                assert ("float32 refused" in row.gate) == (row.error == REFUSED), row.cell
            assert row.error in ("", REFUSED) or (row.then == "float32 norms" and row.gate == "")


# Read back.

FOUND = [
    experiment.run(plan)
    for plan in (
        LoadPlan("bf16", "auto"),
        LoadPlan("fp32", "auto"),
        LoadPlan("overflow", "float16", attention="sdpa"),
        LoadPlan("bf16", "float32", autocast="bfloat16"),
        LoadPlan("bf16", "float32", after_load=("lora", "train")),
        LoadPlan("bf16", "auto", after_load=("dora",)),
    )
]


@pytest.mark.parametrize("found", FOUND, ids=lambda found: str(found.plan.checkpoint))
def test_an_outcome_comes_back_from_its_row(found):
    said = []
    cell = next(cell for cell in cells() if cell.plan() == found.plan)
    again = to_outcome(to_row(cell, found, said), found.versions, said)
    assert again.recorded
    assert view.stations(again) == view.stations(found)
    lost = {"frames": (), "max_logit_gap": None, "seconds": 0.0}
    nameless = [tuple(replace(r, layer="") for r in g) for g in (found.gate, found.training_gate)]
    assert again == replace(
        found, recorded=True, gate=nameless[0], training_gate=nameless[1], **lost
    )


dtypes = st.sampled_from(["bfloat16", "float16", "float32", "float64"])
qkv = st.builds(Dtypes, dtypes, dtypes, dtypes)
gates = st.one_of(
    st.builds(GateRecord, st.just(""), qkv),
    st.builds(GateRecord, st.just(""), qkv, qkv, st.booleans()),
)


@given(st.lists(gates), st.dictionaries(dtypes, st.integers(1, 999)))
def test_any_gate_and_counts_come_back_from_their_text(records, counts):
    found = replace(FOUND[0], gate=tuple(records), loaded_dtypes=counts)
    cell = next(cell for cell in cells() if cell.plan() == found.plan)
    again = to_outcome(to_row(cell, found, []), found.versions, [])
    assert sorted(again.gate, key=str) == sorted(records, key=str)
    assert again.loaded_dtypes == counts

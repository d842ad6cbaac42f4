"""The recorded table: complete, reproduced under both generations, and read back as it was."""

import logging
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import matrix as tool

from helpers import backend, checkpoints, experiment, matrix, panels, recorded, view
from helpers.matrix import LOADS, THENS, Cell, cells, to_outcome, to_row
from helpers.plan import ATTENTION, AUTOCAST, DEFAULT_DTYPES, DTYPES, LoadPlan
from helpers.probe import Dtypes, GateRecord

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


def test_the_readme_counts_the_cells():
    text = (ROOT / "README.md").read_text("utf-8")
    assert re.findall(r"\[(\d+) recorded combinations\]", text) == [str(len(list(cells())))]


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
    lost = {"frames": (), "max_logit_gap": None, "seconds": 0.0, "xray": None}
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


# The tool that records.


def test_other_releases_than_the_recorded_ones_are_said():
    record = RECORDS[1]
    have = record.versions
    for name, other in (("torch", "2.13.1"), ("peft", "0.21.3"), ("transformers", "5.22.3")):
        now = record._replace(versions=backend.Versions({**have, name: other}))
        assert list(tool.differences(record, now)) == [
            f"versions: {name}: {have[name]!r} -> {other!r}"
        ]
    now = record._replace(versions=backend.Versions({**have, "kernels": "0.18.2"}))
    assert list(tool.differences(record, now)) == ["versions: kernels: '0.17' -> '0.18'"]
    alike = {"python": "3.13.9", "kernels": "0.17.99", "flash-attn": "2.8.3"}
    now = record._replace(versions=backend.Versions({**have, **alike}))
    assert list(tool.differences(record, now)) == []


def test_python_310_may_have_the_transformers_that_pyproject_gives_it_and_no_other():
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    pins = dict(re.findall(r'"transformers\[kernels\]==(\S+); python_version (>=|<) ', pyproject))
    newer, older = sorted(pins, key=pins.get, reverse=True)
    assert pins == {newer: ">=", older: "<"}
    record = RECORDS[1]
    for python, release, said in (
        ("3.10.14", older, 0),
        ("3.10.14", newer, 0),
        ("3.11.7", older, 1),
        ("3.10.14", "5.20.1", 1),
    ):
        have = {**record.versions, "python": python, "transformers": release}
        now = record._replace(versions=backend.Versions(have))
        lines = list(tool.differences(record, now))
        assert [line.startswith("versions: transformers: ") for line in lines] == [True] * said


@pytest.mark.parametrize(("cores", "jobs"), [(2, 2), (128, 8), (None, 1)])
def test_a_large_machine_is_not_filled_with_torch(monkeypatch, cores, jobs):
    record = recorded.read(recorded.generation_of(backend.versions()["transformers"]))
    asked = []
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--check"])
    monkeypatch.setattr(tool, "measure", lambda jobs: asked.append(jobs) or record)
    tool.main()
    assert asked == [jobs]


def test_the_stories_come_before_the_cells(monkeypatch):
    started = []

    class OneThread(ThreadPoolExecutor):
        def __init__(self, *_, **__):
            super().__init__(1)

    def run_all(part):
        started.append("cells")
        return [experiment.Outcome(cell.plan()) for cell in part]

    monkeypatch.setattr(tool, "ProcessPoolExecutor", OneThread)
    monkeypatch.setattr(tool, "carry_out", lambda story: started.append(story) or [])
    monkeypatch.setattr(tool, "run_all", run_all)
    found = tool.measure(1)
    assert started[: len(tool.STORIES)] == list(tool.STORIES) == list(found.stories)
    assert set(started[len(tool.STORIES) :]) == {"cells"}
    assert [row.cell for row in found.rows] == list(cells())


LIBRARIES = ("transformers", "kernels", "peft")


@pytest.mark.parametrize("fails", [False, True])
def test_every_cell_hears_what_was_said_at_a_load_that_it_shares(monkeypatch, fails):
    loads = []

    def noisy(*arguments):
        loads.append(arguments)
        for name in LIBRARIES:
            logging.getLogger(f"{name}.x").warning("a line of %s.x", name)
        warnings.warn("from Python", UserWarning, stacklevel=1)
        if fails:
            raise ValueError("no model")
        return experiment.load(*arguments)

    monkeypatch.setattr(tool, "load", noisy)
    once = tool.Once()
    plan = LoadPlan("bf16", "auto", attention="eager")
    plans = [plan, replace(plan, autocast="bfloat16"), replace(plan, after_load=("float",))]
    found = [experiment.run(plan, once) for plan in plans]
    assert len(loads) == (3 if fails else 1)
    assert [outcome.error for outcome in found] == ["no model" if fails else None] * 3
    for outcome in found:
        assert outcome.warnings == ("from Python",)
        assert outcome.logs == tuple(f"a line of {name}.x" for name in LIBRARIES)


def test_a_record_is_stored_as_it_is_in_the_repository(monkeypatch, tmp_path):
    stored = {path.name: path.read_bytes() for path in recorded.FOLDER.iterdir()}
    records = [recorded.read(generation) for generation in recorded.GENERATIONS]
    monkeypatch.setattr(recorded, "FOLDER", tmp_path)
    for generation, record in zip(recorded.GENERATIONS, records, strict=True):
        recorded.write(generation, record)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == stored


def test_an_interrupted_write_leaves_the_old_record(monkeypatch, tmp_path):
    def interrupted():
        yield RECORDS[1].rows[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(recorded, "FOLDER", tmp_path)
    recorded.write("5", RECORDS[1])
    with pytest.raises(KeyboardInterrupt):
        recorded.write("5", recorded.Record({}, [], interrupted(), {}))
    assert recorded.read("5") == RECORDS[1]
    assert len(list(tmp_path.iterdir())) == 2

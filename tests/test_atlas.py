"""The atlas: a sample of it again, at full size and for real; its data, its page, its workers."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import atlas as tool

from helpers import atlas, state
from helpers.atlas import COLUMNS, FAILS, NORMS, PASSES, REFUSED, UNKNOWN, Atlas, Cell
from helpers.errors import PlanError

STORED = atlas.read()
TYPES = STORED.types()
# A decoder, Conv1D and no Linear, an encoder, both, pictures, sound, pictures in text, experts,
# latent attention, and norms that give back what they got.
SAMPLE = ("qwen2", "gpt2", "bert", "bart", "vit", "wav2vec2", "llava", "mixtral", "youtu",
          "gemma", "whisper")  # fmt: skip


def cell(model_type, column):
    return TYPES[model_type][list(COLUMNS).index(column)]


@pytest.mark.usefixtures("one_thread", "activated")
@pytest.mark.parametrize("model_type", SAMPLE)
def test_the_x_ray_says_what_the_real_run_does(model_type):
    with state.listening():
        cells = {one.column: one for one in tool.examine(model_type)}
    assert [one.small for one in cells.values()] == ["agrees"] * len(COLUMNS)
    assert list(atlas.differences(TYPES[model_type], cells.values())) == []


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "mistral", "phi3"])
def test_float32_norms_stop_these(model_type):
    found = cell(model_type, NORMS)
    assert (found.verdict, found.error_type) == (FAILS, "RuntimeError")
    assert "dtype" in found.error
    assert found.first_kind == "parameter"
    assert "norm" in found.first_name


@pytest.mark.parametrize("model_type", ["gemma", "olmo", "phi", "stablelm", "cohere", "gpt_neox"])
def test_float32_norms_do_not_stop_these(model_type):
    assert cell(model_type, NORMS).verdict == PASSES


def test_the_gate_and_a_missing_linear():
    assert cell("llama", "float32").error == REFUSED
    assert cell("gpt2", "float32").failure == "StopIteration"
    (bug,) = [bug for bug in atlas.found_bugs(STORED) if "gpt2" in bug.model_types]
    assert bug.columns == ["float32"]
    assert "integrations/flash_attention.py" in bug.line


def test_every_cell_has_a_verdict_or_a_reason():
    assert len(TYPES) > 400
    assert len(atlas.told(STORED)) >= 300
    assert all([one.column for one in cells] == list(COLUMNS) for cells in TYPES.values())
    for one in STORED.cells:
        assert one.verdict in (PASSES, FAILS, UNKNOWN)
        assert (one.verdict == PASSES) == (one.failure == "")
        assert bool(one.small) == (one.verdict != UNKNOWN)
    assert set(atlas.reasons(STORED)) == set(TYPES) - set(atlas.told(STORED))


def test_none_that_runs_small_disagrees():
    said = [one.small for one in STORED.cells if one.small]
    assert [text for text in said if text != "agrees" and not text.startswith("not run: ")] == []
    assert said.count("agrees") > 1000


def test_the_page_and_the_counts_are_those_of_the_data():
    assert atlas.PAGE.read_text("utf-8") == atlas.page(STORED)
    about = json.loads((atlas.FOLDER / "transformers-5.json").read_text("utf-8"))
    assert about["verdicts"] == atlas.counts(STORED)
    assert about["could not tell"] == atlas.reasons(STORED)
    shown = atlas.summary()
    assert [int(row[1]) for row in shown.rows] == [
        sum(one.verdict == PASSES for one in STORED.cells if one.column == name) for name in COLUMNS
    ]


def test_a_type_is_found_by_its_name():
    table = atlas.find("qwen2")
    assert [row[0] for row in table.rows] == list(COLUMNS)
    assert table.rows[0][:3] == ["float32", "✖ fails", f"RuntimeError: {REFUSED}"]
    with pytest.raises(PlanError, match=r"no model type 'qwen_2'.*did you mean.*'qwen2'.*\?$"):
        atlas.find("qwen_2")


def test_what_is_stored_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(atlas, "FOLDER", tmp_path / "atlas")
    monkeypatch.setattr(atlas, "PAGE", tmp_path / "ATLAS.md")
    cells = [
        Cell("x", "X", column, "input_ids", FAILS, "E", 'a, "b" | `c`', "m", "f:1: l", small="s")
        for column in COLUMNS
    ]
    versions = {"transformers": "5", "torch": "2", "peft": "1"}
    atlas.write(Atlas(versions, cells))
    assert atlas.read() == Atlas(versions, cells)
    assert list(atlas.differences(cells, cells)) == []
    changed = [*cells[:-1], cells[-1]._replace(verdict=PASSES)]
    (line,) = atlas.differences(cells, changed)
    assert line == "x | bfloat16, LoRA: verdict: 'fails' -> 'passes'"


def stuck(pipe):
    """A worker that sends one cell, and then dies or does not come back."""
    pipe.send(tool.Done())
    name = pipe.recv()
    pipe.send(Cell(name, "X", "float32", "", PASSES))
    if name == "gpt2":
        raise SystemExit(3)
    time.sleep(60)


@pytest.mark.parametrize(
    ("model_type", "why"), [("qwen2", "it takes more than 2 s"), ("gpt2", "the process .* died")]
)
def test_a_worker_that_hangs_or_dies_is_replaced(model_type, why, monkeypatch):
    monkeypatch.setattr(tool, "SECONDS", 2)
    monkeypatch.setattr(tool.Worker, "target", staticmethod(stuck))
    with tool.Worker() as worker:
        first = worker.process.pid
        cells = list(worker.examine(model_type).values())
        assert worker.process.is_alive()
        assert worker.process.pid != first
    assert [one.verdict for one in cells] == [PASSES] + [UNKNOWN] * 5
    assert cells[0].small.startswith("not run: ")
    for one in cells[1:]:
        assert re.fullmatch(why, one.error)


def test_a_small_model_that_takes_too_long_is_left(monkeypatch):
    with state.listening():
        monkeypatch.setattr(tool, "PATIENCE", 600)
        assert tool.Small("qwen2").reason == ""
        monkeypatch.setattr(tool, "PATIENCE", 0)
        left = tool.Small("qwen2")
        assert left.reason == "a pass of the small model takes longer than 0 s"
        assert left.config is None
    assert not torch.nn.modules.module._global_forward_pre_hooks

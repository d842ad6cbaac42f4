"""The explore panel without a browser: what its controls say and what Run leaves in it."""

import pytest

from helpers import panels, recorded
from helpers.backend import versions
from helpers.errors import CheckpointError, PlanError
from helpers.experiment import Outcome
from helpers.plan import LoadPlan

PLANS = [
    LoadPlan(),
    LoadPlan("fp32", dtype="float16", default_dtype="bfloat16", attention="eager"),
    LoadPlan("overflow", dtype="auto", autocast="bfloat16"),
    LoadPlan("some/folder", after_load=("lora", "float"), question="And why?"),
]


def press(panel):
    panel.button.click()


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.checkpoint)
def test_the_knobs_show_the_plan_and_give_it_back(plan):
    panel = panels.explore(plan)
    assert panel.plan() == plan
    assert all(knob.label for knob in panel.knobs.values())


def test_without_a_plan_it_starts_with_the_default_one():
    assert panels.explore().plan() == LoadPlan()


def test_every_choice_of_every_knob_is_a_plan_that_can_be_checked():
    panel = panels.explore()
    for name, knob in panel.knobs.items():
        seen = set()
        for choice in knob.options:
            knob.value = choice
            panel.plan().check()
            seen.add(getattr(panel.plan(), name))
        assert len(seen) == len(knob.options)


def test_a_knob_that_was_set_can_be_unset():
    panel = panels.explore(LoadPlan(default_dtype="float16", autocast="bfloat16"))
    panel.knobs["default_dtype"].label = "not set"
    panel.knobs["autocast"].label = "not set"
    assert panel.plan() == LoadPlan()


def test_every_control_has_a_name():
    panel = panels.explore()
    controls = (panel.transformers, *panel.knobs.values(), panel.button)
    names = [control.description for control in controls]
    assert all(names)
    assert len(set(names)) == len(names)


def test_failure_and_success_each_leave_an_outcome_and_a_row(one_thread):
    panel = panels.explore(LoadPlan("fp32"))
    press(panel)
    assert "FlashAttention only support fp16 and bf16 data type" in panel.result.value
    assert "Run 1 is done." in panel.status.value
    panel.knobs["dtype"].value = "bfloat16"
    press(panel)
    assert [outcome.ok for outcome in panel.outcomes] == [False, True]
    assert panel.outcomes[1].plan == LoadPlan("fp32", dtype="bfloat16")
    assert panel.outcomes[1].text in panel.result.value
    assert "only support" not in panel.result.value
    assert panel.history.value.count("<tr>") == 1 + len(panel.outcomes)


def test_while_it_runs_the_panel_says_so_and_keeps_its_button_enabled(monkeypatch):
    panel = panels.explore()
    during = []

    def run(plan):
        during.append((panel.status.value, panel.button._dom_classes, panel.button.disabled))
        return Outcome(plan)

    monkeypatch.setattr(panels, "run", run)
    press(panel)
    ((status, classes, disabled),) = during
    assert "Running" in status
    assert "dg-busy" in classes
    assert not disabled  # a disabled button loses the focus
    assert "dg-busy" not in panel.button._dom_classes
    assert "Running" not in panel.status.value


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PlanError("say <this>."), "say &lt;this&gt;."),
        (CheckpointError("the disk is full."), "the disk is full."),
        (KeyboardInterrupt(), "interrupted"),
        (KeyError("x"), "KeyError: &#x27;x&#x27;"),
        (RuntimeError(), "RuntimeError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_error_gets_out_of_a_press_and_the_next_one_works(monkeypatch, error, said):
    panel = panels.explore()

    def fail(plan):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(panels, "run", fail)
        press(panel)
    assert said in panel.result.value
    assert said in panel.status.value
    assert panel.outcomes == []
    assert panel.history.value == ""
    assert "dg-busy" not in panel.button._dom_classes
    monkeypatch.setattr(panels, "run", Outcome)
    press(panel)
    assert [outcome.plan for outcome in panel.outcomes] == [LoadPlan()]


def test_a_folder_that_is_no_checkpoint_gets_a_sentence(tmp_path):
    panel = panels.explore(LoadPlan(tmp_path))
    press(panel)
    assert "has no config.json" in panel.result.value
    assert panel.outcomes == []


def test_where_no_widget_shows_its_text_does():
    assert repr(panels.explore()) == (
        "Run this cell to see the panel: 6 settings and a Run button."
    )


def test_another_generation_shows_its_record_and_says_so(monkeypatch):
    panel = panels.explore(LoadPlan("bf16"))
    four = recorded.version("4")
    panel.transformers.value = f"{four} (recorded)"
    monkeypatch.setattr(panels, "run", lambda plan: pytest.fail("it ran"))
    press(panel)
    (outcome,) = panel.outcomes
    assert outcome.recorded
    assert outcome.plan == LoadPlan("bf16")
    assert set(outcome.loaded_dtypes) == {"float32"}
    assert outcome.versions["transformers"] == four
    assert "only support fp16 and bf16" in panel.result.value
    assert f"transformers {four}" in panel.result.value
    assert "nothing ran now" in panel.result.value
    assert "Run 1 is a recorded one." in panel.status.value
    assert f"recorded with Transformers {four}" in panel.history.value


def test_the_installed_generation_runs(monkeypatch):
    panel = panels.explore(LoadPlan("bf16"))
    installed, *others = panel.transformers.options
    assert installed == f"{versions()['transformers']} (runs here)"
    assert others == [f"{recorded.version('4')} (recorded)"]
    panel.transformers.value = others[0]
    panel.transformers.value = installed
    monkeypatch.setattr(panels, "run", Outcome)
    press(panel)
    assert [outcome.recorded for outcome in panel.outcomes] == [False]


def test_a_checkpoint_that_is_not_recorded_gets_a_sentence():
    panel = panels.explore(LoadPlan("some/folder"))
    panel.transformers.value = panel.transformers.options[1]
    press(panel)
    assert "record has the guide&#x27;s own checkpoints only" in panel.result.value
    assert panel.outcomes == []


@pytest.mark.parametrize(
    "plan",
    [
        LoadPlan(question="Why?"),
        LoadPlan(after_load="bfloat16"),
        LoadPlan(adapter="an/adapter"),
        LoadPlan(keyword="torch_dtype"),
    ],
    ids=str,
)
def test_a_plan_that_no_knob_can_lead_to_a_record_has_no_choice_of_versions(plan):
    panel = panels.explore(plan)
    assert panel.others == {}
    assert panel.transformers not in panel.children[1].children
    assert "5 settings" in repr(panel)

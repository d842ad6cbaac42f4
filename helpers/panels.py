"""The explore panel: knobs to a LoadPlan, Run, and what the run measured.

Another generation of Transformers than the installed one can be chosen too; its outcomes are the
recorded ones.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import ipywidgets as widgets

from helpers import checkpoints, controls, recorded, view
from helpers.backend import versions
from helpers.errors import PlanError
from helpers.experiment import Outcome, run
from helpers.plan import ATTENTION, AUTOCAST, DEFAULT_DTYPES, DTYPES, LoadPlan
from helpers.style import known_html, status_html

INSTALLED = versions()["transformers"]
NOT_SET = "not set"  # a Dropdown shows nothing for the value None


class ExplorePanel(widgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """Choose, press Run, read. ``outcomes`` holds every outcome so far, oldest first.

    What has no knob, such as ``after_load`` and ``question``, stays as in the first plan.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self.first = plan
        self.outcomes: list[Outcome] = []
        self.knobs = {
            "checkpoint": _dropdown("checkpoint", checkpoints.available(), plan.checkpoint),
            "dtype": _dropdown("dtype", DTYPES, plan.dtype),
            "attention": _dropdown("attn_implementation", ATTENTION, plan.attention),
            "default_dtype": _dropdown("set_default_dtype", DEFAULT_DTYPES, plan.default_dtype),
            "autocast": _dropdown("autocast", AUTOCAST, plan.autocast),
        }
        self.others = {
            f"{recorded.version(generation)} (recorded)": generation
            for generation in recorded.GENERATIONS
            if generation != recorded.generation_of(INSTALLED) and _has_knobs_only(plan)
        }
        choices = [f"{INSTALLED} (runs here)", *self.others]
        self.transformers = _dropdown("Transformers", choices, choices[0])
        self.button = controls.run_button("Run")
        self.button.on_click(self._run)
        self.known = controls.line("", "dg-known")
        for knob in (self.transformers, *self.knobs.values()):
            knob.observe(self._know, "value")
        self._know()
        self.status = controls.line(status_html("Ready."), "dg-status")
        self.result = widgets.HTML()
        self.history = widgets.HTML()
        version = [self.transformers] if self.others else []
        form = controls.form([*version, *self.knobs.values(), self.button])
        parts = controls.page_parts()
        super().__init__([parts, form, self.known, self.status, self.result, self.history])
        self.add_class("dg-panel")

    def plan(self) -> LoadPlan:
        """The plan that the knobs describe now."""
        chosen: dict[str, Any] = {
            name: None if knob.value == NOT_SET else knob.value for name, knob in self.knobs.items()
        }
        return replace(self.first, **chosen)

    def _know(self, _change: Any = None) -> None:
        # ipywidgets lets a press of Run overtake the settings that were changed just before it;
        # panel.js holds the press back until the kernel knows what the page shows.
        shown = [self.transformers, *self.knobs.values()] if self.others else self.knobs.values()
        self.known.value = known_html(knob.value for knob in shown)

    def _run(self, _button: Any = None) -> None:
        # Not `disabled`, which would throw the focus out of the panel; panel.js keeps clicks off.
        self.button.add_class("dg-busy")
        self.status.value = status_html("Running ...")
        try:
            self.outcomes.append(self._outcome())
        except (Exception, KeyboardInterrupt) as error:
            message = view.problem(error)
            self.result.value = view.problem_html(message)
            said = status_html("Not run.", message)
        else:
            outcome = self.outcomes[-1]
            self.result.value = view.outcome_html(outcome)
            self.history.value = view.history_html(self.outcomes)
            how = "is a recorded one" if outcome.recorded else "is done"
            seen = f"Run {len(self.outcomes)} {how}."
            said = status_html(seen, view.spoken(outcome))
        finally:
            self.button.remove_class("dg-busy")
        # Last of all: who reads that it is done may press again at once.
        self.status.value = said

    def _outcome(self) -> Outcome:
        """Of a run now, or the record of the chosen version."""
        generation = self.others.get(self.transformers.value)
        if generation is None:
            return run(self.plan())
        outcome = recorded.find(self.plan(), generation)
        if outcome is None:
            raise PlanError(
                f"Transformers {recorded.version(generation)} is not installed here, and its record"
                f" has the guide's own checkpoints only: choose one of them, or {INSTALLED}."
            )
        return outcome

    def __repr__(self) -> str:
        settings = bool(self.others) + len(self.knobs)
        return f"Run this cell to see the panel: {settings} settings and a Run button."


def explore(plan: LoadPlan | None = None) -> ExplorePanel:
    """The panel, set to a plan, for the last line of a notebook cell."""
    return ExplorePanel(plan or LoadPlan())


def _has_knobs_only(plan: LoadPlan) -> bool:
    """Whether nothing is set but what has a knob; of other plans there is no record."""
    usual = LoadPlan()
    return all(
        getattr(plan, name) == getattr(usual, name)
        for name in ("after_load", "question", "adapter", "keyword")
    )


def _dropdown(label: str, values: Iterable[Any], value: Any) -> widgets.Dropdown:
    # A value that is not among the known ones, such as a folder, is one more choice.
    options = [NOT_SET if v is None else str(v) for v in dict.fromkeys([*values, value])]
    chosen = NOT_SET if value is None else str(value)
    return widgets.Dropdown(options=options, value=chosen, description=label)

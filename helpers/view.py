"""An Outcome as people read it: a verdict, the road of the dtype, a history; as text and as HTML.

No widgets here. The HTML uses JupyterLab's theme colours, and no meaning hangs on colour alone.
"""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

from helpers import river
from helpers.errors import CheckpointError, PlanError
from helpers.experiment import Outcome
from helpers.plan import LoadPlan
from helpers.style import STYLE_TAG, State, details_html, pre_html, snippet_html, verdict_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SYMBOL: dict[State, str] = {"good": "✔", "bad": "✖", "warn": "⚠", "idle": "·"}


class Verdict(NamedTuple):
    """One word and one sentence about an outcome."""

    state: State
    word: str
    sentence: str

    def __str__(self) -> str:
        return f"{SYMBOL[self.state]} {self.word}: {self.sentence}"


class Station(NamedTuple):
    """A place on the road from the file to the gate, and the dtype that was measured there."""

    name: str
    dtype: str
    state: State = "idle"

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}"


class Table:
    """Rows that show as an HTML table in a notebook and as aligned text everywhere else."""

    def __init__(
        self, caption: str, heads: Sequence[str], rows: Sequence[Sequence[object]]
    ) -> None:
        self.caption = caption
        self.heads = heads
        self.rows = [[str(value) for value in row] for row in rows]

    def __repr__(self) -> str:
        lines = [list(self.heads), *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.heads))]
        text = [
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([self.caption, *text])

    def _repr_html_(self) -> str:
        return STYLE_TAG + self.html()

    def html(self) -> str:
        """The table alone, for a page that has the style already."""
        heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in self.heads)
        rows = "".join(
            f'<tr><th scope="row">{escape(first)}</th>'
            + "".join(f"<td>{escape(value)}</td>" for value in rest)
            + "</tr>"
            for first, *rest in self.rows
        )
        return (
            f'<table class="dg-table"><caption>{escape(self.caption)}</caption>'
            f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        )


class Card:
    """One outcome for the last line of a notebook cell: HTML there, text everywhere else."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def __repr__(self) -> str:
        lines = [str(verdict(self.outcome)), road_text(self.outcome)]
        if self.outcome.text is not None:
            lines.append(f"answer: {self.outcome.text}")
        return "\n".join([*lines, measured_with(self.outcome)])

    def _repr_html_(self) -> str:
        return STYLE_TAG + outcome_html(self.outcome)


class Picture:
    """A Matplotlib figure with the words that stand for it where it cannot be seen."""

    def __init__(self, figure: "Figure", words: str) -> None:
        self.figure = figure
        self.words = words

    def __repr__(self) -> str:
        return f"Picture: {self.words}"

    def _repr_html_(self) -> str:
        png = BytesIO()
        # White also in the dark theme, so that the lines keep their contrast.
        self.figure.savefig(png, format="png", dpi=110, facecolor="white", bbox_inches="tight")
        data = b64encode(png.getvalue()).decode("ascii")
        return f'<img alt="{escape(self.words)}" src="data:image/png;base64,{data}">'


def outcomes_table(caption: str, outcomes: Iterable[Outcome]) -> Table:
    """One row an outcome: what was set, where the dtype went, what came of it."""
    return Table(
        caption,
        ("Checkpoint", "Settings", "File", "Loaded", "Gate", "Result", "Distance from float32"),
        [
            (
                outcome.plan.name,
                knobs_text(outcome.plan),
                *(station.dtype for station in stations(outcome)[:2]),
                stations(outcome)[-1].dtype,
                f"{SYMBOL[verdict(outcome).state]} {verdict(outcome).word}",
                gap(outcome),
            )
            for outcome in outcomes
        ],
    )


def verdict(outcome: Outcome) -> Verdict:
    """Whether it worked, in a sentence. A run with NaN or inf in its logits did not."""
    if not outcome.ok:
        return Verdict("bad", "Fails", f"{outcome.error_type}: {outcome.error}")
    if outcome.xray is not None and outcome.weightless:
        words = outcome.xray.verdict.removeprefix("passes: ")
        return Verdict("good", "Passes", f"{words}; without weights there is no text.")
    if not outcome.finite:
        return Verdict(
            "warn",
            "Runs, and is wrong",
            "no exception, but the logits hold NaN or inf, so the text below is no answer.",
        )
    if outcome.recorded:
        return Verdict("good", "Works", "no exception, and finite logits.")
    return Verdict("good", "Works", f"largest logit distance from float32 {gap(outcome)}.")


def gap(outcome: Outcome) -> str:
    """The logit distance from float32 with two significant digits; "not measured" without one."""
    return "not measured" if outcome.max_logit_gap is None else f"{outcome.max_logit_gap:.2g}"


def stations(outcome: Outcome) -> list[Station]:
    """The road of the dtype: checkpoint file, loaded weights, attention input, after the rescue
    cast, gate. What is done after the load is one more station, and so is training. One that was
    not reached says so."""
    attention = _distinct(record.attention_input for record in outcome.gate)
    at_kernel = _distinct(record.kernel for record in outcome.gate if record.kernel)
    accepted = [record.accepted for record in outcome.gate if record.kernel]
    road = [
        Station("checkpoint file", _file(outcome)),
        Station("loaded weights", _counted(outcome.loaded_dtypes) or "not reached"),
        Station("attention input", attention or "not reached"),
    ]
    if outcome.changed_dtypes:
        steps = Station(
            f"after {', '.join(_changes(outcome.plan))}", _counted(outcome.changed_dtypes)
        )
        road.insert(2, steps)
    if outcome.training_gate:
        seen = _distinct(r.kernel or r.attention_input for r in outcome.training_gate)
        road.insert(3, Station("attention while training", seen))
    if outcome.plan.attention != "flash_attention_2":
        unused = f"none in {outcome.plan.attention}"
        return [*road, Station("after the rescue cast", unused), Station("gate", unused)]
    if not accepted:
        unseen = "not seen" if outcome.ok else "not reached"
        return [*road, Station("after the rescue cast", unseen), Station("gate", unseen)]
    passed = all(accepted)
    return [
        *road,
        Station("after the rescue cast", at_kernel),
        Station(
            "gate",
            f"{'accepts' if passed else 'refuses'} {at_kernel}",
            "good" if passed else "bad",
        ),
    ]


def road_text(outcome: Outcome) -> str:
    """The stations as one line of text."""
    return " → ".join(map(str, stations(outcome)))


def knobs_text(plan: LoadPlan) -> str:
    """The settings of a plan, in words."""
    parts = [f"{plan.keyword} {plan.dtype}", plan.attention]
    if plan.default_dtype:
        parts.append(f"set_default_dtype({plan.default_dtype})")
    if plan.autocast:
        parts.append(f"autocast({plan.autocast})")
    return ", ".join([*parts, *_changes(plan)])


def _changes(plan: LoadPlan) -> list[str]:
    return [*(["adapter"] if plan.adapter is not None else []), *plan.after_load]


def settings(outcome: Outcome) -> str:
    """The settings in words, with the version where it is not the one that runs here."""
    knobs = knobs_text(outcome.plan)
    version = outcome.versions.get("transformers")
    return f"{knobs}, recorded with Transformers {version}" if outcome.recorded else knobs


def outcome_html(outcome: Outcome) -> str:
    """Verdict, road, river, answer, log lines and snippet."""
    parts = [_verdict_html(verdict(outcome)), _road_html(stations(outcome))]
    if outcome.xray is not None:
        parts.append(river.html(outcome.xray, headline=False))
    if outcome.text is not None:
        parts.append(
            f"<p>The model was asked <q>{escape(outcome.plan.question)}</q> and says:</p>"
            f'<blockquote class="dg-answer">{escape(outcome.text)}</blockquote>'
        )
    if outcome.frames:
        parts.append(details_html("Traceback", pre_html("Traceback", traceback_text(outcome))))
    if said := [*outcome.warnings, *outcome.logs]:
        lines = "".join(f"<li>{escape(line)}</li>" for line in said)
        parts.append(details_html(f"Warnings and log lines ({len(said)})", f"<ul>{lines}</ul>"))
    parts.append(_snippet_html(outcome))
    parts.append(f'<p class="dg-small">{escape(measured_with(outcome))}</p>')
    return f'<div class="dg-outcome">{"".join(parts)}</div>'


def traceback_text(outcome: Outcome, last: int = 6) -> str:
    """The end of the traceback, as Python prints it."""
    left_out = ["  ..."] if len(outcome.frames) > last else []
    error = f"{outcome.error_type}: {outcome.error}"
    heading = "Traceback (most recent call last):"
    return "\n".join([heading, *left_out, *outcome.frames[-last:], error])


def measured_with(outcome: Outcome) -> str:
    """The line that tags an outcome with its versions and backend."""
    kind = "the CPU reference kernel" if outcome.backend == "reference" else outcome.backend
    notes = ""
    if outcome.autocast_as_on_a_gpu:
        notes += (
            " On a CPU this version does not see that autocast is on; here it was made to count as"
            " it does on a GPU."
        )
    old = outcome.versions.get("transformers", "").startswith("4.")
    if old and outcome.backend == "reference" and outcome.plan.attention == "flash_attention_2":
        notes += (
            " With the flash_attn package it also warns of the dtype at load, and the config does"
            " not name a kernel of the hub."
        )
    if outcome.weightless:
        notes = (
            " The weights are not on this machine: the forward pass ran at the model's own size on"
            f" tensors that have a shape and a dtype and no data.{notes}"
        )
    if outcome.recorded:
        return (
            f"Recorded with {outcome.versions}, nothing ran now; flash_attention_2 was"
            f" {kind}.{notes}"
        )
    return f"Measured here with {outcome.versions}; flash_attention_2 is {kind}.{notes}"


def history_html(outcomes: Sequence[Outcome]) -> str:
    """What was tried, newest first, as a table."""
    if not outcomes:
        return ""
    heads = ("Run", "Checkpoint", "Settings", "Result", "Gate", "Answer or error")
    rows = [
        (
            number,
            outcome.plan.name,
            settings(outcome),
            f"{SYMBOL[verdict(outcome).state]} {verdict(outcome).word}",
            stations(outcome)[-1].dtype,
            _short(outcome),
        )
        for number, outcome in enumerate(outcomes, 1)
    ]
    return Table("What was tried, newest first", heads, rows[::-1]).html()


def problem(error: BaseException) -> str:
    """Why there is no outcome, in one sentence."""
    if isinstance(error, KeyboardInterrupt):
        return "The run was interrupted; nothing of it is kept."
    if isinstance(error, (PlanError, CheckpointError)):
        return str(error)
    return ": ".join(filter(None, (type(error).__name__, str(error))))


def problem_html(message: str) -> str:
    """A plan that could not be run, or a run that was stopped."""
    return _verdict_html(Verdict("bad", "Not run", message))


def spoken(outcome: Outcome) -> str:
    """The verdict, and the answer if there is one."""
    return f"{verdict(outcome)} {outcome.text or ''}".rstrip()


def _verdict_html(result: Verdict) -> str:
    head = f"{SYMBOL[result.state]} {result.word}:"
    return verdict_html(result.state, head, result.sentence, is_code=result.word == "Fails")


def _road_html(road: Iterable[Station]) -> str:
    items = "".join(
        f'<li class="dg-station dg-{s.state}"><span class="dg-name">{escape(s.name)}:</span> '
        f'<span class="dg-dtype">{_mark(s)}{escape(s.dtype)}</span></li>'
        for s in road
    )
    return f'<ol class="dg-road" aria-label="The dtype from the file to the gate">{items}</ol>'


def _mark(station: Station) -> str:
    return "" if station.state == "idle" else f"{SYMBOL[station.state]} "


def _snippet_html(outcome: Outcome) -> str:
    works = verdict(outcome).state == "good"
    label = "for a machine with FlashAttention" if works else "which goes wrong in the same way"
    return snippet_html(f"The same as a script, {label}", "Code to paste", outcome.snippet)


def _distinct(dtypes: Iterable[object]) -> str:
    return " and ".join(dict.fromkeys(map(str, dtypes)))


def _counted(dtypes: dict[str, int]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return ", ".join(f"{dtype} ({count} tensors)" for dtype, count in dtypes.items())


def _file(outcome: Outcome) -> str:
    if outcome.weightless:
        return f"no weights here, config.json says {outcome.declared_dtype or 'nothing'}"
    tensors = _counted(outcome.file_dtypes) or "no safetensors to read"
    if not outcome.file_dtypes or outcome.declared_dtype in outcome.file_dtypes:
        return tensors
    return f"{tensors}, config.json says {outcome.declared_dtype or 'nothing'}"


def _short(outcome: Outcome) -> str:
    text = (outcome.text if outcome.ok else outcome.error) or ""
    return text if len(text) <= 80 else f"{text[:77]}..."

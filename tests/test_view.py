"""An Outcome in words and in HTML: nothing is lost, nothing is injected, colour is never alone."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import style, view
from helpers.backend import Versions
from helpers.errors import CheckpointError, PlanError
from helpers.experiment import Outcome
from helpers.plan import LoadPlan
from helpers.probe import Dtypes, GateRecord
from helpers.style import STYLE
from helpers.view import SYMBOL, Station, Verdict

BF16, FP16, FP32 = (Dtypes(*[name] * 3) for name in ("bfloat16", "float16", "float32"))
STATIONS = [
    "checkpoint file",
    "loaded weights",
    "attention input",
    "after the rescue cast",
    "gate",
]


def layers(attention_input, kernel, count=3):
    came_back = None if kernel is None else "float32" not in kernel
    return tuple(
        GateRecord(f"layers.{i}", attention_input, kernel, came_back) for i in range(count)
    )


FRAMES = ('  File "a.py", line 1, in outer\n    f()', '  File "b.py", line 2, in inner\n    g()')
WORKS = Outcome(
    LoadPlan(),
    stage="done",
    file_dtypes={"bfloat16": 38},
    declared_dtype="bfloat16",
    loaded_dtypes={"bfloat16": 38},
    gate=layers(BF16, BF16),
    finite=True,
    text="An answer.",
    max_logit_gap=0.0912,
    versions=Versions(torch="2.13.0"),
    backend="reference",
    snippet="import torch\n",
)
FAILS = replace(
    WORKS,
    stage="forward",
    error_type="RuntimeError",
    error="FlashAttention only support fp16 and bf16 data type",
    frames=FRAMES,
    file_dtypes={"float32": 38},
    loaded_dtypes={"float32": 38},
    gate=layers(FP32, FP32, 1),
    finite=None,
    text=None,
    max_logit_gap=None,
)
FILE_FP32 = "float32, config.json says bfloat16"
WRONG = replace(WORKS, finite=False, text="!!!!", max_logit_gap=float("nan"))
NOT_LOADED = Outcome(LoadPlan(), error_type="OSError", error="no file")
SDPA = replace(WORKS, plan=LoadPlan(attention="sdpa"), gate=layers(FP32, None))
RESCUED = replace(WORKS, gate=layers(FP32, FP16))


class Reader(HTMLParser):
    """The markup and the text of a piece of HTML, apart."""

    def __init__(self, html):
        super().__init__()
        self.markup, self.words = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.markup.append((tag, tuple(attributes)))

    def handle_endtag(self, tag):
        self.markup.append(f"/{tag}")

    def handle_data(self, data):
        self.words.append(data)

    def handle_comment(self, data):
        self.markup.append("comment")

    handle_decl = unknown_decl = handle_pi = handle_comment

    @property
    def text(self):
        return "".join(self.words)


# Verdict.


@pytest.mark.parametrize(
    ("outcome", "state", "sentence"),
    [
        (WORKS, "good", "✔ Works: largest logit distance from float32 0.091."),
        (replace(WORKS, max_logit_gap=None), "good", "float32 not measured."),
        (FAILS, "bad", f"✖ Fails: RuntimeError: {FAILS.error}"),
        (NOT_LOADED, "bad", "✖ Fails: OSError: no file"),
        (WRONG, "warn", "⚠ Runs, and is wrong: no exception, but the logits hold NaN or inf"),
    ],
)
def test_verdict(outcome, state, sentence):
    found = view.verdict(outcome)
    assert found.state == state
    assert sentence in str(found)


def test_every_state_has_a_symbol_of_its_own_and_every_verdict_a_word():
    assert set(SYMBOL) == {"good", "bad", "warn", "idle"}
    assert len(set(SYMBOL.values())) == len(SYMBOL)
    verdicts = [view.verdict(outcome) for outcome in (WORKS, FAILS, WRONG)]
    assert len({v.word for v in verdicts}) == len({v.state for v in verdicts}) == 3
    for found in verdicts:
        assert re.match(rf"{SYMBOL[found.state]} \w+", str(found))


# The road.


@pytest.mark.parametrize(
    ("outcome", "road"),
    [
        (WORKS, ["bfloat16", "bfloat16", "bfloat16", "bfloat16", "accepts bfloat16"]),
        (FAILS, [FILE_FP32, "float32", "float32", "float32", "refuses float32"]),
        (RESCUED, ["bfloat16", "bfloat16", "float32", "float16", "accepts float16"]),
        (
            SDPA,
            ["bfloat16", "bfloat16", "float32", *["none in sdpa"] * 2],
        ),
        (
            replace(NOT_LOADED, file_dtypes={"bfloat16": 30, "float32": 8}),
            [
                "bfloat16 (30 tensors), float32 (8 tensors), config.json says nothing",
                "not reached",
                "not reached",
                "not reached",
                "not reached",
            ],
        ),
        (
            replace(FAILS, gate=layers(Dtypes("bfloat16", "float32", "bfloat16"), None, 1)),
            [
                FILE_FP32,
                "float32",
                "q bfloat16, k float32, v bfloat16",
                "not reached",
                "not reached",
            ],
        ),
        (
            replace(FAILS, gate=(*layers(BF16, BF16, 2), *layers(FP32, FP32, 1))),
            [
                FILE_FP32,
                "float32",
                "bfloat16 and float32",
                "bfloat16 and float32",
                "refuses bfloat16 and float32",
            ],
        ),
        (
            replace(WORKS, gate=layers(FP32, None)),
            ["bfloat16", "bfloat16", "float32", "not seen", "not seen"],
        ),
    ],
    ids=["works", "fails", "rescued", "sdpa", "not loaded", "no kernel", "two dtypes", "blind"],
)  # fmt: skip
def test_road(outcome, road):
    assert view.stations(outcome) == [
        Station(name, dtype, state(dtype)) for name, dtype in zip(STATIONS, road, strict=True)
    ]
    assert view.road_text(outcome) == " → ".join(
        f"{name}: {dtype}" for name, dtype in zip(STATIONS, road, strict=True)
    )


def state(dtype):
    return {"accepts": "good", "refuses": "bad"}.get(dtype.split(" ")[0], "idle")


@pytest.mark.parametrize("outcome", [WORKS, FAILS, WRONG, RESCUED, SDPA, NOT_LOADED])
def test_without_colours_the_page_says_the_same(outcome):
    text = Reader(view.outcome_html(outcome)).text
    assert str(view.verdict(outcome)) in text
    for station in view.stations(outcome):
        mark = "" if station.state == "idle" else f"{SYMBOL[station.state]} "
        assert f"{station.name}: {mark}{station.dtype}" in text
    assert (outcome.text or "") in text
    assert outcome.snippet in text
    assert outcome.plan.question in text or outcome.text is None


def test_steps_after_the_load_are_a_station_of_their_own():
    changed = replace(WORKS, plan=LoadPlan(after_load="float"), changed_dtypes={"float32": 38})
    road = view.stations(changed)
    assert [station.name for station in road] == [*STATIONS[:2], "after float", *STATIONS[2:]]
    assert [station.dtype for station in road[1:3]] == ["bfloat16", "float32"]


def test_traceback_and_log_lines_are_shown_as_python_prints_them():
    said = replace(FAILS, warnings=("a warning",), logs=("line 1", "line 2"))
    text = Reader(view.outcome_html(said)).text
    heading = "Traceback (most recent call last):"
    assert f"{heading}\n{FRAMES[0]}\n{FRAMES[1]}\nRuntimeError: {FAILS.error}" in text
    many = replace(said, frames=FRAMES[:1] * 9 + FRAMES[1:])
    assert view.traceback_text(many).splitlines()[1] == "  ..."
    assert view.traceback_text(many).count("outer") == 5
    assert "Warnings and log lines (3)" in text
    assert "a warningline 1line 2" in text


# Markup comes from this package alone.

EVIL = [
    "<script>alert(1)</script>",
    "</p></div><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' tabindex='1",
    "<!-- ",
    "-->",
    "&lt;b&gt;&amp;",
    "<![CDATA[",
    "<style>*{display:none}</style>",
    "]]><?php",
]
texts = st.lists(st.sampled_from(EVIL) | st.text(min_size=1, max_size=5), min_size=1, max_size=3)
evil = texts.map(" ".join)


def with_texts(outcome, text):
    """Every piece of text in an outcome replaced by what ``text`` gives for it."""
    records = tuple(replace(r, layer=text(r.layer)) for r in outcome.gate)
    return replace(
        outcome,
        plan=replace(
            outcome.plan,
            checkpoint=text("path"),
            question=text("question"),
            after_load=(text("step"),),
            dtype=text("dtype"),
        ),
        error_type=outcome.error_type and text("Error"),
        error=outcome.error and text("message"),
        frames=tuple(text(frame) for frame in outcome.frames),
        file_dtypes={text("dtype"): 1},
        declared_dtype=text("dtype"),
        loaded_dtypes={text("dtype"): 2},
        gate=records,
        text=outcome.text and text("answer"),
        warnings=(text("warning"),),
        logs=(text("log"), text("log")),
        versions=Versions({text("name"): text("version")}),
        backend=text("backend"),
        snippet=text("code"),
    )


@pytest.mark.parametrize("outcome", [WORKS, FAILS, WRONG, SDPA])
@settings(max_examples=40)
@given(data=st.data())
def test_no_text_becomes_markup(outcome, data):
    tame = with_texts(outcome, lambda kind: kind)
    drawn = []

    def draw(kind):
        drawn.append(data.draw(evil, label=kind))
        return drawn[-1]

    wild = with_texts(outcome, draw)
    for render in (view.outcome_html, lambda o: view.history_html([WORKS, o])):
        page = Reader(render(wild))
        assert page.markup == Reader(render(tame)).markup
    # And it is there to be read. The parser, like a browser, turns "\r" into "\n".
    shown = wild.text if wild.ok else wild.error
    assert normal(shown) in normal(Reader(view.outcome_html(wild)).text)
    assert normal(wild.plan.checkpoint) in normal(Reader(view.history_html([wild])).text)
    for render in (view.problem_html, style.status_html):
        assert Reader(render(drawn[0])).markup == Reader(render("x")).markup
    assert Reader(style.status_html("x", drawn[0])).markup == Reader(style.status_html("x")).markup
    table = view.Table(drawn[0], [drawn[0], "b"], [[drawn[0], drawn[0]]])
    assert Reader(table.html()).markup == Reader(view.Table("a", "bc", ["de"]).html()).markup


def normal(text):
    return re.sub(r"\s+", " ", text)


# What there is instead of an outcome.


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyboardInterrupt(), "The run was interrupted; nothing of it is kept."),
        (PlanError("dtype='x' is not known."), "dtype='x' is not known."),
        (CheckpointError("no room."), "no room."),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
)
def test_problem_is_a_sentence_with_a_symbol_and_a_word(error, words):
    assert view.problem(error) == words
    assert Reader(view.problem_html(words)).text == f"{SYMBOL['bad']} Not run: {words}"


# Tables and cards.


def cells(html):
    return [
        [Reader(cell).text for cell in re.findall(r"<t[dh][ >].*?</t[dh]>", row)]
        for row in re.findall(r"<tr>.*?</tr>", html)
    ]


def test_history_is_newest_first_with_a_number_for_each_run():
    assert view.history_html([]) == ""
    tried = [WORKS, FAILS, WRONG, SDPA]
    head, *rows = cells(view.history_html(tried))
    assert [row[0] for row in rows] == ["4", "3", "2", "1"]
    assert {len(row) for row in (head, *rows)} == {6}
    assert [row[3] for row in rows] == [
        f"{SYMBOL[v.state]} {v.word}" for v in map(view.verdict, reversed(tried))
    ]
    assert rows[2][4:] == ["refuses float32", FAILS.error]
    assert rows[0][2] == "dtype omitted, sdpa"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("", ""), ("short", "short"), ("x" * 80, "x" * 80), ("x" * 81, "x" * 77 + "...")],
)
def test_long_answers_are_cut_and_empty_ones_stay_empty(text, shown):
    (_, row) = cells(view.history_html([replace(WORKS, text=text)]))
    assert row[-1] == shown


def test_settings_in_words_name_every_knob_that_is_set():
    assert view.knobs_text(LoadPlan()) == "dtype omitted, flash_attention_2"
    plan = LoadPlan("x", "auto", "float16", "eager", "bfloat16", ("lora", "merge"))
    words = "dtype auto, eager, set_default_dtype(float16), autocast(bfloat16), lora, merge"
    assert view.knobs_text(plan) == words


def test_backend_is_never_hidden():
    assert "flash_attention_2 is the CPU reference kernel" in view.measured_with(WORKS)
    native = replace(WORKS, backend="flash_attn")
    assert "flash_attention_2 is flash_attn." in view.measured_with(native)
    assert "torch 2.13.0" in view.measured_with(WORKS)


def test_table_holds_the_same_in_text_and_in_html():
    rows = [[1, "one"], [22, "a long entry"]]
    table = view.Table("Some numbers", ["n", "name"], rows)
    assert repr(table).splitlines() == ["Some numbers", "n   name", "1   one", "22  a long entry"]
    assert cells(table.html()) == [["n", "name"], ["1", "one"], ["22", "a long entry"]]
    assert Reader(table._repr_html_()).text == STYLE + Reader(table.html()).text


def test_outcomes_table_has_a_row_for_each():
    table = view.outcomes_table("Tried", [WORKS, FAILS])
    _, works, fails = cells(table.html())
    assert works[-4:] == ["bfloat16", "accepts bfloat16", "✔ Works", "0.091"]
    assert fails[-4:] == ["float32", "refuses float32", "✖ Fails", "not measured"]


@pytest.mark.parametrize("outcome", [WORKS, FAILS, WRONG, RESCUED, SDPA, NOT_LOADED])
def test_card_says_in_text_what_it_says_in_html(outcome):
    card = view.Card(outcome)
    html = Reader(card._repr_html_()).text
    first, road, *rest = repr(card).splitlines()
    assert first == str(view.verdict(outcome))
    assert road == view.road_text(outcome)
    for line in (first, rest[-1]):
        assert line in html
    assert (f"answer: {outcome.text}" in rest) == (outcome.text is not None)


dtypes = st.builds(Dtypes, *[st.sampled_from(["float16", "bfloat16", "float32"])] * 3)
records = st.builds(GateRecord, st.just("layer"), dtypes, st.none() | dtypes, st.booleans())
counts = st.dictionaries(st.sampled_from(["bfloat16", "float32", "F8_E4M3"]), st.integers(1, 99))
outcomes = st.builds(
    Outcome,
    st.builds(LoadPlan, attention=st.sampled_from(["flash_attention_2", "sdpa", "eager"])),
    error_type=st.none() | st.just("RuntimeError"),
    file_dtypes=counts,
    declared_dtype=st.none() | st.sampled_from(["bfloat16", "float32"]),
    loaded_dtypes=counts,
    gate=st.lists(records, max_size=3).map(tuple),
    finite=st.none() | st.booleans(),
    max_logit_gap=st.none() | st.floats(),
)


@given(outcomes)
def test_the_road_always_has_five_stations(outcome):
    road = view.stations(outcome)
    assert [station.name for station in road] == STATIONS
    assert all(station.dtype for station in road)
    assert view.road_text(outcome).split(" → ") == [str(station) for station in road]
    asked = [record for record in outcome.gate if record.kernel]
    if outcome.plan.attention == "flash_attention_2" and asked:
        passed = all(record.accepted for record in asked)
        assert road[-1].state == ("good" if passed else "bad")
        assert road[-1].dtype.startswith("accepts " if passed else "refuses ")
    else:
        assert road[-1].state == "idle"
    found = view.verdict(outcome)
    assert isinstance(found, Verdict)
    assert (found.state == "good") == (outcome.ok and outcome.finite is True)

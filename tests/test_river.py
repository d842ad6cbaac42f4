"""The dtype river: nothing is lost, nothing is invented, nothing is injected, colour is never
alone."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import river
from helpers.gate import xray
from helpers.reading import Harmless, Layer, Station, XRay
from helpers.tracer import Operation, Origin

SVG = "{http://www.w3.org/2000/svg}"
DTYPES = ["bfloat16", "float16", "float32", "float64", "q float32, k float32, v bfloat16"]
HOSTILE = ["<script>alert(1)</script>", '"><b onload="x">', "]]>&amp;&", "\x1b[31m\0\ud800", "a\nb"]
PATHS = [
    "model.layers.{}.self_attn",
    "vision.blocks.{}.attn",
    "decoder.block.{}.layer.1.EncDecAttention",
    "<i>.{}.'\"&",
]
LONG = ["x" * 700, "some words " * 70]
said = st.one_of(st.sampled_from([*HOSTILE, *LONG]), st.text(max_size=300))
stations = st.lists(
    st.builds(
        Station,
        st.sampled_from(["embedding", "norm", "projection", "rotary", "cache", "attention input"]),
        st.sampled_from(DTYPES),
    ),
    max_size=6,
    unique_by=lambda station: station.name,
)


@st.composite
def roads(draw):
    """What layers can share: everything but their names."""
    kernel = draw(st.sampled_from([None, "bfloat16", "float32"]))
    rescue = draw(st.one_of(st.none(), said)) if kernel else None
    road = draw(stations) + ([Station("gate", kernel)] if kernel else [])
    accepted = None if kernel is None else kernel == "bfloat16"
    return Layer("", "", "", "", kernel, accepted, rescue, tuple(road))


@st.composite
def xrays(draw):
    """Towers of layers whose calls may take turns, and words from anywhere."""
    kinds = draw(st.lists(roads(), min_size=1, max_size=3))
    layers, counts = [], {}
    for path, kind in draw(
        st.lists(st.tuples(st.sampled_from(PATHS), st.sampled_from(kinds)), max_size=30)
    ):
        number = counts[path] = counts.get(path, -1) + 1
        layers.append(kind._replace(name=path.format(number)))
    ok = draw(st.sampled_from([True, False, None]))
    module = draw(st.one_of(said, st.sampled_from([layer.name for layer in layers] or [""])))
    origin = Origin(
        0, module, "aten.mul", "parameter", draw(said), draw(said), "float32", "forward"
    )
    return XRay(
        draw(said),
        ok,
        draw(said),
        error_type=None if ok else "RuntimeError",
        error=None if ok else draw(said),
        at=None if ok else f"{module}, {draw(said)}",
        first_float32=draw(st.one_of(st.none(), st.just(origin))),
        layers=tuple(layers),
        harmless=tuple(draw(st.lists(st.builds(Harmless, said, said, st.just(3), said)))),
        operations=(Operation("model.norm", "aten.mul", (), ("float32",), "forward", "x.py"),),
        notes=tuple(draw(st.lists(said, max_size=2))),
    )


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


@given(xrays())
@settings(max_examples=30, deadline=None)
def test_hostile_words_stay_words(seen):
    root = ElementTree.fromstring(river.svg(seen))

    elements = list(root.iter())
    assert {e.tag.removeprefix(SVG) for e in elements} <= {
        *("svg", "title", "desc", "text", "tspan", "path")
    }
    attributes = {name for e in elements for name in e.attrib}
    assert not [name for name in attributes if name.startswith("on") or "href" in name]
    ids = [e.attrib["id"] for e in elements if "id" in e.attrib]
    assert len(ids) == len(set(ids)) == 2
    assert [root.attrib["aria-labelledby"], root.attrib["aria-describedby"]] == ids
    spoken = root.find(f"{SVG}desc").text
    for stop in (stop for row in river.river(seen).rows for stop in row.stops):
        assert " ".join(stop.name.split()) in spoken or not stop.name.isprintable()
    assert ("First float32 that matters" in spoken) is bool(seen.first_float32)
    tags = {tag for tag, _ in Tags(river.html(seen)).found}
    assert tags <= {*("div", "svg", "title", "desc", "text", "tspan", "path")} | {
        *("p", "details", "summary", "pre", "code")
    }


@given(xrays())
@settings(max_examples=30, deadline=None)
def test_text_fits_a_terminal_and_commands_nothing(seen):
    lines = river.text(seen).split("\n")

    assert max(map(len, lines)) <= 100
    assert all(line.isprintable() for line in lines)


@given(xrays())
@settings(max_examples=30, deadline=None)
def test_words_stand_inside_the_picture(seen):
    root = ElementTree.fromstring(river.svg(seen))
    _, _, width, height = map(float, root.attrib["viewBox"].split())

    for text in root.iter(f"{SVG}text"):
        size = int(re.search(r"font-size: (\d+)px", text.attrib["style"])[1])
        for part in [text, *text.iter(f"{SVG}tspan")]:
            if "x" in part.attrib:
                x, long = float(part.attrib["x"]), size * 0.54 * len(part.text or "")
                left = x - long / 2 if "text-anchor" in part.attrib else x
                assert 0 <= left <= left + long <= width
                assert 0 < float(part.attrib["y"]) < height


@given(xrays())
@settings(max_examples=30, deadline=None)
def test_every_layer_is_in_one_row_that_says_what_it_says(seen):
    rows = river.river(seen).rows
    order = {}
    for layer in seen.layers:
        order.setdefault(re.sub(r"\d+", "N", layer.name), []).append(layer)
    covered = []
    for row in rows:
        for run in row.runs:
            alike = order[re.sub(r"\d+", "N", run.first)]
            names = [layer.name for layer in alike]
            unfolded = alike[names.index(run.first) : names.index(run.last) + 1]
            assert len(unfolded) == run.size
            covered += [layer.name for layer in unfolded]
            for layer in unfolded:
                stops = {stop.name: stop for stop in row.stops}
                for name, dtype in layer.stations:
                    assert stops[name].dtype == dtype
                assert ("rescue cast" in stops) == (layer.rescue is not None)
                mark = stops["gate"].mark if "gate" in stops else None
                assert mark == {True: "✔", False: "✖", None: None}[layer.accepted]

    assert sorted(covered) == sorted(layer.name for layer in seen.layers)
    plain = [[(*s[:2], *s[3:]) for s in row.stops] for row in rows if row.runs]
    paths = [re.sub(r"\d+", "N", row.runs[0].first) for row in rows if row.runs]
    both = [f"{path} {stops}" for path, stops in zip(paths, plain, strict=True)]
    assert len(both) == len(set(both))
    marks = [stop.mark for row in rows for stop in row.stops]
    assert seen.ok is True or "✖" in marks or "⚠" in marks


@given(xrays())
@settings(max_examples=30, deadline=None)
def test_float32_has_a_symbol_and_words_wherever_it_has_a_colour(seen):
    root = ElementTree.fromstring(river.svg(seen))
    words = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    rows = river.river(seen).rows
    wide = [
        part
        for row in rows
        for stop in row.stops
        for part in stop.dtype.split(", ")
        if "32" in part or "64" in part
    ]
    orange = [p for p in root.iter(f"{SVG}path") if p.attrib.get("fill") == "#c2410c"]

    middle = [t for t in root.iter(f"{SVG}text") if "text-anchor" in t.attrib]
    assert sum("▲" in "".join(t.itertext()) for t in middle) == len(wide)
    assert bool(orange) <= bool(wide)
    flags = [word for word in words if word.startswith("▼ float32 comes in ")]
    assert len(flags) == (1 if seen.first_float32 and wide else 0)


@given(xrays())
@settings(max_examples=30, deadline=None)
def test_data_goes_through_json_and_back(seen):
    data = river.data(seen)

    assert json.loads(json.dumps(data)) == data
    assert [len(row["stops"]) for row in data["rows"]] == [
        len(row.stops) for row in river.river(seen).rows
    ]


def alike(count, dtype="bfloat16"):
    road = (Station("norm", dtype), Station("attention input", dtype), Station("gate", dtype))
    passed = dtype != "float32"
    return XRay(
        "a model",
        passed,
        "a verdict",
        layers=tuple(
            Layer(f"layers.{i}.attn", dtype, dtype, dtype, dtype, passed, None, road)
            for i in range(count)
        ),
    )


def test_a_picture_does_not_grow_with_layers_that_are_alike():
    for make in (river.svg, river.text, river.html):
        assert len(make(alike(999))) == len(make(alike(200)))
    assert len(json.dumps(river.data(alike(999)))) == len(json.dumps(river.data(alike(200))))


def test_harmless_float32_of_one_kind_is_added_up():
    two = [Harmless("norm", "layers.0-1.norm", 2, line) for line in ("a.py:1: x", "a.py:2: y")]
    seen = replace(alike(2), harmless=(*two, Harmless("norm", "", 1, "a.py:3: z")))

    assert river.river(seen).harmless == ("norm, 5 times: layers.0-1.norm, the model itself",)


def test_ids_come_from_what_is_shown():
    def ids(seen):
        return re.findall(r' id="([^"]*)"', river.svg(seen))

    assert ids(alike(2)) == ids(alike(2))
    assert not set(ids(alike(2))) & set(ids(alike(3)))


def in_turns(count):
    """Every fourth layer is another."""
    seen = alike(count)
    other = (Station("norm", "float16"), Station("gate", "bfloat16"))
    turns = [
        layer._replace(stations=other) if i % 4 == 3 else layer
        for i, layer in enumerate(seen.layers)
    ]
    return replace(seen, layers=tuple(turns))


def test_layers_that_take_turns_are_two_rows():
    assert len(river.svg(in_turns(800))) == len(river.svg(in_turns(400)))
    assert [row.label for row in river.river(in_turns(12)).rows] == [
        "9 layers: 0-2, 4-6, 8-10: same",
        "3 layers: 3, 7, 11: same",
    ]


def test_an_origin_is_marked_in_the_row_of_its_layer():
    seen = alike(6, "float32")
    rescued = tuple(
        layer._replace(rescue="why", after_rescue="bfloat16", accepted=True, stations=road)
        if i < 4
        else layer
        for i, layer in enumerate(seen.layers)
        for road in [(*layer.stations[:-1], Station("gate", "bfloat16"))]
    )
    line = "model.py:1: x"
    origin = Origin(3, "layers.4.norm", "aten.mul", "parameter", "w", line, "float32", "forward")
    rows = river.river(replace(seen, layers=rescued, first_float32=origin)).rows

    assert [row.label for row in rows] == ["layers 0-3: same", "layers 4-5: same"]
    marked = [(row.label, s.name) for row in rows for s in row.stops if s.came_in]
    assert marked == [("layers 4-5: same", "norm")]


def contrast(one, other):
    """WCAG 2.2's contrast ratio of two colours."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(p * w for p, w in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colour", sorted(set(river.COLOUR.values())))
def test_markers_have_contrast_on_both_themes(colour):
    assert contrast(colour, "#ffffff") >= 4.5  # what is written on them
    assert contrast(colour, "#111111") >= 3  # JupyterLab's dark page


# Real X-rays


@pytest.fixture(scope="module")
def look():
    def look(what="Qwen1.5-0.5B", **how):
        seen = xray(what, **how)
        return seen, river.text(seen), river.river(seen)

    return look


def flag_stands_over(text, station):
    lines = text.split("\n")
    (flag,) = [i for i, line in enumerate(lines) if "▼ float32 comes in" in line]
    return lines[flag].index("▼") == re.search(rf"\b{station}\b", lines[flag + 1]).start()


def test_float32_weights_come_in_at_the_embedding_and_are_refused(look):
    seen, text, found = look(dtype="float32")

    assert text.startswith(f"✖ fails: RuntimeError: {seen.error}\n")
    assert flag_stands_over(text, "embedding")
    assert "▼ First float32 that matters: model.embed_tokens, aten.embedding.default" in text
    (row,) = found.rows
    assert row.label == "layer 0"
    assert [s.name for s in row.stops][-3:] == ["attention input", "rescue cast", "gate"]
    assert (row.stops[-1].mark, row.stops[-1].dtype) == ("✖", "float32")
    assert seen.layers[0].rescue in text


def test_bfloat16_passes_without_a_mark(look):
    seen, text, found = look(dtype="bfloat16", decode=True)

    (row,) = found.rows
    assert (row.label, row.path) == ("layers 0-23: same", "model.layers.0-23.self_attn")
    assert "cache" in [stop.name for stop in row.stops]
    assert {stop.dtype for stop in row.stops} == {"bfloat16"}
    assert row.stops[-1].mark == "✔"
    assert "▼" not in text
    assert "▲" not in text.removesuffix(river.LEGEND)
    assert "norm, 49 times: model.layers.0-23.input_layernorm" in text
    assert all(note[:40] in text for note in seen.notes)


def test_a_matmul_of_two_dtypes_ends_the_row(look):
    seen, text, found = look(dtype="bfloat16", after_load=["norms_float"])

    assert not seen.layers
    (row,) = found.rows
    assert [(s.name, s.dtype, s.mark) for s in row.stops] == [
        ("embedding", "bfloat16", ""),
        ("norm", "float32", ""),
        ("q_proj", "", "✖"),
    ]
    assert flag_stands_over(text, "norm")
    assert f"  ✖ RuntimeError: {seen.error}\n" in text
    assert "gate" not in [stop.name for stop in row.stops]


def test_the_rescue_cast_stands_before_the_gate_with_its_reason(look):
    _, text, found = look(dtype="float32", autocast="bfloat16")

    (row,) = found.rows
    assert [(s.name, s.dtype) for s in row.stops][-3:] == [
        ("attention input", "q float32, k float32, v bfloat16"),
        ("rescue cast", "bfloat16"),
        ("gate", "bfloat16"),
    ]
    assert "\n  rescue cast: autocast is on, to bfloat16\n" in text
    assert "▼ float32 comes in again here" in text
    assert flag_stands_over(text, "rotary")


def test_harmless_float32_is_one_line_for_each_kind(look):
    seen, text, _ = look(dtype="bfloat16", after_load=["lora"])

    lines = re.findall(r"^· Harmless float32: (.*?), (\d+) times?:", text, re.MULTILINE)
    times = {}
    for one in seen.harmless:
        times[one.what] = times.get(one.what, 0) + one.times
    assert {what: int(count) for what, count in lines} == times
    assert len(lines) == len(times)
    joined = " ".join(text.split())
    assert all(one.modules in joined for one in seen.harmless)


def test_towers_have_their_own_rows(look):
    from transformers import BartConfig

    small = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers",)}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 32}
    config = BartConfig(
        vocab_size=64, architectures=["BartForConditionalGeneration"], **small, **heads
    )
    _, _, found = look(config, dtype="bfloat16")

    assert [row.path for row in found.rows] == [
        "model.encoder.layers.0-1.self_attn",
        "model.decoder.layers.0-1.self_attn",
        "model.decoder.layers.0-1.encoder_attn",
    ]


def test_an_error_that_is_no_matmul_ends_its_row_too(look):
    from transformers import GPT2Config

    seen, text, found = look(GPT2Config(n_layer=2, n_embd=32, n_head=2), dtype="float32")

    assert (seen.error_type, found.rows[-1].stops[-1].mark) == ("StopIteration", "✖")
    assert "no Linear to take the dtype from. ✖ StopIteration" in text

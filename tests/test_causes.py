"""The catalogue of causes: its form, its links, and its examples, which run as a person runs them.

A failing example has to fail with its own message and a fixed one has to pass, for real: the
libraries, the offline checkpoints and the reference kernel. What needs a GPU, a broken binary or
another version says so in ``why_not_run`` and is skipped with that reason.
"""

import ast
import importlib.util
import json
import re
import sys
import traceback
from pathlib import Path

import pytest
import torch

from helpers import backend, checkpoints, state, why
from helpers.doctor import rules, verdict
from helpers.doctor.data import load
from helpers.doctor.text import diagnose_text

LABELS = [
    "weights-fp32",
    "missing-autocast",
    "upcast-module",
    "kbit-prep",
    "adapter-fp32",
    "quantization-compute-dtype",
    "inputs-fp32",
    "model-on-cpu",
    "mixed-qkv-dtype",
    "rope-dtype-mismatch",
    "matmul-dtype-mismatch",
    "gpu-too-old",
    "gpu-arch-not-built",
    "flash-attn-missing",
    "flash-attn-abi-mismatch",
    "cuda-unavailable",
    "arch-no-fa2",
    "head-dim",
    "noncontiguous-input",
    "padding-side",
    "sdpa-backend-unavailable",
    "warning-benign",
    "unknown-from-text",
]
FOLDER = Path(rules.__file__).parent / "causes"
PAGES = {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(FOLDER.glob("*.json"))}
FIXES = load("fixes.json")
EXAMPLES = ("failing", "fixed")
WIDTH = 88  # columns of a code line: pages are read in terminals and in chats
QUOTED = re.compile(r"`([^`]+)`")

# The honest example of the first ends in the message of the second, whose page it names.
IN_THE_WORDS_OF = {"inputs-fp32": "matmul-dtype-mismatch"}
# Examples that fail in this way on some machines only.
ELSEWHERE = {
    "cuda-unavailable": (
        torch.version.cuda is not None or torch.version.hip is not None,
        "this PyTorch is a GPU build, which words the message differently",
    ),
    "flash-attn-missing": (
        importlib.util.find_spec("flash_attn") is not None,
        "flash_attn is installed here",
    ),
}


def sentences(page):
    """Every text of a page that is translated."""
    yield from (page["title"], page["what"], page["why"], *page["recognise"], *page["versions"])
    yield from (page[kind]["why_not_run"] for kind in EXAMPLES if page[kind]["why_not_run"])
    yield from (one["note"] for one in page["safety"])
    yield from (one["tell_apart"] for one in page["near_misses"])
    yield from (one["what"] for one in page["sources"])


def labels_of_the_rules():
    """Every cause that a sign or a rule can name."""
    for sign in load("signs.json")["signs"]:
        if not sign.get("cause", "headline").startswith("headline"):
            yield sign["cause"]
        yield from sign.get("for", ())
        yield from sign.get("against", ())
    yield from (*rules.FLOAT32, *verdict.BEFORE_DTYPE, *verdict.PROVEN)
    yield from (*rules.FLOAT32_OF.values(), *rules.BLAMED.values())


def test_each_label_has_a_page_and_each_page_a_label():
    assert set(PAGES) == set(LABELS)
    assert [page["label"] for page in PAGES.values()] == list(PAGES)
    assert set(labels_of_the_rules()) <= set(PAGES)
    # The one that is no cause has no fix, only a next check.
    assert {*FIXES["for"], "unknown-from-text"} == set(PAGES)
    assert set(load("checks.json")["shows"]) <= set(PAGES)


@pytest.mark.parametrize("label", PAGES)
def test_a_page_is_complete(label):
    page = PAGES[label]
    assert list(page) == [
        *("label", "title", "what", "why", "recognise", "failing", "fixed"),
        *("safety", "versions", "near_misses", "sources"),
    ]
    assert list(page["failing"]) == ["code", "raises", "why_not_run"]
    assert list(page["fixed"]) == ["code", "why_not_run"]
    assert all(set(one) == {"fix", "level", "note"} for one in page["safety"])
    assert all(set(one) == {"label", "tell_apart"} for one in page["near_misses"])
    assert all(set(one) == {"what", "url"} for one in page["sources"])
    assert page["recognise"]
    assert page["versions"]
    assert page["near_misses"]
    assert page["sources"]
    for sentence in sentences(page):
        assert isinstance(sentence, str)
        assert sentence
        assert sentence == " ".join(sentence.split())
        assert sentence.count("`") % 2 == 0, sentence
    # Either an error's type and how its message begins, or, of the one warning, nothing.
    raises = page["failing"]["raises"]
    assert re.match(r"[A-Z]\w+Error: \S", raises) if label != "warning-benign" else raises == ""


@pytest.mark.parametrize("label", PAGES)
def test_code_of_a_page_is_python_that_fits_a_terminal(label):
    for kind in EXAMPLES:
        code = PAGES[label][kind]["code"]
        assert code
        ast.parse("\n".join(code))
        assert [line for line in code if len(line) > WIDTH or line != line.rstrip()] == []


@pytest.mark.parametrize("label", PAGES)
def test_fixes_of_a_page_are_those_of_the_diagnosis(label):
    told = [(one["fix"], one["level"]) for one in PAGES[label]["safety"]]
    fixes = FIXES["for"].get(label, [])
    assert told == [(fix, FIXES["fixes"][fix]["safety"]) for fix in fixes]


@pytest.mark.parametrize("label", PAGES)
def test_near_misses_are_pages_that_point_back(label):
    near = [one["label"] for one in PAGES[label]["near_misses"]]
    assert label not in near
    assert len(near) == len(set(near))
    for other in near:
        assert label in [one["label"] for one in PAGES[other]["near_misses"]]


@pytest.mark.parametrize("label", PAGES)
def test_sources_have_an_address_or_name_the_file_of_a_package(label):
    for source in PAGES[label]["sources"]:
        if source["url"]:
            assert re.fullmatch(r"https://\S+", source["url"])
        else:
            assert re.search(r"\d+\.\d+\.\d+.*/\w+\.(py|h)", source["what"])


@pytest.mark.parametrize("label", PAGES)
def test_the_message_of_a_page_is_not_taken_for_another_cause(label):
    said = PAGES[label]["failing"]["raises"]
    assert takes_it_for(said, label)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("label", PAGES)
def test_the_failing_example_fails_with_its_own_message(label, tmp_path, monkeypatch):
    page = PAGES[label]["failing"]
    if label in ELSEWHERE and ELSEWHERE[label][0]:
        pytest.skip(ELSEWHERE[label][1])
    error, logged = run(page, tmp_path, monkeypatch)
    if not page["raises"]:
        assert error is None, error
        quotes = {quote for line in PAGES[label]["recognise"] for quote in QUOTED.findall(line)}
        assert quotes & set(logged), logged
        return
    assert error is not None, "the failing example passes"
    kind, _, message = page["raises"].partition(": ")
    assert type(error).__name__ == kind, error
    assert str(error).startswith(message)
    assert takes_it_for("".join(traceback.format_exception(error)), label)
    live = why(error)
    expected = [label] if label != "unknown-from-text" else []
    assert ([live.cause] if live.certain else []) == expected
    assert live.certain or "not seen" in [one.what for one in live.evidence]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("label", PAGES)
def test_the_fixed_example_passes(label, tmp_path, monkeypatch):
    error, logged = run(PAGES[label]["fixed"], tmp_path, monkeypatch)
    assert error is None, "".join(traceback.format_exception(error))
    # What the pages call the sign of trouble is gone too.
    assert [line for line in logged if "torch.float32" in line or "right-padding" in line] == []


def takes_it_for(text, label):
    """Whether the doctor names this cause, or none, for the text."""
    diagnosis = diagnose_text(text)
    own = (label, IN_THE_WORDS_OF.get(label, label))
    return diagnosis.cause in own if diagnosis.certain else diagnosis.cause is None


def run(example, folder, monkeypatch):
    """An example in a namespace and a folder of its own: its exception and what was logged."""
    if example["why_not_run"]:
        pytest.skip(example["why_not_run"])
    monkeypatch.chdir(folder)
    file = folder / "example.py"  # so that a traceback shows the lines, as it does to a person
    file.write_text("\n".join(example["code"]) + "\n", "utf-8")
    code = compile(file.read_text("utf-8"), str(file), "exec")
    names = {"__name__": "example", "backend": backend, "checkpoints": checkpoints}
    before, error = settings(), None
    with state.as_before(), state.listening() as (logged, _):
        backend.activate()
        try:
            exec(code, names)
        except Exception as raised:
            error = raised
    assert settings() == before
    return error, logged


def settings():
    """What of the process an example could leave changed, beside what is put back."""
    return {
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "sdpa": [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()],
        "path": list(sys.path),
    }

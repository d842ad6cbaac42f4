"""What nbval does not look at: how the stored notebooks are made, and what they promise."""

import configparser
import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

from helpers.doctor.text import diagnose_text as diagnose

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DOCTOR = ROOT / "notebooks" / "07_ask_the_doctor.ipynb"
LESSONS = [path for path in NOTEBOOKS if not path.name.startswith("00")]
# flash-attn's text, csrc/flash_attn/flash_api.cpp
DTYPE_ERROR = ("RuntimeError", "FlashAttention only support fp16 and bf16 data type")
RAISED = {
    "01_reproduce_the_error": [DTYPE_ERROR, DTYPE_ERROR],
    "05_lora_train_merge_infer": [DTYPE_ERROR, DTYPE_ERROR],
    "04_set_default_dtype": [
        # torch's words for getattr(torch, "bf16")
        ("AttributeError", "module 'torch' has no attribute 'bf16'")
    ],
    "07_ask_the_doctor": [
        DTYPE_ERROR,
        ("RuntimeError", "mat1 and mat2 must have the same dtype, but got Float and BFloat16"),
    ],
}


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def prose(path):
    return [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]


def name(path):
    return path.stem


def test_all_eight_notebooks_are_here():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"0{number}" for number in range(8)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_every_code_cell_has_a_stored_run_in_one_session(path):
    cells = code_cells(path)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "saved after another run: make notebooks"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_no_output_is_exempt_from_comparison(path):
    tags = {tag for cell in code_cells(path) for tag in cell.metadata.get("tags", [])}
    assert tags <= {"raises-exception"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_cells_meant_to_fail_stored_their_error_and_no_other_did(path):
    errors = [
        (output.ename, output.evalue)
        for cell in code_cells(path)
        for output in cell.outputs
        if output.output_type == "error"
    ]
    tagged = [c for c in code_cells(path) if "raises-exception" in c.metadata.get("tags", [])]
    assert errors == RAISED.get(path.stem, [])
    assert len(tagged) == len(errors)


def test_the_error_of_notebook_01_comes_out_of_transformers_frames():
    tracebacks = [
        re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output.traceback))
        for cell in code_cells(ROOT / "notebooks" / "01_reproduce_the_error.ipynb")
        for output in cell.outputs
        if output.output_type == "error"
    ]
    assert tracebacks
    for text in tracebacks:
        assert re.search(r"site-packages.transformers.models.qwen2.modeling_qwen2\.py", text)
        assert re.search(r"site-packages.transformers.modeling_flash_attention_utils\.py", text)


def test_reports_of_two_machines_are_the_same_to_the_comparison():
    config = configparser.RawConfigParser()
    config.read(ROOT / "tests" / "nbval_sanitize.cfg", "utf-8")

    def compared(text):  # as nbval does it, without flags
        for section in config.sections():
            rule = config[section]
            text = re.sub(rule["regex"], rule["replace"], text)
        return text

    here = (
        "[OK] Python: 3.11.7\n[OK] torch: 2.13.0\n[OK] matplotlib: 3.11.2\n"
        "python 3.11.7, torch 2.13.0, transformers 5.22.2, kernels 0.17.2\n"
        '  File "transformers/x.py", line 864, in f\ndistance 0.091\n'
        "transformers/x.py:864: out = f(q), Cell In[14]:8: x, dg-river-0123456789ab-title\n"
        'File ".venv/lib/python3.11/site-packages/transformers/y.py", line 88, in g'
    )
    there = (
        "[OK] Python: 3.13.1\n[OK] torch: 2.13.1\n[OK] matplotlib: 3.10.9\n"
        "python 3.13.1, torch 2.13.0, transformers 5.22.2, kernels 0.17.9\n"
        '  File "transformers/x.py", line 857, in f\ndistance 0.1\n'
        "transformers/x.py:857: out = f(q), Cell In[1]:8: x, dg-river-ba9876543210-title\n"
        'File "C:\\v\\Lib\\site-packages\\transformers\\y.py", line 90, in g'
    )
    assert compared(here) == compared(there)
    assert compared(here) != compared(there.replace("[OK] torch", "[FAIL] torch"))
    assert compared(here) != compared(there.replace("transformers 5.22.2", "transformers 6.0.0"))
    assert compared(here) != compared(there.replace("x.py:857", "y.py:857"))
    assert compared(here) != compared(there.replace("out = f(q)", "out = f(k)"))
    assert compared(here) != compared(there.replace("transformers\\y.py", "transformers\\z.py"))


# What the pictures of notebook 06 have to say, in its order: where a model fails, with which
# message (None: it passes), and where float32 came in (None: there is none that matters).
MIXED = "mat1 and mat2 must have the same dtype, but got Float and BFloat16"
INSIDE = "base_model.model."
NAMED = [
    (None, None, None),
    (
        "model.layers.0.self_attn", DTYPE_ERROR[1],
        "model.embed_tokens, aten.embedding.default: the float32 parameter"
        " model.embed_tokens.weight",
    ),
    (
        f"{INSIDE}model.layers.0.self_attn", DTYPE_ERROR[1],
        f"{INSIDE}model.embed_tokens, aten.embedding.default: the float32 parameter"
        f" {INSIDE}model.embed_tokens.weight",
    ),
    (
        "model.layers.0.self_attn.q_proj", MIXED,
        "model.layers.0.input_layernorm, aten.mul.Tensor: the float32 parameter"
        " model.layers.0.input_layernorm.weight",
    ),
    (None, None, None),  # Gemma, with the same norms
    (
        "model.layers.0.self_attn", DTYPE_ERROR[1],
        "model.embed_tokens, aten.embedding.default: the float32 parameter"
        " model.embed_tokens.weight",
    ),
    (
        "model.layers.0.self_attn.q_proj", MIXED,
        "model.layers.0.input_layernorm, aten.pow.Tensor_Scalar: the float32 input inputs_embeds",
    ),
    (None, None, "model.layers.0.self_attn.q_proj, aten._to_copy.default: a cast to float32"),
    (
        "model.layers.0.self_attn", "query and key must have the same dtype",
        "model.layers.0.self_attn.k_proj, aten._to_copy.default: a cast to float32",
    ),
    (None, None, "model.rotary_emb, aten._to_copy.default: a cast to float32"),  # 72B, autocast
    (None, None, None),  # the reader's own, which is bf16 until they say another
]  # fmt: skip


def test_the_models_of_notebook_06_are_named_right():
    rivers = [
        " ".join(output.data["text/plain"].split())
        for cell in code_cells(ROOT / "notebooks" / "06_xray_your_model.ipynb")
        for output in cell.outputs
        if "<svg" in output.get("data", {}).get("text/html", "")
    ]
    assert len(rivers) == len(NAMED)
    for river, (where, error, first) in zip(rivers, NAMED, strict=True):
        if error is None:
            assert river.startswith("✔ passes: FlashAttention got bfloat16")
        else:
            assert river.startswith(f"✖ fails: RuntimeError: {error} ")
            assert f" at {where}, transformers/" in river
        assert ("First float32 that matters" in river) is (first is not None)
        assert first is None or f"First float32 that matters: {first} (" in river
    own = [river for river in rivers if "x = self.inside(x).float()" in river]
    assert len(own) == 2
    assert all(re.search(r"\(Cell In\[\d+\]:\d+: x = self", river) for river in own)


# What the doctor has to make of the cases of notebook 07 and of what follows them, in its order:
# whether anything failed, and the cause that the text was made with.
DOCTORED = [
    ("✖", "flash-attn-abi-mismatch"),
    ("✖", "weights-fp32"),
    ("✔", "warning-benign"),
    ("✖", "missing-autocast"),
    ("✖", "kbit-prep"),
    ("?", "The text does not decide"),
    ("✖", "missing-autocast"),  # the same, with what the check printed
    ("✖", "weights-fp32"),  # %why, after .float()
    ("✖", "inputs-fp32"),  # %why: float32 inputs_embeds
    ("-", "Nothing is wrong"),  # a bfloat16 model, before it fails
    ("✖", "weights-fp32"),  # and the float32 one
]
# The first fix that the prose speaks of, for each answer that prints one.
FIRST_FIXES = [
    "reinstall-matching-wheel",
    "pass-dtype",
    "ignore-warning",
    "wrap-in-autocast",
    "undo-kbit-upcast",
    "enable-mixed-precision",
    "pass-dtype",
    "align-dtypes",
]


def said(cell):
    return "".join(
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
        if output.get("name") != "stderr"
    )


def test_the_doctor_of_notebook_07_is_right_about_every_case():
    cells = code_cells(DOCTOR)
    asked = [cell for cell in cells if "diagnose(" in cell.source or "%why" in cell.source]
    answers = "\n".join(map(said, asked))
    heads = re.findall(r"^([✖✔?-]) (\S.*)$", answers, re.M)
    assert len(heads) == len(DOCTORED)
    for (mark, words), (right, cause) in zip(heads, DOCTORED, strict=True):
        assert (mark, re.match(cause, words) is not None) == (right, True), words
    assert re.findall(r"^Fix: .* \[([\w-]+)\]", answers, re.M) == FIRST_FIXES
    assert "Take the cast to float32 out" in answers  # of %why after .float(): not another load
    undecided = next(said(cell) for cell in asked if said(cell).startswith("?"))
    assert "? missing-autocast" in undecided
    assert "Fix:" not in undecided
    # The post in the panel, as its solution says: whole, and without its last sentence.
    (post,) = re.findall(r'doctor_panel\("""(.*)"""\)', cells[-1].source, re.S)
    whole, cut = diagnose(post), diagnose(post.rpartition("\n")[0])
    assert (whole.cause, whole.certain) == ("upcast-module", True)
    assert cut.cause is None
    assert {fix.cause for fix in cut.fixes} <= set(cut.candidates)
    assert "upcast-module" in cut.candidates
    assert len(cut.candidates) > 1
    assert cut.next_check


def test_the_ways_out_of_case_5_of_notebook_07_were_measured():
    cells = code_cells(DOCTOR)
    (measured,) = (said(cell) for cell in cells if "replace(kbit" in cell.source)
    ends = dict(re.findall(r"^([\w ,]+): +(works|fails)", measured, re.M))
    assert ends == {
        "without the preparation": "works",
        "bf16 set, and prepared": "fails",
        "the same, in autocast": "works",
        "prepared, and cast back": "works",
    }


def test_each_case_of_notebook_07_is_asked_before_the_doctor_is():
    cells = read(DOCTOR).cells
    first = next(i for i, cell in enumerate(cells) if cell.source.startswith("## Six cases"))
    last = next(i for i, cell in enumerate(cells) if "## In the session that failed" in cell.source)
    text = "\n".join(cell.source for cell in cells)
    titles = re.findall(r"^### (\d)\. .*\((.+)\)$", text, re.M)
    assert [number for number, _ in titles] == list("123456")
    assert all("run" in how or "written" in how for _, how in titles)
    order = "".join(
        "Q" if cell.source.startswith("<details><summary>Question") else "D"
        for cell in cells[first:last]
        if cell.source.startswith("<details><summary>Question")
        or (cell.cell_type == "code" and "diagnose(case)" in cell.source)
    )
    assert order == "QD" * 6
    for cell in cells[first:last]:
        if cell.source.startswith("<details><summary>Question"):
            wrong = re.findall(r"^- (?:Not )?\*[\w-]+\*.{20}", cell.source, re.M)
            assert len(wrong) >= 2 or "cannot be told" in cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_no_widget_state_and_no_folder_of_a_machine_is_stored(path):
    assert "widgets" not in read(path).metadata, "saved by JupyterLab: make notebooks"
    text = path.read_text("utf-8")
    assert not re.search(r"widget-view\+json|(?<![\w.~])/(?:home|root|tmp|Users)/", text)
    assert str(ROOT) not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_headings_form_one_outline(path):
    levels = [
        len(match[1])
        for source in prose(path)
        for match in re.finditer(r"^(#+) ", re.sub(r"```.*?```", "", source, flags=re.S), re.M)
    ]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_links_to_files_of_the_guide_lead_somewhere(path):
    for source in prose(path):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", source):
            assert (path.parent / target).is_file(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_code_cells_are_short(path):
    lines = {c.source: [line for line in c.source.splitlines() if line] for c in code_cells(path)}
    assert [source for source, filled in lines.items() if len(filled) > 10] == []


@pytest.mark.parametrize("path", LESSONS, ids=name)
def test_a_lesson_ends_with_the_panel_and_three_things_to_remember(path):
    *_, panel, solution, last = read(path).cells
    assert "explore(" in panel.source or "doctor_panel(" in panel.source
    assert solution.source.startswith("<details><summary>Solution")
    assert last.source.startswith("## What to remember")
    assert len(re.findall(r"^\d\. ", last.source, re.M)) == 3


@pytest.mark.parametrize("path", LESSONS, ids=name)
def test_a_lesson_says_which_backend_and_versions_its_outputs_come_from(path):
    first = "".join(output.text for output in code_cells(path)[0].outputs)
    assert "reference kernel" in first
    assert re.search(r"torch \d.*transformers \d", first)

"""The explore panel as a person meets it: in JupyterLab, in a browser, from the keyboard."""

import re

import browser
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from helpers.plan import LoadPlan, snippet

pytestmark = pytest.mark.browser

FIRST = LoadPlan("bf16", dtype="float32")  # what notebook 01 sets the panel to
ERROR = "RuntimeError: FlashAttention only support fp16 and bf16 data type"
THEMES = ("JupyterLab Light", "JupyterLab Dark")
OURS = (".dg-panel", *(f".jp-OutputArea-output:has(> {ours})" for ours in (".dg-outcome", "table")))
# axe looks at almost no contrast inside JupyterLab's scrolling panes, so it also gets a page with
# our markup alone, under all of JupyterLab's rules.
ALONE = """(ours) => {
  const rules = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules]);
  const body = document.body.cloneNode(false);
  body.innerHTML = "<main><h1>Ours alone</h1></main>";
  for (const part of document.querySelectorAll(ours)) body.firstChild.append(part.cloneNode(true));
  return `<!doctype html><html lang="en" class="${document.documentElement.className}">
    <title>Ours alone</title><style>${rules.map((rule) => rule.cssText).join(" ")}</style>
    ${body.outerHTML}</html>`;
}"""
# Writes down what a screen reader can notice during a run, and presses Run again while it is busy.
WATCH = """(panel) => {
  const run = panel.querySelector(".dg-run"), status = panel.querySelector(".dg-status");
  window.noticed = [];
  new MutationObserver(() => {
    const busy = run.getAttribute("aria-disabled");
    const live = status.isConnected && status.getAttribute("role") === "status";
    window.noticed.push([live, busy, status.textContent.trim()]);
    if (run.classList.contains("dg-busy")) run.click();
  }).observe(panel, { subtree: true, childList: true, attributes: true });
}"""
# What scrolls by itself, by keyboard too, may be wider: text as it is, and the picture.
BEYOND_THE_EDGE = """(panel) => [...panel.querySelectorAll(":not(pre *, .dg-picture *)")]
  .filter((part) => part.getBoundingClientRect().right > panel.getBoundingClientRect().right)
  .map((part) => part.outerHTML.slice(0, 100))"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """One JupyterLab and one browser for all tests here: the page and the server's address."""
    with browser.both(tmp_path_factory.mktemp("lab")) as found:
        yield found


@pytest.fixture(scope="module")
def complaints(lab):
    """Errors on the page and in its console. None is exempt."""
    page, _ = lab
    found = []
    page.on("console", lambda message: message.type == "error" and found.append(message.text))
    page.on("pageerror", lambda error: found.append(str(error)))
    return found


@pytest.fixture(scope="module")
def notebook(lab, complaints):
    """Notebook 01 with every cell run."""
    page, address = lab
    opened = browser.open_notebook(page, address, "01_reproduce_the_error.ipynb")
    browser.run_all(page)
    return opened


@pytest.fixture(autouse=True)
def no_complaint(complaints):
    yield
    found = complaints[:]
    complaints.clear()
    assert found == []


@pytest.fixture
def panel(lab, notebook):
    """The panel as it is at first, and the notebook in command mode on its cell."""
    page, _ = lab
    browser.use_theme(page, THEMES[0])
    browser.run_last_code_cell(page)
    found = notebook.locator(".dg-panel")
    expect(found.locator(".dg-status")).to_have_text("Ready.")
    return found


def walk(page, key, goal):
    """Press Tab or Shift+Tab until the goal has the focus."""
    for _ in range(20):
        page.keyboard.press(key)
        if goal.evaluate("element => element === document.activeElement"):
            return
    pytest.fail(f"pressing {key} 20 times did not lead to {goal}")


def run_by_key(page, panel, number, how="is done"):
    walk(page, "Tab", panel.get_by_role("button", name="Run"))
    page.keyboard.press("Enter")
    expect(panel.locator(".dg-status")).to_contain_text(f"Run {number} {how}.")


def test_the_other_generation_by_keyboard_is_a_record_and_says_so(lab, notebook, panel):
    page, _ = lab
    walk(page, "Tab", panel.get_by_label("Transformers", exact=True))
    page.keyboard.press("ArrowDown")
    dtype = panel.get_by_label("dtype", exact=True)
    walk(page, "Tab", dtype)
    for value in ("float16", "bfloat16", "auto", "omitted"):
        page.keyboard.press("ArrowUp")
        expect(dtype).to_have_value(value)
    run_by_key(page, panel, 1, "is a recorded one")
    expect(panel.locator(".dg-verdict")).to_have_text(f"✖ Fails: {ERROR}")
    expect(panel.locator(".dg-outcome")).to_contain_text("transformers 4.57.6")
    expect(panel.locator(".dg-outcome")).to_contain_text("nothing ran now")
    expect(panel.locator(".dg-table tbody tr")).to_contain_text("Transformers 4.57.6")


def test_by_keyboard_alone_the_error_becomes_a_sentence(lab, notebook, panel):
    page, _ = lab
    expect(notebook.locator(".jp-OutputArea-output", has_text=ERROR).first).to_be_visible()
    cells = notebook.locator(".jp-Cell").count()
    verdict, answer = panel.locator(".dg-verdict"), panel.locator(".dg-answer")

    run_by_key(page, panel, 1)
    expect(verdict).to_have_text(f"✖ Fails: {ERROR}")
    expect(panel.get_by_role("img", name="Dtype river of Qwen2ForCausalLM")).to_be_visible()
    expect(answer).to_have_count(0)
    expect(panel.get_by_role("button", name="Run")).to_be_focused()

    dtype = panel.get_by_label("dtype", exact=True)
    walk(page, "Shift+Tab", dtype)
    for value in ("float16", "bfloat16", "auto"):
        page.keyboard.press("ArrowUp")
        expect(dtype).to_have_value(value)
    run_by_key(page, panel, 2)

    expect(verdict).to_contain_text("✔ Works")
    expect(answer).to_have_text(re.compile(r"^[A-Z][\w-]*( [\w-]+)+\.$"))
    expect(panel.locator(".dg-table tbody tr")).to_have_text(
        [re.compile("^2.*auto.*✔ Works"), re.compile("^1.*float32.*✖ Fails")]
    )
    expect(notebook.locator(".jp-Cell")).to_have_count(cells)


def test_a_press_of_run_does_not_overtake_the_settings_before_it(lab, notebook, panel):
    page, _ = lab
    dtype = panel.get_by_label("dtype", exact=True)
    walk(page, "Tab", dtype)
    page.evaluate(
        "void jupyterapp.shell.currentWidget.sessionContext.session.kernel"
        ".requestExecute({code: 'import time; time.sleep(2)'})"
    )
    for value in ("float16", "bfloat16", "auto"):
        page.keyboard.press("ArrowUp")
        expect(dtype).to_have_value(value)
    run_by_key(page, panel, 1)
    expect(panel.locator(".dg-table tbody tr")).to_contain_text("auto")
    expect(panel.locator(".dg-status")).not_to_contain_text("Waiting")


def test_jupyterlab_takes_no_key_from_a_control(lab, notebook, panel):
    page, _ = lab
    cells = notebook.locator(".jp-Cell").count()
    controls = [*panel.get_by_role("combobox").all(), panel.get_by_role("button", name="Run")]
    assert len(controls) == 7
    for control in controls:
        walk(page, "Tab", control)
        for key in ("ArrowDown", "ArrowUp", "a", "b", "x", "d", "d", "m", "j", "k"):
            page.keyboard.press(key)
        expect(control).to_be_focused()
    expect(notebook.locator(".jp-Cell")).to_have_count(cells)
    expect(notebook.locator(".jp-Cell.jp-mod-active .dg-panel")).to_have_count(1)


def test_the_focus_is_seen_on_every_control_and_escape_leads_out(lab, panel):
    page, _ = lab
    for control in [*panel.get_by_role("combobox").all(), panel.get_by_role("button", name="Run")]:
        walk(page, "Tab", control)
        look = control.evaluate(
            "e => [getComputedStyle(e).outlineStyle, getComputedStyle(e).outlineWidth]"
        )
        assert look == ["solid", "2px"]
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.matches('.jp-Cell')")


def test_a_press_that_the_kernel_cannot_hear_gets_an_answer(panel):
    button = panel.get_by_role("button", name="Run")
    button.evaluate("e => e.classList.add('jupyter-widgets-disconnected')")  # as a restart does
    button.press("Enter")
    expect(panel.locator(".dg-status")).to_contain_text("run this notebook again from the top")
    expect(panel.locator(".dg-verdict")).to_have_count(0)


def test_a_run_is_spoken_and_a_second_press_does_not_count(lab, panel):
    page, _ = lab
    panel.evaluate(WATCH)
    run_by_key(page, panel, 1)
    page.keyboard.press("Enter")
    expect(panel.locator(".dg-status")).to_contain_text("Run 2 is done.")
    noticed = page.evaluate("noticed")
    assert all(live for live, _, _ in noticed)
    while_busy = {text for _, busy, text in noticed if busy == "true"}
    assert while_busy >= {"Waiting for the kernel ...", "Running ..."}
    assert noticed[-1][1:] == ["false", f"Run 2 is done. ✖ Fails: {ERROR}"]
    expect(panel.locator(".dg-table tbody tr")).to_have_count(2)


@pytest.mark.parametrize("address", ["secure", "plain http"])
def test_copy_puts_exactly_the_snippet_on_the_clipboard(lab, panel, address):
    page, _ = lab
    page.evaluate("navigator.clipboard.writeText('something else')")
    if address == "plain http":  # there a browser has no such object
        page.evaluate("Object.defineProperty(navigator, 'clipboard', { configurable: true })")
    run_by_key(page, panel, 1)
    copy = panel.get_by_role("button", name="Copy")
    walk(page, "Tab", copy)
    page.keyboard.press("Enter")
    expect(panel.locator(".dg-copied")).to_have_text("Copied.")
    expect(copy).to_be_focused()
    page.evaluate("delete navigator.clipboard")
    assert page.evaluate("navigator.clipboard.readText()") == snippet(FIRST)


@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_nothing_in_our_markup(lab, panel, theme):
    page, _ = lab
    browser.use_theme(page, theme)
    run_by_key(page, panel, 1)
    for summary in panel.locator("summary").all():
        summary.press("Enter")
    expect(panel.locator("details[open]")).to_have_count(3)
    in_lab = axe(page, {"include": [[selector] for selector in OURS]})
    assert found(in_lab, "violations") == []

    alone = page.context.new_page()
    alone.set_content(page.evaluate(ALONE, ", ".join(OURS)))
    # It judges no contrast inside a drawing; tests/test_river.py does.
    report = axe(alone, {"exclude": [[".dg-river svg"]]})
    alone.close()
    assert found(report, "violations") == []
    assert found(report, "incomplete") == []
    assert [rule for rule, _ in found(report, "passes")].count("color-contrast") > 90


def axe(page, context=None):
    kinds = ["violations", "incomplete", "passes"]
    return Axe().run(page, context, {"resultTypes": kinds}).response


def found(report, kind):
    return [(rule["id"], node["target"]) for rule in report[kind] for node in rule["nodes"]]


def test_a_narrow_page_cuts_nothing_off(lab, panel):
    page, _ = lab
    run_by_key(page, panel, 1)
    wide = page.viewport_size
    page.evaluate("jupyterapp.shell.collapseLeft()")
    page.set_viewport_size({**wide, "width": 700})
    cut = panel.evaluate(BEYOND_THE_EDGE)
    page.set_viewport_size(wide)
    page.evaluate("jupyterapp.shell.expandLeft()")
    assert cut == []
    picture = panel.locator(".dg-picture").first
    assert picture.evaluate("(box) => box.tabIndex === 0 && box.scrollWidth >= box.clientWidth")


def test_a_notebook_that_is_not_trusted_yet_reads_well(lab, notebook):
    """Its outputs were stored elsewhere, so JupyterLab drops their style and runs no script."""
    page = notebook.page.context.new_page()
    opened = browser.open_notebook(page, lab[1], "03_explicit_dtype.ipynb")
    card = opened.locator(".dg-outcome").first
    expect(card.locator("ol li").last).to_have_text("gate: ✔ accepts bfloat16")
    expect(card.locator("pre").last).to_contain_text("from_pretrained")
    expect(card.locator(".dg-copy")).to_be_hidden()
    assert opened.locator("style").count() == 0
    page.close()

"""The paste box: its answer says what ``print(diagnosis)`` says, what was pasted stays text, and it
works in JupyterLab, in a browser, from the keyboard.
"""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
from axe_playwright_python.sync_playwright import Axe
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import expect

from helpers import doctor_panel
from helpers.doctor import card, catalogue, panel, words
from helpers.doctor.text import diagnose_text

ROOT = Path(__file__).parents[1]
REPORTS = json.loads((ROOT / "tests" / "data" / "reports.json").read_text("utf-8"))["reports"]
HEADLINE = "RuntimeError: FlashAttention only support fp16 and bf16 data type"
RESCUE = "Casting fp32 inputs back to torch.float32 for flash-attn compatibility."
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</textarea><script>alert(1)</script>",
    "</code></pre></details></div><iframe src='javascript:alert(1)'></iframe>",
    "\" onmouseover=alert(1) x='",
    "<!-- <svg/onload=alert(1)> ]]> <?php &lt;b&gt; &#60;b>",
    "$$\\frac{1}{2}$$ \\(x\\) **bold** [x](javascript:alert(1)) # no heading `code`",
]


@pytest.fixture(autouse=True)
def english():
    words.choose("en")


class Reader(HTMLParser):
    """The markup and the text of a piece of HTML, apart."""

    def __init__(self, source):
        super().__init__()
        self.markup, self.pieces = [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.markup.append((tag, tuple(attributes)))
        self.pieces.append(" ")

    def handle_endtag(self, tag):
        self.markup.append(f"/{tag}")

    def handle_data(self, data):
        self.pieces.append(data)

    def handle_comment(self, data):
        self.markup.append("comment")

    handle_decl = unknown_decl = handle_pi = handle_comment

    @property
    def text(self):
        return " ".join("".join(self.pieces).split())


def press(box):
    box.button.click()


# The answer as HTML.


@pytest.mark.parametrize("report", REPORTS, ids=[report["id"] for report in REPORTS])
def test_the_answer_says_what_print_says_in_its_order(report):
    diagnosis = diagnose_text(report["text"])
    rest = Reader(card.html(diagnosis)).text
    for line in filter(None, str(diagnosis).split("\n")):
        said = " ".join(line.split())
        assert said in rest
        rest = rest[rest.index(said) + len(said) :]


def test_the_colour_of_a_headline_stands_beside_a_mark_and_words():
    texts = {
        f"{RESCUE}\n{HEADLINE}": ("dg-bad", "✖ weights-fp32:"),
        RESCUE.replace("float32 ", "bfloat16 "): ("dg-good", "✔ warning-benign:"),
        HEADLINE: ("dg-warn", "? The text does not decide"),
        "RuntimeError: CUDA out of memory": ("dg-idle", "- This is not a dtype problem"),
    }
    for text, (colour, said) in texts.items():
        found = Reader(card.headline(diagnose_text(text)))
        assert found.markup[0] == ("p", (("class", f"dg-verdict {colour}"),))
        assert found.text.startswith(said)


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("place", ["{}\n" + HEADLINE, HEADLINE + " {}", "{}: " + HEADLINE, "{}"])
def test_what_is_pasted_is_text_and_never_markup(attack, place):
    hostile, harmless = place.format(attack), place.format("x" * len(attack))
    found = Reader(panel.answer(hostile)[1])
    assert found.markup == Reader(panel.answer(harmless)[1]).markup
    assert " ".join(attack.split()) in found.text  # the block for a bug report has all of it


@given(st.text(max_size=300), st.booleans())
def test_any_text_gets_an_answer_of_our_own_markup(text, is_error):
    diagnosis, answer, spoken = panel.answer(f"{HEADLINE}\n{text}" if is_error else text)
    answer.encode("utf-8")
    assert spoken
    assert (diagnosis is not None) is bool(is_error or text.strip())
    for tag in Reader(answer).markup:
        name, attributes = tag if isinstance(tag, tuple) else (tag, ())
        assert re.fullmatch(
            r"/?(div|p|strong|span|ul|li|code|br|details|summary|pre|button|a)", name
        )
        given = dict(attributes)
        assert not [key for key in given if key.startswith("on") or key == "style"]
        assert all(re.fullmatch("dg-[a-z]+", one) for one in given.get("class", "").split())
        assert re.match(r"https://|$", given.get("href", ""))


@pytest.mark.parametrize("label", catalogue.labels())
def test_a_page_in_place_has_the_words_and_the_code_of_the_catalogue(label):
    cause = catalogue.entry(label)
    source = card.page(label)
    codes = re.findall(r"<pre [^>]*><code>(.*?)</code></pre>", source, re.S)
    wanted = ["\n".join(cause[kind]["code"]) for kind in ("failing", "fixed")]
    assert [html.unescape(code) for code in codes] == wanted
    text = Reader(source).text
    for sentence in (cause["what"], *cause["recognise"], cause["failing"]["raises"]):
        assert " ".join(sentence.replace("`", " ").split()).replace(" ", "") in text.replace(
            " ", ""
        )
    for link in (source_["url"] for source_ in cause["sources"] if source_["url"]):
        assert f'<a href="{html.escape(link)}"' in source
    assert not re.search(r"##|```|<https?:", Reader(re.sub(r"<pre.*?</pre>", "", source)).text)


# The panel without a browser.


def test_it_reads_what_is_in_the_box_and_the_second_answer_replaces_the_first():
    box = doctor_panel(f"{RESCUE}\n{HEADLINE}", language="en")
    assert box.answer.value == ""
    press(box)
    assert box.diagnosis.cause == "weights-fp32"
    assert "✖ weights-fp32" in Reader(box.answer.value).text
    assert "Done." in box.status.value
    assert "weights-fp32" in box.status.value
    box.text.value = "ImportError: No module named 'flash_attn'"
    press(box)
    assert box.diagnosis.cause == "flash-attn-missing"
    assert "weights-fp32:" not in Reader(box.answer.value).text.split("More:")[0]
    assert "dg-busy" not in box.button._dom_classes


def test_every_control_has_a_name():
    box = doctor_panel(language="en")
    names = [control.description for control in (box.text, box.language, box.button)]
    assert names == ["Paste the traceback", "Language", "Diagnose"]
    assert tuple(value for _, value in box.language.options) == words.LANGUAGES


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_box_gets_one_sentence_of_what_to_do(text):
    box = doctor_panel(text, language="en")
    press(box)
    assert box.diagnosis is None
    assert Reader(box.answer.value).text.count(".") == 1
    assert "paste a traceback into the box" in box.answer.value
    assert "paste a traceback into the box" in box.status.value


@pytest.mark.parametrize("error", [KeyError("<b>x</b>"), RecursionError(), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["diagnose_text", "card.html"])
def test_a_bug_becomes_one_sentence_and_the_next_press_works(monkeypatch, error, where):
    def fail(*_):
        raise error

    box = doctor_panel(HEADLINE, language="en")
    with monkeypatch.context() as patch:
        patch.setattr(f"helpers.doctor.panel.{where}", fail)
        press(box)
    assert box.diagnosis is None
    said = Reader(box.answer.value).text
    assert re.fullmatch(rf"✖ [^.]*\({type(error).__name__}\)[^.]*\.", said)
    assert "Not diagnosed." in box.status.value
    assert "dg-busy" not in box.button._dom_classes
    press(box)
    assert box.diagnosis.candidates


def test_of_a_hundred_megabytes_the_end_is_read_and_the_answer_is_small():
    box = doctor_panel("y" * 100_000_000 + f"\n{HEADLINE} {'z' * 5_000}\n", language="en")
    assert len(box.text.value) == panel.MOST
    press(box)
    assert "weights-fp32" in box.diagnosis.candidates
    assert len(box.answer.value) < 200_000


def test_bytes_carriage_returns_and_halves_of_characters_can_be_shown():
    box = doctor_panel(b"\xff\x00a\r\nb\rc", language="en")
    assert box.text.value == "\ufffd\x00a\nb\nc"
    assert doctor_panel("\ud800 x").text.value == "? x"
    box.text.value = f"\ud800 {HEADLINE}"  # as a page may send it
    press(box)
    box.answer.value.encode("utf-8")
    assert box.diagnosis.candidates


def test_the_block_for_a_bug_report_has_the_text_and_no_token():
    token = "hf_" + "A1b2" * 8
    answer = panel.answer(f"{HEADLINE}\nlogin(token='{token}')\nmy own words")[1]
    shared = Reader(answer[answer.index("Share:") :]).text
    assert "### dtype-doctor" in shared
    assert "my own words" in shared
    assert token not in answer


def test_bad_arguments_are_refused_in_a_sentence():
    with pytest.raises(TypeError, match=r"^doctor_panel\(\) got int: give the text"):
        doctor_panel(3)
    with pytest.raises(ValueError, match=r"no sentences in 'fr'"):
        doctor_panel(language="fr")
    assert words.say("Fix") == "Fix"


def test_the_other_language_is_the_panel_s_alone():
    box = doctor_panel(f"{RESCUE}\n{HEADLINE}", language="zh")
    press(box)
    assert re.search("[一-鿿]", box.button.description)
    assert re.search("[一-鿿]", Reader(box.answer.value).text.partition("dtype-doctor")[0])
    assert box.diagnosis.cause == "weights-fp32"
    assert words.say("Fix") == "Fix"
    assert Reader(box.answer.value).markup[0] == ("div", (("lang", "zh-CN"),))
    box.language.value = "en"
    assert box.button.description == "Diagnose"
    assert not re.search("[一-鿿]", box.answer.value)


def test_the_panel_loads_no_big_library(fresh_python):
    code = (
        "import json, sys\nfrom helpers import doctor_panel\n"
        f"box = doctor_panel({HEADLINE!r})\nbox.button.click()\n"
        "print(json.dumps([box.diagnosis.is_failure, 'torch' in sys.modules]))"
    )
    assert fresh_python(code) == [True, False]


# In a browser. Only the last cell of notebook 07 is run: the panel needs no other.

in_browser = pytest.mark.browser
THEMES = ("JupyterLab Light", "JupyterLab Dark")
# axe looks at almost no contrast inside JupyterLab's scrolling panes, so it also gets a page with
# our markup alone, under all of JupyterLab's rules.
ALONE = """(panel) => {
  const rules = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules]);
  const body = document.body.cloneNode(false);
  body.innerHTML = "<main><h1>Ours alone</h1></main>";
  body.firstChild.append(panel.cloneNode(true));
  return `<!doctype html><html lang="en" class="${document.documentElement.className}">
    <title>Ours alone</title><style>${rules.map((rule) => rule.cssText).join(" ")}</style>
    ${body.outerHTML}</html>`;
}"""
BEYOND_THE_EDGE = """(panel) => [...panel.querySelectorAll(":not(pre *)")]
  .filter((part) => part.getBoundingClientRect().right > panel.getBoundingClientRect().right + 1)
  .map((part) => part.outerHTML.slice(0, 100))"""
SLEEP = """void jupyterapp.shell.currentWidget.sessionContext.session.kernel
  .requestExecute({code: 'import time; time.sleep(1.5)'})"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Notebook 07 in JupyterLab, and what the page complains of."""
    with browser.both(tmp_path_factory.mktemp("lab")) as (page, address):
        complaints = []
        page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda box: (complaints.append(f"dialog {box.message}"), box.dismiss()))
        notebook = browser.open_notebook(page, address, "07_ask_the_doctor.ipynb")
        yield page, notebook, complaints


@pytest.fixture
def box(lab):
    """The panel as it is at first, and the notebook in command mode on its cell."""
    page, notebook, complaints = lab
    browser.use_theme(page, THEMES[0])
    browser.run_last_code_cell(page)
    found = notebook.locator(".dg-panel")
    expect(found.locator(".dg-status")).to_have_text("Ready.")
    yield found
    seen = complaints[:]
    complaints.clear()
    assert seen == []


def area(box):
    return box.get_by_label("Paste the traceback")


def diagnose(box, text=None):
    if text is not None:
        area(box).fill(text)
    box.get_by_role("button", name="Diagnose").click()
    expect(box.locator(".dg-status")).to_contain_text("Done.")


def axe(page, context=None):
    kinds = ["violations", "incomplete"]
    report = Axe().run(page, context, {"resultTypes": kinds}).response
    rules = [rule for kind in kinds for rule in report[kind]]
    return [(rule["id"], node["target"]) for rule in rules for node in rule["nodes"]]


@in_browser
def test_by_keyboard_alone_a_text_becomes_an_answer(lab, box):
    page, notebook, _ = lab
    cells = notebook.locator(".jp-Cell").count()
    for _ in range(10):
        page.keyboard.press("Tab")
        if area(box).evaluate("element => element === document.activeElement"):
            break
    expect(area(box)).to_be_focused()
    expect(area(box)).to_have_accessible_description(re.compile("nothing in it is run"))
    page.keyboard.press("Control+a")
    for line in (RESCUE, HEADLINE, "ab dd xjk m"):  # JupyterLab's shortcuts are letters here
        page.keyboard.insert_text(line[:-1])
        page.keyboard.press(line[-1])
        page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(box.get_by_label("Language")).to_be_focused()
    page.keyboard.press("Tab")
    expect(box.get_by_role("button", name="Diagnose")).to_be_focused()
    page.keyboard.press("Enter")
    expect(box.locator(".dg-verdict")).to_contain_text("✖ weights-fp32:")
    expect(box.locator(".dg-status[role=status]")).to_contain_text("Done. ✖ weights-fp32:")
    expect(box.get_by_role("button", name="Diagnose")).to_be_focused()
    expect(notebook.locator(".jp-Cell")).to_have_count(cells)
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.matches('.jp-Cell')")


@in_browser
def test_nothing_that_is_pasted_becomes_an_element(lab, box):
    page, _, _ = lab
    text = "\n".join([*(f"{HEADLINE} {attack}" for attack in HOSTILE), *HOSTILE])
    diagnose(box, text)
    for summary in box.locator("summary").all():
        summary.click()
    answer = box.locator(".dg-outcome")
    strange = "img, script, iframe, svg, textarea, mjx-container, h1, b, [onmouseover]"
    expect(answer.locator(strange)).to_have_count(0)
    shared = answer.locator("details", has_text="Share").locator("code")
    for attack in HOSTILE:
        expect(shared).to_contain_text(attack)
    expect(answer.locator("li").first).to_be_visible()
    page.wait_for_timeout(200)  # a dialog or a failed image would come late; `box` looks


@in_browser
def test_copy_puts_exactly_the_lines_of_the_fix_on_the_clipboard(lab, box):
    page, _, _ = lab
    text = f"{RESCUE}\n{HEADLINE}"
    diagnose(box, text)
    box.get_by_role("button", name="Copy").first.press("Enter")
    expect(box.locator(".dg-copied").first).to_have_text("Copied.")
    fix = diagnose_text(text).fixes[0]
    assert page.evaluate("navigator.clipboard.readText()") == fix.code


@in_browser
def test_a_press_does_not_overtake_what_was_pasted_before_it(lab, box):
    page, _, _ = lab
    page.evaluate(SLEEP)
    for text in ("x", "y", f"{RESCUE}\n{HEADLINE} 文字 😀"):
        area(box).fill(text)
        area(box).blur()
    diagnose(box)
    expect(box.locator(".dg-verdict")).to_contain_text("✖ weights-fp32:")


@in_browser
def test_of_a_text_too_long_for_a_message_the_end_is_kept_and_the_page_says_so(lab, box):
    area(box).evaluate(
        """(area, end) => {
          area.value = "\\ud800😀".repeat(4_000_000) + end;  // 24 MB as UTF-8
          area.dispatchEvent(new InputEvent("input", { bubbles: true }));
        }""",
        f"\n{HEADLINE}",
    )
    expect(box.locator(".dg-status")).to_contain_text("the last million characters are kept")
    assert area(box).evaluate("area => area.value.length") <= panel.MOST
    area(box).dispatch_event("change")
    diagnose(box)
    expect(box.locator(".dg-verdict")).to_contain_text("does not decide")


@in_browser
def test_the_page_of_a_cause_opens_in_place_and_all_causes_beside_the_notebook(lab, box):
    page, _, _ = lab
    diagnose(box, HEADLINE)
    box.get_by_text("? missing-autocast", exact=True).press("Enter")
    expect(box.get_by_text(catalogue.entry("missing-autocast")["what"])).to_be_visible()
    box.get_by_role("link", name="All causes").click()
    pages = page.locator(".jp-MarkdownViewer:not(.lm-mod-hidden)")
    expect(pages.get_by_role("heading", name="The causes")).to_be_visible()
    pages.get_by_role("link", name="kbit-prep").click()
    expect(pages.get_by_role("heading", name=re.compile("^kbit-prep:"))).to_be_visible()
    pages.get_by_role("link", name="All causes").click()
    expect(pages.get_by_role("heading", name="The causes")).to_be_visible()
    page.evaluate("jupyterapp.commands.execute('application:close')")
    page.evaluate("jupyterapp.commands.execute('application:close')")


@in_browser
@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_nothing_and_a_narrow_page_cuts_nothing_off(lab, box, theme):
    page, _, _ = lab
    browser.use_theme(page, theme)
    diagnose(box)
    for summary in box.locator("summary").all():
        summary.press("Enter")
    assert axe(page, {"include": [[".dg-panel"]]}) == []
    alone = page.context.new_page()
    alone.set_content(box.evaluate(ALONE))
    assert axe(alone) == []
    alone.close()
    wide = page.viewport_size
    page.evaluate("jupyterapp.shell.collapseLeft()")
    page.set_viewport_size({**wide, "width": 600})
    cut = box.evaluate(BEYOND_THE_EDGE)
    page.set_viewport_size(wide)
    assert cut == []

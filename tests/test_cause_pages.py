"""The committed pages of the causes are what the catalogue gives, and their links resolve."""

import re
from pathlib import Path

import pytest

from helpers.doctor import catalogue
from helpers.doctor.data import load

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "CAUSES.md"
PAGES = sorted((ROOT / "docs" / "causes").iterdir())
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)]+)\)")


def test_the_committed_pages_are_what_comes_out(fresh_python):
    written = fresh_python(
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "import causes\n"
        "print(json.dumps({path.as_posix(): text for path, text in causes.pages().items()}))",
        ROOT / "tools",
    )
    stored = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in PAGES}
    stored["CAUSES.md"] = INDEX.read_text("utf-8")
    assert stored == written, "the catalogue has changed: make causes"


def test_each_label_has_a_page_and_each_page_a_label():
    assert {path.name for path in PAGES} == {f"{label}.md" for label in catalogue.labels()}


def test_each_label_stands_in_one_group_of_the_index():
    groups = load("groups.json")["groups"]
    labels = [label for group in groups for label in group["labels"]]
    assert sorted(labels) == sorted(catalogue.labels())
    index = INDEX.read_text("utf-8")
    assert re.findall(r"^## (.+)$", index, re.M) == [group["title"] for group in groups]
    lines = re.findall(r"^- \[(.+)\]\(docs/causes/(.+)\.md\): (.+)$", index, re.M)
    assert lines == [(label, label, catalogue.entry(label)["title"]) for label in labels]


@pytest.mark.parametrize("path", [INDEX, *PAGES], ids=lambda path: path.stem)
def test_links_lead_to_files_of_the_clone(path):
    targets = LINK.findall(path.read_text("utf-8"))
    assert targets
    for target in targets:
        assert (path.parent / target).is_file(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_links_what_it_is_mistaken_for_and_leaves_code_alone(path):
    text, cause = path.read_text("utf-8"), catalogue.entry(path.stem)
    near = {f"{one['label']}.md" for one in cause["near_misses"]}
    assert {*near, "../../CAUSES.md"} <= set(LINK.findall(text))
    codes = ["\n".join(cause[kind]["code"]) for kind in ("failing", "fixed")]
    assert re.findall(r"^```python\n(.*?)\n```$", text, re.M | re.S) == codes

"""Write the pages of the causes from the doctor's catalogue: ``make causes``.

CAUSES.md is the index, and docs/causes/ holds a page for each label. Needs no package.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INDEX = Path("CAUSES.md")
FOLDER = Path("docs/causes")

sys.path.insert(0, str(ROOT))
from helpers.doctor import catalogue  # noqa: E402
from helpers.doctor.data import load  # noqa: E402

ABOUT = """# The causes

What the doctor can name: why FlashAttention refused a tensor, what else its kernel checks, and the
errors that people meet beside it. Each has a page: what it is, why it happens, how to recognise it,
an example that fails and the same mended, the fixes and how safe they are, and what it is easily
mistaken for.

Which one is yours? Paste the traceback, with what you write about it, into the panel of
[notebook 07](notebooks/07_ask_the_doctor.ipynb) or into `dtype-doctor`. In a terminal,
`dtype-doctor explain LABEL` shows the same pages. The tests run the examples: one that fails has to
fail with its own message, and a mended one has to pass. An example that needs a GPU, or a broken
installation, says that it was not run, and why.
"""


def main() -> None:
    """Write all pages, and drop those of labels that are gone."""
    written = pages()
    (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
    for path in (ROOT / FOLDER).glob("*.md"):
        if path.relative_to(ROOT) not in written:
            path.unlink()
    for path, text in written.items():
        (ROOT / path).write_text(text, "utf-8", newline="\n")
    print(f"{INDEX} and {len(written) - 1} pages in {FOLDER.as_posix()}/")


def pages() -> dict[Path, str]:
    """What is written, by its path in the clone."""
    found = {INDEX: index()}
    for label in catalogue.labels():
        found[FOLDER / f"{label}.md"] = page(label)
    return found


def index() -> str:
    """All causes, in groups."""
    lines = [ABOUT]
    for group in load("groups.json")["groups"]:
        lines += [f"## {group['title']}", ""]
        for label in group["labels"]:
            title = catalogue.entry(label)["title"]
            lines.append(f"- [{label}]({FOLDER.as_posix()}/{label}.md): {title}")
        lines.append("")
    return "\n".join(lines)


def page(label: str) -> str:
    """A cause's page, on which the names of other causes are links."""
    text = _linked(catalogue.page(label), label)
    up = "../" * len(FOLDER.parts)
    return "\n\n".join([text, "---", f"[All causes]({up}{INDEX})"]) + "\n"


def _linked(text: str, own: str) -> str:
    others = "|".join(label for label in catalogue.labels() if label != own)
    pieces = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)  # every second one is code
    pieces[::2] = [re.sub(f"`({others})`", r"[`\1`](\1.md)", piece) for piece in pieces[::2]]
    return "".join(pieces)


if __name__ == "__main__":
    main()

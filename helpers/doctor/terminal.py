"""A diagnosis, or a page of the catalogue, in a terminal's colours."""

from rich.console import Console
from rich.text import Text

from helpers.doctor.diagnosis import Diagnosis
from helpers.doctor.plain import lines
from helpers.doctor.words import say


def _console() -> Console:
    """One that prints what was pasted as it is, and never reads it as markup."""
    return Console(highlight=False, emoji=False, markup=False, soft_wrap=True)


def show(diagnosis: Diagnosis) -> None:
    """Print a diagnosis."""
    console = _console()
    colour = "red" if diagnosis.is_failure else "green"
    if not diagnosis.cause:
        colour = "yellow"
    heading = ""
    for number, line in enumerate(lines(diagnosis)):
        if number == 0:
            style = f"bold {colour}"
        elif line and not line.startswith(" "):
            heading, style = line, "bold"
        else:  # lines of code may be indented as far as what a piece of evidence means
            is_meaning = heading == say("What shows it:") and line.startswith("      ")
            style = "dim" if is_meaning else ""
        console.print(Text(line, style=style))


def show_page(page: str) -> None:
    """Print a page of the catalogue. Not by rich's Markdown, which breaks long lines of code where
    the terminal ends, and what is copied from there is no Python."""
    console = _console()
    is_code = False
    for line in page.split("\n"):
        if line.startswith("```"):
            is_code = not is_code
        elif is_code:
            console.print(Text(line, style="cyan"))
        elif line.startswith("#"):
            console.print(Text(line.lstrip("# "), style="bold"))
        else:
            said = Text(line)
            said.highlight_regex(r"`[^`]+`", "cyan")
            console.print(said)

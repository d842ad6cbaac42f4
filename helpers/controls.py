"""What the panels of widgets share."""

from collections.abc import Iterable
from importlib.resources import files
from typing import Any

import ipywidgets as widgets

from helpers.style import STYLE_TAG

SCRIPT = files("helpers").joinpath("data/panel.js").read_text("utf-8")


def page_parts() -> widgets.Output:
    """Style and script, which a page runs from an output and not from an HTML widget."""
    parts = widgets.Output(outputs=shown("text/html", f"{STYLE_TAG}<script>{SCRIPT}</script>"))
    parts.add_class("dg-parts")
    return parts


def shown(kind: str, text: str) -> tuple[dict[str, Any], ...]:
    """What an Output shows: text of a MIME type."""
    return ({"output_type": "display_data", "data": {kind: text}, "metadata": {}},)


def run_button(description: str) -> widgets.Button:
    """The button that panel.js keeps from a second press."""
    button = widgets.Button(description=description, button_style="primary")
    button.add_class("dg-run")
    return button


def form(controls: Iterable[Any]) -> widgets.Box:
    """The controls, whose settings panel.js compares with what the kernel knows."""
    box = widgets.Box(list(controls))
    box.add_class("dg-form")
    return box


def line(html: str, name: str) -> widgets.HTML:
    """A line of HTML with a class: dg-known or dg-status."""
    widget = widgets.HTML(html)
    widget.add_class(name)
    return widget

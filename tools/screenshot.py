"""Take the README's picture of the explore panel, by a real run: python tools/screenshot.py

Opens notebook 01 in JupyterLab, runs it, and works its panel: a checkpoint loaded in float32, which
FlashAttention refuses, and then the same one with dtype="auto". Needs Chromium.
"""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import expect

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "panel.png"
MARGIN = 4  # CSS pixels around the panel; more would show pieces of its cell

sys.path.insert(0, str(ROOT / "tests"))
import browser  # noqa: E402  # the tests' way to a JupyterLab and a Chromium


def main() -> None:
    """Write ``PICTURE``."""
    PICTURE.parent.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        browser.jupyterlab(Path(folder) / "clone") as address,
        browser.chromium(Path(folder) / "browser", height=1600) as context,
    ):
        page = context.pages[0]
        notebook = browser.open_notebook(page, address, "01_reproduce_the_error.ipynb")
        page.evaluate("jupyterapp.shell.collapseLeft()")
        browser.run_all(page)
        panel = notebook.locator(".dg-panel")
        for dtype, verdict in (("float32", "✖ Fails"), ("auto", "✔ Works")):
            panel.get_by_label("dtype", exact=True).select_option(dtype)
            panel.get_by_role("button", name="Run").click()
            expect(panel.locator(".dg-verdict")).to_contain_text(verdict)
        page.mouse.move(0, 0)
        panel.scroll_into_view_if_needed()
        box = panel.bounding_box()
        assert box is not None
        clip = {
            "x": box["x"] - MARGIN,
            "y": box["y"] - MARGIN,
            "width": box["width"] + 2 * MARGIN,
            "height": box["height"] + 2 * MARGIN,
        }
        page.screenshot(path=PICTURE, clip=clip, animations="disabled")
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

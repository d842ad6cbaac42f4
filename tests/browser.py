"""JupyterLab on a copy of the notebooks, and a Chromium that looks at it.

Both are started as a person's are, by tools/lab.py and with an empty profile, and write into one
temporary folder. tests/test_browser.py works with them; tools/screenshot.py takes a picture.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Error, Locator, Page, Playwright, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "microsoft-edge",
    "msedge",
    "chrome",
)
CHANNELS = ("chrome", "msedge")  # where macOS and Windows install them, which is on no PATH
FLAGS = (
    "--no-sandbox",  # without it Chromium does not start as root, as whom containers run
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# The toolbar says "idle" before the kernel is connected; a "Run All" then is lost without a word.
READY = """async () => {
  const { content, context, sessionContext } = jupyterapp.shell.currentWidget;
  await context.ready;
  await sessionContext.ready;
  await sessionContext.session.kernel.info;
"""
RUN_ALL = READY + "await jupyterapp.commands.execute('notebook:run-all-cells'); }"
# Long notebooks put their cells on the page one after the other, while the browser is idle.
ALL_ARE_SHOWN = """() => {
  const { content, context } = jupyterapp.shell.currentWidget ?? {};
  return context?.isReady
    && content.node.querySelectorAll(".jp-Cell").length === content.model.cells.length;
}"""
ALL_HAVE_RUN = """() => jupyterapp.shell.currentWidget.content.widgets.every(
  ({ model }) => model.type !== "code" || model.executionCount !== null)"""
RUN_LAST_CODE_CELL = (
    READY
    + """
  const isCode = (cell) => cell.model.type === "code";
  content.activeCellIndex = content.widgets.findLastIndex(isCode);
  await jupyterapp.commands.execute("notebook:run-cell");
}"""
)


@contextlib.contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """A JupyterLab on a copy of the notebooks, and of what they link to, in an empty folder; yields
    its address with {path} to be filled in."""
    for name in ("notebooks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "CAUSES.md", folder)
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "lab.py", folder / "tools")
    flags = ("--no-browser", "--ServerApp.port=0", "--LabApp.expose_app_in_browser=True")
    log = folder / "lab.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(folder / "tools" / "lab.py"), *flags],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        server = _running(folder / ".jupyter" / "runtime", process, log)
        yield f"{server['url']}lab/tree/{{path}}?reset&token={server['token']}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # it waits for a kernel; no test looks at its end
            process.kill()
            process.wait()


def _running(runtime: Path, process: "subprocess.Popen[bytes]", log: Path) -> dict[str, str]:
    """What the server says about itself once it answers."""
    for _ in range(600):
        for path in runtime.glob("jpserver-*.json"):
            with contextlib.suppress(ValueError, OSError):
                server: dict[str, str] = json.loads(path.read_text("utf-8"))
                with urllib.request.urlopen(f"{server['url']}api", timeout=5):
                    return server
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")


@contextlib.contextmanager
def both(folder: Path) -> Iterator[tuple[Page, str]]:
    """Chromium and JupyterLab for a test: the page and the server's address. Without a browser the
    test is skipped, and in CI it fails."""
    try:
        with (
            chromium(folder / "browser") as context,
            jupyterlab(folder / "clone") as address,
        ):
            yield context.pages[0], address
    except LookupError as missing:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))


@contextlib.contextmanager
def chromium(folder: Path, width: int = 1280, height: int = 900) -> Iterator[BrowserContext]:
    """An installed Chromium with an empty profile.

    Raises:
        LookupError: there is none.
    """
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    with sync_playwright() as playwright:
        context = _launch(
            playwright,
            user_data_dir=str(folder / "profile"),
            args=FLAGS,
            env={**os.environ, **home, "BREAKPAD_DUMP_LOCATION": str(folder)},
            viewport={"width": width, "height": height},
            permissions=["clipboard-read", "clipboard-write"],
        )
        try:
            yield context
        finally:
            context.close()


def _launch(playwright: Playwright, **options: object) -> BrowserContext:
    if path := next(filter(None, map(shutil.which, COMMANDS)), None):
        return playwright.chromium.launch_persistent_context(executable_path=path, **options)
    for channel in CHANNELS:
        with contextlib.suppress(Error):
            return playwright.chromium.launch_persistent_context(channel=channel, **options)
    raise LookupError(
        f"Found no browser to drive, expected one of the commands {', '.join(COMMANDS)}:"
        " install Chromium."
    )


def open_notebook(page: Page, address: str, name: str) -> Locator:
    """Show a notebook of the copy; returns the notebook."""
    page.goto(address.format(path=f"notebooks/{name}"))
    notebook = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
    notebook.locator(".jp-Cell").first.wait_for()
    page.wait_for_function(ALL_ARE_SHOWN)
    return notebook


def run_all(page: Page) -> None:
    """Run every cell of the notebook in front."""
    page.evaluate(RUN_ALL)
    # The command is over at the first exception; the cells after it run all the same.
    page.wait_for_function(ALL_HAVE_RUN, timeout=120_000)


def run_last_code_cell(page: Page) -> None:
    """Run the cell with the panel once more. The notebook then is in command mode, on that cell."""
    page.evaluate(RUN_LAST_CODE_CELL)


def use_theme(page: Page, name: str) -> None:
    """Change JupyterLab's theme."""
    page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', { theme })", name)
    page.locator(f"body[data-jp-theme-name='{name}']").wait_for(state="attached")

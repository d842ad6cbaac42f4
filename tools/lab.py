"""Open the guide in JupyterLab, writing nothing into the home folder.

    python tools/lab.py [FLAGS]      JupyterLab on the first notebook, with these flags
    python tools/lab.py -- ARGS      python ARGS instead, for example -- -m pytest

Either way Jupyter, IPython and Matplotlib keep their settings and state in .jupyter/ of this clone.
That also leaves out the settings in the home folder, so that the guide looks and runs the same for
everybody. Run it with the Python that has the packages: .venv's, or that of the conda environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# As a default address, and not as a file to open, so that `--no-browser` prints it too.
START = "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb"
SETTINGS = {
    # Answers JupyterLab's first question, whether it may fetch news, with no. And what a learner
    # runs does not by itself replace the stored outputs, with which `make test` compares.
    "labconfig/default_setting_overrides.json": {
        "@jupyterlab/apputils-extension:notification": {"fetchNews": "false"},
        "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    },
    # The guide needs no language server, and the search for one runs npm, which writes into ~/.npm.
    "jupyter_server_config.json": {"LanguageServerManager": {"autodetect": False}},
}


def main(arguments: list[str]) -> None:
    """Run JupyterLab, or what follows ``--``, and exit with its code."""
    if arguments[:1] == ["--"]:
        arguments = arguments[1:]
    elif importlib.util.find_spec("jupyterlab") is None:
        sys.exit(
            f"JupyterLab is not installed for {sys.executable}: run `make lab`, or `python "
            "tools/set_up.py` and then this command with .venv's Python."
        )
    else:
        arguments = ["-m", "jupyterlab", START, *allow_root(), *arguments]
    folders = environment(ROOT / ".jupyter")
    write_settings(Path(folders["JUPYTER_CONFIG_DIR"]))
    run([sys.executable, *arguments], {**os.environ, **folders})


def environment(state: Path) -> dict[str, str]:
    """The variables that keep every file of Jupyter, IPython and Matplotlib below ``state``."""
    return {
        "JUPYTER_CONFIG_DIR": str(state / "config"),
        "JUPYTER_DATA_DIR": str(state / "data"),
        "JUPYTER_RUNTIME_DIR": str(state / "runtime"),
        "IPYTHONDIR": str(state / "ipython"),
        "MPLCONFIGDIR": str(state / "matplotlib"),
        # Where Chromium keeps its crash reports, for the tests in a browser.
        "BREAKPAD_DUMP_LOCATION": str(state / "chromium"),
    }


def write_settings(config: Path) -> None:
    """Write ``SETTINGS`` below a JUPYTER_CONFIG_DIR."""
    for name, content in SETTINGS.items():
        path = config / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def allow_root() -> list[str]:
    """The flag without which Jupyter refuses to start as root, which in a container people are."""
    return ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []


def run(command: list[str], variables: Mapping[str, str]) -> None:
    os.chdir(ROOT)
    if os.name != "nt":
        # The process becomes the command, so that Ctrl-C and kill reach it.
        os.execve(command[0], command, variables)
    try:
        sys.exit(subprocess.call(command, env=variables))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])

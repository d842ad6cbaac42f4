"""Run every notebook of the guide and store its outputs: ``make notebooks``.

Usage: python tools/notebooks.py [NOTEBOOK ...]
"""

import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


def main(names: list[str]) -> None:
    """Execute the named notebooks, or all of them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the stored outputs are those of a laptop
    for path in map(Path, names) if names else sorted((ROOT / "notebooks").rglob("[0-9]*.ipynb")):
        started = time.perf_counter()
        execute(path)
        print(f"{path.name}: {time.perf_counter() - started:.1f} s")


def execute(path: Path) -> None:
    """Run one notebook in a fresh kernel and write it back.

    A cell that raises stops the run, and so does one tagged raises-exception that does not.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        record_timing=False,
        coalesce_streams=True,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            tidy(cell)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)


def tidy(cell: nbformat.NotebookNode) -> None:
    """Drop what belongs to this machine: widget views, and the folders above the clone."""
    cell.metadata.pop("execution", None)
    raised = False
    for output in cell.outputs:
        raised |= output.output_type == "error"
        if output.output_type == "error":
            output.traceback = [relative(line) for line in output.traceback]
        elif output.output_type == "stream":
            output.text = relative(output.text)
        else:
            output.data.pop("application/vnd.jupyter.widget-view+json", None)
            for mime, text in output.data.items():
                if mime.startswith("text/") and isinstance(text, str):
                    output.data[mime] = relative(text)
    if "raises-exception" in cell.metadata.get("tags", []) and not raised:
        sys.exit(f"a cell tagged raises-exception did not raise:\n{cell.source}")


def relative(text: str) -> str:
    """Paths below the clone without the folders above it; IPython writes the home folder as ~."""
    home = str(Path.home())
    root = str(ROOT)
    for prefix in (root, root.replace(home, "~", 1) if root.startswith(home) else root):
        text = text.replace(prefix + os.sep, "")
    return re.sub(r"(?<!\S)\S*?(ipykernel_\d+)", r"\1", text)


if __name__ == "__main__":
    main(sys.argv[1:])

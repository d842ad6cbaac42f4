"""Notebooks, their floor, X-rays and the doctor, each in a process of its own."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import nbformat
from jupyter_client.manager import KernelManager

HERE = Path(__file__).resolve().parent


class Measured(NamedTuple):
    """Seconds until the last line was done, peak MB, and seconds until a kernel first answered."""

    seconds: float
    peak: float
    ready: float = 0.0


def notebook(path: Path) -> Measured:
    """Run the cells in a fresh kernel, by jupyter_client alone: nbclient's time is not theirs.

    RuntimeError: a cell raises that is not tagged for it.
    """
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    manager = KernelManager(kernel_name="python3")
    started = time.perf_counter()
    manager.start_kernel(cwd=str(path.parent), stderr=subprocess.DEVNULL)
    client = manager.client()
    try:
        # Not wait_for_ready, which waits another 0.2 s when the kernel is ready.
        client.start_channels(hb=False)
        client.kernel_info(reply=True, timeout=60)
        ready = time.perf_counter() - started
        for cell in cells:
            reply = _execute(client, cell.source)
            if reply["status"] != "ok" and "raises-exception" not in cell.metadata.get("tags", []):
                raise RuntimeError(f"{path.name} raised {reply['ename']}: {reply['evalue']}")
        seconds = time.perf_counter() - started
        code = f"import sys; sys.path.append({str(HERE)!r}); import peak"
        reply = _execute(client, code, user_expressions={"peak": "peak.peak()"})
        peak = float(reply["user_expressions"]["peak"]["data"]["text/plain"])
        return Measured(seconds, peak, ready)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def bare(checkpoint: Path, config: dict) -> Measured:
    """Run bare.py. RuntimeError: it fails."""
    command = [sys.executable, str(HERE / "bare.py"), str(checkpoint), json.dumps(config)]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        done = process.stdout.readline()
        seconds = time.perf_counter() - started
        peak = process.stdout.read()
    if not done or process.returncode:
        raise RuntimeError(f"this failed, run it to see how: {subprocess.list2cmdline(command)}")
    return Measured(seconds, float(peak))


def full_size(side: str) -> Measured:
    """Run full_size.py. CalledProcessError: it fails."""
    command = [sys.executable, "-m", "benchmarks.full_size", side]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE.parent)
    return Measured(*map(float, done.stdout.split()))


def doctor(file: Path) -> Measured:
    """``dtype-doctor FILE`` without a terminal, from the start of Python to its end.

    RuntimeError: it finds no failure.
    """
    code = (
        "import sys; from helpers.doctor.command import main; status = main(sys.argv[1:]);"
        " from benchmarks import peak; print(peak.peak(), file=sys.stderr); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, str(file)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    seconds = time.perf_counter() - started
    if done.returncode != 1:
        raise RuntimeError(f"it says nothing failed: {done.stdout}{done.stderr}")
    return Measured(seconds, float(done.stderr))


def _execute(client, code: str, **more) -> dict:
    options = {"reply": True, "timeout": 300, "stop_on_error": False, "allow_stdin": False}
    return client.execute(code, **options, **more)["content"]

"""Print what the guide costs over the bare libraries; exit with 1 if that is above a bound."""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import psutil

from benchmarks import logs, processes
from benchmarks.table import Row, interleave, render

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "01_reproduce_the_error.ipynb"
CHECKPOINT = "fp32"  # the one that notebook 01 loads
FULL_SIZE = "Qwen1.5-7B"  # the one that it shows at its own size


def notebook(quick: bool) -> Iterator[Row]:
    """Notebook 01, from kernel start to the last reply; a script that loads twice and forwards, and
    once more at full size on fake tensors."""
    from helpers import checkpoints, subjects

    config = subjects.shipped()[FULL_SIZE]["config"]
    bare = partial(processes.bare, checkpoints.get(CHECKPOINT), config)
    sides = interleave(partial(processes.notebook, NOTEBOOK), bare, 3 if quick else 9)
    yield Row("notebook 01", "s", *([m.seconds for m in side] for side in sides), 1.25)
    yield Row("  of it, kernel start", "s", [m.ready for m in sides[0]])
    yield Row("  its peak memory", "MB", *([m.peak for m in side] for side in sides), 1.10)


def lora(quick: bool) -> Iterator[Row]:
    """Notebook 05, its training included."""
    path = ROOT / "notebooks" / "05_lora_train_merge_infer.ipynb"
    found = [processes.notebook(path).seconds for _ in range(2 if quick else 3)]
    yield Row("notebook 05", "s", found, bound=60)


def matrix(quick: bool) -> Iterator[Row]:
    """One whole table of loads, in each environment that is there; it is compared, not stored."""
    second = ROOT / ".venv-v4" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    for python in (Path(sys.executable), second):
        if not python.exists():
            print("no .venv-v4, so no table of Transformers 4: make setup-v4", file=sys.stderr)
            continue
        command = [str(python), "tools/lab.py", "--", "tools/matrix.py", "--check"]
        check = partial(subprocess.run, command, check=True, cwd=ROOT, capture_output=True)
        seconds = [timed(check)() / 1e3 for _ in range(2)]
        yield Row(f"matrix, {python.parents[1].name}", "s", seconds, bound=90)


def run(quick: bool) -> Iterator[Row]:
    """``run(LoadPlan())``; the same load, forward and generate without the guide."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from helpers import backend, checkpoints, experiment
    from helpers.plan import MAX_NEW_TOKENS, LoadPlan

    path = checkpoints.get(LoadPlan().checkpoint)
    backend.activate()
    logging.set_verbosity_error()  # run() prints nothing either
    logging.disable_progress_bar()
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}

    def bare() -> None:
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="flash_attention_2")
        tokenizer = AutoTokenizer.from_pretrained(path)
        inputs = tokenizer(checkpoints.QUESTION, return_tensors="pt")
        with torch.inference_mode():
            model(**inputs)
            tokenizer.decode(model.generate(**inputs, **options)[0])

    with one_thread():  # run() takes one too, which must not count in its favour
        sides = timed(partial(experiment.run, LoadPlan())), timed(bare)
        yield Row("run(LoadPlan())", "ms", *interleave(*sides, 10 if quick else 40), 1.3)


def live(quick: bool) -> Iterator[Row]:
    """``xray`` of a model with weights, six layers of Qwen1.5-0.5B; its forward."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from helpers import backend, subjects, xray

    config = AutoConfig.for_model(**subjects.shipped()["Qwen1.5-0.5B"]["config"])
    config.num_hidden_layers = 6
    backend.activate()
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="flash_attention_2"
    ).eval()
    ids = torch.ones(2, 64, dtype=torch.long)
    with one_thread(), torch.no_grad():
        bare = timed(partial(model, input_ids=ids, use_cache=False))
        sides = interleave(timed(partial(xray, model, ids)), bare, 5 if quick else 20)
    yield Row("X-ray of a live model", "ms", *sides, 1.3)


def full_size(quick: bool) -> Iterator[Row]:
    """``xray("Qwen1.5-110B")``; building and forwarding it on fake tensors."""
    measure = (partial(processes.full_size, side) for side in ("xray", "bare"))
    sides = interleave(*measure, 3 if quick else 9)
    yield Row("X-ray of Qwen1.5-110B", "s", *([m.seconds for m in side] for side in sides), 1.3)
    yield Row("  without the comparison", "s", [m.seconds for m in sides[0]], bound=3)
    yield Row("  its peak memory", "MB", [m.peak for m in sides[0]], bound=600)


def picture(quick: bool) -> Iterator[Row]:
    """The dtype river of 200 layers."""
    from transformers import Qwen2Config

    from helpers import river, xray

    config = Qwen2Config(
        num_hidden_layers=200, hidden_size=64, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    found = xray(config, dtype="float32", autocast="bfloat16")
    draw = timed(partial(river.html, found))
    yield Row("picture of 200 layers", "ms", [draw() for _ in range(10 if quick else 40)], bound=50)


def click(quick: bool) -> Iterator[Row]:
    """The panel's Run button at several settings, after a first round that fills the caches."""
    from helpers.panels import ExplorePanel
    from helpers.plan import LoadPlan

    plans = list(product(("bf16", "fp32", "overflow"), ("omitted", "float16", "float32")))
    panel = ExplorePanel(LoadPlan())
    times = []
    for settings in plans * (4 if quick else 9):
        panel.knobs["checkpoint"].value, panel.knobs["dtype"].value = settings
        times.append(timed(panel.button.click)())
    if len(panel.outcomes) < len(times):
        raise RuntimeError(f"a click had no outcome: {panel.status.value}")
    yield Row("click on Run", "ms", times[len(plans) :], bound=200)


def kernel(quick: bool) -> Iterator[Row]:
    """The reference kernel's forward; SDPA on the same tensors, 16 heads of size 64."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from helpers.reference_kernel.attention import flash_attn_func

    for tokens, causal in product((128, 256, 512, 1024, 2048), (False, True)):
        q, k, v = torch.randn(3, 1, tokens, 16, 64, dtype=torch.bfloat16)
        transposed = (x.transpose(1, 2) for x in (q, k, v))
        guide = timed(partial(flash_attn_func, q, k, v, causal=causal), calls=2048 // tokens)
        sdpa = partial(scaled_dot_product_attention, *transposed, is_causal=causal)
        with one_thread():  # on a busy machine a second one measures how long a core is taken
            sides = interleave(guide, timed(sdpa, calls=2048 // tokens), 10 if quick else 40)
        yield Row(f"kernel, {tokens} tokens{', causal' if causal else ''}", "ms", *sides, 1.15)


def import_helpers(quick: bool) -> Iterator[Row]:
    """``import helpers`` over ``pass``, each in a Python of its own."""
    commands = ([sys.executable, "-c", code] for code in ("import helpers", "pass"))
    sides = (timed(partial(subprocess.run, c, check=True, cwd=ROOT)) for c in commands)
    pairs = zip(*interleave(*sides, 10 if quick else 40), strict=True)
    yield Row("import helpers", "ms", [guide - bare for guide, bare in pairs], bound=30)


def doctor(quick: bool) -> Iterator[Row]:
    """The command ``dtype-doctor`` on a traceback in a pipe; a Python that does nothing."""
    script = Path(sys.executable).with_name("dtype-doctor" + (".exe" if os.name == "nt" else ""))
    # Not those that keep compiled files from being written, which the first round does.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    options = {"input": logs.TRACEBACK.encode(), "capture_output": True, "env": plain}
    status = subprocess.run([script], **options).returncode
    if status != 1:
        raise RuntimeError(f"{script.name} finds no failure in a traceback: exit status {status}")
    commands = ([script], [sys.executable, "-c", "pass"])
    sides = (timed(partial(subprocess.run, command, **options)) for command in commands)
    yield Row("dtype-doctor < traceback", "ms", *interleave(*sides, 20 if quick else 60), 4)


def long_log(quick: bool) -> Iterator[Row]:
    """``dtype-doctor`` on a log of 10 MB, whose lines repeat or differ; on a quarter of it. Memory
    is what it takes more than for one line."""
    size, rounds = 10_000_000, 3 if quick else 7
    with tempfile.TemporaryDirectory() as folder:
        log, quarter, line = (Path(folder) / name for name in ("log", "quarter", "line"))
        line.write_text(logs.TRACEBACK.splitlines()[-1])
        floor = processes.doctor(line).peak
        for name, write in (("that repeats", logs.repeating), ("that differs", logs.differing)):
            log.write_bytes(write(size))
            quarter.write_bytes(write(size // 4))
            sides = interleave(*(partial(processes.doctor, x) for x in (log, quarter)), rounds)
            seconds = [[m.seconds for m in side] for side in sides]
            yield Row(f"doctor, 10 MB log {name}", "s", seconds[0], bound=2)
            yield Row("  over a quarter of it", "s", *seconds, 5)
            memory = [m.peak - floor for m in sides[0]]
            yield Row("  its memory over its size", "MB", memory, [size / 2**20] * rounds, 4)


def why(quick: bool) -> Iterator[Row]:
    """``why()`` after an exception in a model of 28 layers, all float32 or only the last."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    import helpers
    from helpers import backend

    config = Qwen2Config(
        num_hidden_layers=28, hidden_size=64, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=1000,
    )  # fmt: skip
    backend.activate()
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="flash_attention_2"
        ).eval()
        last = model.model.layers[-1].float()
        last.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
        error = raised(partial(model, input_ids=torch.ones(2, 64, dtype=torch.long)))
        if not helpers.why(error).candidates:
            raise RuntimeError(f"why() knows nothing of {error!r}")
        ask = timed(partial(helpers.why, error))
        name = f"why(), {str(dtype).removeprefix('torch.')} weights"
        yield Row(name, "ms", [ask() for _ in range(10 if quick else 40)], bound=50)


def raised(function: Callable[[], object]) -> Exception:
    """What a function raises. RuntimeError: nothing."""
    try:
        function()
    except Exception as error:
        return error
    raise RuntimeError("what was to fail did not")


ROWS = {
    "notebook": notebook,
    "lora": lora,
    "matrix": matrix,
    "run": run,
    "live": live,
    "full-size": full_size,
    "picture": picture,
    "click": click,
    "kernel": kernel,
    "import": import_helpers,
    "doctor": doctor,
    "long-log": long_log,
    "why": why,
}


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, for both sides of a comparison."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def timed(function: Callable[[], object], calls: int = 1) -> Callable[[], float]:
    """A function that calls ``function`` and returns the milliseconds of one call."""

    def milliseconds() -> float:
        started = time.perf_counter()
        for _ in range(calls):
            function()
        return 1e3 * (time.perf_counter() - started) / calls

    return milliseconds


def machine() -> str:
    """What the numbers hold for."""
    import torch

    from helpers.backend import versions

    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    cores = f"{psutil.cpu_count()} cores, {torch.get_num_threads()} torch threads (run, kernel: 1)"
    return f"{platform.system()} {platform.machine()}, {cores}; {packages}; reference kernel"


def main() -> int:
    """Measure the rows that the command line names, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, help="some of the rows")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the same kernel on every machine
    load = psutil.getloadavg()[0]
    rows: list[Row] = []
    for name in options.only:
        print(f"measuring {name} ...", file=sys.stderr)
        rows += ROWS[name](options.quick)
    print(render(rows), machine(), sep="\n\n")
    print(f"Other work on the machine makes these noisy; the load average was {load:.1f} before.")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Run the atlas: X-ray every model type that supports FlashAttention-2, and check it for real.

    python tools/atlas.py            run every cell and store what came out
    python tools/atlas.py --check    run every cell, and fail where one is not as stored
    python tools/atlas.py --check --types qwen2,gpt2    only these

For each cell a small model of the same architecture with real weights does the same forward, and
has to do what the X-ray of the full size says; each disagreement is printed, and the exit status
is 1. Model types run in processes of their own: one that crashes or hangs takes no other with it.
"""

import argparse
import functools
import gc
import inspect
import itertools
import multiprocessing
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from helpers import atlas, backend, gate, state, subjects
from helpers.atlas import COLUMNS, FAILS, NO_CALL, NORMS, PASSES, UNKNOWN, Atlas, Cell
from helpers.errors import PlanError
from helpers.examples import example_inputs
from helpers.small import small_config
from helpers.steps import STEPS, Context

FLASH = "flash_attention_2"
MOST_JOBS = 8  # each holds torch
SECONDS = 60  # for all that is done with a model type
PATIENCE = 1  # second for one pass of a small model


def main() -> None:
    """Measure, then store or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with what is stored")
    parser.add_argument("--types", help="model types, with commas between; goes with --check")
    jobs = min(os.cpu_count() or 1, MOST_JOBS)
    parser.add_argument("--jobs", type=int, default=jobs, help="processes at a time")
    arguments = parser.parse_args()
    if arguments.types and not arguments.check:
        parser.error("--types would store a part of the atlas: add --check")
    started = time.perf_counter()
    with state.listening():
        chosen = arguments.types.split(",") if arguments.types else model_types()
    now = Atlas(dict(backend.versions()), measure(chosen, arguments.jobs))
    differing = [cell for cell in now.cells if cell.small.startswith("differs")]
    wrong = [f"{cell.model_type} | {cell.column}: {cell.small}" for cell in differing]
    print(
        f"Transformers {now.versions['transformers']}: {len(now.cells)} cells in"
        f" {time.perf_counter() - started:.0f} s; {len(atlas.told(now))} of {len(chosen)} model"
        f" types told; {sum(cell.small == 'agrees' for cell in now.cells)} cells ran small and"
        f" agree, {len(wrong)} differ"
    )
    if arguments.check:
        stored = [cell for cell in atlas.read().cells if cell.model_type in chosen]
        wrong += atlas.differences(stored, now.cells)
    else:
        atlas.write(now)
    if wrong:
        sys.exit("\n".join(wrong))


def model_types() -> list[str]:
    """The model types of Transformers of which a class supports FlashAttention-2."""
    from transformers import CONFIG_MAPPING

    return [name for name in sorted(CONFIG_MAPPING) if model_class(name) is not None]


@functools.cache
def model_class(model_type: str) -> Any:
    """The class that ``subjects.model_class`` picks if it supports FlashAttention-2, else the
    first of Transformers' mappings that does; None without one."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    kind = CONFIG_MAPPING[model_type]
    names = [name for name in vars(modeling_auto) if name.endswith("_MAPPING")]
    found = []
    try:
        found.append(subjects.model_class(kind()))
    except Exception:  # its default config contradicts itself, or there is no such class
        names = [*subjects.MAPPINGS, *names]
    for name in names:
        mapping = getattr(modeling_auto, name)
        try:
            some = mapping.get(kind, ())
        except ValueError:  # the mapping names a class that does not exist
            continue
        found += some if isinstance(some, (tuple, list)) else [some]
    return next((x for x in found if _supports(x) and _is_for(x, kind)), None)


def _supports(model: Any) -> bool:
    return bool(getattr(model, "_supports_flash_attn", False))


def _is_for(model: Any, kind: type) -> bool:
    return issubclass(kind, model.config_class or kind)


def default_config(model_type: str) -> Any:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    config.architectures = [model_class(model_type).__name__]
    return config


def examine(model_type: str) -> Iterator[Cell]:
    """The six cells of a model type, then the same cells with what the small model did."""
    given = Inputs()
    looked = full_size(model_type, given)
    if looked["bfloat16"].verdict == UNKNOWN and given.media:
        # The default config does not fit the pictures or sounds that come with it.
        alone = Inputs(text_alone=True)
        text = full_size(model_type, alone)
        if text["bfloat16"].verdict != UNKNOWN:
            given, looked = alone, text
    yield from looked.values()
    told = [[looked[x] for x in some if looked[x].verdict != UNKNOWN] for some in TOGETHER]
    if any(told):
        small = Small(model_type, given.text_alone)
        for cells in told:
            yield from small.compare(cells)


class Inputs:
    """Makes the inputs of the models of one config, and remembers their names."""

    def __init__(self, text_alone: bool = False) -> None:
        self.text_alone = text_alone
        self.counts: dict[str, int] = {}
        self.names = ""
        self.media = False  # pictures or sounds beside the text

    def __call__(self, model: Any) -> dict[str, Any]:
        made = example_inputs(model, self.text_alone, self.counts)
        self.names = ", ".join(made)
        self.media = any(x.dtype.is_floating_point for x in made.values())
        return made


# Columns that one model serves, one after the other; a step changes it for good, so it comes last.
TOGETHER = (
    ("bfloat16", NORMS),
    ("bfloat16, LoRA",),
    ("float32", "float32, autocast"),
    ("float16",),
)


def full_size(model_type: str, inputs: Inputs) -> dict[str, Cell]:
    """The X-rays of the default config."""
    import torch

    from helpers.weightless import Weightless

    name = model_class(model_type).__name__
    cells = {column: Cell(model_type, name, column, "", UNKNOWN) for column in COLUMNS}
    for columns in TOGETHER:
        # A kernel that cannot be loaded would otherwise count as loaded from then on.
        with state.as_before(), torch.no_grad(), Weightless() as mode:
            try:
                config = default_config(model_type)
                model = subjects.build(config, COLUMNS[columns[0]].dtype, FLASH)
            except Exception as error:  # what building a model raises, there is no list of
                why = f"cannot be built: {_said(error)}"
                cells |= {column: cells[column]._replace(error=why) for column in columns}
                continue
            for column in columns:
                try:
                    for step in COLUMNS[column].after_load:
                        model = STEPS[step].apply(model, Context(None, FLASH))
                    how = gate.How(inputs, COLUMNS[column].autocast)
                    found = gate.of_built(model, how, mode)
                except Exception as error:  # of the step, or there is no example of its inputs
                    cells[column] = cells[column]._replace(error=_said(error))
                else:
                    cells[column] = _seen(cells[column], found, inputs.names)
    return cells


def _seen(cell: Cell, found: Any, names: str) -> Cell:
    module, _, line = (found.at or "").partition(", ")
    first = found.first_float32
    notes = found.notes if found.ok else ()
    cell = cell._replace(
        inputs=names,
        verdict={True: PASSES, False: FAILS, None: UNKNOWN}[found.ok],
        error_type=found.error_type or "",
        error=one_line(found.error or ""),
        module=module,
        line=line,
        rescue=next((layer.rescue for layer in found.layers if layer.rescue), "")
        or ("" if found.layers or not found.ok else NO_CALL),
        cpu_only=next((n.partition(": ")[0] for n in notes if "on CUDA" in n), ""),
    )
    if first is None:
        return cell
    return cell._replace(
        first_module=first.module,
        first_kind=first.kind,
        first_name=first.name or "",
        first_line=first.line,
    )


def _said(error: Exception) -> str:
    kind = "" if isinstance(error, PlanError) else f"{type(error).__name__}: "
    return one_line(f"{kind}{error}")


class Small:
    """A small model of the same architecture, with real weights."""

    def __init__(self, model_type: str, text_alone: bool = False) -> None:
        import torch

        self.config, self.reason = None, ""
        for images in (True, False):
            try:
                self.inputs = Inputs(text_alone)
                self.config = small_config(default_config(model_type), images)
                self.reason = ""
                # Without FlashAttention and in one dtype, only the shrinking can be at fault.
                with state.as_before(), torch.no_grad():
                    self.run(subjects.build(self.config, "float32", "eager"), None, _patient())
                return
            except _TooLong:
                self.reason = f"a pass of the small model takes longer than {PATIENCE} s"
                break  # with larger pictures it takes no less
            except Exception as error:
                self.reason = one_line(f"{type(error).__name__}: {error}")
        self.config = None

    def run(
        self, model: Any, autocast: str | None, watch: AbstractContextManager[None] | None = None
    ) -> None:
        """One forward."""
        import torch

        inputs = self.inputs(model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if "use_cache" in inspect.signature(base.forward).parameters:
            inputs["use_cache"] = False
        region = torch.autocast("cpu", getattr(torch, autocast or "bfloat16"), bool(autocast))
        with region, watch or nullcontext():
            model(**inputs)

    def compare(self, cells: list[Cell]) -> list[Cell]:
        """The cells of columns that one model serves, with what it did."""
        import torch

        if self.config is None:
            return [cell._replace(small=f"not run: {self.reason}") for cell in cells]
        model, done = None, []
        with state.as_before(), torch.no_grad():
            for cell in cells:
                dtype, autocast, steps = COLUMNS[cell.column]
                raised = ""
                try:
                    if model is None:
                        model = subjects.build(self.config, dtype, FLASH)
                    for step in steps:
                        model = STEPS[step].apply(model, Context(None, FLASH))
                    self.run(model, autocast)
                except Exception as error:
                    raised = f"{type(error).__name__}: {one_line(str(error))}".strip(": ")
                agrees = _same(raised, cell.failure)
                small = "agrees" if agrees else f"differs: {raised or PASSES}"
                done.append(cell._replace(small=small))
        return done


class _TooLong(Exception):
    """A pass of a small model."""


@contextmanager
def _patient() -> Iterator[None]:
    """The block ends with _TooLong at the first module that it calls after PATIENCE."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    started = time.perf_counter()

    def look(_module: Any, _inputs: Any) -> None:
        if time.perf_counter() - started > PATIENCE:
            raise _TooLong

    handle = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _same(one: str, other: str) -> bool:
    """Whether two messages are alike but for their numbers, which are sizes and layers."""
    return re.sub(r"\d+", "0", one) == re.sub(r"\d+", "0", other)


def one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def measure(chosen: list[str], jobs: int) -> list[Cell]:
    """Every cell of some model types, in the order of ``chosen`` and COLUMNS."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for model_type in chosen:
        model_class(model_type)  # imports here, because Transformers' lazy imports know no threads
        waiting.put(model_type)
    found: dict[str, dict[str, Cell]] = {}

    def work() -> None:
        with Worker() as worker:
            while True:
                try:
                    model_type = waiting.get_nowait()
                except queue.Empty:
                    return
                found[model_type] = worker.examine(model_type)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[model_type][column] for model_type in chosen for column in COLUMNS]


class Done(NamedTuple):
    """A worker is through with its start, or with a model type."""


def serve(pipe: Any) -> None:
    """In a worker: examine what the pipe names, and send each cell as soon as it is there."""
    import torch

    torch.set_num_threads(1)
    backend.activate()
    gc.disable()  # a fifth of the time; what is in cycles goes now and then
    with state.listening():
        pipe.send(Done())  # with its imports
        for number in itertools.count(1):
            try:
                model_type = pipe.recv()
            except EOFError:
                return
            for cell in examine(model_type):
                pipe.send(cell)
            pipe.send(Done())
            if number % 8 == 0:
                gc.collect()


class Worker:
    """A process that examines model types, and that is replaced when it dies or takes too long."""

    target = staticmethod(serve)

    def __enter__(self) -> "Worker":
        # Started anew, not forked: a fork would inherit the threads of torch half-way.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=self.target, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()  # it has imported what it needs, which is not the model type's time
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()

    def examine(self, model_type: str) -> dict[str, Cell]:
        name = model_class(model_type).__name__
        cells = {
            column: Cell(model_type, name, column, "", UNKNOWN, error="not reached")
            for column in COLUMNS
        }
        deadline = time.monotonic() + SECONDS
        try:
            self.pipe.send(model_type)
            while self.pipe.poll(max(deadline - time.monotonic(), 0)):
                if isinstance(cell := self.pipe.recv(), Done):
                    return cells
                cells[cell.column] = cell
            why = f"it takes more than {SECONDS} s"
        except (EOFError, OSError):
            why = "the process that ran it died"
        self.__exit__()
        self.__enter__()
        return {column: _unfinished(cell, why) for column, cell in cells.items()}


def _unfinished(cell: Cell, why: str) -> Cell:
    if cell.error == "not reached":
        return cell._replace(error=why)
    return cell if cell.small or cell.verdict == UNKNOWN else cell._replace(small=f"not run: {why}")


if __name__ == "__main__":
    main()

"""Is this machine ready for the guide? ``python -m helpers.machine`` prints it, line by line.

Each line is ``[OK]`` or ``[FAIL]`` with what was found; a failure says what to do. The last line
runs one real experiment.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from copy import copy
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

# Nothing else that could be missing is imported up here: this report is for those who miss it.
if TYPE_CHECKING:
    from packaging.markers import Marker
    from packaging.requirements import Requirement

PROJECT = "flashattention-dtype-guide"
FOR_TRANSFORMERS_4 = Path(__file__).parents[1] / "requirements-v4.in"
ROOM = 50 * 2**20  # six checkpoints of at most 2 MB, with room to spare


class Check(NamedTuple):
    """One line of the report; ``fix`` is empty where nothing is wrong."""

    name: str
    found: str
    fix: str = ""

    @property
    def ok(self) -> bool:
        return not self.fix

    def __str__(self) -> str:
        head = f"[{'OK' if self.ok else 'FAIL'}] {self.name}: {self.found}"
        return head if self.ok else f"{head}\n       fix: {self.fix}"


def checks() -> Iterator[Check]:
    """All checks, cheap ones first; one that breaks does not stop the rest."""
    needed = requirements()
    if not needed:
        yield Check(PROJECT, "not installed", "make setup, and use the Python in .venv")
        return
    yield python_version(sys.version_info[:3])
    for requirement in needed:
        yield package(requirement)
    for name, check in (
        ("checkpoints", cache_folder),
        ("FlashAttention here", flash_attention),
        ("one real run", one_run),
    ):
        yield _guarded(name, check)


def report() -> bool:
    """Print every check; True if all passed."""
    results = []
    for check in checks():
        print(check, flush=True)
        results.append(check.ok)
    print("Everything is ready." if all(results) else "Please mend the lines marked [FAIL].")
    return all(results)


def python_version(found: tuple[int, ...]) -> Check:
    """A Python that the guide was made for, as its installed metadata says."""
    from packaging.specifiers import SpecifierSet

    text = ".".join(map(str, found))
    wanted = SpecifierSet(metadata(PROJECT)["Requires-Python"])
    return Check("Python", text, "" if text in wanted else f"install Python {wanted}")


def requirements() -> "list[Requirement]":
    """The project's own direct dependencies, and what their extras add, such as the `kernels` of
    `transformers[kernels]`; from the installed metadata. With Transformers 4, what .venv-v4 has."""
    if is_second_environment():
        from packaging.requirements import Requirement

        lines = FOR_TRANSFORMERS_4.read_text("utf-8").splitlines()
        return [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0]]
    own = _required(PROJECT, "")
    return own + [r for o in own for extra in o.extras for r in _required(o.name, extra)]


def _required(name: str, extra: str) -> "list[Requirement]":
    """What a package needs here: by itself, or only for one of its extras."""
    try:
        lines = requires(name) or []
    except PackageNotFoundError:
        return []
    from packaging.requirements import Requirement

    parsed = [Requirement(line) for line in lines]
    if not extra:
        return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [r for r in parsed if r.marker and _only_for(extra, r.marker)]


def _only_for(extra: str, marker: "Marker") -> bool:
    return marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def is_second_environment() -> bool:
    """Whether this is the environment that `make setup-v4` makes."""
    return Path(sys.prefix).name == ".venv-v4" and FOR_TRANSFORMERS_4.is_file()


def package(requirement: "Requirement") -> Check:
    """Installed, and in the range that the guide was run with."""
    wanted = copy(requirement)
    wanted.marker = None  # its quotes would end the quotes below
    install = f'pip install -c constraints.txt "{wanted}"'
    if is_second_environment():
        install = "make setup-v4"
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Check(requirement.name, "not installed", install)
    fits = requirement.specifier.contains(found, prereleases=True)
    return Check(requirement.name, found.partition("+")[0], "" if fits else install)


def cache_folder() -> Check:
    """The checkpoints can be made and kept."""
    from helpers import checkpoints

    folder = checkpoints.get("bf16")
    if checkpoints.cache() not in folder.parents:
        way_out = f"set {checkpoints.CACHE} to a folder that can be written"
        return Check("checkpoints", "kept for this process only", way_out)
    free = shutil.disk_usage(folder).free
    fix = "" if free > ROOM else f"free some space on the disk of {folder}"
    return Check("checkpoints", "made, in the user's cache folder", fix)


def flash_attention() -> Check:
    """Which FlashAttention the guide uses on this machine."""
    from helpers import backend

    return Check("FlashAttention here", str(backend.activate()))


def one_run() -> Check:
    """Load, forward and generate once, with the dtype that works."""
    from helpers.experiment import run
    from helpers.plan import LoadPlan

    outcome = run(LoadPlan(dtype="auto"))
    fix = "" if outcome.ok and outcome.finite else "send this report with your question"
    return Check("one real run", str(outcome), fix)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except (OSError, RuntimeError) as error:  # of our own modules: a sentence with the way out
        return Check(name, "not possible", str(error))
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        return Check(name, found, "send this report with your question")


if __name__ == "__main__":
    sys.exit(0 if report() else 1)

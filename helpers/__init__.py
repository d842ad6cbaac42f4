"""Helpers of the FlashAttention dtype guide.

The public names are resolved on first use, so that ``import helpers`` loads neither torch nor
transformers.
"""

import sys
from importlib import import_module

TYPE_CHECKING = False  # what type checkers take for True; importing typing costs milliseconds
if TYPE_CHECKING:
    from helpers.backend import versions
    from helpers.checklist import same_dtype
    from helpers.doctor.ask import diagnose, why
    from helpers.doctor.panel import doctor_panel
    from helpers.errors import PlanError
    from helpers.experiment import Outcome, run
    from helpers.gate import xray
    from helpers.panels import explore
    from helpers.plan import LoadPlan

_HOME_OF = {
    "LoadPlan": "helpers.plan",
    "Outcome": "helpers.experiment",
    "PlanError": "helpers.errors",
    "diagnose": "helpers.doctor.ask",
    "doctor_panel": "helpers.doctor.panel",
    "why": "helpers.doctor.ask",
    "run": "helpers.experiment",
    "same_dtype": "helpers.checklist",
    "versions": "helpers.backend",
    "explore": "helpers.panels",
    "xray": "helpers.gate",
}

__all__ = [
    "LoadPlan",
    "Outcome",
    "PlanError",
    "diagnose",
    "doctor_panel",
    "explore",
    "run",
    "same_dtype",
    "versions",
    "why",
    "xray",
]


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        if sys.version_info < (3, 10) and not _HOME_OF[name].startswith("helpers.doctor."):
            raise ImportError(
                f"helpers.{name} needs Python 3.10 or newer. A text and an exception"
                " can be diagnosed with this one."
            )
        try:
            return getattr(import_module(_HOME_OF[name]), name)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"helpers.{name} needs more than is here, {error.name!r} is missing: take the whole"
                " guide and install its dependencies.",
                name=error.name,
            ) from error
    raise AttributeError(f"module 'helpers' has no attribute {name!r}")


def __dir__() -> "list[str]":
    return sorted([*globals(), *_HOME_OF])

"""Helpers of the FlashAttention dtype guide.

The public names are resolved on first use, so that ``import helpers`` loads neither torch nor
transformers.
"""

from importlib import import_module

TYPE_CHECKING = False  # what type checkers take for True; importing typing costs milliseconds
if TYPE_CHECKING:
    from helpers.backend import versions
    from helpers.checklist import same_dtype
    from helpers.doctor.ask import diagnose, why
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
    "explore",
    "run",
    "same_dtype",
    "versions",
    "why",
    "xray",
]


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'helpers' has no attribute {name!r}")


def __dir__() -> "list[str]":
    return sorted([*globals(), *_HOME_OF])

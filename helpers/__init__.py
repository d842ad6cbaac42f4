"""Helpers of the FlashAttention dtype guide.

The public names are resolved on first use, so that ``import helpers`` loads neither torch nor
transformers.
"""

from importlib import import_module

TYPE_CHECKING = False  # what type checkers take for True; importing typing costs milliseconds
if TYPE_CHECKING:
    from helpers.experiment import LoadPlan, Outcome, PlanError, run, versions
    from helpers.panels import explore

_HOME_OF = {
    "LoadPlan": "helpers.experiment",
    "Outcome": "helpers.experiment",
    "PlanError": "helpers.experiment",
    "run": "helpers.experiment",
    "versions": "helpers.experiment",
    "explore": "helpers.panels",
}

__all__ = ["LoadPlan", "Outcome", "PlanError", "explore", "run", "versions"]


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'helpers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])

"""The public names are there, and importing the package is cheap."""

from importlib import import_module

import pytest

import helpers

CODE = """
import json, sys
before = set(sys.modules)
import helpers
only_helpers = {name for name in set(sys.modules) - before if name.startswith("helpers")}
from helpers import backend, checkpoints, experiment, gate, machine, probe, state, view
from helpers import LoadPlan
LoadPlan(dtype="auto").check()
heavy = {"torch", "transformers", "peft", "kernels", "ipywidgets"} & set(sys.modules)
print(json.dumps([sorted(only_helpers), sorted(heavy)]))
"""


def test_importing_loads_no_big_library(fresh_python):
    only_helpers, heavy = fresh_python(CODE)
    assert only_helpers == ["helpers"]
    assert heavy == []


@pytest.mark.parametrize("name", helpers.__all__)
def test_public_name_is_the_one_of_its_module(name):
    value = getattr(helpers, name)
    assert value is getattr(import_module(value.__module__), name)
    assert name in dir(helpers)


def test_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="module 'helpers' has no attribute 'explode'"):
        helpers.explode  # noqa: B018
    with pytest.raises(ImportError, match="explode"):
        from helpers import explode  # noqa: F401

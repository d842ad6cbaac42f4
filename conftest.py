"""For every test and notebook: no GPU unless asked for, and guards over nbval."""

import os
import signal

import pytest


def pytest_configure(config):
    # The stored outputs are those of the reference kernel, and Transformers prefers flash-attn
    # wherever it sees a GPU. `pytest -m gpu` shows it one.
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    # A command in the background of a script ignores Ctrl-C, which some tests send to themselves.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    # The file that takes longest comes first, so that no process waits for it at the end.
    items.sort(key=lambda item: item.path.name != "test_matrix.py")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """nbval runs a cell without a stored run and compares nothing, and it accepts that a cell
    tagged raises-exception raises nothing. Both fail here."""
    result = yield
    if type(item).__name__ == "IPyNbCell":
        if item.cell.source.strip() and item.cell.execution_count is None:
            pytest.fail("this cell has no stored run: make notebooks")
        raised = any(output.output_type == "error" for output in item.test_outputs)
        if item.options["check_exception"] and not raised:
            pytest.fail("this cell is tagged raises-exception and did not raise")
    return result

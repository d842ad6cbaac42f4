"""The statistics and the table of ``make bench``; no times are measured here."""

import math
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import __main__ as bench
from benchmarks import logs
from benchmarks.table import Row, interleave, render, spread

TIMES = st.lists(st.floats(0.1, 1e6), min_size=2, max_size=9)


@given(TIMES, TIMES)
def test_the_result_compares_the_medians(guide, bare):
    assert math.isclose(Row("x", "s", guide, bare).result * median(bare), median(guide))
    assert Row("x", "s", guide).result == median(guide)


@given(TIMES, TIMES)
def test_the_bound_is_the_largest_result_that_passes(guide, bare):
    result = Row("x", "s", guide, bare).result
    assert Row("x", "s", guide, bare, result).ok
    assert not Row("x", "s", guide, bare, math.nextafter(result, 0)).ok
    assert Row("x", "s", guide, bare, None).ok


def test_the_sides_take_turns_and_the_first_round_is_left_out():
    calls = []

    def side(name):
        calls.append(name)
        return len(calls)

    sides = interleave(lambda: side("guide"), lambda: side("bare"), 3)
    assert calls == ["guide", "bare"] * 4
    assert sides == [[3, 5, 7], [4, 6, 8]]


def test_spread_is_the_median_and_the_quartiles():
    assert spread([5, 1, 2, 4, 3], "ms") == "3 (2-4) ms"
    assert spread([1200.0, 1000.0, 1100.0], "MB") == "1100 (1050-1150) MB"


def test_the_table_says_which_row_is_above_its_bound():
    slow = Row("slow", "s", [3, 3], [2, 2], 1.25)
    fast = Row("much faster", "ms", [3, 3], bound=200)
    head, *lines = render([slow, fast, Row("told", "s", [3, 3])]).splitlines()
    assert lines[0].split() == [
        "slow",
        "3",
        "(3-3)",
        "s",
        "2",
        "(2-2)",
        "s",
        "1.500",
        "1.25",
        "ABOVE",
    ]
    assert lines[1].split()[-3:] == ["200", "ms", "ok"]
    assert lines[2].split() == ["told", "3", "(3-3)", "s"]
    assert lines[0].index("1.25") == lines[1].index("200 ms") == head.index("bound")


@pytest.mark.parametrize(("guide", "code"), [(124.0, 0), (126.0, 1)])
def test_the_exit_code_tells_whether_a_bound_is_exceeded(monkeypatch, capsys, guide, code):
    rows = [Row("first", "s", [guide] * 2, [100.0] * 2, 1.25), Row("last", "s", [1.0] * 2)]
    monkeypatch.setattr(bench, "ROWS", {"made up": lambda quick: iter(rows)})
    monkeypatch.setattr(bench, "machine", lambda: "a machine")
    monkeypatch.setattr("sys.argv", ["benchmarks", "--quick"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # main() sets it; undone afterwards
    assert bench.main() == code
    assert "first" in capsys.readouterr().out


@pytest.mark.parametrize("write", [logs.repeating, logs.differing])
@pytest.mark.parametrize("size", [5_000, 40_000])
def test_a_log_is_the_same_each_time_and_as_long_as_asked(write, size):
    log = write(size)
    assert len(log) == size
    assert log == write(size)
    assert log.endswith(f"\n{logs.TRACEBACK}".encode())


def test_one_log_repeats_but_for_its_numbers_and_in_the_other_each_line_is_new():
    def lines(log):
        whole = log.decode().removesuffix(logs.TRACEBACK).split("\n")[:-2]
        return ["".join("0" if sign.isdigit() else sign for sign in line) for line in whole]

    repeating, differing = lines(logs.repeating(40_000)), lines(logs.differing(40_000))
    assert len(set(repeating)) < len(repeating) / 20
    assert len(set(differing)) == len(differing) > 300

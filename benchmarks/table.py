"""Measurements of two sides, their comparison, and the table."""

from collections.abc import Callable, Iterable
from statistics import median, quantiles
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Row(NamedTuple):
    """What was measured of the guide and of the bare libraries, in ``unit``.

    The result is the quotient of the two medians, or the guide's median where ``bare`` is empty. It
    may not exceed ``bound``; a row without one only informs.
    """

    name: str
    unit: str
    guide: list[float]
    bare: list[float] | tuple[()] = ()
    bound: float | None = None

    @property
    def result(self) -> float:
        return median(self.guide) / median(self.bare) if self.bare else median(self.guide)

    @property
    def ok(self) -> bool:
        return self.bound is None or self.result <= self.bound

    def cells(self) -> tuple[str, ...]:
        """Name, both sides, ratio, bound, verdict."""
        bare, ratio = "", ""
        if self.bare:
            bare, ratio = spread(self.bare, self.unit), f"{self.result:.3f}"
        bound = (
            "" if self.bound is None else f"{self.bound:g}{'' if self.bare else ' ' + self.unit}"
        )
        verdict = bound and ("ok" if self.ok else "ABOVE")
        return self.name, spread(self.guide, self.unit), bare, ratio, bound, verdict


def interleave(guide: Callable[[], T], bare: Callable[[], T], rounds: int) -> list[list[T]]:
    """Call the two in turn, so that a slow minute of the machine falls on both, and return what
    each returned. One more round before, which fills the caches, is left out."""
    pairs = [(guide(), bare()) for _ in range(rounds + 1)][1:]
    return [list(side) for side in zip(*pairs, strict=True)]


def spread(values: list[float], unit: str) -> str:
    """Median and quartiles, ``"5.1 (4.9-5.6) s"``."""
    quartiles = quantiles(values, n=4, method="inclusive")
    low, middle, high = (f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in quartiles)
    return f"{middle} ({low}-{high}) {unit}"


def render(rows: Iterable[Row]) -> str:
    """The rows in aligned columns under their heads."""
    heads = ("", "guide: median (quartiles)", "bare", "ratio", "bound", "")
    table = [heads, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table)

"""The rows of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One figure of this package's kernel, of jax's own, and what is aimed at.

    Attributes:
        chip: one of `CHIPS`.
        what: is measured.
        unit: of the figures; "%" for a share of 1.
        ours, theirs: None where there is none.
        at_most, at_least: the target; None for none.
        raw: what it was computed from.
    """

    chip: str
    what: str
    unit: str
    ours: float | None
    theirs: float | None = None
    at_most: float | None = None
    at_least: float | None = None
    raw: object = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none, or no figure."""
        if self.ours is None or (self.at_most is None and self.at_least is None):
            return None
        enough = self.at_least is None or self.ours >= self.at_least
        return enough and (self.at_most is None or self.ours <= self.at_most)


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of a Markdown table."""
    head = ("chip", "figure", "ours", "jax's", "target", "")
    cells = [head, ("---", "---", "---:", "---:", "---:", "---"), *map(_cells, rows)]
    return [f"| {' | '.join(line)} |" for line in cells]


def _cells(row: Row) -> tuple[str, ...]:
    bounds = (("≤", row.at_most), ("≥", row.at_least))
    target = " ".join(f"{sign} {_number(bound, row.unit)}" for sign, bound in bounds if bound is not None)
    verdict = {True: "met", False: "missed", None: ""}[row.met]
    return row.chip, row.what, _number(row.ours, row.unit), _number(row.theirs, row.unit), target, verdict


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "%":
        return f"{value:.1%}"
    return f"{value:.4g} {unit}".rstrip()

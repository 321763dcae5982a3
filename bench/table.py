"""How figures are gathered and shown.

Owns:    what a row and a benchmark are; interleaved runs and their medians; the table.
Runs in: the benchmark process.
Unaware: of what is measured.
"""
from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

Figures = Dict[str, float]


@dataclass(frozen=True)
class Target:
    """What is to be reached: a bound on the figure itself, or on its ratio to the base."""

    of: str                         # "ratio" | "figure"
    least: Optional[float] = None
    most: Optional[float] = None

    def __str__(self) -> str:
        sign, bound = ("≥", self.least) if self.least is not None else ("≤", self.most)
        return f"{sign} {bound:g}{'× base' if self.of == 'ratio' else ''}"

    def reached(self, figure: float, ratio: Optional[float]) -> bool:
        value = ratio if self.of == "ratio" else figure
        if value is None:
            return False
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


def ratio_least(bound: float) -> Target:
    return Target("ratio", least=bound)


def ratio_most(bound: float) -> Target:
    return Target("ratio", most=bound)


def least(bound: float) -> Target:
    return Target("figure", least=bound)


def most(bound: float) -> Target:
    return Target("figure", most=bound)


@dataclass(frozen=True)
class Row:
    """One line of the table: which figure, beside which base, against which targets."""

    figure: str                     # its key in what `ours` returns
    title: str
    unit: str
    base: str = ""                  # its key in what `base` returns; "" for none
    target: Optional[Target] = None  # None: said for information


class Benchmark:
    """Something measured in interleaved runs. `start` and `stop` frame them; `base` and `ours` are one run each."""

    name = ""
    about = ""
    rows: Tuple[Row, ...] = ()
    runs = 5                        # unless --runs says otherwise; slow ones ask for fewer
    limits_only = False             # set by --base: measure the raw limits, without a server

    def start(self) -> None:
        """Prepare what all runs share."""

    def stop(self) -> None:
        """Undo `start`; called after a failure too."""

    def base(self) -> Figures:
        """Measure the raw limit once."""
        return {}

    def ours(self) -> Figures:
        """Measure agentserver once."""
        return {}


@dataclass(frozen=True)
class Result:
    """A row with its medians over all runs."""

    row: Row
    base: Optional[float]
    figure: Optional[float]
    ratio: Optional[float]

    @property
    def verdict(self) -> str:
        if self.row.target is None:
            return ""
        if self.figure is None:
            return "not measured"
        return "reached" if self.row.target.reached(self.figure, self.ratio) else "MISSED"

    def to_json(self, benchmark: str) -> Dict[str, Any]:
        return {"benchmark": benchmark, "figure": self.row.figure, "title": self.row.title, "unit": self.row.unit,
                "base": self.base, "agentserver": self.figure, "ratio": self.ratio,
                "target": str(self.row.target) if self.row.target else None, "verdict": self.verdict or None}


def measure(benchmark: Benchmark, runs: int) -> List[Result]:
    """Run a benchmark: base, ours, base, ours …; return its rows."""
    bases: List[Figures] = []
    figures: List[Figures] = []
    try:
        benchmark.start()
        for _ in range(runs):
            bases.append(benchmark.base())
            if not benchmark.limits_only:
                figures.append(benchmark.ours())
    finally:
        benchmark.stop()
    return [_result(row, bases, figures) for row in benchmark.rows]


def _result(row: Row, bases: Sequence[Figures], figures: Sequence[Figures]) -> Result:
    """Take medians; the ratio is the median of the ratios of neighbouring runs, because absolute figures drift."""
    base = [run[row.base] for run in bases if row.base in run]
    ours = [run[row.figure] for run in figures if row.figure in run]
    ratios = [mine / limit for mine, limit in zip(ours, base) if limit]
    return Result(row, _median(base), _median(ours), _median(ratios))


def _median(values: Sequence[float]) -> Optional[float]:
    return statistics.median(values) if values else None


def number(value: Optional[float]) -> str:
    """Return a figure with three digits that matter."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


HEADS = ("", "unit", "base", "agentserver", "ratio", "to reach", "")


def lines(results: Sequence[Result]) -> List[Tuple[str, ...]]:
    """Return the cells of the table."""
    return [(r.row.title, r.row.unit, number(r.base), number(r.figure), number(r.ratio),
             str(r.row.target) if r.row.target else "–", r.verdict) for r in results]


def text(rows: Sequence[Tuple[str, ...]], widths: Sequence[int]) -> List[str]:
    """Return rows as aligned lines: words to the left, figures to the right."""
    return ["  ".join(cell.rjust(width) if 2 <= column <= 4 else cell.ljust(width)
                      for column, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]

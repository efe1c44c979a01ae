"""A run: its rounds, shown by the progress bar, and the resulting figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from rich.progress import Progress

T = TypeVar("T")
Samples = dict[str, dict[str, list[float]]]
"""The measured values, by contender and column."""


class Run:
    """What the measurements share.

    Args:
        url: The URL of the database.
        share: How much to measure, as a share of the rounds of a full run.
        progress: Shows the rounds.
    """

    def __init__(self, url: str, share: float, progress: Progress) -> None:
        self.url = url
        self.share = share
        self.seconds = 1.0 if share >= 0.5 else 0.3  # that a server is kept busy in a round
        self.samples: dict[str, Samples] = {}
        self._progress = progress

    def rounds(self, title: str, full: int, *, always: bool = False) -> Iterator[int]:
        """Yield the numbers of the rounds of a measurement."""
        total = full if always else max(round(full * self.share), 1)
        yield from self._progress.track(range(total), description=title, total=total)

    def add(self, section: str, key: str, column: str, value: float) -> None:
        """Add a measured value."""
        columns = self.samples.setdefault(section, {}).setdefault(key, {})
        columns.setdefault(column, []).append(value)

    def figures(self, section: str, floor_of: Callable[[str, str], tuple[str, str]]) -> Any:
        """Return the median of each value, and the median and spread of its ratio to a floor.

        Args:
            section: The section of the values.
            floor_of: For a contender and a column, the contender and column of their floor.
        """
        samples = self.samples[section]
        figures: dict[str, dict[str, dict[str, float]]] = {}
        for key, columns in samples.items():
            for column, values in columns.items():
                figure = {"value": statistics.median(values)}
                floor_key, floor_column = floor_of(key, column)
                floor = samples.get(floor_key, {}).get(floor_column, [])
                # Ratios within a round: what slows a round down slows all of it down.
                ratios = [value / base for value, base in zip(values, floor, strict=False) if base]
                if ratios:
                    figure |= {"ratio": statistics.median(ratios), **_spread(ratios)}
                rounded = {name: float(f"{number:.4g}") for name, number in figure.items()}
                figures.setdefault(key, {})[column] = rounded
        return figures


def rotated(things: Sequence[T], number: int) -> list[T]:
    """Return the things rotated, so that each round starts with a different one."""
    start = number % len(things)
    return [*things[start:], *things[:start]]


def _spread(values: list[float]) -> dict[str, float]:
    if len(values) == 1:
        return {"low": values[0], "high": values[0]}
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "high": high}

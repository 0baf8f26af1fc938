"""What the figures of evaluations have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etils import epath


def new() -> tuple[Any, Any]:
    """A figure fit for a paper, and its axes."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.xaxis.label.set_size(12)
    axes.yaxis.label.set_size(12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    return figure, axes


def sizes_along(axes: Any, sizes: Sequence[int], linear_to: int = 1) -> None:
    """A logarithmic axis of numbers of tokens, linear up to `linear_to`: 0 has a place on it."""
    axes.set_xscale("symlog", base=2, linthresh=linear_to)
    axes.set_xticks(sizes, [short(size) for size in sizes])
    axes.minorticks_off()


def short(size: int) -> str:
    """4096 as 4K, 2**20 as 1M."""
    for unit, letter in ((2**20, "M"), (2**10, "K")):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{letter}"
    return str(size)


def save(figure: Any, path: epath.Path) -> None:
    """As a PNG."""
    with path.open("wb") as file:
        figure.savefig(file, format="png")

"""A figure: what is trained for it, and how its numbers are put together, written and drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fot_jax.evals import plots

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One `fot train`, and mostly one `fot evaluate` after it.

    Attributes:
      name: of its workdir.
      model: what it stands for in the figure; "" for one that others only start from.
      files: experiment files beside this one.
      bindings: for --gin.
      start: the run whose parameters it starts from.
    """

    name: str
    model: str
    files: tuple[str, ...]
    bindings: tuple[str, ...] = ()
    start: str | None = None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure: one line for each model.

    Attributes:
      title: what it shows.
      paper: what the paper found.
      family: of runs; figures of one family share them.
      runs: by seed, those that others start from first.
      evaluation: its name in what `fot evaluate` writes.
      x, y: of its rows.
      labels: of the axes.
      percent: whether y is a share, shown as percent.
      times_even: label of the axis if y, a share of x, is drawn as a multiple of 1 / x.
    """

    title: str
    paper: str
    family: str
    runs: Callable[[int], list[Run]]
    evaluation: str
    x: str
    y: str
    labels: tuple[str, str]
    percent: bool = False
    times_even: str = ""

    def rows(self, results: Mapping[str, Sequence[dict]]) -> Rows:
        """A row for each model and x: mean, least and most of y over seeds.

        Of one seed, rows with the same x (layers, depths) count as their mean.

        Args:
          results: by model, what `fot evaluate` wrote for each seed.
        """
        rows = []
        for model, of_seeds in results.items():
            found: dict[int, list[float]] = {}
            for result in of_seeds:
                of_seed: dict[int, list[float]] = {}
                for row in result[self.evaluation]:
                    y = math.nan if row[self.y] is None else row[self.y]  # was not finite
                    of_seed.setdefault(row[self.x], []).append(y)
                for x, ys in of_seed.items():
                    found.setdefault(x, []).append(sum(ys) / len(ys))
            for x, ys in found.items():
                numbers = {self.y: sum(ys) / len(ys), "least": min(ys), "most": max(ys)}
                rows.append({"model": model, self.x: x, **numbers, "seeds": len(of_seeds)})
        return rows

    def table(self, rows: Rows) -> str:
        """The rows in Markdown: a column for each model."""
        models = list(dict.fromkeys(row["model"] for row in rows))
        cells = {(row["model"], row[self.x]): self._cell(row) for row in rows}
        lines = [f"| {self.labels[0]} | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
        for x in sorted({row[self.x] for row in rows}):
            found = (cells.get((model, x), "") for model in models)
            lines.append(f"| {plots.short(x)} | {' | '.join(found)} |")
        return "\n".join(lines)

    def _cell(self, row: dict[str, Any]) -> str:
        mean, least, most = (row[name] for name in (self.y, "least", "most"))
        if self.percent:
            mean, least, most = (f"{100 * number:.1f}" for number in (mean, least, most))
        else:
            mean, least, most = (f"{number:.3g}" for number in (mean, least, most))
        unit = " %" * self.percent
        return f"{mean}{unit}" if row["seeds"] == 1 else f"{mean}{unit} ({least} … {most})"

    def draw(self, rows: Rows, path: Path) -> None:
        """The rows as a PNG: a line for each model, and the range over seeds."""
        figure, axes = plots.new()
        percent = self.percent and not self.times_even
        for model in dict.fromkeys(row["model"] for row in rows):
            of_model = [row for row in rows if row["model"] == model]
            x = [row[self.x] for row in of_model]
            y, least, most = (
                [row[name] * (row[self.x] if self.times_even else 100**percent) for row in of_model]
                for name in (self.y, "least", "most")
            )
            (line,) = axes.plot(x, y, "o-", label=model)
            axes.fill_between(x, least, most, color=line.get_color(), alpha=0.25, linewidth=0)
        sizes = sorted({row[self.x] for row in rows})
        plots.sizes_along(axes, sizes, linear_to=min((size for size in sizes if size), default=1))
        if percent:  # from 0, unless all lines would lie on each other at the top
            lowest = 100 * min(row["least"] for row in rows)
            axes.set_ylim(*((-3, 103) if lowest < 80 else (lowest - 1, 100.5)))
        axes.set_xlabel(self.labels[0])
        axes.set_ylabel(self.times_even or self.labels[1])
        axes.legend(fontsize=10)
        plots.save(figure, path)

"""The figures and tables of the paper: what is trained for each, and how they are drawn."""

from __future__ import annotations

import dataclasses
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
      model: what it stands for in the figure.
      seed: of its parameters and its data.
      files: experiment files beside this one.
      bindings: for --gin.
      start: the run whose parameters it starts from.
      evaluated: whether the figure shows it.
    """

    name: str
    model: str
    seed: int
    files: tuple[str, ...]
    bindings: tuple[str, ...] = ()
    start: str | None = None
    evaluated: bool = True


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure or table.

    Attributes:
      title: what it shows.
      paper: what the paper found.
      runs: by seeds, those that others start from first.
      rows: of the results of runs, by what `fot evaluate` wrote.
      table: the rows as text.
      draw: the rows as a PNG.
    """

    title: str
    paper: str
    runs: Callable[[Sequence[int]], list[Run]]
    rows: Callable[[Mapping[Run, dict]], Rows]
    table: Callable[[Rows], str]
    draw: Callable[[Rows, Path], None]


def _seeds(seed: int) -> tuple[str, ...]:
    return f"train.seed = {seed}", f"Data.seed = {seed}"


# --- Dictionary lookup (paper §5) ----------------------------------------------------------------


def _dictionary(seeds: Sequence[int]) -> list[Run]:
    runs = []
    for seed in seeds:
        own, fot, plain = _seeds(seed), ("dictionary.gin",), ("dictionary_plain.gin",)
        no_negatives = (*own, "SwitchAtAccuracy.values = (1, 1)")
        runs += [
            Run(f"fot_{seed}", "FoT, d = 1, then 128", seed, fot, own),
            Run(f"d1_{seed}", "FoT, d = 1", seed, fot, no_negatives),
            Run(f"plain_{seed}", "plain transformer", seed, plain, own),
        ]
    return runs


def _dictionary_cpu(seeds: Sequence[int]) -> list[Run]:
    runs = []
    for seed in seeds:
        own = _seeds(seed)
        one, two, three = (f"dictionary_cpu{part}.gin" for part in ("_short", "_d1", ""))
        plain = ("dictionary_cpu_plain.gin",)
        short_texts = ("ModelConfig.local_context = 64", "DictionaryLookup.document_tokens = 64")
        runs += [
            Run(f"short_{seed}", "", seed, (one,), own, evaluated=False),
            Run(f"middle_{seed}", "", seed, (two,), own, f"short_{seed}", evaluated=False),
            Run(f"fot_{seed}", "FoT, d = 1, then 32", seed, (three,), own, f"middle_{seed}"),
            Run(
                f"d1_{seed}",
                "FoT, d = 1",
                seed,
                (three,),
                (*own, "SwitchAtAccuracy.values = (1, 1)"),
                f"middle_{seed}",
            ),
            Run(f"plain_short_{seed}", "", seed, plain, (*own, *short_texts), evaluated=False),
            Run(f"plain_{seed}", "plain transformer", seed, plain, own, f"plain_short_{seed}"),
        ]
    return runs


def _dictionary_rows(results: Mapping[Run, dict]) -> Rows:
    """A row for each model and size: mean, least and most over seeds."""
    by_model: dict[tuple[str, int], list[float]] = {}
    for run, result in results.items():
        for row in result["dictionary_accuracy"]:
            by_model.setdefault((run.model, row["dictionary"]), []).append(row["accuracy"])
    return [
        {
            "model": model,
            "dictionary": size,
            "accuracy": sum(found) / len(found),
            "least": min(found),
            "most": max(found),
            "seeds": len(found),
        }
        for (model, size), found in by_model.items()
    ]


def _dictionary_table(rows: Rows) -> str:
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells = {(row["model"], row["dictionary"]): row for row in rows}
    lines = [
        "| dictionary (tokens) | " + " | ".join(models) + " |",
        "|---" * (len(models) + 1) + "|",
    ]
    for size in sorted({row["dictionary"] for row in rows}):
        found = []
        for model in models:
            row = cells.get((model, size))
            found.append("" if row is None else _percent(row))
        lines.append(f"| {plots.short(size)} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def _percent(row: dict[str, Any]) -> str:
    mean, least, most = (f"{100 * row[name]:.1f}" for name in ("accuracy", "least", "most"))
    return f"{mean} %" if row["seeds"] == 1 else f"{mean} % ({least} … {most})"


def _draw_dictionary(rows: Rows, path: Path) -> None:
    figure, axes = plots.new()
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        sizes = [row["dictionary"] for row in of_model]
        mean, least, most = (
            [100 * row[name] for row in of_model] for name in ("accuracy", "least", "most")
        )
        (line,) = axes.plot(sizes, mean, "o-", label=model)
        axes.fill_between(sizes, least, most, color=line.get_color(), alpha=0.25, linewidth=0)
    axes.axhline(
        92, color="black", linewidth=1, linestyle=":", label="the paper at 16M: above 92 %"
    )
    plots.sizes_along(axes, sorted({row["dictionary"] for row in rows}))
    axes.set_ylim(-3, 103)
    axes.set_xlabel("dictionary in memory (tokens)")
    axes.set_ylabel("value tokens found (%)")
    axes.legend(fontsize=10)
    plots.save(figure, path)


_DICTIONARY = Figure(
    "Dictionary lookup: value tokens found after training on documents of 512 tokens",
    "above 92 % at 16M tokens (37M parameters, d = 128); a plain transformer fails at 16K",
    *(_dictionary, _dictionary_rows, _dictionary_table, _draw_dictionary),
)

FIGURES = {
    "dictionary": _DICTIONARY,
    "dictionary_cpu": dataclasses.replace(_DICTIONARY, runs=_dictionary_cpu),
}

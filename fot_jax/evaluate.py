"""`fot evaluate`: the loop over an experiment's evaluations, also run by training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Protocol

import jax
from etils import epath

from fot_jax.data.lanes import DocumentSource
from fot_jax.errors import UserError, check_range
from fot_jax.generate import LanguageModel


class Eval(Protocol):
    """One evaluation: a frozen dataclass in evals/."""

    name: str

    def scalars(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """What of the rows goes into the metrics of a training run."""

    def run(self, lm: LanguageModel, source: DocumentSource) -> list[dict[str, Any]]:
        """Rows of results."""

    def table(self, rows: list[dict[str, Any]]) -> str:
        """The rows as text for people."""

    def plot(self, rows: list[dict[str, Any]], path: epath.Path) -> None:
        """Draws the rows as a PNG, if they can be drawn."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and when during training.

    Attributes:
      evals: run at the end of training and by `fot evaluate`, e.g. PerplexityByContext.
      during: run every `every` steps of training; the same evaluations with smaller numbers, say.
      every: training steps between them; None: never.
      source: documents; None: those of training (their held-out splits).
    """

    evals: Sequence[Eval] = ()
    during: Sequence[Eval] = ()
    every: int | None = None
    source: DocumentSource | None = None

    def __post_init__(self):
        check_range("Evaluation", 1, every=self.every)
        if bool(self.during) != bool(self.every):
            raise UserError(
                "Evaluation.during and Evaluation.every go together: set both of them or none"
            )


def evaluate(
    checkpoint: str,
    evaluation: Evaluation,
    source: DocumentSource,
    output: str | None = None,
) -> None:
    """Loads a checkpoint, runs its experiment's evaluations, prints the tables.

    Documents are tokenized with the checkpoint's own vocabulary.

    Args:
      checkpoint: a workdir, or a step inside it.
      evaluation: what to run; its own source, if it has one, comes before `source`.
      output: a JSON file for {evaluation: rows}; plots go beside it.
    """
    lm = LanguageModel.load(checkpoint)
    plots = None if output is None else epath.Path(output).absolute().parent
    if plots is not None:
        try:
            plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{output}: cannot be written ({error.strerror}): choose another place"
            ) from error
    source = (evaluation.source or source).with_vocabulary(lm.vocabulary)
    results = run_evals(lm, evaluation.evals, source, plots)
    if output is not None:
        whole = epath.Path(f"{output}.partial")
        whole.write_text(json.dumps({"checkpoint": checkpoint, **results}, indent=1) + "\n")
        whole.replace(output)


def run_evals(
    lm: LanguageModel, evals: Sequence[Eval], source: DocumentSource, plots: epath.Path | None
) -> dict[str, list[dict[str, Any]]]:
    """Runs evaluations one after the other, prints each table, draws each plot into `plots`.

    All processes run them; process 0 prints and draws.
    """
    results = {}
    for evaluation in evals:
        rows = evaluation.run(lm, source)
        if jax.process_index() == 0:
            print(f"\n{evaluation.name}\n{evaluation.table(rows)}", flush=True)
        if plots is not None and jax.process_index() == 0:
            plots.mkdir(parents=True, exist_ok=True)
            whole = plots / f"{evaluation.name}.png.partial"
            evaluation.plot(rows, whole)
            if whole.exists():
                whole.replace(plots / f"{evaluation.name}.png")
        results[evaluation.name] = rows
    return results

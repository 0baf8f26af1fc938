"""Evaluations of a run, during training and after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etils import epath

from fot_jax.checkpoints import loading
from fot_jax.common.agreement import all_arrive
from fot_jax.common.errors import UserError
from fot_jax.data.documents import DocumentSource
from fot_jax.evals.evaluate import Eval, Evaluation, draw, show
from fot_jax.inference.language_model import LanguageModel
from fot_jax.model.transformer import Transformer
from fot_jax.training.metrics import Metrics


class Evaluations:
    """Evaluates parameters on documents with the vocabulary of the run."""

    def __init__(
        self,
        evaluation: Evaluation,
        source: DocumentSource,
        transformer: Transformer,
        metrics: Metrics,
        workdir: epath.Path,
    ):
        """`source`: documents of training, whose held-out splits serve if no others are set."""
        self._vocabulary = source.vocabulary
        self._source = evaluation.documents(source)
        self._transformer, self._metrics, self._workdir = transformer, metrics, workdir

    def run(self, evals: Sequence[Eval], params: Any, step: int, goes_on: bool = False) -> None:
        """Prints tables, draws plots into workdir/plots, writes numbers to the metrics.

        Args:
          goes_on: where one refuses, a line says so, and it is left out.

        Raises:
          UserError: one refuses, on all processes or on some alone. What others measured before is
            in the metrics.
        """
        workdir, kept = self._workdir, self._workdir / loading.KEPT
        values: dict[str, float] = {}
        try:
            with self._metrics.untimed():
                files = kept if kept.exists() else None
                lm = LanguageModel.of(self._transformer, params, self._vocabulary, files)
                for each in evals:
                    try:
                        rows = each.run(lm, self._source)
                    except (UserError, OSError) as error:
                        if not goes_on or not all_arrive(f"{each.name} refuses in step {step}"):
                            raise
                        self._metrics.say(f"step {step}: {each.name} is left out: {error}")
                        continue
                    values |= each.scalars(rows)
                    show(each, rows)
                    try:
                        draw(each, rows, workdir / "plots" / f"{each.name}.png")
                    except (UserError, OSError) as error:  # on process 0 alone
                        if not goes_on:
                            raise
                        self._metrics.say(f"step {step}: {each.name} is not drawn: {error}")
        finally:
            if values:
                self._metrics.write(step, values)

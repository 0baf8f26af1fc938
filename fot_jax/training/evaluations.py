"""Evaluations of a run, during training and after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etils import epath

from fot_jax.checkpoints import loading
from fot_jax.data.documents import DocumentSource
from fot_jax.evals.evaluate import Eval, Evaluation, run_evals
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

    def run(self, evals: Sequence[Eval], params: Any, step: int) -> None:
        """Prints tables, draws plots into workdir/plots, writes numbers to the metrics."""
        workdir, kept = self._workdir, self._workdir / loading.KEPT
        with self._metrics.untimed():
            files = kept if kept.exists() else None
            lm = LanguageModel.of(self._transformer, params, self._vocabulary, files)
            results = run_evals(lm, evals, self._source, workdir / "plots")
        values = {k: x for e in evals for k, x in e.scalars(results[e.name]).items()}
        if values:
            self._metrics.write(step, values)

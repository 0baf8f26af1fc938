"""`fot evaluate`: the loop over an experiment's evaluations, also run by training."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any, Protocol

import jax
from etils import epath

from fot_jax.checkpoints import loading
from fot_jax.common.atomic import replacing, write_json
from fot_jax.common.configurable import configurable
from fot_jax.common.errors import NotHere, UserError, check_range
from fot_jax.common.paths import absolute, in_bucket, path_of
from fot_jax.data.documents import DocumentSource
from fot_jax.data.files import warn_once
from fot_jax.evals.provenance import provenance
from fot_jax.inference.language_model import LanguageModel
from fot_jax.model.config import ModelConfig

RESERVED_NAMES = ("checkpoint", "made")  # of what results hold beside rows of evaluations


class Eval(Protocol):
    """One evaluation: a frozen dataclass in a file of its own, with numbers that can be set.

    Rows of results are dictionaries that JSON can hold: `fot evaluate --output` writes them as
    they are, but null for numbers that are not finite, and `table` and `plot` also draw rows that
    were read from such a file, where all are.
    """

    name: str  # of its results, its plot and its metrics: no two evaluations may share one

    def check(self, model: ModelConfig, source: DocumentSource) -> None:
        """Refuses what can be refused before anything is loaded or trained, in little time.

        Args:
          source: as `run` will get it; `source.check_split(split)` says whether it has a split.

        Raises:
          NoDocuments: of the source or of another one; anything else has been checked.
          UserError: this evaluation does not fit the model, or something it needs is missing here.
        """

    def run(self, lm: LanguageModel, source: DocumentSource) -> list[dict[str, Any]]:
        """Measures the model.

        All processes of a run call this and get the same rows.

        Args:
          lm: the model; its windows and its memory are those of `lm.config`.
          source: documents (`source.documents(split)`), and their vocabulary.

        Raises:
          UserError: the documents do not fit.
        """

    def scalars(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """The numbers that go into the metrics of a training run, by name; {} for none."""

    def table(self, rows: list[dict[str, Any]]) -> str:
        """The rows as text for people."""

    def plot(self, rows: list[dict[str, Any]], path: epath.Path) -> None:
        """Draws the rows as a PNG; does nothing where there is nothing to draw."""


@configurable
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
        for field in ("evals", "during"):
            names = [each.name for each in getattr(self, field)]
            if taken := [name for name in names if name in RESERVED_NAMES]:
                raise UserError(
                    f"the name {taken[0]!r} of an evaluation: results have it already, give another"
                )
            if odd := [name for name in names if not re.fullmatch(r"[\w.-]+", name)]:
                raise UserError(f"the name {odd[0]!r} of an evaluation: give letters, digits or _")
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise UserError(
                    f"Evaluation.{field} has two evaluations named {twice!r}: give one of them "
                    "another name"
                )

    def due(self, step: int) -> bool:
        """Whether those during training follow this step."""
        return bool(self.every) and step % self.every == 0

    def own_sources(self) -> list[DocumentSource]:
        """Documents that are not those of training, for all evaluations or for one."""
        named = (getattr(each, "source", None) for each in (*self.evals, *self.during))
        return [each for each in (self.source, *named) if each is not None]

    def documents(self, source: DocumentSource) -> DocumentSource:
        """What evaluations get, where training reads `source`, whose vocabulary they have."""
        return source if self.source is None else self.source.with_vocabulary(source.vocabulary)

    def check(self, model: ModelConfig, source: DocumentSource, elsewhere: bool = False) -> None:
        """Checks every evaluation.

        Args:
          source: documents of training, with the vocabulary of the run.
          elsewhere: documents and directories may be on another machine: a warning says so.

        Raises:
          UserError: one of them does not fit the model, or lacks something here.
        """
        source = self.documents(source)
        for each in (*self.evals, *self.during):
            try:
                each.check(model, source)
            except (NotHere, OSError) as error:  # or a bucket that takes a login
                if not elsewhere:
                    raise
                warn_once(f"whether all is there to evaluate is not known here: {error}")


@configurable(flags=("checkpoint", "output"))
def evaluate(
    checkpoint: str,
    evaluation: Evaluation,
    source: DocumentSource,
    output: str | None = None,
    dtype: str = "float32",
    devices: int = 1,
) -> None:
    """Loads a checkpoint, runs its experiment's evaluations, prints the tables.

    Documents are tokenized with the checkpoint's own vocabulary, if it has one.

    Args:
      checkpoint: a workdir, a step inside it, or a Hugging Face directory.
      evaluation: what to run; its own source, if it has one, comes before `source`.
      dtype, devices: as of LanguageModel.load.
      output: a JSON file for {evaluation: rows}, and for what made it, written after each
        evaluation; plots go beside it: with STEM.json STEM.NAME.png.

    Raises:
      UserError: there is nothing to evaluate, or an evaluation does not fit this checkpoint.
    """
    if not evaluation.evals:
        raise UserError("the experiment evaluates nothing: set Evaluation.evals")
    config, vocabulary = loading.config_of(checkpoint), loading.vocabulary_of(checkpoint)
    source = evaluation.source or source
    if vocabulary is None:
        vocabulary = source.vocabulary
    loading.check_rows(checkpoint, vocabulary, config.vocab_size)
    source = source.with_vocabulary(vocabulary)
    for each in evaluation.evals:
        each.check(config, source)
    writes = output is not None and jax.process_index() == 0
    plots = _directory_of(output) if writes else None
    made = provenance()  # now: code and commit may be others when it is done
    lm = LanguageModel.load(checkpoint, dtype=dtype, devices=devices)
    lm = dataclasses.replace(lm, vocabulary=vocabulary)
    results = {}
    for each in evaluation.evals:
        results[each.name] = rows = each.run(lm, source)
        show(each, rows)
        if writes:  # now, as the next one may be refused, or be killed
            write_json(output, {"checkpoint": checkpoint, "made": made, **results})
            draw(each, rows, plots / f"{path_of(output).stem}.{each.name}.png")


def _directory_of(output: str) -> epath.Path:
    """The directory that results go into, made where needed.

    Raises:
      UserError: no file of that name can be written there.
    """
    path = path_of(output)
    there = path if in_bucket(path) else os.path.realpath(path)  # where a link leads
    partial = epath.Path(f"{there}.partial")
    # `is_file` of epath is true for devices and pipes, too.
    if path.is_dir() or os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{output}: not a file: give the name of one, new or to be replaced")
    if path.suffix == ".png":
        raise UserError(f"{output}: plots have such names, and this is JSON: give another")
    try:
        absolute(path).parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("")
        partial.unlink()
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror}): choose another place"
        ) from error
    return absolute(path).parent


def show(evaluation: Eval, rows: list[dict[str, Any]]) -> None:
    """Prints the table, on process 0."""
    if jax.process_index() == 0:
        print(f"\n{evaluation.name}\n{evaluation.table(rows)}", flush=True)


def draw(evaluation: Eval, rows: list[dict[str, Any]], path: epath.Path) -> None:
    """Draws the plot, on process 0; where drawing fails, an older one stays."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            evaluation.plot(rows, partial)

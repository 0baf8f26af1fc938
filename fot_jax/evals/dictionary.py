"""Dictionary lookup: is the right value found among all definitions in memory (paper §5)?"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from fot_jax.common.atomic import scratch_directory
from fot_jax.common.configurable import configurable
from fot_jax.common.errors import LARGEST_SEED, NotHere, UserError, because_of, check_range
from fot_jax.common.progress import bar
from fot_jax.data.documents import DocumentSource
from fot_jax.data.synthetic import KEY, QUESTION, DictionaryLookup, Records
from fot_jax.evals import plots
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import MemoryConfig, State
from fot_jax.model.config import ModelConfig
from fot_jax.model.lookup import Lookup, TopK

LONGEST_WINDOW = 2**16  # tokens of dictionary for a model without memory: attention is quadratic


@configurable
@dataclasses.dataclass(frozen=True)
class DictionaryAccuracy:
    """The share of value tokens that are the most likely ones, by size of the dictionary.

    One dictionary is read window by window, as training reads definitions: each by itself, into
    one memory. At every size, windows of questions are asked about all that has been read so far.

    A model without memory layers has dictionary and questions in one window, as far as that goes:
    no further than 64K tokens.

    Attributes:
      sizes: tokens of dictionary, separators among them.
      windows: of questions, at every size; each of as many as a training document has.
      rows: of windows that are read side by side.
      lookup: as MemoryConfig.lookup; the paper has k = 32. With IndexedTopK the last tokens that
        were read, up to 65,536, are searched exactly all the same.
      storage: of memory, as MemoryConfig.storage.
      directory: of this machine, to keep memory in files in as long as it is measured, which are
        then removed (see MemoryConfig.directory); None: in RAM.
      seed: of dictionary and questions.
      name: of the plot, and in results.
    """

    sizes: tuple[int, ...] = (512, 4_096, 32_768, 262_144)
    windows: int = 16
    rows: int = 16
    lookup: Lookup = TopK(32)
    storage: str | None = "float16"
    directory: str | None = None
    seed: int = 0
    name: str = "dictionary_accuracy"

    def __post_init__(self):
        check_range("DictionaryAccuracy", 1, windows=self.windows, rows=self.rows)
        check_range("DictionaryAccuracy", 0, LARGEST_SEED, seed=self.seed)
        if not self.sizes:
            raise UserError("DictionaryAccuracy.sizes = (): give one size or more")
        with because_of("DictionaryAccuracy.directory"):
            MemoryConfig(directory=self.directory, ring=False)
        for size in self.sizes:
            check_range("DictionaryAccuracy", 1, 2**30, sizes=size)
            with because_of(f"DictionaryAccuracy.sizes has {size}"):
                self._memory(size)
        if self.windows % self.rows:
            raise UserError(
                f"DictionaryAccuracy.windows = {self.windows} is not a multiple of "
                f"DictionaryAccuracy.rows = {self.rows}: change one of them"
            )

    def _memory(self, size: int, directory: str | None = None) -> MemoryConfig:
        return MemoryConfig(
            *(size, False),
            storage=self.storage,
            lookup=self.lookup,
            shared=True,
            directory=directory,
        )

    def check(self, model: ModelConfig, source: DocumentSource) -> None:
        """Raises UserError where the documents are no dictionary lookup, or sizes do not fit.

        Raises NotHere where files cannot be written to `directory`.
        """
        if self.directory is not None and not os.access(self.directory, os.W_OK | os.X_OK):
            raise NotHere(
                f"DictionaryAccuracy.directory = {self.directory!r} is no directory that can be "
                "written to: make it first, or name another one"
            )
        self._dictionary(source, self._sizes(model, source)[-1])

    def _sizes(self, model: ModelConfig, source: DocumentSource) -> list[int]:
        """Those that are measured, in whole windows, ascending."""
        if not isinstance(source, DictionaryLookup):
            raise UserError(
                f"DictionaryAccuracy asks about a DictionaryLookup, not a {type(source).__name__}: "
                "set Evaluation.source = @DictionaryLookup()"
            )
        sizes = sorted({size // source.half * source.half for size in self.sizes})
        if sizes[0] == 0:
            raise UserError(
                f"DictionaryAccuracy.sizes has {min(self.sizes)}, less than a window of "
                f"{source.half} tokens (half of DictionaryLookup.document_tokens): leave it out"
            )
        if model.memory_before:  # which is all that it sees
            sizes = [size for size in sizes if size <= model.local_context]
            if not sizes:
                raise UserError(
                    "DictionaryAccuracy.sizes are all more than the window before, of "
                    f"{model.local_context} tokens, that the model sees (memory_before): add one"
                )
        elif not model.memory_layers:
            sizes = [size for size in sizes if size <= LONGEST_WINDOW]
            if not sizes:
                raise UserError(
                    "the model has no memory, and DictionaryAccuracy.sizes are all more than the "
                    f"{LONGEST_WINDOW:,} tokens that it is given in a window: add smaller ones"
                )
        return sizes

    def _dictionary(self, source: DictionaryLookup, size: int) -> Records:
        """Of the largest size."""
        rng = np.random.default_rng((self.seed, 0))
        return source.dictionary(rng, size // source.half * source.records)

    def run(self, lm: LanguageModel, source: DocumentSource) -> list[dict[str, Any]]:
        """One row a size: tokens of dictionary, accuracy, value tokens asked for.

        Raises:
          UserError: the documents are no dictionary lookup, or there are fewer keys.
        """
        sizes = self._sizes(lm.config, source)
        dictionary = self._dictionary(source, sizes[-1])
        ask = self._with_memory if lm.config.memory_layers else self._in_one_window
        rows = []
        for size, correct in ask(lm, source, dictionary, sizes):
            weights = source.weights_of_questions()
            count = weights.sum() * self.windows
            accuracy = float((correct * weights).sum() / count)
            rows.append({"dictionary": size, "accuracy": accuracy, "tokens": int(count)})
        return rows

    def _with_memory(self, lm, source, dictionary, sizes) -> Iterator[tuple[int, np.ndarray]]:
        """(size, correct [windows, half]) of each size."""
        lm = lm.for_memory(self._memory(sizes[-1], self.directory))
        state, done = None, 0
        with self._files() as directory, bar(sizes[-1], name=self.name) as progress:
            for size in sizes:
                records = slice(*(n // source.half * source.records for n in (done, size)))
                windows = source.half_document(
                    KEY, _windows(dictionary.of(records), source.records)
                )
                memory = {"memory": self._memory(sizes[-1], directory)}
                if state is not None:
                    memory = {"state": state}
                state = lm.remember(windows, rows=self.rows, progress=progress, **memory)
                done = size
                yield size, self._answers(lm, source, dictionary, size, state)

    @contextlib.contextmanager
    def _files(self) -> Iterator[str | None]:
        """A name for a memory in files, which are removed at the end; None: in RAM."""
        if self.directory is None:
            yield None
            return
        with scratch_directory(self.directory) as scratch:
            yield str(scratch / "memory")

    def _answers(self, lm, source, dictionary, size: int, state: State) -> np.ndarray:
        questions = self._questions(source, dictionary, size)
        return np.concatenate(
            [
                _correct(lm, rows, state=state.copy())
                for rows in np.split(questions, self.windows // self.rows)
            ]
        )

    def _in_one_window(self, lm, source, dictionary, sizes) -> Iterator[tuple[int, np.ndarray]]:
        """The same, for a model without memory layers."""
        for size in sizes:
            config = dataclasses.replace(lm.config, local_context=size + source.half)
            wide = dataclasses.replace(lm, config=config)
            records = dictionary.of(slice(size // source.half * source.records))
            read = source.half_document(KEY, _windows(records, source.records)).reshape(-1)
            questions = self._questions(source, dictionary, size)
            yield (
                size,
                np.concatenate(
                    [_correct(wide, np.concatenate([read, row])[None]) for row in questions]
                )[:, -source.half :],
            )

    def _questions(self, source, dictionary: Records, size: int) -> np.ndarray:
        """Windows of questions about the first `size` tokens of the dictionary: [windows, half]."""
        rng = np.random.default_rng((self.seed, size))
        there = size // source.half * source.records
        chosen = [rng.choice(there, source.records, replace=False) for _ in range(self.windows)]
        return source.half_document(QUESTION, dictionary.of(np.stack(chosen)))

    def scalars(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Accuracy of each size."""
        return {f"{self.name}/{row['dictionary']}": row["accuracy"] for row in rows}

    def table(self, rows: list[dict[str, Any]]) -> str:
        """The rows as text."""
        lines = [f"{'dictionary (tokens)':>20} {'accuracy':>9} {'asked':>8}"]
        for row in rows:
            lines.append(f"{row['dictionary']:20,d} {row['accuracy']:9.4f} {row['tokens']:8,d}")
        return "\n".join(lines)

    def plot(self, rows: list[dict[str, Any]], path: epath.Path) -> None:
        """Accuracy against size, as a PNG."""
        figure, axes = plots.new()
        sizes = [row["dictionary"] for row in rows]
        axes.plot(sizes, [100 * row["accuracy"] for row in rows], "o-")
        plots.sizes_along(axes, sizes)
        axes.set_ylim(-3, 103)
        axes.set_xlabel("dictionary in memory (tokens)")
        axes.set_ylabel("value tokens found (%)")
        plots.save(figure, path)


def _windows(records: Records, each: int) -> Records:
    """[windows * each, symbols] -> [windows, each, symbols]."""
    return Records(*(x.reshape(-1, each, x.shape[-1]) for x in records))


def _correct(lm: LanguageModel, tokens: np.ndarray, **options) -> np.ndarray:
    """Whether every token [rows, T] but the first was the most likely one; False for that."""
    scores = lm.score(tokens, last_context_length=lm.config.local_context, **options)
    return np.pad(scores.correct, [(0, 0), (1, 0)])

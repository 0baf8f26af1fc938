"""Perplexity by context: how much a memory of earlier text lowers it (paper §5)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError, check_range
from fot_jax.common.progress import bar
from fot_jax.data.documents import Document, DocumentSource
from fot_jax.evals import plots
from fot_jax.inference import segment_files
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import EVERYTHING, MemoryConfig, check_texts
from fot_jax.model.config import ModelConfig
from fot_jax.model.lookup import Dense, Lookup


@configurable
@dataclasses.dataclass(frozen=True)
class PerplexityByContext:
    """Perplexity of the same tokens with memories of several sizes beyond the local window.

    Scored are the tokens beyond the largest memory, so that every memory is full when they are
    read; of a document too short for that, its second half, with what memory its first one fills: a
    warning says so, and rows say of how many documents memories were full. They are the same with a
    memory of each document and with one that is shared, and for models that have a window alone, or
    only the one before it (memory_before), which are measured with the sizes that they can use.
    Reading starts with an empty memory, so many tokens before them as fill it.

    Attributes:
      memory_sizes: tokens.
      documents: at most so many, the longest of the first hundred of the split.
      scored_tokens: in all, shared out evenly; the paper's tests have a million. Documents that are
        too short give fewer.
      rows: at most so many documents are read side by side.
      multi_doc: these share one memory, of which each then has its part (the paper's multi-doc
        setting); else each has its own.
      lookup: Dense(), TopK(k), ApproximateTopK(k, recall), or IndexedTopK(k, visited), of which a
        text has a memory of its own (rows = 1) or a shared one. With an index nothing is forgotten:
        a memory grows while tokens are scored, begins anew when it has twice its size, and rows say
        how much it held. The newest 65,536 tokens or fewer are looked up without the index, which
        is used in memories of 65,536 and more.
      storage: of memory, as MemoryConfig.storage.
      source: of other documents than the run's; tokenized as those are.
      split: of the source.
      name: of the plot, and in results.
    """

    memory_sizes: tuple[int, ...] = (0, 128, 1024, 4096, 16384)
    documents: int = 32
    scored_tokens: int = 2**20
    rows: int = 4
    multi_doc: bool = False
    lookup: Lookup = Dense()
    storage: str | None = None
    source: DocumentSource | None = None
    split: str = "valid"
    name: str = "perplexity_by_context"

    def __post_init__(self):
        counts = {"documents": self.documents, "scored_tokens": self.scored_tokens}
        check_range("PerplexityByContext", 1, **counts, rows=self.rows)
        if not self.memory_sizes:
            raise UserError("PerplexityByContext.memory_sizes = (): give one size or more")
        for size in self.memory_sizes:
            check_range("PerplexityByContext", 0, 2**31 - 1, memory_sizes=size)
            self._memory(size)
        rows = 1 if self.multi_doc else self.rows
        check_texts("PerplexityByContext", rows, self.storage, self.lookup)

    def _memory(self, size: int) -> MemoryConfig:
        """Of so many tokens when the first ones are scored."""
        config = MemoryConfig(storage=self.storage, lookup=self.lookup, shared=self.multi_doc)
        if not size:
            config = dataclasses.replace(config, lookup=Dense())
        return config if config.in_segments else dataclasses.replace(config, size=size)

    def check(self, model: ModelConfig, source: DocumentSource) -> None:
        """Raises UserError, whatever the model, where the split is not there."""
        self._of(source).check_split(self.split)

    def _of(self, source: DocumentSource) -> DocumentSource:
        """The documents to read, where those of the run are `source`."""
        return source if self.source is None else self.source.with_vocabulary(source.vocabulary)

    def run(self, lm: LanguageModel, source: DocumentSource) -> list[dict[str, Any]]:
        """One row a memory size: memory, perplexity, nats, accuracy, tokens, documents, full.

        `full` is the number of documents before whose first scored token there is enough text for
        the memory. With an index also memory_at_most, tokens that the memory held at most, and
        indexed, how many of them were looked up by the index.

        Raises:
          UserError: the split has no document longer than two windows, or no token of those that
            are scored counts in the loss.
        """
        (rows,) = self.run_each([lm], source)
        return rows

    def run_each(
        self, models: Sequence[LanguageModel], source: DocumentSource
    ) -> list[list[dict[str, Any]]]:
        """The rows of several models, of one window and vocabulary, on the same tokens.

        Raises:
          UserError: as of run.
        """
        window = models[0].config.local_context
        sizes = sorted(set(self.memory_sizes))
        batches = self._choose(self._of(source), window, sizes[-1])
        by_model = [self._usable(lm.config, sizes) for lm in models]
        measured = {0, *sizes, *itertools.chain.from_iterable(by_model)}
        parts = {size: self._parts(batches, size, window) for size in measured}
        total = sum(
            self._tokens(batch, size, window)
            for usable in by_model
            for size in usable
            for batch in parts[size]
        )
        with bar(total, name=self.name) as progress:
            found = [
                [self._measure(lm, size, parts[size], progress) for size in usable]
                for lm, usable in zip(models, by_model, strict=True)
            ]
        full = {size: self._full(batches, size, window) for size in measured}
        for row in itertools.chain.from_iterable(found):
            row["documents"], row["full"] = sum(map(len, batches)), full[row["memory"]]
        if short := [row for rows in found for row in rows if row["full"] < row["documents"]]:
            self._warn_of_short_documents(short)
        indexed = [row["indexed"] for rows in found for row in rows if "indexed" in row]
        if indexed and not any(indexed) and jax.process_index() == 0:
            logging.warning(
                "%s: no memory had more than the %s tokens that are looked up without the index of "
                "%s: what was measured is exact search; give memory_sizes of as many, and longer "
                "documents",
                *(self.name, f"{segment_files.TOKENS:,}", self.lookup),
            )
        return found

    def _full(self, batches: list[list[_Scored]], size: int, window: int) -> int:
        """Documents long enough to fill such a memory, or their part of it."""
        needed = (
            (scored.start, self._before(batch, size, window))
            for batch in batches
            for scored in batch
        )
        return sum(start >= before for start, before in needed)

    def _warn_of_short_documents(self, rows: list[dict[str, Any]]) -> None:
        row = max(rows, key=lambda row: row["memory"])
        if jax.process_index() == 0:
            logging.warning(
                "%s: memories of %s tokens and more are not full when tokens are scored, of %d of "
                "%d documents with the largest: the split has no longer ones; lower memory_sizes",
                *(self.name, f"{min(row['memory'] for row in rows):,}"),
                *(row["documents"] - row["full"], row["documents"]),
            )

    def _usable(self, model: ModelConfig, sizes: list[int]) -> list[int]:
        """The sizes that a model can have."""
        if not model.memory_layers:
            return [0]
        if model.memory_before:
            return sorted({min(size, model.local_context) for size in sizes})
        return sizes

    def _measure(
        self,
        lm: LanguageModel,
        size: int,
        batches: list[list[_Scored]],
        progress: Callable[[int], None],
    ) -> dict[str, Any]:
        """The row of a size."""
        window, memory = lm.config.local_context, self._memory(size)
        lm = lm.for_memory(memory)
        sums, held = np.zeros(3), []
        for batch in batches:
            tokens, mask, weights = self._arrays(batch, size, window)
            if not weights.any():  # in a part of a document
                progress(self._tokens(batch, size, window))
                continue
            # What nobody scores is read for memory alone, which takes fewer layers and no logits.
            start = int(weights.any(0).argmax()) // window * window
            read = {"last_context_length": window, "progress": progress}
            before = {"memory": memory if lm.config.memory_layers else EVERYTHING}
            if start:
                of_start = lm.read(tokens[:, :start], mask=mask[:, :start], **before, **read)
                before = {"state": of_start}
            scores = lm.score(tokens[:, start:], mask=mask[:, start:], **before, **read)
            if memory.in_segments:  # of a window or more, which was read before
                held.append((int(of_start.stored.max()), of_start.segments.tokens))
            weights = weights[:, start:]
            of_batch = (scores.nats * weights, scores.correct * weights, weights)
            sums += [x.sum(dtype=np.float64) for x in of_batch]
        nats, correct, weights = sums.tolist()
        row = {
            "memory": size,
            "perplexity": math.exp(min(nats / weights, 700.0)),
            "nats": nats / weights,
            "accuracy": correct / weights,
            "tokens": weights,
        }
        if held:
            row["memory_at_most"], row["indexed"] = map(max, zip(*held, strict=True))
        return row

    def _choose(self, source, window: int, largest: int) -> list[list[_Scored]]:
        """The longest documents at hand, in batches, and the part of each that is scored."""
        scored = math.ceil(self.scored_tokens / self.documents / window) * window
        at_hand = itertools.islice(source.documents(self.split), 100)
        longest = sorted(at_hand, key=lambda document: -len(document.tokens))[: self.documents]
        longest = [d for d in longest if len(d.tokens) > 2 * window]
        if not longest:
            raise UserError(
                f"the {self.split} split has no document longer than two windows of {window} "
                "tokens: perplexity by context needs long documents"
            )
        before = math.ceil(largest / window) * window
        parts = []
        for document in longest:
            n = min((len(document.tokens) - 1) // window * window, before + scored)
            half = max(n // 2 // window * window, n - scored)
            parts.append(_Scored(document, before if n > before else half, n))
        if not any(of.weights[start + 1 : stop + 1].any() for of, start, stop in parts):
            raise UserError(
                f"no token that PerplexityByContext scores of the {self.split} split counts in the "
                "loss: choose another source, or larger scored_tokens"
            )
        # As even as can be, for memories that the documents of a batch share.
        count = math.ceil(len(parts) / self.rows)
        bounds = [len(parts) * i // count for i in range(count + 1)]
        return [parts[first:last] for first, last in itertools.pairwise(bounds)]

    def _parts(self, batches: list[list[_Scored]], size: int, window: int) -> list[list[_Scored]]:
        """What is scored with one memory: batches or, where memory grows, as much as fills it."""
        if not self._memory(size).in_segments:
            return batches
        parts = []
        for batch in batches:
            most = self._before(batch, size, window)
            for done in range(0, max(stop - start for _, start, stop in batch), most):
                of_part = [
                    _Scored(document, start + done, min(start + done + most, stop))
                    for document, start, stop in batch
                    if start + done < stop
                ]
                parts.append(of_part)
        return parts

    def _before(self, batch: list[_Scored], size: int, window: int) -> int:
        """Tokens of each document, in whole windows, that fill the memory."""
        share = size / (len(batch) if self.multi_doc else 1)
        return math.ceil(share / window) * window

    def _starts(self, batch: list[_Scored], size: int, window: int) -> list[int]:
        """Where reading starts: so many whole windows before as fill the memory."""
        before = self._before(batch, size, window)
        return [max(0, scored.start - before) for scored in batch]

    def _tokens(self, batch: list[_Scored], size: int, window: int) -> int:
        """How many are read."""
        return sum(scored.stop for scored in batch) - sum(self._starts(batch, size, window))

    def _arrays(self, batch: list[_Scored], size: int, window: int):
        """Tokens and mask, [rows, N + 1], and weights of the tokens but the first, [rows, N]."""
        starts = self._starts(batch, size, window)
        length = max(scored.stop - start for scored, start in zip(batch, starts, strict=True))
        tokens = np.zeros((len(batch), length + 1), np.int32)
        mask = np.zeros((len(batch), length + 1), bool)
        weights = np.zeros((len(batch), length), np.float32)
        for i, ((document, scored, stop), start) in enumerate(zip(batch, starts, strict=True)):
            n = stop - start
            tokens[i, : n + 1] = document.tokens[start : stop + 1]
            mask[i, : n + 1] = True
            weights[i, scored - start : n] = document.weights[scored + 1 : stop + 1]
        return tokens, mask, weights

    def scalars(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Perplexity of each memory size."""
        of = f"{self.name}/{self.split}"
        return {f"{of}/memory_{row['memory']}": row["perplexity"] for row in rows}

    def table(self, rows: list[dict[str, Any]]) -> str:
        """The rows as text."""
        grows = any("memory_at_most" in row for row in rows)
        head = f"{'memory (tokens)':>16} {'perplexity':>11} {'accuracy':>9} {'scored':>10}"
        lines = [head + grows * f" {'at most':>11} {'indexed':>11}"]
        for r in rows:
            numbers = f"{r['perplexity']:11.3f} {r['accuracy']:9.3f} {r['tokens']:10,.0f}"
            if grows:
                held = r.get("memory_at_most", r["memory"]), r.get("indexed", 0)
                numbers += "".join(f" {tokens:11,d}" for tokens in held)
            lines.append(f"{r['memory']:16d} {numbers}")
        return "\n".join(lines)

    def plot(self, rows: list[dict[str, Any]], path: epath.Path) -> None:
        """Perplexity against memory size, as a PNG."""
        figure, axes = plots.new()
        sizes = [row["memory"] for row in rows]
        perplexities = [row["perplexity"] for row in rows]
        axes.plot(sizes, perplexities, "o-", linewidth=2.5, markersize=8)
        for size, perplexity in zip(sizes, perplexities, strict=True):
            axes.annotate(
                f"{perplexity:.2f}",
                (size, perplexity),
                textcoords="offset points",
                xytext=(0, 10),
                ha="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # over a steep line
                fontsize=11,
            )
        # Linear up to the smallest memory, so that "no memory" has a place.
        plots.sizes_along(axes, sizes, linear_to=max(1, sizes[1] if len(sizes) > 1 else 1))
        axes.margins(x=0.06, y=0.18)
        documents = ", shared by documents" if self.multi_doc else ""
        least = "at least so many " * any("memory_at_most" in row for row in rows)
        axes.set_xlabel(f"memory beyond the local window ({least}tokens{documents})")
        axes.set_ylabel(f"{self.split} perplexity per token")
        plots.save(figure, path)


class _Scored(NamedTuple):
    document: Document
    start: int  # of the scored tokens, a multiple of the window
    stop: int

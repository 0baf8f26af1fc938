"""Perplexity by context: how much a memory of earlier text lowers it (paper §5)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np
from etils import epath

from fot_jax.data.lanes import Document, DocumentSource
from fot_jax.errors import UserError, check_range
from fot_jax.generate import LanguageModel


@dataclasses.dataclass(frozen=True)
class PerplexityByContext:
    """Perplexity of the same tokens with memories of several sizes beyond the local window.

    Scored are the tokens beyond the largest memory, so that every memory is full when they are
    read; of a document too short for that, its second half. Reading starts with an empty memory
    (the paper's single-doc setting), one memory size before them.

    Attributes:
      memory_sizes: tokens, rounded up to whole windows.
      documents: documents read side by side, the longest of the first hundred of the split.
      scored_tokens: tokens scored of each document at most.
      split: of the source.
      name: of the plot, and in results.
    """

    memory_sizes: tuple[int, ...] = (0, 128, 1024, 4096, 16384)
    documents: int = 4
    scored_tokens: int = 4096
    split: str = "valid"
    name: str = "perplexity_by_context"

    def __post_init__(self):
        counts = {"documents": self.documents, "scored_tokens": self.scored_tokens}
        check_range("PerplexityByContext", 1, **counts)
        if not self.memory_sizes:
            raise UserError("PerplexityByContext.memory_sizes = (): give one size or more")
        for size in self.memory_sizes:
            check_range("PerplexityByContext", 0, 2**31 - 1, memory_sizes=size)

    def run(self, lm: LanguageModel, source: DocumentSource) -> list[dict[str, float]]:
        """One row a memory size: memory, perplexity, nats, accuracy, tokens.

        Raises:
          UserError: the split has no document of at least two windows.
        """
        window = lm.model.config.local_context
        sizes = sorted({math.ceil(size / window) * window for size in self.memory_sizes})
        if not lm.model.config.memory_layers:
            sizes = [0]
        documents = self._choose(source, window, sizes[-1])
        rows = []
        for size in sizes:
            tokens, targets, weights = _batch(documents, size, window)
            scores = lm.score(tokens, targets, capacity=size)
            nats = float((np.asarray(scores.nats) * weights).sum() / weights.sum())
            correct = float((np.asarray(scores.correct) * weights).sum() / weights.sum())
            rows.append(
                {
                    "memory": size,
                    "perplexity": math.exp(min(nats, 700.0)),
                    "nats": nats,
                    "accuracy": correct,
                    "tokens": float(weights.sum()),
                }
            )
        return rows

    def _choose(self, source, window: int, largest: int) -> list[_Scored]:
        """The longest documents at hand, and the part of each that is scored."""
        scored = math.ceil(self.scored_tokens / window) * window
        at_hand = itertools.islice(source.documents(self.split), 100)
        longest = sorted(at_hand, key=lambda document: -len(document.tokens))[: self.documents]
        chosen = []
        for document in longest:
            n = min((len(document.tokens) - 1) // window * window, largest + scored)
            if n >= 2 * window:
                start = largest if n > largest else n // 2 // window * window
                chosen.append(_Scored(document, start, n))
        if not chosen:
            raise UserError(
                f"the {self.split} split has no document longer than two windows of {window} "
                "tokens: perplexity by context needs long documents"
            )
        return chosen

    def scalars(self, rows) -> dict[str, float]:
        """Perplexity of each memory size."""
        return {f"{self.split}_perplexity/memory_{r['memory']}": r["perplexity"] for r in rows}

    def table(self, rows) -> str:
        """The rows as text."""
        lines = [f"{'memory (tokens)':>16} {'perplexity':>11} {'accuracy':>9}"]
        lines += [f"{r['memory']:16d} {r['perplexity']:11.3f} {r['accuracy']:9.3f}" for r in rows]
        return "\n".join(lines)

    def plot(self, rows, path: epath.Path) -> None:
        """Perplexity against memory size, as a PNG."""
        import matplotlib.figure

        figure = matplotlib.figure.Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
        axes = figure.subplots()
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
        # Linear up to the smallest memory, so that "no memory" has a place on a log axis.
        axes.set_xscale("symlog", base=2, linthresh=max(1, sizes[1] if len(sizes) > 1 else 1))
        axes.set_xticks(sizes, [_short(size) for size in sizes])
        axes.minorticks_off()
        axes.margins(x=0.06, y=0.18)
        axes.set_xlabel("memory beyond the local window (tokens)", fontsize=12)
        axes.set_ylabel(f"{self.split} perplexity per token", fontsize=12)
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3)
        with path.open("wb") as file:
            figure.savefig(file, format="png")


class _Scored(NamedTuple):
    document: Document
    start: int  # of the scored tokens, a multiple of the window
    stop: int


def _batch(documents: list[_Scored], size: int, window: int):
    """Tokens, targets and weights, each [documents, N], with up to `size` tokens to read before."""
    starts = [max(0, start - size) for _, start, _ in documents]
    shape = (
        len(documents),
        max(d.stop - start for d, start in zip(documents, starts, strict=True)),
    )
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for i, ((document, scored, stop), start) in enumerate(zip(documents, starts, strict=True)):
        n = stop - start
        tokens[i, :n] = document.tokens[start:stop]
        targets[i, :n] = document.tokens[start + 1 : stop + 1]
        weights[i, scored - start : n] = document.weights[scored + 1 : stop + 1]
    return tokens, targets, weights


def _short(size: int) -> str:
    return f"{size // 1024}K" if size >= 1024 and size % 1024 == 0 else str(size)

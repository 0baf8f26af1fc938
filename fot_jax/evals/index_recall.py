"""Whether a model's keys are easy to index: what an index finds of those that its queries look for.

The paper trains keys to be told from those of other documents (§3.3), and looks them up exactly.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import LARGEST_SEED, UserError, check_range
from fot_jax.common.progress import bar
from fot_jax.data.documents import Document, DocumentSource
from fot_jax.evals import plots
from fot_jax.evals.queries import queries_of
from fot_jax.inference import segment_files
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import MemoryConfig
from fot_jax.model import memory as memories
from fot_jax.model import segments
from fot_jax.model.config import ModelConfig
from fot_jax.model.lookup import Dense, IndexedTopK
from fot_jax.model.segments import Closed

ASKING = 4  # documents whose windows are read side by side


@configurable
@dataclasses.dataclass(frozen=True)
class IndexRecall:
    """How much an index finds of a query's best keys, by how many of all keys it visits.

    Memory holds the beginnings of several documents, window by window, each read as if it were the
    only one, as training reads previous contexts; the windows after some of these beginnings ask.
    Of queries that predict a token which counts in the loss some are drawn.

    Attributes:
      memory: tokens, of all documents together.
      documents: that they are of, in equal parts: the first of the split that are long enough.
      queries: tokens that ask, in all; every head of a memory layer does.
      k: best keys of a query.
      visited: shares of all keys.
      split: of the source.
      storage: of memory, as MemoryConfig.storage.
      seed: of the draw.
      name: of the plot, and in results.
    """

    memory: int = 65_536
    documents: int = 4
    queries: int = 256
    k: int = 32
    visited: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    split: str = "valid"
    storage: str | None = None
    seed: int = 0
    name: str = "index_recall"

    def __post_init__(self):
        counts = {"documents": self.documents, "queries": self.queries, "k": self.k}
        check_range("IndexRecall", 1, **counts)
        check_range("IndexRecall", 1, 2**30, memory=self.memory)
        check_range("IndexRecall", 0, LARGEST_SEED, seed=self.seed)
        if not self.visited:
            raise UserError("IndexRecall.visited = (): give one share or more")
        for share in self.visited:
            check_range("IndexRecall", 1e-6, 0.999, visited=share)
        MemoryConfig(storage=self.storage)

    def check(self, model: ModelConfig, source: DocumentSource) -> None:
        """Raises UserError for a model whose memory has no index, or without the split."""
        if not model.memory_layers or model.memory_before:
            raise UserError(
                "IndexRecall is of memory layers, and the model has none, or sees the window "
                "before its own alone: leave it out"
            )
        self._windows(model.local_context)
        source.check_split(self.split)

    def _windows(self, window: int) -> int:
        """Of a document, that are in memory."""
        windows = self.memory // (self.documents * window)
        if windows == 0:
            raise UserError(
                f"IndexRecall.memory = {self.memory} is less than a window of {window} tokens of "
                f"each of IndexRecall.documents = {self.documents}: raise one or lower the other"
            )
        if self.k > (tokens := windows * window * self.documents):
            raise UserError(
                f"IndexRecall.k = {self.k} is more than the {tokens} tokens of whole windows in "
                f"IndexRecall.memory = {self.memory}: lower it"
            )
        return windows

    def run(self, lm: LanguageModel, source: DocumentSource) -> list[dict[str, Any]]:
        """One row a layer and share, the last of a layer exact: layer, visited, recall, mass.

        `recall` is the share of a query's k best keys that were found, `mass` that of its softmax
        over all of memory that the found ones have; both averaged over heads and queries.

        Raises:
          UserError: a model without a memory to index; not so many documents are as long.
        """
        self.check(lm.config, source)
        lm = lm.on_one_device()
        window = lm.config.local_context
        windows = self._windows(window)
        documents = self._documents(source, (windows + 1) * window)
        start = windows * window
        asking = documents[:: math.ceil(len(documents) / ASKING)]
        texts = np.concatenate([each.tokens[:start].reshape(-1, window) for each in documents])
        memory = MemoryConfig(storage=self.storage, shared=True)
        with bar(texts.size, name=self.name) as progress:
            state = lm.remember(texts, rows=len(asking), memory=memory, progress=progress)
        asks = np.stack([each.tokens[start : start + window] for each in asking])
        which, places = self._drawn(asking, start, window)
        closed = segment_files.segmented(state.memory, texts.size).of_layers()
        rows = []
        for i, q in enumerate(queries_of(lm, asks, state, Dense())):
            q = q[which, :, :, places].swapaxes(0, 1)  # [K, queries, G, D]
            q = q.reshape(1, len(q), -1, q.shape[-1]).astype(np.float32)  # as keys are read
            keys = memories.decode(state.memory.layers[i].k, jnp.float32)[0, :, : texts.size]
            measured = _measured(q, np.asarray(keys), closed[i], self.k, self.visited)
            rows += [{"layer": lm.config.memory_layers[i], **row} for row in measured]
        return rows

    def _documents(self, source: DocumentSource, tokens: int) -> list[Document]:
        at_hand = itertools.islice(source.documents(self.split), 100_000)
        enough = (document for document in at_hand if len(document.tokens) >= tokens)
        documents = list(itertools.islice(enough, self.documents))
        if len(documents) < self.documents:
            raise UserError(
                f"the {self.split} split has {len(documents)} documents of {tokens} tokens, "
                f"IndexRecall.documents = {self.documents} asks for more: lower it, or memory"
            )
        return documents

    def _drawn(
        self, asking: list[Document], start: int, window: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which documents and places of their windows ask."""
        counts = np.zeros((len(asking), window), bool)
        for row, document in zip(counts, asking, strict=True):
            weights = document.weights[start + 1 : start + 1 + window]
            row[: len(weights)] = weights > 0
        some = np.argwhere(counts)
        rng = np.random.default_rng(self.seed)
        if len(some) == 0:
            raise UserError(
                f"no token of the windows that ask counts in the loss: lower IndexRecall.memory = "
                f"{self.memory}"
            )
        return tuple(some[np.sort(rng.permutation(len(some))[: self.queries])].T)

    def scalars(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Recall of every layer and share."""
        return {
            f"{self.name}/layer_{row['layer']}/{row['visited']}": row["recall"]
            for row in rows
            if row["visited"] < 1
        }

    def table(self, rows: list[dict[str, Any]]) -> str:
        """The rows as text: of each layer, recall and mass by share of the keys visited."""
        shares = sorted({row["visited"] for row in rows})
        cells = {(row["layer"], row["visited"]): row for row in rows}
        lines = [f"{'':>18} " + " ".join(f"{f'{100 * share:g} %':>8}" for share in shares)]
        for layer in sorted({row["layer"] for row in rows}):
            for what in ("recall", "mass"):
                numbers = " ".join(f"{cells[layer, share][what]:8.4f}" for share in shares)
                lines.append(f"{f'layer {layer} {what}':>18} {numbers}")
        return "\n".join(lines)

    def plot(self, rows: list[dict[str, Any]], path: epath.Path) -> None:
        """Recall by the share of keys that are visited, a line a layer, as a PNG."""
        figure, axes = plots.new()
        for layer in sorted({row["layer"] for row in rows}):
            of_layer = [row for row in rows if row["layer"] == layer and row["visited"] < 1]
            shares = [100 * row["visited"] for row in of_layer]
            recalls = [100 * row["recall"] for row in of_layer]
            axes.plot(shares, recalls, "o-", label=f"layer {layer}")
        axes.set_xscale("log")
        axes.set_xlabel("keys visited (%)")
        axes.set_ylabel(f"of the {self.k} best keys found (%)")
        axes.legend(fontsize=10)
        plots.save(figure, path)


def _measured(q, keys, closed: Closed, k: int, shares) -> list[dict[str, float]]:
    """Rows of one layer: queries [1, K, N, D], keys [K, M, D], and an index of these."""
    best, total = [], []
    for of_head, its_keys in zip(q[0], keys, strict=True):
        for few in np.array_split(of_head, math.ceil(len(of_head) * len(its_keys) / 2**25)):
            scores = few @ its_keys.T
            best.append(np.sort(np.partition(scores, -k, -1)[:, -k:], -1)[:, ::-1])
            top = scores.max(-1)
            total.append(top + np.log(np.exp(scores - top[:, None]).sum(-1, dtype=np.float64)))
    best, total = (np.concatenate(x).reshape(*q.shape[1:3], -1) for x in (best, total))

    def row(share: float, scores) -> dict[str, float]:
        found = scores >= best[..., -1:] - 1e-5 * np.abs(best).max(-1, keepdims=True)
        mass = np.exp(scores - total).sum(-1)
        return {"visited": share, "recall": float(found.mean()), "mass": float(mass.mean())}

    rows = []
    for share in sorted(set(shares)):
        lookup = IndexedTopK(k, max(k, math.ceil(share * keys.shape[1])))
        rows.append(row(share, segments.search(lookup, q, closed)[0][0]))
    return [*rows, row(1.0, best)]

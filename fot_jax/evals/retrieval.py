"""What memory layers retrieve: queries in their context, and the tokens whose keys they find."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Int

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import LARGEST_SEED, UserError, check_range
from fot_jax.data.documents import DocumentSource
from fot_jax.evals import plots
from fot_jax.evals.queries import queries_of
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import MemoryConfig, check_texts
from fot_jax.model.config import ModelConfig
from fot_jax.model.lookup import Dense, TopK

CONTEXT = 12  # tokens shown on either side
BINS = 100  # of positions, in the plot


@configurable
@dataclasses.dataclass(frozen=True)
class RetrievalTable:
    """The keys that queries of a document retrieve from the memory of all before their window.

    A memory layer gives every query a softmax over its k best keys, head by head. A key's share is
    its part of that, averaged over heads; its focus is the share of all retrieved keys that stand
    within `around` tokens of it, itself among them: near 1 where a layer looks at one place.

    Attributes:
      memory: tokens of the document that are read first, the queries come from the window after.
      queries: tokens of that window, drawn at random.
      k: keys retrieved by each query and head.
      keys: of these, so many with the largest shares are listed.
      around: tokens on either side that count for the focus.
      split: of the source; its first document that is long enough.
      storage: of memory, as MemoryConfig.
      seed: of the queries.
      name: of the plot, and in results.
    """

    memory: int = 16_384
    queries: int = 8
    k: int = 128
    keys: int = 3
    around: int = 32
    split: str = "valid"
    storage: str | None = None
    seed: int = 0
    name: str = "retrieval"

    def __post_init__(self):
        counts = {"memory": self.memory, "queries": self.queries, "k": self.k, "keys": self.keys}
        check_range("RetrievalTable", 1, **counts)
        check_range("RetrievalTable", 0, around=self.around)
        check_range("RetrievalTable", 0, LARGEST_SEED, seed=self.seed)
        check_texts("RetrievalTable", 1, self.storage, Dense())
        if self.k > self.memory:
            raise UserError(
                f"RetrievalTable.k = {self.k} is larger than RetrievalTable.memory = "
                f"{self.memory}: lower it"
            )

    def check(self, model: ModelConfig, source: DocumentSource) -> None:
        """Raises UserError for a model whose memory cannot be looked into, or without the split."""
        if not model.memory_layers or model.memory_before:
            raise UserError(
                "RetrievalTable is of memory layers, and the model has none, or sees the window "
                "before its own alone: leave it out"
            )
        if self.queries > model.local_context:
            raise UserError(
                f"RetrievalTable.queries = {self.queries}: give at most the local context, "
                f"{model.local_context}"
            )
        source.check_split(self.split)

    def run(self, lm: LanguageModel, source: DocumentSource) -> list[dict[str, Any]]:
        """One row a query, layer by layer: layer, query (its place in the document), text, found,
        mass.

        `found` lists the keys with the largest shares, {position, text, share, focus}; `mass` all
        of them, (position, share). A text is (before, token, after).

        Raises:
          UserError: a model without a memory to choose from; no document is as long.
        """
        c = lm.config
        self.check(c, source)
        lm = lm.on_one_device()
        tokens = self._document(source, self.memory + c.local_context)
        lookup = TopK(self.k)
        state = lm.read(
            tokens[: self.memory], memory=MemoryConfig(storage=self.storage, lookup=lookup)
        )
        rng = np.random.default_rng(self.seed)
        places = np.sort(rng.choice(c.local_context, self.queries, replace=False))
        of_layers = queries_of(lm, tokens[None, self.memory :], state, lookup)
        rows, search = [], jax.jit(lookup.search)
        for i, q in enumerate(of_layers):
            q = q[:, :, :, places].reshape(1, c.num_kv_heads, -1, c.head_dim)
            found = search(q, state.memory.layers[i].k, state.memory.visible)
            scores, slots = (np.asarray(x).reshape(c.num_heads, -1, self.k) for x in found)
            for j, place in enumerate(places.tolist()):
                of_query = scores[:, j], slots[:, j]
                rows.append(self._row(c.memory_layers[i], place, tokens, lm.decode, *of_query))
        return rows

    def _document(self, source: DocumentSource, needed: int) -> np.ndarray:
        documents = itertools.islice(source.documents(self.split), 10_000)
        for document in documents:
            if len(document.tokens) >= needed:
                return document.tokens[:needed]
        raise UserError(
            f"no document of the {self.split} split has the {needed} tokens that "
            f"RetrievalTable.memory = {self.memory} and a window take: lower it"
        )

    def _row(self, layer: int, place: int, tokens, decode, scores, slots) -> dict[str, Any]:
        """Of a query: scores and slots [H, k] of what its heads retrieved."""
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True) * len(shares)
        mass = np.bincount(slots.ravel(), shares.ravel(), self.memory)
        best = np.argsort(-mass, kind="stable")[: self.keys]
        query = self.memory + place
        return {
            "layer": layer,
            "query": query,
            "text": _text(tokens, query, decode),
            "found": [
                {
                    "position": int(i),
                    "text": _text(tokens[: self.memory], i, decode),
                    "share": float(mass[i]),
                    "focus": float(mass[max(0, i - self.around) : i + self.around + 1].sum()),
                }
                for i in best
                if mass[i] > 0
            ],
            "mass": [(int(i), float(mass[i])) for i in np.flatnonzero(mass)],
        }

    def scalars(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """For each layer the focus of the first keys, averaged over queries."""
        return {f"{self.name}/layer_{n}/focus": focus for n, focus in _focus(rows).items()}

    def table(self, rows: list[dict[str, Any]]) -> str:
        """The rows as text: a query, and under it what it found."""
        lines = [f"{'share':>8} {'focus':>8}  token in its context"]
        for layer, focus in _focus(rows).items():
            lines.append(f"\nlayer {layer}: focus {focus:.3f} on average")
            for row in (row for row in rows if row["layer"] == layer):
                lines.append(f"{'query':>17}  {_shown(row['text'])}")
                for key in row["found"]:
                    numbers = f"{key['share']:8.3f} {key['focus']:8.3f}"
                    lines.append(f"{numbers}  {_shown(key['text'])}")
        return "\n".join(lines)

    def plot(self, rows: list[dict[str, Any]], path: epath.Path) -> None:
        """Where in memory the mass of each query is: a line a query, darker for more."""
        figure, axes = plots.new()
        lines = []
        for row in rows:
            positions, shares = zip(*row["mass"], strict=True)
            lines.append(np.histogram(positions, BINS, (0, self.memory), weights=shares)[0])
        extent = (0, self.memory, len(rows) - 0.5, -0.5)
        shown = axes.imshow(lines, extent=extent, aspect="auto", cmap="Blues", vmin=0)
        names = [f"{row['layer']}: {row['text'][1]!r}" for row in rows]
        size = min(9, 180 / len(rows))
        axes.set_yticks(range(len(rows)), names, fontsize=size, parse_math=False)  # "$" is text
        axes.set_xlabel("position in memory (tokens)")
        axes.set_ylabel("layer: query")
        axes.grid(False)
        figure.colorbar(shown, label="share of the retrieved mass")
        plots.save(figure, path)


def _text(tokens: Int[np.ndarray, " N"], i: int, decode) -> tuple[str, str, str]:
    parts = tokens[max(0, i - CONTEXT) : i], tokens[i : i + 1], tokens[i + 1 : i + 1 + CONTEXT]
    return tuple(decode(part.tolist()) for part in parts)


def _shown(text: tuple[str, str, str]) -> str:
    before, token, after = (repr(part)[1:-1] for part in text)
    return f"{before}[{token}]{after}"


def _focus(rows) -> dict[int, float]:
    layers = sorted({row["layer"] for row in rows})
    of_layer = {n: [row["found"][0]["focus"] for row in rows if row["layer"] == n] for n in layers}
    return {n: sum(found) / len(found) for n, found in of_layer.items()}

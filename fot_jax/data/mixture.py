"""Documents of several sources in one stream: pass keys among real text, say. NumPy only."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError
from fot_jax.data.documents import START, Document, DocumentSource, Position, in_turn
from fot_jax.data.vocabulary import Vocabulary


@configurable
@dataclasses.dataclass(frozen=True)
class Mixture:
    """A DocumentSource of others, which are drawn from in fixed proportions.

    Of a shard, document n is of a source drawn by (seed, shard, n) alone; each source goes through
    its own documents in its own order. (Corpora that differ in their files alone are mixed by
    `Text.corpora`.)

    Attributes:
      sources: two or more; all are tokenized as the first is.
      weights: shares of documents, not of tokens; one for each source.
    """

    sources: Sequence[DocumentSource]
    weights: Sequence[float]

    def __post_init__(self):
        if len(self.sources) < 2 or any(isinstance(each, Mixture) for each in self.sources):
            raise UserError("Mixture.sources: name two or more, none of which is a Mixture itself")
        if len(self.weights) != len(self.sources):
            raise UserError(
                f"Mixture.weights are {len(self.weights)} for {len(self.sources)} sources: give "
                "one for each"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise UserError(f"Mixture.weights = {tuple(self.weights)}: give numbers above 0")

    @property
    def vocabulary(self) -> Vocabulary:
        """The first source's.

        Raises:
          UserError: another one cannot be written in it.
        """
        return self._of_one_vocabulary()[0].vocabulary

    def with_vocabulary(self, vocabulary: Vocabulary) -> Mixture:
        sources = [source.with_vocabulary(vocabulary) for source in self.sources]
        return dataclasses.replace(self, sources=sources)

    def settings(self) -> dict[str, Any]:
        of_each = (
            (f"source {i}: {name}", value)
            for i, source in enumerate(self._of_one_vocabulary())
            for name, value in source.settings().items()
        )
        return {"Mixture.weights": self.weights, **dict(of_each)}

    def check_split(self, split: str) -> None:
        """That each source has it."""
        for source in self._of_one_vocabulary():
            source.check_split(split)

    def documents(self, split: str) -> Iterator[Document]:
        """Those of each source, in turn."""
        yield from in_turn(each.documents(split) for each in self._of_one_vocabulary())

    def stream(
        self, shard: int, shards: int, seed: int, position: Position = START
    ) -> Iterator[tuple[Position, Document]]:
        """Training documents of a shard. A position goes on with those of the sources.

        Raises:
          UserError: it is one of another number of sources; as the sources'.
        """
        if position == START:
            position = START * (1 + len(self.sources))
        positions = list(zip(position[::2], position[1::2], strict=True))
        if len(positions) != 1 + len(self.sources):
            raise UserError(
                f"the checkpoint's data is of {max(1, len(positions) - 1)} sources, "
                f"Mixture.sources names {len(self.sources)}: name the same, or use another workdir"
            )
        (epoch, taken), *positions = positions
        streams = []
        for source, at in zip(self._of_one_vocabulary(), positions, strict=True):
            stream = source.stream(shard, shards, seed, at)
            first = next(stream)  # one that has none says so now, not when it is first drawn
            streams.append(itertools.chain([first], stream))
        ends = np.cumsum(self.weights) / np.sum(self.weights)
        for n in itertools.count(taken):
            drawn = np.random.default_rng((seed, shard, n)).random()
            i = int(np.searchsorted(ends[:-1], drawn, side="right"))
            positions[i], document = next(streams[i])
            yield (epoch, n + 1, *itertools.chain(*positions)), document

    def _of_one_vocabulary(self) -> list[DocumentSource]:
        first, *others = self.sources
        return [first, *(source.with_vocabulary(first.vocabulary) for source in others)]

"""Documents, and the interface of what yields them to training and evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int

from fot_jax.common.errors import NotHere, UserError
from fot_jax.data.vocabulary import Vocabulary


class Document(NamedTuple):
    """A whole document, tokenized, with the marks of its beginning and end; two tokens or more."""

    tokens: Int[np.ndarray, " N"]  # int32
    weights: Float[np.ndarray, " N"]  # float32: of each token's loss when it is to be predicted


# Epoch, documents of the shard already taken in it; of a mixture, then those of its sources. Saved
# in checkpoints: another form is a new version of that format (common/formats.py).
Position = tuple[int, ...]
START: Position = (0, 0)


class NoDocuments(NotHere):
    """None of any split are on this machine, or they are not prepared here."""


class DocumentSource(Protocol):
    """Where documents come from. Everything it yields is a function of its fields and arguments."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What the documents are tokenized with."""

    def with_vocabulary(self, vocabulary: Vocabulary) -> DocumentSource:
        """The same documents tokenized with another vocabulary, one read from a checkpoint, say."""

    def settings(self) -> dict[str, Any]:
        """What the order of `stream` depends on, beside its arguments: name -> what JSON can hold.

        Those whose names end with "files" or "path" may change while a run is stopped.
        """

    def check_split(self, split: str) -> None:
        """Refuses a split that `documents` could not yield; tokenizes nothing.

        Raises:
          NoDocuments: there are none here, of any split.
          UserError: no such split, or nothing in it.
        """

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of a split (train, valid, test), each once, in a fixed order."""

    def stream(
        self, shard: int, shards: int, seed: int, position: Position = START
    ) -> Iterator[tuple[Position, Document]]:
        """Training documents of one of `shards` disjoint shards, shuffled, epoch after epoch.

        Yields (position after this document, document); starting again from a position gives the
        documents that would have followed.
        """


def in_turn(documents: Iterable[Iterator[Document]]) -> Iterator[Document]:
    """One of each, again and again, as long as they have some."""
    waiting = list(documents)
    while waiting:
        for each in tuple(waiting):
            if (document := next(each, None)) is None:
                waiting.remove(each)
            else:
                yield document


def single_source_position(position: Position) -> tuple[int, int]:
    """Epoch, and documents taken in it.

    Raises:
      UserError: it is the position of a mixture.
    """
    if len(position) != 2:
        raise UserError(
            f"the checkpoint's data is of a Mixture of {len(position) // 2 - 1} sources, "
            "Data.source is none: name the same, or use another workdir"
        )
    return position

"""Vocabularies: text to token ids and back.

The interface, how a text becomes the tokens that a model reads (`encode_prompt`,
`encode_document`), and the two vocabularies that need no tokenizer library. The others are in
sentencepiece_vocabulary.py and hugging_face_tokenizer.py; saved ones are read by
saved_vocabulary.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath
from jaxtyping import Int

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError
from fot_jax.data.vocabulary_files import write_vocabulary


class Vocabulary(Protocol):
    """Token ids 0 … size - 1. Immutable; two are equal if they make the same tokens.

    Marks are its special tokens: those that stand around texts, and never for a part of one.
    """

    @property
    def size(self) -> int:
        """How many ids there are, marks included."""

    @property
    def bos(self) -> int | None:
        """Marks the beginning of a document; None where the vocabulary has no such mark."""

    @property
    def eos(self) -> int:
        """Marks the end of a document."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Generation stops at any of these tokens: at eos, as a rule."""

    @property
    def before(self) -> tuple[int, ...]:
        """Marks that are put before a text: bos, as a rule."""

    @property
    def after(self) -> tuple[int, ...]:
        """Marks that are put after a text even if it is to be continued: none, as a rule."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without marks around it.

        Raises:
          UserError: the text cannot be written in this vocabulary.
        """

    def encode_literally(self, text: str) -> list[int]:
        """The same for a text in which nothing is a request, to fill a gap say, but text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; marks, and ids outside the vocabulary, give nothing."""

    def settled(self, ids: Sequence[int]) -> bool:
        """Whether the text of these tokens stays what it is when other tokens follow."""

    def save(self, directory: epath.PathLike) -> None:
        """Writes what `load_vocabulary` reads, whole or not at all; may replace an older one.

        Raises:
          UserError: the directory cannot be written.
        """


def encode_prompt(vocabulary: Vocabulary, text: str) -> list[int]:
    """Tokens of a text that a model is to continue: with the marks of its beginning.

    Raises:
      UserError: the text cannot be written in this vocabulary.
    """
    return [*vocabulary.before, *vocabulary.encode(text), *vocabulary.after]


def encode_document(vocabulary: Vocabulary, text: str) -> Int[np.ndarray, " N"]:
    """Tokens of a document that a model is trained on, marks around them, eos at the end; int32.

    Raises:
      UserError: the text cannot be written in this vocabulary.
    """
    tokens = [*vocabulary.before, *vocabulary.encode_literally(text), *vocabulary.after]
    if vocabulary.after[-1:] != (vocabulary.eos,):
        tokens.append(vocabulary.eos)
    return np.asarray(tokens, np.int32)


class StandardMarks:
    """The marks of models trained from scratch: a document begins with bos, or eos without one."""

    @property
    def ends(self) -> tuple[int, ...]:
        return (self.eos,)

    @property
    def before(self) -> tuple[int, ...]:
        return (self.eos if self.bos is None else self.bos,)

    after = ()

    def encode_literally(self, text: str) -> list[int]:
        return self.encode(text)

    def settled(self, ids: Sequence[int]) -> bool:
        return not self.decode(ids).endswith("\ufffd")  # half a character


@configurable
@dataclasses.dataclass(frozen=True)
class Bytes(StandardMarks):
    """UTF-8: ids 0 … 255 are the bytes, 256 is bos, 257 eos."""

    size = 258
    bos = 256
    eos = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")

    def save(self, directory: epath.PathLike) -> None:
        write_vocabulary(directory, {"kind": "Bytes"})

    @classmethod
    def load(cls, directory: epath.Path, description: dict[str, Any]) -> Bytes:
        """As `saved_vocabulary.load_vocabulary` calls it."""
        return cls()


@dataclasses.dataclass(frozen=True)
class Symbols(StandardMarks):
    """The words of synthetic data, separated by spaces: id i is names[i].

    Attributes:
      names: all different; "</s>", which must be among them, is eos, and "<s>" bos.
    """

    names: tuple[str, ...]

    def __post_init__(self):
        texts = all(isinstance(name, str) for name in self.names)
        if not texts or "</s>" not in self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f'names must be all different and have "</s>": {self.names}')

    @property
    def size(self) -> int:
        return len(self.names)

    @property
    def bos(self) -> int | None:
        return self._ids.get("<s>")

    @property
    def eos(self) -> int:
        return self._ids["</s>"]

    def encode(self, text: str) -> list[int]:
        """Raises UserError for a word that is no symbol."""
        words = text.split()
        for word in words:
            if word not in self._ids:
                raise UserError(
                    f"{word!r} is none of the {self.size} symbols ({' '.join(self.names[:8])} …)"
                )
        return [self._ids[word] for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        marks = (self.bos, self.eos)
        return " ".join(self.names[i] for i in ids if 0 <= i < self.size and i not in marks)

    def save(self, directory: epath.PathLike) -> None:
        write_vocabulary(directory, {"kind": "Symbols", "names": self.names})

    @classmethod
    def load(cls, directory: epath.Path, description: dict[str, Any]) -> Symbols:
        """As `saved_vocabulary.load_vocabulary` calls it."""
        return cls(tuple(description["names"]))

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

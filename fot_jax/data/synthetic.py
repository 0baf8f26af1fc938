"""Synthetic documents: dictionary lookup and pass keys (paper §4, §5). NumPy only.

Document i of a split is a function of (split, seed, i) alone. Training is one endless epoch, of
which shard s of n takes documents s, s + n, s + 2n, …: to go on from a position costs nothing, and
the number of shards does not change which documents there are.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import string
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError, check_range
from fot_jax.data.documents import START, Document, Position, single_source_position
from fot_jax.data.files import SPLITS
from fot_jax.data.vocabulary import Bytes, Symbols, Vocabulary, encode_document


class DrawnSource:
    """A base for sources that draw each document by itself, from its number.

    A subclass is a frozen dataclass with fields `vocabulary` and `eval_documents` (of each split),
    and defines `document` and `with_vocabulary`.
    """

    eval_documents: int

    def document(self, split: str, seed: int, index: int) -> Document:
        """One document."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        names = {each.name for each in dataclasses.fields(self)} - {"vocabulary", "eval_documents"}
        return {f"{type(self).__name__}.{name}": getattr(self, name) for name in sorted(names)}

    def check_split(self, split: str) -> None:
        """Refuses what is none of the three."""
        if split not in SPLITS:
            raise UserError(f"{type(self).__name__} has no split {split!r}: use one of {SPLITS}")

    def documents(self, split: str) -> Iterator[Document]:
        """The first `eval_documents` documents of a split; of train, those of seed 0.

        Raises:
          UserError: no such split.
        """
        self.check_split(split)
        return (self.document(split, 0, index) for index in range(self.eval_documents))

    def stream(
        self, shard: int, shards: int, seed: int, position: Position = START
    ) -> Iterator[tuple[Position, Document]]:
        """Training documents of a shard, without end; the epoch of a position stays 0."""
        epoch, taken = single_source_position(position)
        for n in itertools.count(taken):
            yield (epoch, n + 1), self.document("train", seed, n * shards + shard)


def generator_of(split: str, seed: int, index: int) -> np.random.Generator:
    """The generator of document `index` of a split: no two documents share one."""
    return np.random.default_rng((SPLITS.index(split), seed, index))


# --- Dictionary lookup ---------------------------------------------------------------------------

SYMBOLS = 60  # that keys and values are made of
KEY, VALUE, QUESTION, SEPARATOR, FIRST_SYMBOL = range(5)  # ids
LONGEST_KEY = 10  # symbols: there are more keys than an int64 can count beyond that


@configurable
@dataclasses.dataclass(frozen=True)
class DictionaryLookup(DrawnSource):
    """A dictionary, then questions about it: 64 tokens in all (paper §5).

    The first half of a document holds definitions `<k> k1 … <v> v1 …`, the second half questions
    `<q> k1 … <v> v1 …`: as many whole records as fit in a half, the rest of it separators. Keys of
    a document differ. Each is asked once, in another order, so that no answer can be copied from
    an earlier question. The loss is on the values of questions alone.

    One more separator, which is only ever a target, ends a document: its inputs fill windows of,
    say, half of `document_tokens` exactly, and the next document starts with the next window.

    Hard negatives, which the paper leaves open: with `near_documents`, so many documents in a row,
    those of a crossbatch group, say, have keys of the same few symbols, and none twice. A key then
    has neighbours, that differ in one symbol, in nearly every group; with all 60 symbols one key in
    thirty has one among 64 documents of 512 tokens.

    Attributes:
      document_tokens: inputs of a document; it has one token more.
      key_length, value_length: symbols.
      eval_documents: of each split.
      near_documents: of training, whose keys are near each other; None: keys are of all symbols.
      near_symbols: how many symbols these have between them.
    """

    document_tokens: int = 512
    key_length: int = 4
    value_length: int = 4
    eval_documents: int = 64
    near_documents: int | None = None
    near_symbols: int = 12

    vocabulary = Symbols(
        ("<k>", "<v>", "<q>", "</s>", *(string.digits + string.ascii_letters)[:SYMBOLS])
    )

    def __post_init__(self):
        check_range("DictionaryLookup", 1, LONGEST_KEY, key_length=self.key_length)
        counts = {"value_length": self.value_length, "eval_documents": self.eval_documents}
        check_range("DictionaryLookup", 1, **counts, near_documents=self.near_documents)
        check_range("DictionaryLookup", 1, SYMBOLS, near_symbols=self.near_symbols)
        if self.records < 1:
            raise UserError(
                f"DictionaryLookup.document_tokens = {self.document_tokens} is too short for a "
                f"definition and a question: give {2 * self.record_tokens} or more"
            )
        symbols = SYMBOLS if self.near_documents is None else self.near_symbols
        documents = self.near_documents or 1
        if documents * self.records > symbols**self.key_length:
            raise UserError(
                f"DictionaryLookup.key_length = {self.key_length} makes "
                f"{symbols**self.key_length} keys of {symbols} symbols, document_tokens = "
                f"{self.document_tokens} has room for {self.records}"
                + (f" in each of {documents} documents" if self.near_documents else "")
                + ": raise key_length or shorten documents"
            )

    @property
    def half(self) -> int:
        """Tokens of the definitions of a document, and of its questions, with separators."""
        return self.document_tokens // 2

    @property
    def record_tokens(self) -> int:
        """Tokens of a definition, and of a question."""
        return 2 + self.key_length + self.value_length

    @property
    def records(self) -> int:
        """Definitions in a document, and questions."""
        return self.half // self.record_tokens

    def with_vocabulary(self, vocabulary: Vocabulary) -> DictionaryLookup:
        """Itself.

        Raises:
          UserError: it is not the vocabulary of this task.
        """
        if vocabulary != self.vocabulary:
            raise UserError(
                f"DictionaryLookup has its own {self.vocabulary.size} symbols and cannot be "
                f"written in another vocabulary, here one of {vocabulary.size} tokens: use a model "
                "trained on it"
            )
        return self

    def document(self, split: str, seed: int, index: int) -> Document:
        near = split == "train" and self.near_documents is not None
        rng = generator_of(split, seed, index)
        tokens = np.full(self.document_tokens + 1, SEPARATOR, np.int32)
        weights = np.zeros(len(tokens), np.float32)
        keys = self._near_keys(seed, index) if near else None
        dictionary = self.dictionary(rng, self.records, keys)
        order = rng.permutation(self.records)
        tokens[: self.half] = self.half_document(KEY, dictionary)
        questions = slice(self.half, 2 * self.half)
        tokens[questions] = self.half_document(QUESTION, dictionary.of(order))
        weights[questions] = self.weights_of_questions()
        return Document(tokens, weights)

    def _near_keys(self, seed: int, index: int) -> np.ndarray:
        """Keys of a document with hard negatives."""
        block, place = divmod(index, self.near_documents)
        rng = np.random.default_rng((0, seed, block, 1))
        symbols = rng.permutation(SYMBOLS)[: self.near_symbols]
        # One document after another: a key with a value here and another there has no answer.
        of_block = self._keys(rng, self.near_documents * self.records, symbols)
        return of_block[place * self.records : (place + 1) * self.records]

    def _keys(self, rng: np.random.Generator, count: int, symbols: np.ndarray) -> np.ndarray:
        """Keys that differ, of some symbols, as ids: [count, key_length]."""
        numbers = rng.choice(len(symbols) ** self.key_length, count, replace=False)
        places = numbers[:, None] // len(symbols) ** np.arange(self.key_length) % len(symbols)
        return FIRST_SYMBOL + symbols[places]

    def dictionary(
        self, rng: np.random.Generator, records: int, keys: np.ndarray | None = None
    ) -> Records:
        """So many records with these keys; None: with keys that differ.

        Raises:
          UserError: there are fewer keys.
        """
        possible = SYMBOLS**self.key_length
        if records > possible:
            raise UserError(
                f"a dictionary of {records} records, but DictionaryLookup.key_length = "
                f"{self.key_length} makes {possible} keys: raise it, or ask for fewer"
            )
        if keys is None:
            keys = self._keys(rng, records, np.arange(SYMBOLS))
        values = rng.integers(FIRST_SYMBOL, FIRST_SYMBOL + SYMBOLS, (records, self.value_length))
        return Records(keys, values)

    def half_document(self, mark: int, records: Records) -> np.ndarray:
        """Tokens [..., half] of `self.records` definitions (KEY) or questions (QUESTION)."""
        keys, values = records
        first, second = (np.full((*keys.shape[:-1], 1), each) for each in (mark, VALUE))
        of_records = np.concatenate([first, keys, second, values], -1)
        n = self.records * self.record_tokens
        tokens = np.full((*keys.shape[:-2], self.half), SEPARATOR, np.int32)
        tokens[..., :n] = of_records.reshape(*keys.shape[:-2], n)
        return tokens

    def weights_of_questions(self) -> np.ndarray:
        """1 on values, [half] float32."""
        weights = np.zeros(self.half, np.float32)
        of_records = weights[: self.records * self.record_tokens].reshape(self.records, -1)
        of_records[:, 2 + self.key_length :] = 1.0  # a view
        return weights


class Records(NamedTuple):
    """Keys and values of a dictionary, as ids: [..., records, symbols]."""

    keys: np.ndarray
    values: np.ndarray

    def of(self, index) -> Records:
        """Some of them, in another order or shape."""
        return Records(self.keys[index], self.values[index])


# --- Pass keys -----------------------------------------------------------------------------------

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
STATEMENT = "The pass key is {key}. Remember it. {key} is the pass key."
PASSKEY_QUESTION = "What is the pass key? The pass key is"


@configurable
@dataclasses.dataclass(frozen=True)
class Passkey(DrawnSource):
    """A number stated somewhere in filler and asked for at the end (paper §4).

    The number has five digits and stands before any of the fillers, or after the last, all equally
    likely. The document is the prompt and the answer, a space and the number, between the marks of
    its beginning and end. Training never sees the numbers that are asked for in evaluations.

    Attributes:
      document_tokens: inputs of a document at most: fillers are added while they fit.
      fillers: texts, of which one is drawn each time; the paper has one.
      vocabulary: of text.
      filler_weight: of the loss on all but the answer, whose tokens have weight 1.
      eval_documents: of each split.
    """

    document_tokens: int = 4096
    fillers: Sequence[str] = (FILLER,)
    vocabulary: Vocabulary = Bytes()
    filler_weight: float = 0.0
    eval_documents: int = 64

    def __post_init__(self):
        counts = {"document_tokens": self.document_tokens, "eval_documents": self.eval_documents}
        check_range("Passkey", 1, **counts)
        check_range("Passkey", 0, filler_weight=self.filler_weight)
        if not self.fillers or not all(text.strip() for text in self.fillers):
            raise UserError("Passkey.fillers: name one text or more, none of them empty")

    def with_vocabulary(self, vocabulary: Vocabulary) -> Passkey:
        return dataclasses.replace(self, vocabulary=vocabulary)

    def document(self, split: str, seed: int, index: int) -> Document:
        """Raises UserError if not even a document without filler fits."""
        rng = generator_of(split, seed, index)
        key = draw_passkey(rng, training=split == "train")
        fillers = self.draw_fillers(rng, key)
        before = int(rng.integers(len(fillers) + 1))
        prompt, answer = self.prompt_and_answer(key, fillers[:before], fillers[before:])
        tokens = np.concatenate([prompt, answer, [self.vocabulary.eos]]).astype(np.int32)
        weights = np.full(len(tokens), self.filler_weight, np.float32)
        weights[len(prompt) : -1] = 1.0
        return Document(tokens, weights)

    def draw_fillers(self, rng: np.random.Generator, key: int) -> list[str]:
        """Fillers, as many as fit.

        Raises:
          UserError: not even a document without them does.
        """
        fixed = self._inputs(key, [])
        room = self.document_tokens - fixed
        if room < 0:
            raise UserError(
                f"Passkey.document_tokens = {self.document_tokens} is too short for the pass key "
                f"and the question: give {fixed} or more"
            )
        drawn = []
        while True:
            i = int(rng.integers(len(self.fillers)))
            if (room := room - self._takes[i]) < 0:
                return drawn
            drawn.append(self.fillers[i])

    @functools.cached_property
    def _takes(self) -> list[int]:
        """Tokens that each filler adds, whatever the number."""
        fixed = self._inputs(10_000, [])
        return [max(1, self._inputs(10_000, [filler]) - fixed) for filler in self.fillers]

    def _inputs(self, key: int, fillers: list[str]) -> int:
        return sum(map(len, self.prompt_and_answer(key, [], fillers)))

    def prompt_and_answer(
        self, key: int, before: Sequence[str], after: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, with fillers before and after the statement."""
        prompt = passkey_prompt(key, before, after)
        tokens = encode_document(self.vocabulary, f"{prompt} {key}")[:-1]
        marks = len(self.vocabulary.before)
        return np.split(tokens, [marks + len(self.vocabulary.encode(prompt))])


def draw_passkey(rng: np.random.Generator, *, training: bool) -> int:
    """A number of five digits: a multiple of 7 for evaluations, another one for training."""
    while True:
        key = int(rng.integers(10_000, 100_000))
        if training == (key % 7 > 0):
            return key


def passkey_prompt(key: int, before: Sequence[str], after: Sequence[str]) -> str:
    """The text up to the answer, with fillers before and after the statement."""
    return " ".join([TASK, *before, STATEMENT.format(key=key), *after, PASSKEY_QUESTION])

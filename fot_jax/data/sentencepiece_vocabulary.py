"""SentencePiece models as vocabularies, and how one is trained on a corpus."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import tempfile
from collections.abc import Iterable
from typing import Any

from etils import epath

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError, check_range
from fot_jax.common.paths import path_of
from fot_jax.data.vocabulary import StandardMarks
from fot_jax.data.vocabulary_files import read_bytes, write_vocabulary

MODEL = "tokenizer.model"
SPACE = "▁"  # how SentencePiece writes a space


@configurable
@dataclasses.dataclass(frozen=True, init=False)
class SentencePiece(StandardMarks):
    """A SentencePiece model, such as LLaMA's tokenizer.model."""

    model: bytes = dataclasses.field(repr=False)

    def __init__(self, path: epath.PathLike):
        """Reads a model file.

        Raises:
          UserError: it is missing or no such file, or the model has no eos.
        """
        object.__setattr__(self, "model", read_bytes(path_of(path)))
        try:
            eos = self._processor.eos_id()
        except RuntimeError as error:
            raise UserError(
                f"{path}: not a SentencePiece model, or damaged: give a .model file"
            ) from error
        if eos < 0:
            raise UserError(f"{path}: the model has no end mark: train it with an eos_id")

    @property
    def size(self) -> int:
        return self._processor.get_piece_size()

    @property
    def bos(self) -> int | None:
        bos = self._processor.bos_id()
        return bos if bos >= 0 else None

    @property
    def eos(self) -> int:
        return self._processor.eos_id()

    def encode(self, text: str) -> list[int]:
        if self._space_as_bytes is None or SPACE not in text:
            return self._processor.encode(text)
        first, *rest = map(self._processor.encode, text.split(SPACE))
        return first + [i for part in rest for i in (*self._space_as_bytes, *part)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.size])

    def save(self, directory: epath.PathLike) -> None:
        write_vocabulary(directory, {"kind": "SentencePiece"}, {MODEL: self.model})

    @classmethod
    def load(cls, directory: epath.Path, description: dict[str, Any]) -> SentencePiece:
        """As `saved_vocabulary.load_vocabulary` calls it."""
        return cls(directory / MODEL)

    @functools.cached_property
    def _processor(self):
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @functools.cached_property
    def _space_as_bytes(self) -> list[int] | None:
        """How to spell a SPACE that stands in the text, which would come back as a space.

        None for models without byte pieces, and for those that put a space before any text they are
        given: there, splitting a text would change its tokens.
        """
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        adds_space = self._processor.encode("a", out_type=str)[0].startswith(SPACE)
        return ids if all(map(self._processor.is_byte, ids)) and not adds_space else None


@configurable
@dataclasses.dataclass(frozen=True)
class TrainedSentencePiece:
    """Not yet a vocabulary: says that one is to be trained on the corpus, which takes a second.

    The same texts give the same vocabulary. Any text comes back from its tokens unchanged: nothing
    is normalized, and what has no piece is spelled in bytes.

    Attributes:
      pieces: size of the vocabulary; 256 bytes and three marks are among them.
    """

    pieces: int = 1024

    def train(self, texts: Iterable[str]) -> SentencePiece:
        """Byte-pair encoding: better here than a unigram model, and trained twenty times faster.

        Args:
          texts: all are held in memory; a few megabytes are enough.

        Raises:
          UserError: the texts are too few, or have too many characters, for so many pieces.
        """
        import sentencepiece

        check_range("TrainedSentencePiece", 1, 2**31 - 1, pieces=self.pieces)
        # Tabs and null characters, which the trainer cannot read, are bytes in any case.
        parts = itertools.chain.from_iterable(re.split("[\t\0]+", text) for text in texts)
        sentences = [part[i : i + 2000] for part in parts for i in range(0, len(part), 2000)]
        with tempfile.NamedTemporaryFile() as file:
            try:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(sentences),
                    model_writer=file,
                    model_type="bpe",
                    vocab_size=self.pieces,
                    byte_fallback=True,
                    normalization_rule_name="identity",
                    add_dummy_prefix=False,
                    remove_extra_whitespaces=False,
                    allow_whitespace_only_pieces=True,  # indentation
                    max_sentence_length=2**14,  # bytes
                    num_threads=1,  # with more, the model would differ from run to run
                    minloglevel=2,
                )
            except RuntimeError as error:
                raise UserError(_training_message(self.pieces, sentences, str(error))) from error
            file.flush()
            return SentencePiece(file.name)


def _training_message(pieces: int, sentences: list[str], error: str) -> str:
    advice = "set TrainedSentencePiece.pieces to another number"
    if limit := re.search(r"set it to a value <= (\d+)", error):
        advice = f"the text is enough for at most {limit[1]}: set TrainedSentencePiece.pieces to it"
    elif needed := re.search(r"required_chars.*\. \d+ vs (\d+)", error):
        advice = f"its characters need {needed[1]} or more: raise TrainedSentencePiece.pieces"
    elif not sentences:
        advice = "the training split is empty"
    return f"cannot make {pieces} pieces of {sum(map(len, sentences))} characters of text: {advice}"

"""Vocabularies: text to token ids and back, and how they are kept beside a checkpoint.

A saved vocabulary is a directory: `vocabulary.json`, which says of what kind it is, and the
tokenizer's own files, from which it is made again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath
from jaxtyping import Int

from fot_jax.common import formats
from fot_jax.common.atomic import new_directory
from fot_jax.common.checksums import crc32_of_json
from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError, check_range
from fot_jax.common.paths import path_of


class Vocabulary(Protocol):
    """Token ids 0 … size - 1. Immutable; two are equal if they make the same tokens."""

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
        """A text that a model writes ends at any of these tokens: at eos, as a rule."""

    @property
    def before(self) -> tuple[int, ...]:
        """Marks that are put before a text: bos, as a rule."""

    @property
    def after(self) -> tuple[int, ...]:
        """Marks that are put after a text even if it is to be continued: none, as a rule."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without marks around it."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; marks, and ids outside the vocabulary, give nothing."""

    def settled(self, ids: Sequence[int]) -> bool:
        """Whether the text of these tokens stays what it is when others follow."""

    def save(self, directory: epath.PathLike) -> None:
        """Writes what `load_vocabulary` reads, whole or not at all; may replace an older one."""


def marked(vocabulary: Vocabulary, text: str) -> list[int]:
    """Tokens of a text as a model is given it to go on from: with marks where it has some."""
    return [*vocabulary.before, *vocabulary.encode(text), *vocabulary.after]


def frame(vocabulary: Vocabulary, text: str) -> Int[np.ndarray, " N"]:
    """A document: the text with its marks, and eos."""
    tokens = marked(vocabulary, text)
    if vocabulary.after[-1:] != (vocabulary.eos,):
        tokens.append(vocabulary.eos)
    return np.asarray(tokens, np.int32)


class _Marked:
    """Marks as models are trained with from scratch: documents begin with one in any case."""

    @property
    def ends(self) -> tuple[int, ...]:
        return (self.eos,)

    @property
    def before(self) -> tuple[int, ...]:
        return (self.eos if self.bos is None else self.bos,)

    after = ()

    def settled(self, ids: Sequence[int]) -> bool:
        return not self.decode(ids).endswith("\ufffd")  # half a character


# --- Bytes and symbols ---------------------------------------------------------------------------


@configurable
@dataclasses.dataclass(frozen=True)
class Bytes(_Marked):
    """UTF-8: ids 0 … 255 are the bytes, 256 is bos, 257 eos."""

    size = 258
    bos = 256
    eos = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")

    def save(self, directory: epath.PathLike) -> None:
        _write(directory, {"kind": "Bytes"}, {})


@dataclasses.dataclass(frozen=True)
class Symbols(_Marked):
    """Words of made-up data, separated by spaces: id i is names[i].

    Attributes:
      names: all different; "</s>", which must be among them, is eos, and "<s>" bos.
    """

    names: tuple[str, ...]

    def __post_init__(self):
        if not self.are_names(self.names):
            raise ValueError(f'names must be all different and have "</s>": {self.names}')

    @staticmethod
    def are_names(names: Sequence) -> bool:
        """Whether they can be the symbols of a vocabulary."""
        texts = all(isinstance(name, str) for name in names)
        return texts and "</s>" in names and len(set(names)) == len(names)

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
        _write(directory, {"kind": "Symbols", "names": self.names}, {})

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}


# --- SentencePiece -------------------------------------------------------------------------------

SPACE = "▁"  # how SentencePiece writes a space


@configurable
@dataclasses.dataclass(frozen=True, init=False)
class SentencePiece(_Marked):
    """A SentencePiece model, such as LLaMA's tokenizer.model."""

    model: bytes = dataclasses.field(repr=False)

    def __init__(self, path: epath.PathLike):
        """Reads a model file.

        Raises:
          UserError: it is missing or no such file, or the model has no eos.
        """
        object.__setattr__(self, "model", _read(path_of(path)))
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
        _write(directory, {"kind": "SentencePiece"}, {"tokenizer.model": self.model})

    @functools.cached_property
    def _processor(self):
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @functools.cached_property
    def _space_as_bytes(self) -> list[int] | None:
        """How to spell a SPACE that stands in the text, which would come back as a space.

        None for models that have no bytes, and for those that put a space before any text they are
        given: there, cutting a text in parts would change it.
        """
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        adds_space = self._processor.encode("a", out_type=str)[0].startswith(SPACE)
        return ids if all(map(self._processor.is_byte, ids)) and not adds_space else None


@configurable
@dataclasses.dataclass(frozen=True)
class TrainedSentencePiece:
    """Not yet a vocabulary: asks for one to be trained on the corpus, which takes a second.

    The same texts give the same vocabulary. Any text comes back from its tokens unchanged: nothing
    is normalized, and what has no piece is spelt in bytes.

    Attributes:
      pieces: size of the vocabulary; 256 bytes and three marks are among them.
    """

    pieces: int = 1024

    def train(self, texts: Iterable[str]) -> SentencePiece:
        """Byte-pair encoding: better here than a unigram model, and made twenty times faster.

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
                    num_threads=1,  # more make another model
                    minloglevel=2,
                )
            except RuntimeError as error:
                raise UserError(_training_message(self.pieces, sentences, str(error))) from error
            file.flush()
            return SentencePiece(file.name)


def _training_message(pieces: int, sentences: list[str], error: str) -> str:
    advice = "set TrainedSentencePiece.pieces otherwise"
    if limit := re.search(r"set it to a value <= (\d+)", error):
        advice = f"the text is enough for at most {limit[1]}: set TrainedSentencePiece.pieces to it"
    elif needed := re.search(r"required_chars.*\. \d+ vs (\d+)", error):
        advice = f"its characters need {needed[1]} or more: raise TrainedSentencePiece.pieces"
    elif not sentences:
        advice = "the training split is empty"
    return f"cannot make {pieces} pieces of {sum(map(len, sentences))} characters of text: {advice}"


# --- Hugging Face --------------------------------------------------------------------------------

COMMON_BOS = ("<s>", "<|begin_of_text|>")
COMMON_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>")


@dataclasses.dataclass(frozen=True)
class Marks:
    """Where a model's texts end, and what its tokenizer puts around them: as of Vocabulary."""

    ends: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Infilling:
    """How Code Llama is asked for what is missing in a text.

    Attributes:
      gap: what stands in the text for that.
      normalizer, post_processor: of a tokenizer.json that puts the text before the gap and after it
        in order, in place of the tokenizer's own; JSON.
    """

    gap: str
    normalizer: str
    post_processor: str


@configurable
@dataclasses.dataclass(frozen=True, init=False)
class HuggingFaceTokenizer(_Marked):
    """A tokenizer.json. As in transformers, names of special tokens in a text are these tokens."""

    tokenizer: bytes = dataclasses.field(repr=False)
    bos_token: str | None
    eos_token: str
    marks: Marks | None = None
    splits_marks: bool = False
    infilling: Infilling | None = None

    def __init__(self, path: epath.PathLike, bos: str | None = None, eos: str | None = None):
        """Reads a tokenizer.json, to train a model from scratch with.

        (The tokenizer of a model, as its other files complete it: hugging_face/tokenizers.py.)

        Args:
          path: of the file.
          bos, eos: names of the marks; None takes those in tokenizer_config.json beside the file
            or, where there is no such file, common names that the tokenizer knows.

        Raises:
          UserError: a file is missing or damaged, or a mark is not known.
        """
        path = path_of(path)
        object.__setattr__(self, "tokenizer", _read(path))
        try:
            known = self._processor.get_vocab(with_added_tokens=True)
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{path}: not a tokenizer.json, or damaged ({error})") from error
        config = path.parent / "tokenizer_config.json"
        if config.exists():
            names = _read_json(config)
            bos = bos or _token_name(config, names, "bos_token")
            eos = eos or _token_name(config, names, "eos_token")
        else:
            bos = bos or next(filter(known.__contains__, COMMON_BOS), None)
            eos = eos or next(filter(known.__contains__, COMMON_EOS), None)
        if not eos:
            raise UserError(
                f"{path}: which token ends a text is not known: add eos_token, its name, to "
                "tokenizer_config.json beside it"
            )
        for name in filter(None, (bos, eos)):
            if name not in known:
                raise UserError(
                    f"{path}: has no token {name!r}: set bos and eos to the names of two it has"
                )
        object.__setattr__(self, "bos_token", bos)
        object.__setattr__(self, "eos_token", eos)

    @classmethod
    def of(
        cls,
        tokenizer: bytes,
        bos_token: str | None,
        eos_token: str,
        marks: Marks | None = None,
        splits_marks: bool = False,
        infilling: Infilling | None = None,
    ) -> HuggingFaceTokenizer:
        """From its parts.

        Args:
          tokenizer: content of a tokenizer.json.
          bos_token, eos_token: names of tokens in it.
          marks: None: as for training from scratch, bos (eos where there is none) before a text,
            which ends at eos.
          splits_marks: names of special tokens in a text are text.
          infilling: how a text with a gap is asked for.
        """
        self = cls.__new__(cls)
        parts = (tokenizer, bos_token, eos_token, marks, splits_marks, infilling)
        for field, part in zip(dataclasses.fields(cls), parts, strict=True):
            object.__setattr__(self, field.name, part)
        return self

    @functools.cached_property
    def model_size(self) -> int:
        """Without tokens that were added behind those of the tokenizer's own model."""
        return 1 + max(self._processor.get_vocab(with_added_tokens=False).values(), default=-1)

    @functools.cached_property
    def size(self) -> int:
        """Without the gap of `infilling`, which models have no row for: it is never a token."""
        ids = self._processor.get_vocab(with_added_tokens=True)
        if self.infilling is not None:
            ids.pop(self.infilling.gap, None)
        return 1 + max(ids.values())

    @property
    def bos(self) -> int | None:
        return None if self.bos_token is None else self._processor.token_to_id(self.bos_token)

    @property
    def eos(self) -> int:
        return self._processor.token_to_id(self.eos_token)

    @property
    def ends(self) -> tuple[int, ...]:
        return super().ends if self.marks is None else self.marks.ends

    @property
    def before(self) -> tuple[int, ...]:
        return super().before if self.marks is None else self.marks.before

    @property
    def after(self) -> tuple[int, ...]:
        return () if self.marks is None else self.marks.after

    def encode(self, text: str) -> list[int]:
        """Raises UserError for a text that cannot be tokenized, or that has several gaps."""
        gap = None if self.infilling is None else self.infilling.gap
        before, *after = [text] if gap is None else text.split(gap)
        if len(after) > 1:
            raise UserError(f"the text has {len(after)} gaps, {gap}: leave one of them")
        try:
            if any(after):
                return self._around_a_gap.encode(f" {before}", *after).ids
            return self._processor.encode(before, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"the text cannot be tokenized: {error}") from error

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.size])

    def settled(self, ids: Sequence[int]) -> bool:
        """Not in a row of tokens of one byte: a wrong one makes all of them unreadable."""
        seen = (i for i in reversed(ids) if 0 <= i < self.size and i not in self._unseen)
        if next(seen, None) in self._bytes:
            return False
        return super().settled(ids) and (not self._cleans_up or self.decode(ids).endswith("\n"))

    def save(self, directory: epath.PathLike) -> None:
        config = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        files = {
            "tokenizer.json": self.tokenizer,
            "tokenizer_config.json": json.dumps(config).encode(),
        }
        description: dict[str, Any] = {"kind": "HuggingFaceTokenizer"}
        if self.marks is not None:
            description["marks"] = dataclasses.asdict(self.marks)
        if self.splits_marks:
            description["splits_marks"] = True
        if self.infilling is not None:
            description["infilling"] = dataclasses.asdict(self.infilling)
        _write(directory, description, files)

    @functools.cached_property
    def _processor(self):
        import tokenizers

        processor = tokenizers.Tokenizer.from_buffer(self.tokenizer)
        processor.no_truncation()
        processor.no_padding()
        processor.encode_special_tokens = self.splits_marks
        return processor

    @functools.cached_property
    def _around_a_gap(self):
        import tokenizers

        steps = {name: json.loads(getattr(self.infilling, name)) for name in _STEPS}
        content = json.dumps({**json.loads(self.tokenizer), **steps})
        processor = tokenizers.Tokenizer.from_str(content)
        processor.no_truncation()
        processor.no_padding()
        return processor

    @functools.cached_property
    def _unseen(self) -> frozenset[int]:
        """Tokens that decode to nothing."""
        added = self._processor.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    @functools.cached_property
    def _bytes(self) -> frozenset[int]:
        names = (f"<0x{byte:02X}>" for byte in range(256))
        ids = map(self._processor.token_to_id, names)
        return frozenset(i for i in ids if i is not None)

    @functools.cached_property
    def _cleans_up(self) -> bool:
        return CLEAN_UP[0][0] in _replaced(json.loads(self.tokenizer)["decoder"])


_STEPS = ("normalizer", "post_processor")

# What `clean_up_tokenization_spaces` of transformers replaces in a text, in this order.
CLEAN_UP = tuple(
    (text, text.strip() if text == " ' " else text[1:])
    for text in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
)


def _replaced(decoder: dict | None) -> list[str]:
    """The texts that a decoder of a tokenizer.json replaces."""
    if decoder is None:
        return []
    parts = decoder.get("decoders", [])
    own = decoder.get("pattern", {}).get("String")
    return [own] * (own is not None) + [text for part in parts for text in _replaced(part)]


def _token_name(config: epath.Path, names: dict, mark: str) -> str | None:
    """Of a mark in a tokenizer_config.json, where it is a text or an object with one."""
    value = names.get(mark)
    name = value.get("content") if isinstance(value, dict) else value
    if not (name is None or isinstance(name, str)):
        raise UserError(f"{config}: {mark} is {json.dumps(value)[:40]}, not the name of a token")
    return name


# --- Files ---------------------------------------------------------------------------------------


def load_vocabulary(directory: epath.PathLike) -> Vocabulary:
    """What `save` wrote.

    Raises:
      UserError: nothing there, damaged, or of a kind that this version does not know.
    """
    directory = epath.Path(directory)
    where = directory / "vocabulary.json"
    if not where.exists():
        raise UserError(f"{directory}: no vocabulary here: there is no vocabulary.json")
    description = _read_json(where)
    if "crc32" in description:  # the first vocabularies of fot_jax 0.1 have none
        if description.pop("crc32") != crc32_of_json(description, sort_keys=True):
            raise UserError(f"{where}: damaged: it is not what was saved: restore it from a copy")
    formats.VOCABULARY.check(where, description)
    checksums = description.get("sha256")
    for name, checksum in checksums.items() if isinstance(checksums, dict) else ():
        if hashlib.sha256(_read(directory / name)).hexdigest() != checksum:
            raise UserError(
                f"{directory / name}: damaged: its checksum is not that in vocabulary.json: "
                "restore it from a copy"
            )
    match description:
        case {"kind": "Bytes"}:
            return Bytes()
        case {"kind": "Symbols", "names": [*names]} if Symbols.are_names(names):
            return Symbols(tuple(names))
        case {"kind": "SentencePiece"}:
            return SentencePiece(directory / "tokenizer.model")
        case {"kind": "HuggingFaceTokenizer"}:
            vocabulary = HuggingFaceTokenizer(directory / "tokenizer.json")
            return _completed(where, vocabulary, description)
    raise UserError(
        f"{where}: a vocabulary of unknown kind {description.get('kind')!r}: written by another "
        "version of fot_jax, or damaged"
    )


def _completed(
    where: epath.Path, vocabulary: HuggingFaceTokenizer, description: dict
) -> HuggingFaceTokenizer:
    """With what is told beside its files."""
    try:
        marks, infilling = description.get("marks"), description.get("infilling")
        if marks is not None:
            marks = Marks(**{name: tuple(map(int, ids)) for name, ids in marks.items()})
        return HuggingFaceTokenizer.of(
            *(vocabulary.tokenizer, vocabulary.bos_token, vocabulary.eos_token, marks),
            bool(description.get("splits_marks", False)),
            None if infilling is None else Infilling(**infilling),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: damaged ({error}): restore it from a copy") from error


def _write(directory: epath.PathLike, description: dict, files: dict[str, bytes]) -> None:
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    with new_directory(directory, "vocabulary.json") as half:
        for name, content in files.items():
            (half / name).write_bytes(content)
        described = {**formats.VOCABULARY.number, **description, "sha256": checksums}
        sealed = {**described, "crc32": crc32_of_json(described, sort_keys=True)}
        (half / "vocabulary.json").write_text(json.dumps(sealed, indent=1))


def _read(path: epath.Path) -> bytes:
    if not path.exists():
        raise UserError(f"{path}: no such file: give the path of a tokenizer file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _read_json(path: epath.Path) -> dict:
    content = _read(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error}): restore it from a copy") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object: restore it from a copy")
    return value

"""tokenizer.json, the file of the Hugging Face tokenizers library, as a vocabulary."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError
from fot_jax.common.paths import path_of
from fot_jax.data.vocabulary import StandardMarks
from fot_jax.data.vocabulary_files import read_bytes, read_json, write_vocabulary

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
COMMON_BOS = ("<s>", "<|begin_of_text|>")
COMMON_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>")


@dataclasses.dataclass(frozen=True)
class Marks:
    """Where a model's texts end, and what its tokenizer puts around them, as in Vocabulary."""

    ends: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Infilling:
    """How a text with a gap becomes a prompt for Code Llama, which fills the gap.

    Attributes:
      gap: what stands in the text for the gap.
      normalizer, post_processor: those of the tokenizer.json that arranges the text before the gap
        and after it, in place of the tokenizer's own; JSON.
    """

    gap: str
    normalizer: str
    post_processor: str


@configurable
@dataclasses.dataclass(frozen=True, init=False)
class HuggingFaceTokenizer(StandardMarks):
    """A tokenizer.json. As in transformers, names of special tokens in a text are these tokens.

    Attributes:
      tokenizer: content of the file.
      bos_token, eos_token: names of tokens in it.
      marks: None: as for training from scratch, bos (eos where there is none) before a text,
        which ends at eos.
      splits_marks: names of special tokens in a text are ordinary text.
      infilling: how a text with a gap becomes a prompt; None: there are no gaps.
    """

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
        object.__setattr__(self, "tokenizer", read_bytes(path))
        try:
            known = self._processor.get_vocab(with_added_tokens=True)
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{path}: not a tokenizer.json, or damaged ({error})") from error
        config = path.parent / TOKENIZER_CONFIG
        if config.exists():
            names = read_json(config)
            bos = bos or _token_name(config, names, "bos_token")
            eos = eos or _token_name(config, names, "eos_token")
        else:
            bos = bos or next(filter(known.__contains__, COMMON_BOS), None)
            eos = eos or next(filter(known.__contains__, COMMON_EOS), None)
        if not eos:
            raise UserError(
                f"{path}: which token ends a text is not known: add eos_token, its name, to "
                f"{TOKENIZER_CONFIG} beside it"
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
        *,
        tokenizer: bytes,
        bos_token: str | None,
        eos_token: str,
        marks: Marks | None = None,
        splits_marks: bool = False,
        infilling: Infilling | None = None,
    ) -> HuggingFaceTokenizer:
        """From its attributes."""
        self = cls.__new__(cls)
        object.__setattr__(self, "tokenizer", tokenizer)
        object.__setattr__(self, "bos_token", bos_token)
        object.__setattr__(self, "eos_token", eos_token)
        object.__setattr__(self, "marks", marks)
        object.__setattr__(self, "splits_marks", splits_marks)
        object.__setattr__(self, "infilling", infilling)
        return self

    @functools.cached_property
    def model_size(self) -> int:
        """Ids of the tokenizer's own model, without tokens that were added after its last."""
        return 1 + max(self._processor.get_vocab(with_added_tokens=False).values(), default=-1)

    @functools.cached_property
    def size(self) -> int:
        """Ids, without that of the gap of `infilling`, which is never a token."""
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
                return self._infilling_processor.encode(f" {before}", *after).ids
            return self._processor.encode(before, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"the text cannot be tokenized: {error}") from error

    def encode_literally(self, text: str) -> list[int]:
        if self.infilling is None or self.infilling.gap not in text:
            return self.encode(text)
        return self._without_gaps.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.size])

    def settled(self, ids: Sequence[int]) -> bool:
        """Never after a token of one byte: a wrong one would make all before it unreadable."""
        seen = (i for i in reversed(ids) if 0 <= i < self.size and i not in self._unseen)
        if next(seen, None) in self._bytes:
            return False
        return super().settled(ids) and (not self._cleans_up or self.decode(ids).endswith("\n"))

    def save(self, directory: epath.PathLike) -> None:
        config = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        files = {TOKENIZER: self.tokenizer, TOKENIZER_CONFIG: json.dumps(config).encode()}
        description: dict[str, Any] = {"kind": "HuggingFaceTokenizer"}
        if self.marks is not None:
            description["marks"] = dataclasses.asdict(self.marks)
        if self.splits_marks:
            description["splits_marks"] = True
        if self.infilling is not None:
            description["infilling"] = dataclasses.asdict(self.infilling)
        write_vocabulary(directory, description, files)

    @classmethod
    def load(cls, directory: epath.Path, description: dict[str, Any]) -> HuggingFaceTokenizer:
        """As `saved_vocabulary.load_vocabulary` calls it."""
        saved = cls(directory / TOKENIZER)
        marks, infilling = description.get("marks"), description.get("infilling")
        if marks is not None:
            marks = Marks(**{name: tuple(map(int, ids)) for name, ids in marks.items()})
        return cls.of(
            tokenizer=saved.tokenizer,
            bos_token=saved.bos_token,
            eos_token=saved.eos_token,
            marks=marks,
            splits_marks=bool(description.get("splits_marks", False)),
            infilling=None if infilling is None else Infilling(**infilling),
        )

    @functools.cached_property
    def _without_gaps(self) -> HuggingFaceTokenizer:
        content = json.loads(self.tokenizer)
        for token in content["added_tokens"]:  # left out, those after it would have other ids
            if token["content"] == self.infilling.gap:
                token["content"] = f"\0{self.infilling.gap}\0"
        tokenizer = json.dumps(content).encode()
        return HuggingFaceTokenizer.of(
            tokenizer=tokenizer,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            splits_marks=self.splits_marks,
        )

    @functools.cached_property
    def _processor(self):
        import tokenizers

        processor = _as_it_is(tokenizers.Tokenizer.from_buffer(self.tokenizer))
        processor.encode_special_tokens = self.splits_marks
        return processor

    @functools.cached_property
    def _infilling_processor(self):
        import tokenizers

        content = {
            **json.loads(self.tokenizer),
            "normalizer": json.loads(self.infilling.normalizer),
            "post_processor": json.loads(self.infilling.post_processor),
        }
        return _as_it_is(tokenizers.Tokenizer.from_str(json.dumps(content)))

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
        return CLEAN_UP[0][0] in _replaced(json.loads(self.tokenizer).get("decoder"))


def _as_it_is(processor):
    """The tokenizer, of which a text has all its tokens, and the same ones each time."""
    processor.no_truncation()
    processor.no_padding()
    if getattr(processor.model, "dropout", None):  # of merges, at random
        processor.model.dropout = None
    return processor


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
    """The name of a mark in a tokenizer_config.json, where it is a text or an object with one."""
    value = names.get(mark)
    name = value.get("content") if isinstance(value, dict) else value
    if not (name is None or isinstance(name, str)):
        raise UserError(f"{config}: {mark} is {json.dumps(value)[:40]}, not the name of a token")
    return name

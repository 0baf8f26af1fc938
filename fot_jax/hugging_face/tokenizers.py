"""Tokenizer files of a Hugging Face directory: kept, made into a vocabulary, made from one."""

from __future__ import annotations

import json
from typing import Any

from etils import epath
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from fot_jax.data.vocabulary import (
    SPACE,
    Bytes,
    HuggingFaceTokenizer,
    SentencePiece,
    Symbols,
    Vocabulary,
)
from fot_jax.errors import UserError

_JSON, _CONFIG, _MODEL = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
FILES = (
    *(_JSON, _CONFIG, _MODEL, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)


def vocabulary_of(directory: epath.PathLike) -> Vocabulary | None:
    """The vocabulary of a Hugging Face directory; None where it has no tokenizer.

    Raises:
      UserError: its tokenizer cannot be read.
    """
    directory = epath.Path(directory)
    if (directory / _JSON).exists():
        return HuggingFaceTokenizer(directory / _JSON)
    return SentencePiece(directory / _MODEL) if (directory / _MODEL).exists() else None


def write(vocabulary: Vocabulary, directory: epath.Path) -> None:
    """Writes what `transformers.AutoTokenizer` makes the same tokens with.

    But for a text in which the name of a mark stands, which is then that mark, or SPACE, which is
    then a space.

    Raises:
      UserError: the vocabulary is one that its library cannot follow.
    """
    files: dict[str, bytes] = {}
    if isinstance(vocabulary, HuggingFaceTokenizer):
        files[_JSON] = vocabulary.tokenizer
        bos, eos = vocabulary.bos_token, vocabulary.eos_token
    else:
        tokenizer, (bos, eos) = _tokenizer(vocabulary)
        files[_JSON] = tokenizer.to_str(pretty=True).encode()
    if isinstance(vocabulary, SentencePiece):
        files[_MODEL] = vocabulary.model
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    files[_CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    for name, content in files.items():
        (directory / name).write_bytes(content)


def _tokenizer(vocabulary: Vocabulary) -> tuple[Tokenizer, tuple[str | None, str]]:
    """The library's form of a vocabulary of ours, and the names of its marks."""
    match vocabulary:
        case Bytes():
            tokenizer, bos, eos = _bytes(vocabulary)
        case Symbols():
            tokenizer, bos, eos = _symbols(vocabulary)
        case SentencePiece():
            tokenizer, bos, eos = _sentence_piece(vocabulary)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (bos, eos) if name])
    start = bos or eos  # as data/vocabulary.frame begins a document
    tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
    )
    return tokenizer, (bos, eos)


def _bytes(vocabulary: Bytes) -> tuple[Tokenizer, str | None, str]:
    # The library writes each byte as a character: itself if it can be seen, else one from 256 on.
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    names = {byte: chr(byte) for byte in seen} | {b: chr(256 + i) for i, b in enumerate(unseen)}
    ids = {name: byte for byte, name in names.items()}
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    ids |= {bos: vocabulary.bos, eos: vocabulary.eos}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, bos, eos


def _symbols(vocabulary: Symbols) -> tuple[Tokenizer, str | None, str]:
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(vocabulary.names)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer, None if vocabulary.bos is None else "<s>", "</s>"


def _sentence_piece(vocabulary: SentencePiece) -> tuple[Tokenizer, str | None, str]:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.model)
    spec, normal = proto.trainer_spec, proto.normalizer_spec
    names = [piece.piece for piece in proto.pieces]
    if spec.model_type == spec.BPE:
        model = _byte_pairs(proto, names)
    elif spec.model_type == spec.UNIGRAM:
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        model = models.Unigram(pieces, spec.unk_id, spec.byte_fallback)
    else:
        raise UserError(
            "the vocabulary is a SentencePiece model of whole words or characters: have byte pairs "
            "and unigrams"
        )
    tokenizer = Tokenizer(model)
    before: list[Any] = []
    if normal.precompiled_charsmap:
        before.append(normalizers.Precompiled(normal.precompiled_charsmap))
    if normal.remove_extra_whitespaces:
        before += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    after = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if normal.add_dummy_prefix:  # also after a piece of the user's own, where it should not be
        before.append(normalizers.Prepend(SPACE))
        after.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(after)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False)
            for piece in proto.pieces
            if piece.type == piece.USER_DEFINED
        ]
    )
    bos = None if vocabulary.bos is None else names[vocabulary.bos]
    return tokenizer, bos, names[vocabulary.eos]


def _byte_pairs(proto, names: list[str]) -> models.BPE:
    """The file has no merges, but scores: the best whole of two neighbours comes first."""
    scores = {p.piece: p.score for p in proto.pieces if p.type in (p.NORMAL, p.USER_DEFINED)}
    merges = []
    for piece in scores:
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [pair for pair in halves if pair[0] in scores and pair[1] in scores]
    merges.sort(key=lambda pair: -scores["".join(pair)])
    return models.BPE(
        {name: i for i, name in enumerate(names)},
        merges,
        unk_token=names[proto.trainer_spec.unk_id],
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )

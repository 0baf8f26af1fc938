"""Tokenizer files of a Hugging Face directory: kept, made into a vocabulary, made from one."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from etils import epath
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from fot_jax.common.errors import UserError
from fot_jax.common.paths import in_bucket
from fot_jax.data.hugging_face_tokenizer import (
    CLEAN_UP,
    COMMON_EOS,
    HuggingFaceTokenizer,
    Infilling,
    Marks,
)
from fot_jax.data.sentencepiece_vocabulary import SPACE, SentencePiece
from fot_jax.data.vocabulary import Bytes, Symbols, Vocabulary
from fot_jax.hugging_face.config import CONFIG, Fields

_JSON, _CONFIG, _MODEL = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
_TOKENIZERS = (_JSON, _MODEL, "vocab.json", "tekken.json")  # one of them, and there is a tokenizer
_FILES = (
    *_TOKENIZERS,
    "merges.txt",
    _CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_TEMPLATES = "additional_chat_templates"  # a directory of them, by name
_ROLES = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
GENERATION = "generation_config.json"


def copy_files(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies what there is of config.json, generation_config.json and a tokenizer's files.

    Args:
      target: a directory.
    """
    source, target = epath.Path(source), epath.Path(target)
    names = [CONFIG, GENERATION, *_FILES]
    if (source / _CONFIG).exists():  # the tokenizer.json that newer versions are to take
        newer = Fields(source, _CONFIG).values.get("fast_tokenizer_files")
        newer = newer if isinstance(newer, list) else []
        names += [name for name in newer if re.fullmatch(r"tokenizer\.[\w.]+\.json", str(name))]
    if (source / _TEMPLATES).is_dir():
        (target / _TEMPLATES).mkdir(exist_ok=True)
        there = [path.name for path in (source / _TEMPLATES).iterdir()]
        names += [f"{_TEMPLATES}/{name}" for name in there if name.endswith(".jinja")]
    for name in names:
        if (source / name).exists():
            (source / name).copy(target / name, overwrite=True)


def vocabulary_of(directory: epath.PathLike) -> Vocabulary | None:
    """The vocabulary of a Hugging Face directory; None where it has no tokenizer.

    As `transformers.AutoTokenizer` reads it, which takes its files together (their classes have
    defaults of their own, of marks, spaces and added tokens); texts end where `generate` ends them.

    Raises:
      UserError: its tokenizer cannot be read.
    """
    directory = epath.Path(directory)
    theirs = _theirs(directory)
    return None if theirs is None else _read(theirs, directory)


def special_tokens_of(directory: epath.PathLike) -> dict[str, Any] | None:
    """What a directory's tokenizer has beside bos and eos, as tokenizer_config.json names it.

    None where it has no tokenizer.

    Raises:
      UserError: its tokenizer cannot be read.
    """
    theirs = _theirs(epath.Path(directory))
    if theirs is None:
        return None
    found = {role: x for role in _ROLES if (x := getattr(theirs, role)) is not None}
    named = {*found.values(), theirs.bos_token, theirs.eos_token}
    others = [name for name in theirs.all_special_tokens if name not in named]
    return {**found, "additional_special_tokens": others} if others else found


def ends_of(directory: epath.PathLike) -> tuple[int, ...]:
    """The tokens at any of which `generate` of transformers ends a text; maybe none.

    Raises:
      UserError: the file that tells is damaged.
    """
    name = GENERATION if (epath.Path(directory) / GENERATION).exists() else CONFIG
    ends = Fields(directory, name).marks().get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return tuple(end for end in ends if 0 <= end < 2**32)  # -1 is written for no token


def _theirs(directory: epath.Path) -> Any | None:
    """The tokenizer that transformers makes of a directory; None where it has none."""
    if not any((directory / name).exists() for name in _TOKENIZERS):
        return None
    if in_bucket(directory):
        with tempfile.TemporaryDirectory() as here:
            copy_files(directory, here)
            return _auto_tokenizer(epath.Path(here), directory)
    return _auto_tokenizer(directory, directory)


def _read(theirs: Any, directory: epath.Path) -> HuggingFaceTokenizer:
    """What transformers made of a directory, with the ends that this says; changes `theirs`."""
    tokenizer = theirs.backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ends = ends_of(directory)
    names = [*map(tokenizer.id_to_token, ends), *COMMON_EOS]
    known = tokenizer.get_vocab(with_added_tokens=True)
    eos = theirs.eos_token or next(filter(known.__contains__, names), None)
    if eos is None:
        raise UserError(
            f"{directory}: which token ends a text is not known: add eos_token, its name, to "
            f"{_CONFIG}"
        )
    if theirs.clean_up_tokenization_spaces and (
        not isinstance(tokenizer.model, models.BPE)  # of which it asks again
        or theirs.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    ):
        # Without a decoder there are spaces between tokens, as this one writes them.
        spaced = decoders.WordPiece(prefix="\0", cleanup=False)
        own = [tokenizer.decoder or spaced]
        replaced = [decoders.Replace(*each) for each in CLEAN_UP]
        tokenizer.decoder = decoders.Sequence([*own, decoders.Fuse(), *replaced])
    return HuggingFaceTokenizer.of(
        tokenizer=tokenizer.to_str().encode(),
        bos_token=theirs.bos_token,
        eos_token=eos,
        marks=_marks(tokenizer, ends),
        splits_marks=bool(theirs.split_special_tokens),
        infilling=_infilling(theirs),
    )


def _auto_tokenizer(directory: epath.Path, named: epath.Path) -> Any:
    """The tokenizer of a directory of this machine, called something else in messages."""
    # Or it says, where there is no torch, that there is none, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    for file in (_CONFIG, "special_tokens_map.json"):  # as of conversions of the first LLaMA
        values = Fields(directory, file).values if (directory / file).exists() else {}
        for mark in ("bos_token", "eos_token", "unk_token"):
            if values.get(mark) == "":
                raise UserError(f"{named / file}: {mark} is empty: give its name, or leave it out")
    said = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except StrictDataclassError as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"{named / CONFIG}: transformers refuses it ({what}): correct what it names"
        ) from error
    except Exception as error:  # of any kind, from any of its files
        if not (directory / _JSON).exists() and (directory / _MODEL).exists():
            SentencePiece(directory / _MODEL)  # refused, if it is none
        what = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        raise UserError(
            f"{named}: transformers cannot read its tokenizer ({what}): correct {_CONFIG}, or "
            "restore the tokenizer's files from a copy"
        ) from error
    finally:
        transformers.logging.set_verbosity(said)
    if not isinstance(theirs, transformers.PreTrainedTokenizerFast):
        raise UserError(
            f"{named}: its tokenizer is a program, {type(theirs).__name__}: save it as {_JSON}"
        )
    return theirs


def _marks(tokenizer: Tokenizer, ends: tuple[int, ...]) -> Marks:
    text = tokenizer.encode("a")
    own = [i for i, mark in enumerate(text.special_tokens_mask) if not mark]
    start, end = (own[0], own[-1] + 1) if own else (len(text.ids), len(text.ids))
    return Marks(ends=ends, before=tuple(text.ids[:start]), after=tuple(text.ids[end:]))


def _infilling(theirs: Any) -> Infilling | None:
    """How Code Llama's tokenizer arranges a text with a gap; changes the tokenizer's settings."""
    if getattr(theirs, "fill_token", None) is None:
        return None
    if None in (theirs.prefix_id, theirs.middle_id, theirs.suffix_id):
        return None
    theirs.set_infilling_processor(False, add_special_tokens=False)
    content = json.loads(theirs.backend_tokenizer.to_str())
    return Infilling(
        gap=theirs.fill_token,
        normalizer=json.dumps(content["normalizer"]),
        post_processor=json.dumps(content["post_processor"]),
    )


def write(
    vocabulary: Vocabulary, directory: epath.Path, special: Mapping[str, Any] | None = None
) -> None:
    """Writes what `transformers.AutoTokenizer` makes the same tokens with.

    But for a SPACE in a text, which SentencePiece itself takes for a space. Names of marks in a
    text are text, unless the vocabulary is a tokenizer.json, in which they are these marks.

    Args:
      directory: maybe with the files of a tokenizer, which other programs read, and of which chat
        templates and lengths stay.
      special: of the model that the vocabulary came with, as of `special_tokens_of`; None: it is
        of no model, and eos is for padding.

    Raises:
      UserError: the vocabulary is one that the tokenizers library cannot follow.
    """
    files: dict[str, bytes] = {}
    if isinstance(vocabulary, HuggingFaceTokenizer):
        files[_JSON] = _with_marks(vocabulary)
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
        **({"pad_token": eos} if special is None else special),
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    if not isinstance(vocabulary, HuggingFaceTokenizer) or vocabulary.splits_marks:
        config["split_special_tokens"] = True
    kept = ["chat_template", "model_max_length", "padding_side"]
    if special is None:
        (directory / "added_tokens.json").unlink(missing_ok=True)  # to no tokenizer that is there
    else:
        kept.append("added_tokens_decoder")  # what tokenizer.model lacks of tokenizer.json
    if (directory / _CONFIG).exists():
        older = Fields(directory, _CONFIG).values
        config |= {name: older[name] for name in kept if name in older}
    (directory / "special_tokens_map.json").unlink(missing_ok=True)  # it would come before
    files[_CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    for name, content in files.items():
        (directory / name).write_bytes(content)


def _with_marks(vocabulary: HuggingFaceTokenizer) -> bytes:
    """A tokenizer.json that puts the marks around a text which the vocabulary has for it."""
    tokenizer = Tokenizer.from_buffer(vocabulary.tokenizer)
    before, after = vocabulary.before, vocabulary.after
    same = _marks(tokenizer, vocabulary.ends) == Marks(vocabulary.ends, before, after)
    dropout = getattr(tokenizer.model, "dropout", None)  # of merges at random, which is not ours
    if same and not dropout:
        return vocabulary.tokenizer
    if dropout:
        tokenizer.model.dropout = None
    if same:
        return tokenizer.to_str().encode()
    names = {i: tokenizer.id_to_token(i) for i in (*before, *after)}
    tokenizer.post_processor = TemplateProcessing(
        single=[*map(names.get, before), "$A", *map(names.get, after)],
        special_tokens=[(name, i) for i, name in names.items()],
    )
    return tokenizer.to_str().encode()


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
    start = bos or eos  # as data/vocabulary.StandardMarks begins a document
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
    if reason := _beyond_the_library(proto):
        raise UserError(
            f"a tokenizer.json cannot make the tokens of this SentencePiece model: {reason}: to "
            "convert the weights alone, move the workdir's directory vocabulary away; its "
            "tokenizer.model is read by the library sentencepiece"
        )
    spec, normal = proto.trainer_spec, proto.normalizer_spec
    names = [piece.piece for piece in proto.pieces]
    tokenizer = Tokenizer(_byte_pairs(proto))
    before: list[Any] = []
    after = [
        decoders.Replace(names[spec.unk_id], spec.unk_surface),
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if normal.remove_extra_whitespaces:
        before += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" +"), " ")]
    if normal.add_dummy_prefix:
        before.append(normalizers.Prepend(SPACE))
    if normal.add_dummy_prefix or normal.remove_extra_whitespaces:
        # Spaces at the beginning, but not that of what an unknown piece becomes.
        surface, unknown = spec.unk_surface, ""
        if surface.startswith(" ") and not spec.byte_fallback:
            unknown = rf"(?!{re.escape(surface[1:])})"
        count = "+" if normal.remove_extra_whitespaces else ""
        after.append(decoders.Replace(Regex(rf"\A(?: {unknown}){count}"), ""))
    before.append(normalizers.Replace(" ", SPACE))
    if normal.remove_extra_whitespaces:
        before.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    tokenizer.normalizer = normalizers.Sequence(before)
    tokenizer.decoder = decoders.Sequence(after)
    # Found in the text as it is normalized, as there, so that their spaces are SPACEs.
    own = (piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED)
    tokenizer.add_tokens([AddedToken(name, normalized=True) for name in own if " " not in name])
    bos = None if vocabulary.bos is None else names[vocabulary.bos]
    return tokenizer, bos, names[vocabulary.eos]


def _beyond_the_library(proto) -> str | None:
    """What the tokenizers library has no way to do, or does otherwise; None where it can follow."""
    spec, normal = proto.trainer_spec, proto.normalizer_spec
    kind = type(proto.pieces[0])
    of_type = {
        each: {piece.piece: piece.score for piece in proto.pieces if piece.type == each}
        for each in (kind.NORMAL, kind.USER_DEFINED, kind.UNUSED, kind.CONTROL, kind.UNKNOWN)
    }
    normals, own = of_type[kind.NORMAL], of_type[kind.USER_DEFINED]
    marks = [*of_type[kind.CONTROL], *of_type[kind.UNKNOWN]]
    letters = {letter for piece in normals for letter in piece}
    scores = [score for piece, score in normals.items() if len(piece) > 1]
    if spec.model_type == spec.UNIGRAM:
        return "it is a unigram model, whose scores are added with another rounding there"
    if spec.model_type != spec.BPE:
        return "it is a model of whole words or characters, and not of byte pairs"
    if normal.precompiled_charsmap:
        return (
            f"its normalizer ({normal.name or 'of its own'}) is applied to other groups of "
            "characters there"
        )
    if proto.denormalizer_spec.precompiled_charsmap:
        return "it changes texts that it decodes"
    if spec.treat_whitespace_as_suffix or not normal.escape_whitespaces:
        return "it writes spaces otherwise than before words (treat_whitespace_as_suffix)"
    if own and normal.add_dummy_prefix:
        return "it has user-defined symbols, and puts a space before a text (add_dummy_prefix)"
    if normal.remove_extra_whitespaces and (
        any({" ", SPACE} & {*piece} for piece in own)
        or any(SPACE in piece[1:] for piece in normals)
    ):
        return "it removes spaces (remove_extra_whitespaces), and has pieces with spaces in them"
    unknown = spec.unk_surface.strip()
    if not spec.byte_fallback and (not unknown or {*unknown} & letters):
        return "what it decodes unknown pieces to (unk_surface) may stand in a text"
    if of_type[kind.UNUSED]:
        return "it has pieces that are not used"
    if any(len(name) == 1 for name in marks):
        return "it has a mark whose name is a single character"
    if letters - normals.keys() - own.keys():
        return "some of its pieces have characters that are no pieces"
    if len(set(scores)) < len(scores):
        return "it has different pieces of the same score"
    if any(proto.pieces[spec.unk_id].piece in piece for piece in (*normals, *own)):
        return "it has a piece with the name of the unknown one in it"
    return None


def _byte_pairs(proto) -> models.BPE:
    """The file has no merges, but scores: the best whole of two neighbours comes first."""
    names = [piece.piece for piece in proto.pieces]
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
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

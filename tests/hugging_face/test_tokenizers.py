"""Tokenizers that transformers makes the same tokens with as our vocabularies do."""

import io
import itertools
import json
import random
import re
import sysconfig
import warnings
from pathlib import Path

import pytest
import sentencepiece
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tiny import PAPER
from tokenizers import ByteLevelBPETokenizer

from fot_jax.common.errors import UserError
from fot_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer
from fot_jax.data.sentencepiece_vocabulary import SentencePiece, TrainedSentencePiece
from fot_jax.data.vocabulary import Bytes, Symbols, encode_document
from fot_jax.hugging_face import config, tokenizers

pytestmark = pytest.mark.torch
TEXT = "".join(
    file.read_text("utf-8", "replace")
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:20]
)


def trained(directory, text=TEXT, change=None, **settings):
    """A SentencePiece model; like LLaMA's unless it is said otherwise."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 600 if settings.get("byte_fallback", True) else 450,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        **settings,
    }
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=content, minloglevel=2, **settings
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(content.getvalue())
    if change is not None:
        change(proto)
    path = directory / "trained.model"
    path.write_bytes(proto.SerializeToString())
    return SentencePiece(path)


# --- SentencePiece -------------------------------------------------------------------------------

OWN = {
    "none": [],
    "words": ["<|call|>", "return", "é", "aba"],
    "runs of spaces": ["▁▁", "▁▁▁▁", "  ", "a▁b"],
}
FEW = "\n".join("".join(random.Random(i).choices("aaab ", k=90)) for i in range(99))


def reason(add_dummy_prefix, remove_extra_whitespaces, user_defined_symbols, **_):
    """Why settings are refused."""
    if user_defined_symbols and add_dummy_prefix:
        return "it has user-defined symbols, and puts a space before a text (add_dummy_prefix)"
    if any({*" ▁"} & {*symbol} for symbol in user_defined_symbols) and remove_extra_whitespaces:
        return "it removes spaces (remove_extra_whitespaces), and has pieces with spaces in them"
    return None


def settings_of_trainers():
    names = "byte_fallback", "add_dummy_prefix", "remove_extra_whitespaces"
    for *flags, own in itertools.product(*[(True, False)] * 3, OWN):
        name = ", ".join([*itertools.compress(names, flags), f"symbols: {own}"])
        values = {**dict(zip(names, flags, strict=True)), "user_defined_symbols": OWN[own]}
        yield name, (values, reason(**values))
    for rule in ("nfkc", "nmt_nfkc", "nmt_nfkc_cf", "nfkc_cf"):
        values = {"normalization_rule_name": rule, "remove_extra_whitespaces": True}
        yield rule, (values, f"its normalizer ({rule}) is applied to other groups of characters")
    yield "control symbols", ({"control_symbols": ["<pad>", "return"]}, None)
    yield "no beginning", ({"bos_id": -1}, None)
    yield "other marks", ({"bos_piece": "[B]", "eos_piece": "def", "unk_piece": "self"}, None)
    yield "any split", ({"split_by_whitespace": False, "split_by_unicode_script": False}, None)
    spaces = {"allow_whitespace_only_pieces": True, "split_digits": True}
    yield "runs of spaces", (spaces, None)
    few = {"text": FEW, "vocab_size": 290, "split_by_whitespace": False, "hard_vocab_limit": False}
    yield "few letters", (few, None)
    for surface, stands in ((" x ", True), ("", True), ("☒", False), ("  ☒", False)):
        values = {"unk_surface": surface, "byte_fallback": False}
        yield f"unknown: {surface!r}", (values, "may stand in a text" if stands else None)
    yield "characters", ({"model_type": "char"}, "of whole words or characters, and not of byte")
    words = {"model_type": "word", "byte_fallback": False}
    yield "words", (words, "it is a model of whole words or characters, and not of byte pairs")
    yield "unigram", ({"model_type": "unigram"}, "whose scores are added with another rounding")
    suffix = {"treat_whitespace_as_suffix": True}
    yield "spaces after words", (suffix, "(treat_whitespace_as_suffix)")
    yield "a mark of one character", ({"control_symbols": ["a"]}, "name is a single character")

    def same_score(proto):
        proto.pieces[-300].score = proto.pieces[-301].score

    def unused(proto):
        proto.pieces[300].type = proto.pieces[300].UNUSED

    def other_characters(proto):
        proto.pieces[300].piece += "各"

    def unescaped(proto):
        proto.normalizer_spec.escape_whitespaces = False

    def only_back(proto):
        rules = proto.normalizer_spec.precompiled_charsmap
        proto.denormalizer_spec.precompiled_charsmap = rules
        proto.normalizer_spec.precompiled_charsmap = b""

    for change, message in (
        (same_score, "it has different pieces of the same score"),
        (unused, "it has pieces that are not used"),
        (other_characters, "some of its pieces have characters that are no pieces"),
        (unescaped, "it writes spaces otherwise than before words"),
        (only_back, "it changes texts that it decodes"),
    ):
        rule = "nfkc" if change is only_back else "identity"
        values = {"change": change, "normalization_rule_name": rule}
        yield change.__name__, (values, message)


TRAINERS = dict(settings_of_trainers())
NASTY = (
    *("\0", "\t", "\n", "\r", " ", "  ", "   ", "\xa0", "\u3000", "\u2028", "\u200b", "\ufeff"),
    *("▁", "▁▁", "</s>", "<s>", "<unk>", "<0x41>", "[B]", "def", "self", "return", "<|call|>"),
    *("a", "b", "aba", "a b", "==", "(", "é", "e\u0301", "\u0301", "ｶﾞ", "ﾞ", "각", "ᄀ", "ᅡ", "ᆨ"),
    *("👩\u200d👩", "🙂", "🇫", "ﬁ", "①", "İ", "ß", "中", "\ufffd", "\U0010ffff", "\x7f", "⁇", "☒"),
)
TEXTS = st.lists(st.sampled_from(NASTY) | st.text(max_size=4), max_size=12).map("".join)
UNHURRIED = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150
)


def written(vocabulary, directory):
    tokenizers.write(vocabulary, directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_sentence_piece_model_makes_its_own_tokens_or_is_refused(tmp_path, name):
    values, message = TRAINERS[name]
    vocabulary = trained(tmp_path, **values)
    if message is not None:
        with pytest.raises(UserError) as error:
            tokenizers.write(vocabulary, tmp_path)
        assert str(error.value).startswith("a tokenizer.json cannot make the tokens of this Sente")
        assert message in str(error.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["trained.model"]
        return
    theirs = written(vocabulary, tmp_path)
    itself = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model)

    @given(text=TEXTS | st.text(alphabet="aab ", max_size=60), start=st.integers(0, 9))
    @example(text="", start=0)
    @example(text=TEXT[:30_000], start=0)
    @UNHURRIED
    def same(text, start):
        ids = itself.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs.decode(ids) == itself.decode(ids)
        if "▁" not in text:
            assert vocabulary.encode(text) == ids
        rest = ids[start:]
        if not any(map(itself.is_byte, rest)):  # which may be half a character
            assert theirs.decode(rest) == itself.decode(rest)

    same()


# --- All vocabularies ----------------------------------------------------------------------------

KINDS = {
    "ours": lambda directory: TrainedSentencePiece(600).train([TEXT]),
    "llama": trained,
    "bytes": lambda directory: Bytes(),
    "symbols": lambda directory: Symbols(("<s>", "a", "b", "</s>", "é")),
}


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """A vocabulary, and what transformers makes of the files written for it."""
    directory = tmp_path_factory.mktemp("tokenizer")
    vocabulary = KINDS[request.param](directory)
    return request.param, vocabulary, written(vocabulary, directory)


@given(text=TEXTS | st.text(alphabet=TEXT[:5000]))
@example(text="")
@example(text="<s> a </s>")
@example(text="<|begin_of_text|>a<|end_of_text|>")
@UNHURRIED
def test_the_same_tokens(both, text):
    kind, vocabulary, theirs = both
    if kind == "symbols":
        text = " ".join(re.findall("[abé]|</?s>", text))
    text = text.replace("▁", "")  # a space for SentencePiece, and no more for our vocabulary
    ours = vocabulary.encode(text)
    assert theirs(text, add_special_tokens=False).input_ids == ours
    assert theirs.decode(ours, skip_special_tokens=True) == vocabulary.decode(ours)


def test_marks(both):
    _, vocabulary, theirs = both
    assert theirs("a b").input_ids == encode_document(vocabulary, "a b")[:-1].tolist()
    assert theirs.eos_token_id == vocabulary.eos
    assert theirs.bos_token_id == vocabulary.bos
    assert len(theirs) == vocabulary.size
    ids = encode_document(vocabulary, "a b").tolist()
    assert theirs.decode(ids, skip_special_tokens=True) == "a b"


def test_a_whole_file(both):
    kind, vocabulary, theirs = both
    text = "a b é" if kind == "symbols" else TEXT[:50_000]
    assert theirs(text, add_special_tokens=False).input_ids == vocabulary.encode(text)


def test_a_tokenizer_json_stays_as_it_is(tmp_path, both):
    _, vocabulary, theirs = both
    theirs.save_pretrained(tmp_path / "a")
    ours = HuggingFaceTokenizer(tmp_path / "a" / "tokenizer.json")
    (tmp_path / "b").mkdir()
    tokenizers.write(ours, tmp_path / "b")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert again("a b").input_ids == theirs("a b").input_ids
    assert again.decode(again("a b").input_ids, skip_special_tokens=True) == "a b"


def test_a_tokenizer_json_with_dropout_is_written_without(tmp_path):
    """As ours leaves it out, so that a text has the same tokens each time."""
    bpe = ByteLevelBPETokenizer(dropout=0.5)
    bpe.train_from_iterator([TEXT], 400, special_tokens=["</s>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    ours = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    tokenizers.write(ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for _ in range(9):
        encoded = theirs(TEXT[:200], add_special_tokens=False).input_ids
        assert encoded == ours.encode(TEXT[:200])


def test_the_vocabulary_of_a_directory(tmp_path):
    assert tokenizers.vocabulary_of(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 257}')
    tokenizers.write(Bytes(), tmp_path)
    found = tokenizers.vocabulary_of(tmp_path)
    assert isinstance(found, HuggingFaceTokenizer)
    assert (found.bos, found.eos, found.size) == (Bytes.bos, Bytes.eos, Bytes.size)
    assert (found.ends, found.before, found.after) == ((257,), (Bytes.bos,), ())


def test_a_directory_of_ours_makes_transformers_say_nothing(tmp_path):
    values = config.content(PAPER, "float32", {"eos_token_id": 257})
    (tmp_path / "config.json").write_text(json.dumps(values))
    tokenizers.write(Bytes(), tmp_path)
    with warnings.catch_warnings(action="error"):
        assert tokenizers.vocabulary_of(tmp_path).size == Bytes.size

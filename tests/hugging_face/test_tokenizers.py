"""Tokenizers that transformers makes the same tokens with as our vocabularies do."""

import io
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fot_jax.data.vocabulary import (
    Bytes,
    HuggingFaceTokenizer,
    SentencePiece,
    Symbols,
    TrainedSentencePiece,
    frame,
)
from fot_jax.hugging_face import tokenizers

pytestmark = pytest.mark.torch
TEXT = "".join(
    file.read_text("utf-8", "replace")
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:20]
)


def trained(directory, **settings):
    """A SentencePiece model; like LLaMA's unless it is said otherwise."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        **settings,
    }
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=content, minloglevel=2, **settings
    )
    path = directory / "trained.model"
    path.write_bytes(content.getvalue())
    return SentencePiece(path)


KINDS = {
    "ours": lambda directory: TrainedSentencePiece(600).train([TEXT]),
    "llama": trained,
    "unigram": lambda directory: trained(directory, model_type="unigram"),
    "words of its own": lambda directory: trained(
        directory, user_defined_symbols=["<|call|>", "return"], add_dummy_prefix=False
    ),
    "bytes": lambda directory: Bytes(),
    "symbols": lambda directory: Symbols(("<s>", "a", "b", "</s>", "é")),
}


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """A vocabulary, and what transformers makes of the files written for it."""
    directory = tmp_path_factory.mktemp("tokenizer")
    vocabulary = KINDS[request.param](directory)
    tokenizers.write(vocabulary, directory)
    return request.param, vocabulary, transformers.AutoTokenizer.from_pretrained(directory)


ANY = st.text() | st.text(alphabet="ab \t\ndefr(é🙂") | st.text(alphabet=TEXT[:5000])


@given(text=ANY)
@example(text="")
@example(text=" a  b ")
@example(text="def f(x):\n    return x + 1\n")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_same_tokens(both, text):
    kind, vocabulary, theirs = both
    if kind == "symbols":
        text = " ".join(letter for letter in text if letter in "abé")
    # Null characters end a text for SentencePiece; a SPACE in a text is a space for tokenizers.
    text = text.replace("\0", "").replace("▁", "")
    ours = vocabulary.encode(text)
    assert theirs(text, add_special_tokens=False).input_ids == ours
    assert theirs.decode(ours) == vocabulary.decode(ours)


def test_marks(both):
    _, vocabulary, theirs = both
    assert theirs("a b").input_ids == frame(vocabulary, "a b")[:-1].tolist()
    assert theirs.eos_token_id == vocabulary.eos
    assert theirs.bos_token_id == vocabulary.bos
    assert len(theirs) == vocabulary.size
    ids = frame(vocabulary, "a b").tolist()
    assert theirs.decode(ids, skip_special_tokens=True) == "a b"


def test_a_whole_file(both):
    kind, vocabulary, theirs = both
    text = "a b é" if kind == "symbols" else TEXT[:50_000]
    assert theirs(text, add_special_tokens=False).input_ids == vocabulary.encode(text)


def test_normalized_texts(tmp_path):
    vocabulary = trained(
        tmp_path, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True
    )
    tokenizers.write(vocabulary, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a  b ", " ｆｕｌｌ width\u3000é", "x\ty"):
        assert theirs(text, add_special_tokens=False).input_ids == vocabulary.encode(text)


def test_a_tokenizer_json_stays_as_it_is(tmp_path, both):
    _, vocabulary, theirs = both
    theirs.save_pretrained(tmp_path / "a")
    ours = HuggingFaceTokenizer(tmp_path / "a" / "tokenizer.json")
    (tmp_path / "b").mkdir()
    tokenizers.write(ours, tmp_path / "b")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert again("a b").input_ids == theirs("a b").input_ids
    assert tokenizers.vocabulary_of(tmp_path / "b") == ours


def test_the_vocabulary_of_a_directory(tmp_path):
    assert tokenizers.vocabulary_of(tmp_path) is None
    model = trained(tmp_path)
    (tmp_path / "trained.model").rename(tmp_path / "tokenizer.model")
    assert tokenizers.vocabulary_of(tmp_path) == model
    tokenizers.write(Bytes(), tmp_path)
    found = tokenizers.vocabulary_of(tmp_path)
    assert isinstance(found, HuggingFaceTokenizer)
    assert (found.bos, found.eos, found.size) == (Bytes.bos, Bytes.eos, Bytes.size)

"""Vocabularies against the libraries they wrap, and what becomes of them on disk."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fot_jax.common.atomic import new_directory
from fot_jax.common.errors import UserError
from fot_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer
from fot_jax.data.saved_vocabulary import load_vocabulary
from fot_jax.data.sentencepiece_vocabulary import SentencePiece, TrainedSentencePiece
from fot_jax.data.vocabulary import Bytes, Symbols, encode_document


def python_sources(count=40):
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [file.read_text("utf-8", "replace") for file in files[:count]]


@pytest.fixture(scope="module")
def trained():
    return TrainedSentencePiece(600).train(python_sources())


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory):
    """A model like LLaMA's, that puts a space before texts and has bytes; as the library has it."""
    file = train_model(tmp_path_factory.mktemp("llama"), byte_fallback=True, vocab_size=600)
    return SentencePiece(file), sentencepiece.SentencePieceProcessor(model_file=str(file))


def train_model(directory, **settings):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain.from_iterable(t.splitlines() for t in python_sources(10)),
        model_prefix=str(directory / "model"),
        model_type="bpe",
        minloglevel=2,
        **settings,
    )
    return directory / "model.model"


SPECIAL = ("<s>", "</s>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>")


def write_tokenizer(directory, special=("<s>", "</s>"), config=None, change=lambda tokenizer: None):
    """A byte-level tokenizer.json, and a tokenizer_config.json beside it where one is given."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(python_sources(5), trainer)
    change(tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory / "tokenizer.json"


# --- Encoding and decoding -----------------------------------------------------------------------


@settings(deadline=None)
@given(st.text())
def test_bytes_are_utf8(text):
    vocabulary = Bytes()
    assert vocabulary.encode(text) == list(text.encode())
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert max(*vocabulary.encode(text), vocabulary.bos, vocabulary.eos) < vocabulary.size


any_text = st.one_of(
    st.text(),
    st.text(alphabet="a ▁\t\n\r\0é\u3000🙂"),
    st.lists(st.sampled_from(["<s>", "</s>", "<unk>", "<0x0A>", "def", "    ", " "])).map("".join),
)


@settings(deadline=None)
@given(any_text)
@example(" leading and trailing ")
@example("▁ ▁")
@example("")
@example("\ufeff\ufffd\u2028")
def test_any_text_comes_back_from_a_trained_vocabulary(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not {trained.bos, trained.eos} & set(ids)
    assert all(0 <= i < trained.size for i in ids)
    if "▁" not in text:  # which the library takes for a space
        processor = sentencepiece.SentencePieceProcessor(model_proto=trained.model)
        assert ids == processor.encode(text)


def test_trained_vocabulary(trained):
    assert trained.size == 600
    assert trained == TrainedSentencePiece(600).train(python_sources())
    assert trained != TrainedSentencePiece(601).train(python_sources())
    source = "".join(python_sources())
    assert len(trained.encode(source)) < len(source) / 2  # half as many tokens
    assert len(trained.encode("        ")) == 1  # an indentation


@pytest.mark.parametrize(
    ("pieces", "texts", "message"),
    [
        (1024, [], "0 characters of text: the training split is empty"),
        (1024, ["ab ab"], r"the text is enough for at most 26\d: set .*pieces to it"),
        (300, [chr(0x4E00 + i) for i in range(400)], "need 659 or more: raise .*pieces"),
    ],
)
def test_too_little_or_too_varied_text_to_train_on(pieces, texts, message):
    with pytest.raises(UserError, match=message):
        TrainedSentencePiece(pieces).train(texts)


@settings(deadline=None)
@given(text=any_text)
def test_a_model_file_encodes_as_the_library_does(llama_like, text):
    vocabulary, processor = llama_like
    assert vocabulary.encode(text) == processor.encode(text)
    assert vocabulary.decode(vocabulary.encode(text)) == processor.decode(processor.encode(text))
    marks = (processor.get_piece_size(), processor.bos_id(), processor.eos_id())
    assert (vocabulary.size, vocabulary.bos, vocabulary.eos) == marks


@settings(deadline=None)
@given(text=st.text())
@example(text="in a text, <s> and </s> are marks")
def test_hugging_face_tokenizer_encodes_as_the_library_does(hugging_face, text):
    path, vocabulary = hugging_face
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    ids = vocabulary.encode(text)
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert vocabulary.decode(ids) == re.sub("</?s>", "", text)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    path = write_tokenizer(tmp_path_factory.mktemp("hugging_face"))
    return path, HuggingFaceTokenizer(path)


def test_a_tokenizer_that_was_saved_with_padding_and_truncation_does_neither(tmp_path):
    def change(tokenizer):
        tokenizer.enable_padding(length=50)
        tokenizer.enable_truncation(3)

    vocabulary = HuggingFaceTokenizer(write_tokenizer(tmp_path, change=change))
    assert vocabulary.decode(vocabulary.encode("one two three four")) == "one two three four"
    assert len(vocabulary.encode("a")) == 1


def test_a_tokenizer_that_was_saved_with_dropout_gives_the_same_tokens_each_time(tmp_path):
    plain = HuggingFaceTokenizer(write_tokenizer(tmp_path / "plain"))

    def change(tokenizer):
        tokenizer.model.dropout = 0.5

    other = HuggingFaceTokenizer(write_tokenizer(tmp_path / "other", change=change))
    assert b'"dropout":0.5' in re.sub(rb"\s", b"", other.tokenizer)
    assert [other.encode("one two three")] * 20 == [plain.encode("one two three")] * 20


def test_a_tokenizer_without_a_decoder(tmp_path):
    path = write_tokenizer(tmp_path)
    content = json.loads(path.read_text())
    del content["decoder"]
    path.write_text(json.dumps(content))
    vocabulary = HuggingFaceTokenizer(path)
    assert vocabulary.settled(vocabulary.encode("one"))


def test_the_size_covers_tokens_added_beyond_the_model(tmp_path):
    path = write_tokenizer(tmp_path, change=lambda tokenizer: tokenizer.add_tokens(["extra"]))
    vocabulary = HuggingFaceTokenizer(path)
    assert vocabulary.encode("extra") == [vocabulary.size - 1]


def test_symbols():
    vocabulary = Symbols(("<s>", "a", "bb", "</s>"))
    assert (vocabulary.size, vocabulary.bos, vocabulary.eos) == (4, 0, 3)
    assert vocabulary.encode("bb a  bb") == [2, 1, 2]
    assert vocabulary.decode([0, 2, 1, 3, 99]) == "bb a"
    assert Symbols(("a", "</s>")).bos is None
    with pytest.raises(UserError, match="'c' is none of the 4 symbols"):
        vocabulary.encode("a c")
    for names in (("a", "b"), ("a", "a", "</s>")):
        with pytest.raises(ValueError, match="all different"):
            Symbols(names)


def all_kinds(tmp_path, trained):
    return [
        Bytes(),
        Symbols(("<s>", "</s>", "a")),
        trained,
        HuggingFaceTokenizer(write_tokenizer(tmp_path / "source")),
    ]


def test_marks_and_unknown_ids_decode_to_nothing(tmp_path, trained):
    for vocabulary in all_kinds(tmp_path, trained):
        beyond = [-1, vocabulary.size, vocabulary.size + 7]
        ids = [vocabulary.bos, *vocabulary.encode("a"), vocabulary.eos, *beyond]
        assert vocabulary.decode(np.array(ids)) == "a"


def test_documents_have_their_marks(tmp_path, trained):
    for vocabulary in all_kinds(tmp_path, trained):
        tokens = encode_document(vocabulary, "a")
        assert tokens.dtype == np.int32
        assert tokens.tolist() == [vocabulary.bos, *vocabulary.encode("a"), vocabulary.eos]
    without_bos = Symbols(("a", "</s>"))
    assert encode_document(without_bos, "a").tolist() == [1, 0, 1]  # eos instead


# --- Which marks a tokenizer has -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("special", "config", "named", "bos", "eos"),
    [
        (SPECIAL, None, {}, "<s>", "</s>"),
        (SPECIAL[2:], None, {}, "<|begin_of_text|>", "<|end_of_text|>"),
        (SPECIAL[2:3], None, {}, None, "<|endoftext|>"),
        (SPECIAL, None, {"bos": "</s>", "eos": "<|endoftext|>"}, "</s>", "<|endoftext|>"),
        (SPECIAL, {"bos_token": "</s>", "eos_token": "<s>"}, {}, "</s>", "<s>"),
        (SPECIAL, {"eos_token": {"content": "<|endoftext|>"}}, {}, None, "<|endoftext|>"),
        (SPECIAL, {"bos_token": None, "eos_token": "</s>"}, {"eos": "<s>"}, None, "<s>"),
    ],
)
def test_marks_of_a_hugging_face_tokenizer(tmp_path, special, config, named, bos, eos):
    vocabulary = HuggingFaceTokenizer(write_tokenizer(tmp_path, special, config), **named)
    assert vocabulary.bos == (None if bos is None else special.index(bos))
    assert vocabulary.eos == special.index(eos)
    vocabulary.save(tmp_path / "saved")
    assert load_vocabulary(tmp_path / "saved") == vocabulary


def test_saved_before_marks_were(tmp_path):
    """A tokenizer.json with names of its marks: begins with bos, or eos, and ends at eos."""
    vocabulary = HuggingFaceTokenizer(write_tokenizer(tmp_path / "a"))
    vocabulary.save(tmp_path / "saved")
    path = tmp_path / "saved" / "vocabulary.json"
    saved = json.loads(path.read_text())
    assert isinstance(saved.pop("crc32"), int)  # later still
    assert saved.pop("version") == 1  # later still
    assert saved.keys() == {"kind", "sha256"}
    marks = {"ends": [1, 7], "before": [], "after": [0]}
    path.write_text(json.dumps(saved | {"marks": marks, "splits_marks": True}))
    newer = load_vocabulary(tmp_path / "saved")
    assert (newer.ends, newer.before, newer.after) == ((1, 7), (), (0,))
    assert (vocabulary.ends, vocabulary.before, vocabulary.after) == ((1,), (0,), ())
    assert newer.encode("</s>") != vocabulary.encode("</s>") == [1]
    for damaged in ({"marks": 3}, {"marks": {"ends": [1]}}, {"infilling": {"gap": "x"}}):
        path.write_text(json.dumps(saved | damaged))
        with pytest.raises(UserError, match="vocabulary.json: damaged"):
            load_vocabulary(tmp_path / "saved")


def test_marks_that_are_not_known(tmp_path):
    path = write_tokenizer(tmp_path, special=["<end>"])
    with pytest.raises(UserError, match="which token ends a text is not known: add eos_token"):
        HuggingFaceTokenizer(path)
    assert HuggingFaceTokenizer(path, eos="<end>").eos == 0
    with pytest.raises(UserError, match="has no token '<no>': set bos and eos"):
        HuggingFaceTokenizer(path, bos="<no>", eos="<end>")


def test_marks_of_a_sentencepiece_model(tmp_path):
    vocabulary = SentencePiece(train_model(tmp_path, vocab_size=300, bos_id=-1))
    assert vocabulary.bos is None
    assert encode_document(vocabulary, "a")[[0, -1]].tolist() == [vocabulary.eos] * 2
    with pytest.raises(UserError, match="the model has no end mark"):
        SentencePiece(train_model(tmp_path, vocab_size=300, eos_id=-1))


# --- Files ---------------------------------------------------------------------------------------


def test_saved_vocabularies_come_back_equal(tmp_path, trained):
    for vocabulary in all_kinds(tmp_path, trained):
        vocabulary.save(tmp_path / "saved")  # over the one before
        loaded = load_vocabulary(str(tmp_path / "saved"))
        assert loaded == vocabulary and hash(loaded) == hash(vocabulary)
        assert loaded.encode("a") == vocabulary.encode("a")
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "source"}


def test_files_that_are_no_tokenizers(tmp_path):
    (tmp_path / "text").write_text("plain text")
    (tmp_path / "empty").write_bytes(b"")
    for kind in (SentencePiece, HuggingFaceTokenizer):
        with pytest.raises(UserError, match="missing: no such file: give the path"):
            kind(tmp_path / "missing")
        with pytest.raises(UserError, match="cannot be read: Is a directory"):
            kind(tmp_path)
        for name in ("text", "empty"):
            with pytest.raises(
                UserError, match=rf"{name}: (not a |the model has no end).*"
            ) as info:
                kind(tmp_path / name)
            assert "\n" not in str(info.value)


def test_a_flipped_bit_of_vocabulary_json_is_seen(tmp_path):
    """Any, but for those that are none of what it says."""
    Symbols(("<s>", "</s>", "a", "b")).save(tmp_path)
    path = tmp_path / "vocabulary.json"
    whole, sound = path.read_bytes(), load_vocabulary(tmp_path)
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert load_vocabulary(tmp_path) == sound
        except UserError as error:
            assert str(path) in str(error)
    path.write_bytes(whole.replace(b'"a"', b'"c"'))
    with pytest.raises(UserError, match="vocabulary.json: damaged: it is not what was saved"):
        load_vocabulary(tmp_path)


def test_damaged_vocabularies(tmp_path, trained):
    saved, copy = tmp_path / "saved", tmp_path / "copy"
    trained.save(saved)

    def damaged(name, content):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(saved, copy)
        (copy / name).write_bytes(content)
        return copy

    model = (saved / "tokenizer.model").read_bytes()
    cases = [
        (tmp_path / "none", "no vocabulary here"),
        (("tokenizer.model", model[:-1]), "tokenizer.model: damaged: its checksum"),
        (("vocabulary.json", b'{"kind": '), "vocabulary.json: damaged, not JSON"),
        (("vocabulary.json", b"\xff"), "vocabulary.json: damaged, not JSON"),
        (("vocabulary.json", b"[]"), "vocabulary.json: not a JSON object"),
        (("vocabulary.json", b"{}"), "unknown kind None"),
        (("vocabulary.json", b'{"kind": "Pickle"}'), "unknown kind 'Pickle'"),
        (("vocabulary.json", b'{"sha256": {"gone": ""}}'), "gone: no such file"),
    ]
    for where, message in cases:
        directory = damaged(*where) if isinstance(where, tuple) else where
        with pytest.raises(UserError, match=message) as info:
            load_vocabulary(directory)
        assert "\n" not in str(info.value)


def test_a_directory_is_written_whole_or_not_at_all(tmp_path):
    Bytes().save(tmp_path / "vocabulary")
    with pytest.raises(KeyboardInterrupt):
        with new_directory(tmp_path / "vocabulary", "vocabulary.json") as half:
            (half / "vocabulary.json").write_text("half")
            raise KeyboardInterrupt
    assert load_vocabulary(tmp_path / "vocabulary") == Bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["vocabulary"]
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        Bytes().save(tmp_path / "vocabulary" / "vocabulary.json" / "below a file")


def test_importing_it_imports_no_framework_and_no_tokenizer():
    code = "import sys, fot_jax.data.vocabulary; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"tensorflow", "seqio", "jax", "torch", "sentencepiece", "tokenizers"}
    assert not heavy & set(run.stdout.split())

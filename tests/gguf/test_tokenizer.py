"""Tokenizers in .gguf files against those that they were made of, by the libraries of their own."""

import functools
import io
import json
import sysconfig
from pathlib import Path

import ggufs
import llamas
import pytest
import sentencepiece
import transformers
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from fot_jax.cli import main
from fot_jax.data.vocabulary import encode_prompt
from fot_jax.gguf import tokenizer
from fot_jax.gguf.weights import File
from fot_jax.inference.language_model import LanguageModel

pytestmark = pytest.mark.torch
SOURCES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
MARKS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            [*MARKS, " ", "  ", "\n", "\t", "'s", "'LL", "12345", "word", "Ünï", "日本", "é́"]
            + ["camelCase", "हिन्दी", "./a", "?\r\n"]
        )
    ).map("".join),
)


# --- Byte pairs ----------------------------------------------------------------------------------


def split(*patterns):
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


def words(*before, own=False):
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)
    return pre_tokenizers.Sequence([*before, last])


LLAMA3 = (  # as in the tokenizer.json of each model
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MISTRAL_NEMO = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
WORDS = {
    "llama-bpe": words(*split(LLAMA3)),
    "tekken": words(*split(MISTRAL_NEMO)),
    "gpt-2": words(own=True),
    "smollm": words(DIGITS, own=True),
    "deepseek-coder": words(
        *split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"), DIGITS
    ),
}


@functools.cache
def trained(named):
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer, theirs.decoder = WORDS[named], decoders.ByteLevel()
    theirs.train(
        [str(file) for file in SOURCES],
        trainers.BpeTrainer(
            vocab_size=600,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=MARKS,
            show_progress=False,
        ),
    )
    return theirs


def byte_pairs(named, theirs, **settings):
    def add(writer):
        model = json.loads(theirs.to_str())["model"]
        tokens = sorted(model["vocab"], key=model["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(named)
        writer.add_token_list(tokens)
        kinds = [TokenType.CONTROL] * len(MARKS)
        writer.add_token_types([*kinds, *[TokenType.NORMAL] * (len(tokens) - len(kinds))])
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        for name, value in settings.items():
            getattr(writer, f"add_{name}")(value)

    return add


def without(name, add):
    def changed(writer):
        add(writer)
        del writer.kv_data[0][f"tokenizer.ggml.{name}"]

    return changed


def written(path, add, **config):
    ggufs.write(path, llamas.make(**config), tokenizer=add)
    return File(path)


@pytest.mark.parametrize("named", WORDS)
def test_byte_pairs(tmp_path_factory, named):
    theirs = trained(named)
    path = tmp_path_factory.mktemp("bpe") / "a.gguf"
    ours = tokenizer.vocabulary_of(written(path, byte_pairs(named, theirs)))
    assert ours.before == ((1,) if named in ("llama-bpe", "tekken") else ())
    assert ours.ends == (2, MARKS.index("<|im_end|>")) and ours.size == theirs.get_vocab_size()
    cut = Tokenizer.from_buffer(ours.tokenizer).pre_tokenizer.pre_tokenize_str

    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def same(text):
        tokens = theirs.encode(text).ids
        assert ours.encode(text) == tokens
        assert cut(text) == theirs.pre_tokenizer.pre_tokenize_str(text)  # few words are tokens
        assert ours.decode(tokens) == theirs.decode([i for i in tokens if i >= len(MARKS)])

    same()


# --- SentencePiece -------------------------------------------------------------------------------


@functools.cache
def piece_model(prefix):
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for file in SOURCES for line in file.read_text().splitlines()),
        model_writer=content,
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        minloglevel=2,
    )
    return content.getvalue()


def pieces(model, user_defined=(), **settings):
    def add(writer):
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        of = type(proto.pieces[0])
        kinds = {of.NORMAL: 1, of.UNKNOWN: 2, of.CONTROL: 3, of.BYTE: 6}
        types = [kinds[piece.type] for piece in proto.pieces]
        writer.add_tokenizer_model("llama")
        writer.add_token_list([piece.piece for piece in proto.pieces] + [*user_defined])
        writer.add_token_scores([piece.score for piece in proto.pieces] + [0.0] * len(user_defined))
        writer.add_token_types(types + [TokenType.USER_DEFINED] * len(user_defined))
        writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
        for name, value in settings.items():
            getattr(writer, f"add_{name}")(*value if isinstance(value, tuple) else (value,))

    return add


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece(tmp_path_factory, prefix):
    theirs = sentencepiece.SentencePieceProcessor(model_proto=piece_model(prefix))
    path = tmp_path_factory.mktemp("pieces") / "a.gguf"
    ours = tokenizer.vocabulary_of(written(path, pieces(piece_model(prefix))))
    assert (ours.before, ours.ends, ours.bos, ours.eos) == ((1,), (2,), 1, 2)

    @settings(max_examples=300, deadline=None)
    @given(TEXTS.filter(lambda text: not any(mark in text for mark in MARKS[:3])))
    def same(text):
        tokens = theirs.encode(text)
        assert ours.encode(text) == tokens
        assert ours.decode(tokens) == theirs.decode(tokens)

    same()


def test_what_is_added_to_it(tmp_path):
    """Found in a text before all else; what is between is tokenized by itself."""
    theirs = sentencepiece.SentencePieceProcessor(model_proto=piece_model(True))
    add = pieces(piece_model(True), ("<tool>", "  "))
    ours = tokenizer.vocabulary_of(written(tmp_path / "a.gguf", add))
    tool, two_spaces = 900, 901
    assert ours.encode("if<tool>self  x") == [
        *theirs.encode("if"),
        tool,
        *theirs.encode("self"),
        two_spaces,
        *theirs.encode("x"),
    ]


def test_an_end_that_the_file_calls_an_ordinary_text(tmp_path):
    """As chat models made from others have it: llama.cpp ends a text there all the same."""
    names = ("<|im_end|>", "<tool>", "<reponame>", "<|file_sep|>")  # the last two by their roles
    add = pieces(piece_model(True), names)
    ours = tokenizer.vocabulary_of(written(tmp_path / "a.gguf", add))
    assert ours.ends == (2, 900, 902, 903)
    assert ours.decode([900]) == "" and ours.decode([901]) == "<tool>"
    add = pieces(piece_model(True), names, uint32=("tokenizer.ggml.fim_rep_token_id", 901))
    assert tokenizer.vocabulary_of(written(tmp_path / "b.gguf", add)).ends == (2, 901, 900, 903)


# --- Whole files ---------------------------------------------------------------------------------


def test_there_and_back(tmp_path):
    add = byte_pairs(
        "smollm",
        trained("smollm"),
        add_bos_token=True,
        add_eos_token=True,
        eot_token_id=3,
        pad_token_id=4,
        unk_token_id=0,
        name="Some Model",
        license="other",
        license_name="llama3.1",
        license_link="LICENSE",
        chat_template="{{ messages[0]['content'] }}",
    )
    written(tmp_path / "a.gguf", add, vocab_size=640)
    assert main(["convert", "from-hf", str(tmp_path / "a.gguf"), str(tmp_path / "b")]) == 0
    lm = LanguageModel.load(tmp_path / "b")
    assert lm.vocabulary.ends == (2, 3, 4)  # one by its name
    assert main(["convert", "to-hf", str(tmp_path / "b"), str(tmp_path / "c")]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "c")
    for text in ("", "a text of 123", "<|im_start|>user\nis ", "日本\n\n"):
        wanted = [1, *trained("smollm").encode(text).ids, 2]
        assert encode_prompt(lm.vocabulary, text) == wanted == theirs(text)["input_ids"]
    assert theirs.chat_template == "{{ messages[0]['content'] }}"
    generation = json.loads((tmp_path / "c" / "generation_config.json").read_text())
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    for values in (generation, config):
        assert (values["eos_token_id"], values["pad_token_id"]) == ([2, 3, 4], 4)
    assert (theirs.pad_token_id, theirs.unk_token_id) == (4, 0)
    card = (tmp_path / "c" / "README.md").read_text()
    assert "license_name: llama3.1\nlicense_link: LICENSE\n" in card
    assert "derive from Some Model, whose licence is llama3.1." in card


@pytest.mark.parametrize(
    "add, line",
    [
        (
            lambda: byte_pairs("falcon", trained("gpt-2")),
            "tokenizer.ggml.pre = 'falcon': how it cuts texts into words is not known here",
        ),
        (
            lambda: byte_pairs("gpt-2", trained("gpt-2"), tokenizer_model="bert"),
            "tokenizer.ggml.model = 'bert' is not supported: have 'gpt2', 'llama'",
        ),
        (
            lambda: byte_pairs("gpt-2", trained("gpt-2"), eos_token_id=9999),
            "tokenizer.ggml.eos_token_id is missing",
        ),
        (
            lambda: pieces(piece_model(True), token_scores=[-1000.0] * 900),
            "have the same score, so which comes first is not known",
        ),
        (lambda: pieces(piece_model(True), remove_extra_whitespaces=True), "removes spaces"),
        (
            lambda: byte_pairs("gpt-2", trained("gpt-2"), token_merges=["a b", "zz zz"]),
            "its merge 'zz zz' is of no tokens that it has: get the file again",
        ),
        (
            lambda: byte_pairs("gpt-2", trained("gpt-2"), token_merges=["a b", "a"]),
            "its merge 'a' is of no tokens that it has: get the file again",
        ),
        (
            lambda: pieces(piece_model(True), token_types=[1] * 899 + [9]),
            "the type of token 899 is 9, which is none: get the file again",
        ),
        (lambda: pieces(piece_model(True), token_types=[1, 2]), "has types of 2 of its 900 tokens"),
        (lambda: without("token_type", pieces(piece_model(True))), "has no types of tokens"),
        (
            lambda: without("merges", byte_pairs("gpt-2", trained("gpt-2"))),
            "its tokenizer has no merges: get the file again",
        ),
    ],
    ids=[
        "words",
        "kind",
        "eos",
        "scores",
        "spaces",
        "merges",
        "no pair",
        "type",
        "types",
        "no types",
        "no merges",
    ],
)
def test_what_is_refused(tmp_path, capsys, add, line):
    written(tmp_path / "a.gguf", add())
    assert main(["convert", "from-hf", str(tmp_path / "a.gguf"), str(tmp_path / "b")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said and not (tmp_path / "b").exists()

"""Made-up documents, read back by a parser written from the description of the tasks."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fot_jax.common.configurable import configurables_of
from fot_jax.common.errors import UserError
from fot_jax.data import synthetic
from fot_jax.data.lanes import Lanes
from fot_jax.data.sentencepiece_vocabulary import TrainedSentencePiece
from fot_jax.data.synthetic import (
    FILLER,
    PASSKEY_QUESTION,
    TASK,
    DictionaryLookup,
    Passkey,
    passkey_prompt,
)
from fot_jax.data.vocabulary import Bytes, Symbols

SOURCES = (DictionaryLookup(document_tokens=80), Passkey(document_tokens=700))


def take(source, n, shard=0, shards=1, seed=0, position=(0, 0)):
    """n times (position after, document)."""
    return list(itertools.islice(source.stream(shard, shards, seed, position), n))


def contents(documents):
    return [(document.tokens.tobytes(), document.weights.tobytes()) for document in documents]


# --- Both sources --------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_documents_have_the_promised_types(source):
    for document in (*(d for _, d in take(source, 3)), *source.documents("valid")):
        assert document.tokens.dtype == np.int32 and document.weights.dtype == np.float32
        assert document.tokens.shape == document.weights.shape
        assert document.tokens.min() >= 0 and document.tokens.max() < source.vocabulary.size


@pytest.mark.parametrize("source", SOURCES)
def test_a_stream_is_a_function_of_its_arguments_and_goes_on_from_any_position(source):
    whole = take(source, 12, shard=1, shards=3, seed=5)
    assert [position for position, _ in whole] == [(0, n) for n in range(1, 13)]
    again = dataclasses.replace(source)
    for n in range(9):
        rest = take(again, 3, shard=1, shards=3, seed=5, position=(0, n))
        assert [position for position, _ in rest] == [(0, n + i) for i in (1, 2, 3)]
        assert contents(d for _, d in rest) == contents(d for _, d in whole[n : n + 3])


@pytest.mark.parametrize("source", SOURCES)
def test_shards_seeds_and_splits_draw_different_documents(source):
    source = dataclasses.replace(source, eval_documents=8)  # few: pass keys repeat by chance
    parts = [take(source, 8, shard, shards=3, seed=seed) for shard in range(3) for seed in (0, 1)]
    documents = [document for part in parts for _, document in part]
    documents += [*source.documents("valid"), *source.documents("test")]
    assert len(set(contents(documents))) == len(documents) == 48 + 16


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shards", [2, 3])
def test_shards_together_are_the_same_documents(source, shards):
    by_shard = [take(source, 12 // shards, shard, shards) for shard in range(shards)]
    together = [document for at_once in zip(*by_shard, strict=True) for _, document in at_once]
    assert contents(together) == contents(document for _, document in take(source, 12))


@pytest.mark.parametrize("source", SOURCES)
def test_splits_are_finite_and_fixed(source):
    source = dataclasses.replace(source, eval_documents=5)
    for split in ("train", "valid", "test"):
        documents = contents(source.documents(split))
        assert len(documents) == 5
        assert documents == contents(source.documents(split))
    assert contents(source.documents("train")) == contents(d for _, d in take(source, 5))
    with pytest.raises(UserError, match="no split 'validation'.*'valid'"):
        source.documents("validation")


def test_gin_is_given_every_source():
    assert {type(source) for source in SOURCES} == configurables_of(synthetic).keys()


# --- Dictionary lookup ---------------------------------------------------------------------------


def parse_records(words, mark, key_length, value_length):
    """[(key, value, where the value starts)] and what is left when no more record starts."""
    pattern = [mark, *[None] * key_length, "<v>", *[None] * value_length]
    records, at = [], 0
    while at < len(words) and words[at] == mark:
        record = words[at : at + len(pattern)]
        assert len(record) == len(pattern)
        for word, expected in zip(record, pattern, strict=True):
            assert word == expected if expected else re.fullmatch("[0-9a-zA-X]", word)
        key, value = record[1 : 1 + key_length], record[2 + key_length :]
        records.append((tuple(key), tuple(value), at + 2 + key_length))
        at += len(pattern)
    return records, words[at:]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(1, 10), st.integers(1, 6), st.integers(0, 2**40))
def test_every_question_is_answered_by_its_definition(more_tokens, key_length, value_length, seed):
    record = 2 + key_length + value_length
    source = DictionaryLookup(2 * record + more_tokens, key_length, value_length)
    half = source.document_tokens // 2
    for _, document in take(source, 2, seed=seed):
        words = [source.vocabulary.names[token] for token in document.tokens]
        assert len(words) == source.document_tokens + 1
        shape = (key_length, value_length)
        definitions, rest = parse_records(words[:half], "<k>", *shape)
        questions, end = parse_records(words[half:], "<q>", *shape)
        assert set(rest) | set(end) <= {"</s>"} and words[-1] == "</s>"
        assert len(rest) < record and len(definitions) == len(questions)
        dictionary = {key: value for key, value, _ in definitions}
        assert len(dictionary) == len(definitions) == half // record
        assert {key: value for key, value, _ in questions} == dictionary
        scored = {half + at + i for _, _, at in questions for i in range(value_length)}
        assert set(np.flatnonzero(document.weights)) == scored
        assert set(document.weights) == {0.0, 1.0}


def test_the_papers_documents():
    source = DictionaryLookup()
    assert source.vocabulary.size == 64
    documents = list(source.documents("test"))
    assert all(len(document.tokens) == 513 for document in documents)
    assert all(document.weights.sum() == 4 * 25 for document in documents)
    assert {token for document in documents for token in document.tokens} == set(range(64))


def test_symbols_places_and_orders_are_drawn_evenly():
    source = DictionaryLookup(document_tokens=4 * 512)
    tokens = np.stack([document.tokens for _, document in take(source, 100)])
    records = tokens[:, :1020].reshape(100, 102, 10)
    for place in (1, 2, 3, 4, 6, 7, 8, 9):  # 10200 draws of 60 symbols: 170 each, give or take 13
        count = np.bincount(records[:, :, place].ravel(), minlength=64)
        assert (count[:4] == 0).all() and count[4:].min() > 100 and count[4:].max() < 240
    questions = tokens[:, 1024:2044].reshape(100, 102, 10)
    asked = (questions[:, :, None, 1:5] == records[:, None, :, 1:5]).all(-1).argmax(-1)
    assert (asked == np.arange(102)).mean() < 0.05  # 1 in 102 stays in its place
    assert abs(np.corrcoef(asked.ravel(), np.tile(np.arange(102), 100))[0, 1]) < 0.05


@pytest.mark.parametrize("window", [128, 256, 512])
def test_documents_stay_aligned_with_windows(window):
    names = np.array(DictionaryLookup.vocabulary.names)
    lanes = Lanes(DictionaryLookup(), lanes=3, window=window)
    for document in (1, 2, 3):
        batches = [next(lanes) for _ in range(512 // window)]
        inputs = np.concatenate([batch["inputs"] for batch in batches], axis=1)
        assert (names[inputs[:, 0]] == "<k>").all() and (names[inputs[:, 256]] == "<q>").all()
        assert all((batch["segment_ids"] == document).all() for batch in batches)
        assert (sum(batch["weights"].sum(1) for batch in batches) == 100).all()


def test_few_keys_are_all_used():
    source = DictionaryLookup(document_tokens=2 * 60 * 4, key_length=1, value_length=1)
    (_, document), *_ = take(source, 1)
    assert sorted(document.tokens[1:240:4]) == list(range(4, 64))


def test_hard_negatives():
    """Keys of four documents in a row, over all shards, are of the same 12 symbols, none twice."""
    plain, near = DictionaryLookup(), DictionaryLookup(near_documents=4)
    shards = [take(near, 8, shard, shards=2) for shard in range(2)]
    documents = [document for pair in zip(*shards, strict=True) for _, document in pair]
    of_block = []
    for block in range(4):
        keys = [
            d.tokens[:250].reshape(25, 10)[:, 1:5] for d in documents[4 * block : 4 * block + 4]
        ]
        symbols = set(np.concatenate(keys).reshape(-1).tolist())
        assert len(symbols) == 12 and len({tuple(key) for key in np.concatenate(keys)}) == 100
        of_block.append(frozenset(symbols))
    assert len(set(of_block)) == 4
    values = {x for d in documents for x in d.tokens[:250].reshape(25, 10)[:, 6:].flat}
    assert len(values) == 60
    assert contents(near.documents("valid")) == contents(plain.documents("valid"))


def test_the_dictionary_has_its_own_vocabulary(tmp_path):
    source = DictionaryLookup()
    assert source.with_vocabulary(Symbols(source.vocabulary.names)) == source
    with pytest.raises(UserError, match="DictionaryLookup.*64 symbols.*258 tokens"):
        source.with_vocabulary(Bytes())


# --- Pass keys -----------------------------------------------------------------------------------

PROMPT = re.compile(
    r"There is an important info hidden inside a lot of irrelevant text\. "
    r"Find it and memorize them\. I will quiz you about the important information there\. "
    r"(?P<before>(?:<filler> )*)"
    r"The pass key is (?P<key>\d{5})\. Remember it\. (?P=key) is the pass key\. "
    r"(?P<after>(?:<filler> )*)"
    r"What is the pass key\? The pass key is (?P<answer>\d{5})".replace(
        "<filler>",
        r"The grass is green\. The sky is blue\. The sun is yellow\. "
        r"Here we go\. There and back again\.",
    )
)
FILLER_LENGTH = 90  # with the space after it


def parse_passkey(text):
    """(repetitions before, repetitions after, key), once the answer has been checked."""
    match = PROMPT.fullmatch(text)
    assert match["answer"] == match["key"]
    return *(len(match[part]) // FILLER_LENGTH for part in ("before", "after")), match["key"]


@settings(max_examples=50, deadline=None)
@given(st.integers(263, 3000), st.floats(0, 1, width=32), st.integers(0, 2**40))
def test_passkey_documents_are_the_prompt_and_its_answer(document_tokens, weight, seed):
    source = Passkey(document_tokens, filler_weight=weight)
    for _, (tokens, weights) in take(source, 2, seed=seed):
        assert tokens[0] == Bytes.bos and tokens[-1] == Bytes.eos
        before, after, key = parse_passkey(bytes(tokens[1:-1].tolist()).decode())
        assert document_tokens - FILLER_LENGTH < len(tokens) - 1 <= document_tokens
        assert bytes(tokens[-7:-1].tolist()).decode() == f" {key}"
        assert (weights[-7:-1] == 1).all()
        assert (weights[:-7] == weight).all() and weights[-1] == weight
        text = f"{passkey_prompt(int(key), [FILLER] * before, [FILLER] * after)} {key}"
        assert text.encode() == bytes(tokens[1:-1].tolist())


def test_keys_and_their_places_vary():
    source = Passkey(document_tokens=1000)
    texts = [source.vocabulary.decode(document.tokens) for _, document in take(source, 200)]
    before, after, keys = zip(*map(parse_passkey, texts), strict=True)
    fillers = {b + a for b, a in zip(before, after, strict=True)}
    assert len(fillers) == 1
    assert set(before) == set(range(max(fillers) + 1))
    assert len(set(keys)) > 190


def test_training_and_evaluations_have_different_numbers():
    source = Passkey(document_tokens=300, eval_documents=300)

    def keys(documents):
        texts = (source.vocabulary.decode(document.tokens) for document in documents)
        return [int(parse_passkey(text)[2]) for text in texts]

    asked = keys([*source.documents("valid"), *source.documents("test")])
    trained = keys(document for _, document in take(source, 600))
    assert all(key % 7 == 0 for key in asked) and all(key % 7 for key in trained)
    assert len(set(asked)) > 500 and len(set(trained)) > 590
    for drawn in (asked, trained):
        assert min(drawn) >= 10_000 and max(drawn) <= 99_999
        assert {key % 10 for key in drawn} == set(range(10))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text("abc .", min_size=1).filter(str.strip), min_size=1, max_size=4),
    st.integers(263, 1500),
    st.integers(0, 2**40),
)
def test_several_fillers(fillers, document_tokens, seed):
    """Each is drawn, none fits any more that was drawn next; the number is anywhere among them."""
    source = Passkey(document_tokens, fillers)
    for _, (tokens, weights) in take(source, 2, seed=seed):
        text = bytes(tokens[1:-1].tolist()).decode()
        key = int(bytes(tokens[weights > 0].tolist()).decode())
        longest = 1 + max(map(len, fillers))
        assert document_tokens - longest < len(tokens) - 1 <= document_tokens
        before, after = text.removeprefix(passkey_prompt(key, [], [])[: len(TASK) + 1]).split(
            f"The pass key is {key}. Remember it. {key} is the pass key. "
        )
        after = after.removesuffix(f"{PASSKEY_QUESTION} {key}")
        anything = "|".join(re.escape(f"{filler} ") for filler in fillers)
        assert all(re.fullmatch(f"({anything})*", part) for part in (before, after))


def test_fillers_are_drawn_evenly():
    source = Passkey(1400, ("One.", "Two.", "Three."))
    texts = "".join(source.vocabulary.decode(document.tokens) for _, document in take(source, 20))
    counts = [texts.count(f" {filler} ") for filler in source.fillers]
    assert sum(counts) > 3000 and max(counts) < 1.2 * min(counts)


def test_passkeys_in_another_vocabulary():
    pieces = TrainedSentencePiece(pieces=340).train(
        [passkey_prompt(n * 1117, [FILLER], [FILLER]) for n in range(60)]
    )
    source = Passkey(document_tokens=400).with_vocabulary(pieces)
    assert source == Passkey(document_tokens=400, vocabulary=pieces)
    counts = set()
    for _, (tokens, weights) in take(source, 20):
        parse_passkey(pieces.decode(tokens))
        assert tokens[0] == pieces.bos and tokens[-1] == pieces.eos
        assert len(tokens) - 1 <= 400
        counts.add(len(tokens))
        answer = tokens[weights == 1].tolist()
        assert re.fullmatch(r" ?\d{5}", pieces.decode(answer))
        assert weights[-1 - len(answer) : -1].all()
    assert min(counts) > 340


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"document_tokens": 19}, "document_tokens = 19 .*give 20 or more"),
        ({"document_tokens": 0}, "document_tokens = 0 .*give 20 or more"),
        ({"key_length": 0}, "key_length = 0: give a number from 1 to 10"),
        ({"value_length": 0}, "value_length = 0: give 1 or more"),
        ({"eval_documents": 0}, "eval_documents = 0: give 1 or more"),
        ({"key_length": 11}, "key_length = 11: give a number from 1 to 10"),
        ({"key_length": 1, "document_tokens": 854}, "key_length = 1 makes 60 keys.*room for 61"),
        ({"key_length": 1, "near_documents": 1}, "key_length = 1 makes 12 keys of 12.*room for 36"),
        ({"key_length": 2, "near_documents": 5}, ".*144 keys of 12.*room for 32 in each of 5"),
        ({"near_documents": 0}, "near_documents = 0: give 1 or more"),
        ({"near_symbols": 61}, "near_symbols = 61: give a number from 1 to 60"),
    ],
)
def test_impossible_dictionaries(fields, message):
    with pytest.raises(UserError, match=f"^DictionaryLookup.{message}"):
        DictionaryLookup(**fields)


def test_the_smallest_dictionary():
    (_, document), *_ = take(DictionaryLookup(document_tokens=20), 1)
    assert (document.tokens[1:10] == document.tokens[11:20]).all()


def test_impossible_passkeys():
    for fields in {"document_tokens": 0}, {"eval_documents": 0}:
        with pytest.raises(UserError, match=f"Passkey.{next(iter(fields))} = 0: give 1 or more"):
            Passkey(**fields)
    for fillers in (), (" ",), ("One.", ""):
        with pytest.raises(UserError, match="Passkey.fillers: name one text or more"):
            Passkey(fillers=fillers)
    with pytest.raises(UserError, match=r"^Passkey.document_tokens = 100 .*give (\d+)") as error:
        take(Passkey(document_tokens=100), 1)
    least = int(re.search(r"give (\d+)", str(error.value))[1])
    take(Passkey(document_tokens=least), 1)
    with pytest.raises(UserError, match="give"):
        take(Passkey(document_tokens=least - 1), 1)

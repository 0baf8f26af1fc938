"""Documents of corpora on disk against plain readings of the same files."""

import ast
import collections
import dataclasses
import gzip
import itertools
import json
import random
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import pytest
from corpora import (
    epochs_of,
    framed,
    message_of,
    read,
    take,
    text_over,
    texts_of,
    write,
    write_corpus,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fot_jax.common.errors import UserError
from fot_jax.data import corpus as corpus_module
from fot_jax.data import tasks
from fot_jax.data.corpus import shard_of
from fot_jax.data.sentencepiece_vocabulary import SentencePiece, TrainedSentencePiece
from fot_jax.data.tasks import Corpus, Text
from fot_jax.data.vocabulary import Bytes

# --- Reading files -------------------------------------------------------------------------------


def test_documents_are_the_rows_in_order(tmp_path):
    train, valid = texts_of(20), texts_of(5, start=100)
    for files in (1, 3):
        path = write_corpus(tmp_path / str(files), files, train=train, valid=valid)
        source = text_over(path)
        assert read(source.documents("train")) == [framed(text) for text in train]
        assert read(source.documents("valid")) == [framed(text) for text in valid]
        document = next(source.documents("train"))
        assert (document.tokens.dtype, document.weights.dtype) == (np.int32, np.float32)
        assert document.weights.tolist() == [1.0] * len(document.tokens)


def test_blank_lines_and_rows_without_text_content(tmp_path):
    write(tmp_path / "valid.jsonl", '\n{"text": ""}\n  \n{"text": "a"}')
    assert read(text_over(tmp_path).documents("valid")) == [framed(""), framed("a")]


def test_other_fields_and_short_documents(tmp_path):
    texts = texts_of(30)
    write(tmp_path / "valid.jsonl.gz", [{"content": text, "text": 1} for text in texts])
    corpus = Corpus(str(tmp_path), text_field="content", min_document_length=60)
    long = [framed(text) for text in texts if len(framed(text)) >= 60]
    assert 0 < len(long) < 30
    assert read(text_over(corpus).documents("valid")) == long


def test_rows_equal_in_a_field_are_joined(tmp_path):
    rows = [("a", 1), ("b", 1), ("c", 2), ("d", 1), ("e", None), ("f", None)]
    write(tmp_path / "train.jsonl", [{"text": text, "folder": key} for text, key in rows])
    source = text_over(Corpus(str(tmp_path), join_by="folder"))
    assert read(source.documents("train")) == [framed(t) for t in ("a\nb", "c", "d", "e\nf")]
    shards = [take(source, 2, shard, 2) for shard in (0, 1)]
    assert sorted(t for s in shards for _, t in s) == sorted(read(source.documents("train")))


# --- Streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("files", "shards"), [(1, 1), (1, 3), (4, 3), (4, 5)])
def test_shards_of_each_epoch_are_disjoint_and_together_complete(tmp_path, files, shards):
    texts = texts_of(23)
    source = text_over(write_corpus(tmp_path, files, train=texts))
    epochs = [epochs_of(source, shard, shards, 2) for shard in range(shards)]
    for epoch in range(2):
        together = [document for shard in epochs for document in shard[epoch]]
        assert sorted(together) == sorted(map(framed, texts))
    assert epochs[0][0] != epochs[0][1]


@pytest.mark.parametrize("files", [1, 4])
def test_streams_are_a_function_of_their_arguments(tmp_path, files):
    source = text_over(write_corpus(tmp_path, files, train=texts_of(11)))
    for shard, shards in [(0, 1), (1, 3)]:
        whole = take(source, 25, shard, shards)
        assert whole == take(dataclasses.replace(source), 25, shard, shards)
        assert whole != take(source, 25, shard, shards, seed=1)
        for i in (0, 2, 3, 10, 13, 21):
            here = take(source, 3, shard, shards, position=whole[i][0])
            assert here == whole[i + 1 : i + 4]


WORDS = {"short": "word", "long": "word " * 9}
files = st.lists(st.lists(st.sampled_from(list(WORDS)), max_size=3), min_size=1, max_size=6)


@settings(max_examples=8, deadline=None)
@given(files, st.integers(1, 3), st.booleans(), st.booleans())
def test_shards_of_files_some_of_which_are_empty(files, shards, leave_out, of_pieces):
    """Each has documents or is refused at once; an epoch has each document once."""
    with tempfile.TemporaryDirectory() as directory:
        for i, kinds in enumerate(files):
            rows = [{"text": f"{i}-{j} {WORDS[kind]}"} for j, kind in enumerate(kinds)]
            write(Path(directory) / f"train-{i:05d}.jsonl", rows)
        least = 30 if leave_out else 0
        pieces = 40 if of_pieces else None
        corpus = Corpus(directory, min_document_length=least)
        source = text_over(corpus, piece_tokens=pieces)
        wanted = []
        for i, j in ((i, j) for i, kinds in enumerate(files) for j in range(len(kinds))):
            tokens = framed(f"{i}-{j} {WORDS[files[i][j]]}")
            if len(tokens) >= max(least, pieces or 0):
                wanted.append(tokens[:pieces])
        with_some = [kinds for kinds in files if "long" in kinds or kinds and not (least or pieces)]
        epochs = []
        for shard in range(shards):
            try:
                epochs.append(epochs_of(source, shard, shards, 2))
            except UserError as error:
                assert wanted == [] or "in shard" in str(error)
                assert len(with_some) < max(shards, len(files) - len(with_some))
                return
        for epoch in range(2):
            assert sorted(itertools.chain(*(each[epoch] for each in epochs))) == sorted(wanted)
        (position, _), *then = take(source, 5, shards - 1, shards)
        assert take(source, 4, shards - 1, shards, position=position) == then


@pytest.mark.parametrize("piece_tokens", [None, 20])
def test_mixtures_of_corpora_some_of_whose_files_are_empty(tmp_path, monkeypatch, piece_tokens):
    """As often as their weights say, the documents of each equally often; and resumed."""
    monkeypatch.setattr(tasks, "SHUFFLED_TOKENS", 500)  # of tiny corpora, read again and again
    texts = [f"{i} " + "word " * 5 for i in range(6)]
    for name, start, kept in (("a", 0, ["x"]), ("b", 3, [])):
        for i in range(5):
            rows = texts[start + i : start + i + 1] if i < 3 else kept
            write(tmp_path / name / f"train-{i}.jsonl", [{"text": text} for text in rows])
    corpora = [Corpus(str(tmp_path / name), min_document_length=10) for name in "ab"]
    source = text_over(*corpora, piece_tokens=piece_tokens)
    together = collections.Counter()
    for shard in range(2):
        stream = take(source, 300, shard, 2)
        together.update(tokens for _, tokens in stream)
        assert take(source, 20, shard, 2, position=stream[70][0]) == stream[71:91]
    expected = {framed(text)[:piece_tokens] for text in texts}
    assert together.keys() == expected
    assert max(together.values()) < 2 * min(together.values())
    for name in ("b", "a"):
        for file in (tmp_path / name).iterdir():
            write(file, [{"text": "short"}])
        message = message_of(lambda: take(source, 1, 1, 2))
        assert f"{tmp_path / name}: no " in message and "in shard 1 of 2" in message


def test_corpora_larger_than_what_is_shuffled_among(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "SHUFFLED_BYTES", 500)
    texts = texts_of(100)
    source = text_over(write_corpus(tmp_path, 1, train=texts))
    first, second = epochs_of(source, 0, 1, 2)
    assert sorted(first) == sorted(second) == sorted(map(framed, texts))
    assert first != second
    order = [[framed(text) for text in texts].index(document) for document in first]
    assert max(order[:10]) < 40  # it began before all was read


def test_all_orders_are_equally_likely():
    parts = [lambda: iter("ab"), lambda: iter("cd")]
    rng = np.random.default_rng(0)
    orders = collections.Counter("".join(shard_of(parts, 0, 1, rng)) for _ in range(4800))
    assert len(orders) == 24
    assert all(abs(count - 200) < 5 * 200**0.5 for count in orders.values())


def test_pieces_of_documents(tmp_path, monkeypatch):
    """All whole pieces of every document, once an epoch, neighbours apart; other splits as ever."""
    texts = ["".join(f"{i:02d}-{j:02d}," for j in range(2 * i)) for i in range(30)]
    path = write_corpus(tmp_path, 3, train=texts, valid=texts[:3])
    source = text_over(path, piece_tokens=20)
    pieces = sorted(
        framed(text)[i : i + 20] for text in texts for i in range(0, len(text) + 2 - 19, 20)
    )
    for some in (tasks.SHUFFLED_TOKENS, 200):
        monkeypatch.setattr(tasks, "SHUFFLED_TOKENS", some)
        for shards in (1, 2):
            shares = [epochs_of(source, shard, shards, 2) for shard in range(shards)]
            for epoch in (0, 1):
                assert sorted(itertools.chain(*(share[epoch] for share in shares))) == pieces
            assert shares[0][0] != shares[0][1]
    monkeypatch.undo()
    whole = take(source, 60)
    longest = [
        i
        for i, (_, p) in enumerate(take(source, len(pieces)))
        if b"29-" in bytes(token for token in p if token < 256)
    ]
    assert longest[-1] - longest[0] >= 2 * len(longest)
    assert whole[7:] == take(source, 53, position=whole[6][0])
    assert read(source.documents("valid")) == [framed(text) for text in texts[:3]]
    message = message_of(lambda: take(text_over(path, piece_tokens=2000), 1))
    assert "no piece of 2000 tokens in shard 0 of 1: lower Text.piece_tokens" in message
    message = message_of(lambda: text_over(path, piece_tokens=1))
    assert message == "Text.piece_tokens = 1: give a number from 2 to 2147483647"


def test_pieces_of_a_mixture(tmp_path, monkeypatch):
    """A corpus without a single piece is an error, not a search without end."""
    monkeypatch.setattr(tasks, "SHUFFLED_TOKENS", 3_000)  # of tiny corpora, read again and again
    long = write_corpus(tmp_path / "long", 1, train=["long enough" * i for i in range(3, 9)])
    short = write_corpus(tmp_path / "short", 1, train=["a", "short"])
    also_long = write_corpus(tmp_path / "also_long", 1, train=["abc" * 20])
    for corpora in ((long, short), (short, long)):
        source = text_over(*corpora, piece_tokens=30)
        message = message_of(lambda source=source: take(source, 99))
        assert "short: no piece of 30 tokens in shard 0 of 1: lower Text.piece_tokens" in message
    source = text_over(long, also_long, piece_tokens=30)
    assert {len(tokens) for _, tokens in take(source, 20)} == {30}


def test_mixture(tmp_path):
    """Documents come in proportion to the weights, each corpus again only when it is through."""
    few, many = texts_of(7), texts_of(50, start=100)
    paths = [write_corpus(tmp_path / n, 1, train=t, valid=t) for n, t in [("a", few), ("b", many)]]
    source = text_over(Corpus(paths[0], weight=3.0), Corpus(paths[1], weight=1.0))
    in_turn = [text for both in zip(few, many, strict=False) for text in both] + many[len(few) :]
    assert read(source.documents("valid")) == [framed(text) for text in in_turn]
    stream = take(source, 600)
    assert [position for position, _ in stream] == [(1, i + 1) for i in range(600)]
    of_few = [t for _, t in stream if t in set(map(framed, few))]
    of_many = [t for _, t in stream if t not in set(of_few)]
    assert abs(len(of_few) / 600 - 0.75) < 0.06
    rounds = [of_few[i : i + 7] for i in range(0, len(of_few) - 6, 7)]
    assert all(sorted(r) == sorted(map(framed, few)) for r in rounds)
    assert len(set(map(tuple, rounds))) > len(rounds) // 2
    assert sorted(of_many[:50]) == sorted(map(framed, many))
    assert take(source, 5, position=(1, 321)) == stream[321:326]
    streams = [[t for _, t in take(source, 200, shard, 2)] for shard in range(2)]
    drawn = [[t in of_few for t in stream] for stream in streams]
    assert 50 < sum(a != b for a, b in zip(*drawn, strict=True)) < 100  # of 75: independent draws
    # A run of an earlier fot_jax goes on as it began: all shards draw alike.
    earlier = [[t for _, t in take(source, 60, i, 2, position=(0, 40))] for i in range(2)]
    drawn = [[t in of_few for t in stream] for stream in earlier]
    assert drawn[0] == drawn[1] and not set(earlier[0]) & set(earlier[1])
    shards = list(map(set, streams))
    assert not shards[0] & shards[1]
    assert shards[0] | shards[1] >= set(map(framed, few))


# --- Tokenizers ----------------------------------------------------------------------------------


def test_a_tokenizer_is_trained_on_the_training_split(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(50)]
    train = [" ".join(rng.choices(words, k=300)) for _ in range(40)]
    path = write_corpus(tmp_path, 2, train=train, valid=["zzz " * 100])
    source = text_over(path, tokenizer=TrainedSentencePiece(330))
    assert source.vocabulary == TrainedSentencePiece(330).train(train)
    assert source.vocabulary is source.vocabulary
    (document,) = source.documents("valid")
    assert source.vocabulary.decode(document.tokens) == "zzz " * 100
    other = source.with_vocabulary(Bytes())
    assert read(other.documents("valid")) == [framed("zzz " * 100)]


def test_the_tokenizers_share_of_long_documents_and_many(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TRAINING_CHARACTERS", 40)
    monkeypatch.setattr(tasks, "TRAINING_EXCERPT", 10)
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Recorder(TrainedSentencePiece):
        def train(self, texts):
            seen.extend(texts)
            return Bytes()

    a = write_corpus(tmp_path / "a", 1, train=["0123456789abcdefghij", "short"])
    b = write_corpus(tmp_path / "b", 1, train=["x" * 12, "y" * 12, "z" * 12])
    assert text_over(a, b, tokenizer=Recorder()).vocabulary == Bytes()
    assert seen == ["56789abcde", "short", "x" * 10, "y" * 10]


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "train.jsonl:3: broken row, not JSON"),
        (b"\xff", "train.jsonl:3: broken row, not JSON"),
        ('["text"]', "train.jsonl:3: broken row, not an object"),
        ('{"txt": "a", "id": 1}', "train.jsonl:3: no field 'text' in the row, which has txt, id"),
        ('{"text": ["a"]}', "train.jsonl:3: field 'text' is [\"a\"], not a text"),
        ('{"text": "\\ud800"}', "train.jsonl:3: field 'text' has half a character"),
    ],
)
def test_broken_rows(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    source = text_over(tmp_path)
    assert message in message_of(lambda: list(source.documents("train")))
    assert message in message_of(lambda: take(source, 2))
    mixture = text_over(tmp_path, write_corpus(tmp_path / "other", 1, train=texts_of(3)))
    assert message in message_of(lambda: take(mixture, 50))
    trained = text_over(tmp_path, tokenizer=TrainedSentencePiece())
    assert message in message_of(lambda: trained.vocabulary)


def test_a_row_without_the_field_to_join_by(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "a"}])
    source = text_over(Corpus(str(tmp_path), join_by="folder"))
    assert "train.jsonl:1: no field 'folder'" in message_of(lambda: take(source, 1))


def test_damaged_gzip_files(tmp_path):
    write(
        tmp_path / "train.jsonl.gz",
        [{"text": random.Random(i).randbytes(99).hex()} for i in range(99)],
    )
    whole = (tmp_path / "train.jsonl.gz").read_bytes()
    source = text_over(tmp_path)
    for content in (whole[: len(whole) // 2], b"no gzip", whole[:-60] + b"?" * 60):
        (tmp_path / "train.jsonl.gz").write_bytes(content)
        message = message_of(lambda: take(source, 99))
        assert "train.jsonl.gz:" in message and "restore the file from a copy" in message


def test_missing_directories_splits_and_documents(tmp_path):
    assert "gone: no such directory: set Corpus.path to one with train.jsonl.gz" in message_of(
        lambda: list(text_over(tmp_path / "gone").documents("train"))
    )
    source = text_over(write_corpus(tmp_path / "a", 1, train=["abc"], valid=[]))
    for split in ("test", "validation"):
        for read_or_check in source.documents, source.check_split:
            message = message_of(lambda f=read_or_check, split=split: list(f(split) or ()))
            assert f"a: no {split} split (there is: train, valid)" in message
    assert "test.jsonl.gz" in message_of(lambda: source.check_split("test"))
    assert "a: the valid split is empty" in message_of(lambda: source.check_split("valid"))
    source.check_split("train")
    mixture = text_over(tmp_path / "a", write_corpus(tmp_path / "b", 1, valid=["abc"]))
    assert "b: no train split (there is: valid)" in message_of(lambda: take(mixture, 1))
    trained = text_over(tmp_path / "b", tokenizer=TrainedSentencePiece())
    assert "b: no train split" in message_of(lambda: trained.vocabulary)
    write(tmp_path / "a" / "train.jsonl.gz", [])
    assert "there is a train.jsonl.gz too" in message_of(lambda: list(source.documents("train")))


def test_more_shards_than_documents(tmp_path):
    path = write_corpus(tmp_path / "a", 1, train=["a", "b", "long enough"])
    assert "no training document in shard 3 of 4: lower Data.lane_groups" in message_of(
        lambda: take(text_over(path), 1, 3, 4)
    )
    long = Corpus(path, min_document_length=10)
    assert take(text_over(long), 1, 0, 2)[0][1] == framed("long enough")
    assert (
        "no training document of 10 tokens or more in shard 1 of 2: "
        "lower Data.lane_groups or Corpus.min_document_length"
    ) in message_of(lambda: take(text_over(long), 1, 1, 2))
    mixture = text_over(long, write_corpus(tmp_path / "b", 1, train=["a", "b", "c"]))
    assert "a: no training document of 10" in message_of(lambda: take(mixture, 50, 1, 2))
    longer = text_over(Corpus(path, min_document_length=99))
    assert "has no document of 99 tokens" in message_of(lambda: list(longer.documents("train")))


def test_settings_that_make_no_sense(tmp_path):
    assert "Corpus.weight = 0 of x: give more than 0" in message_of(lambda: Corpus("x", weight=0))
    assert "join_by is for JSON Lines" in message_of(lambda: Corpus("tfds:x", join_by="y"))
    for corpora in ([], [Corpus("x"), Corpus("x", weight=2.0)]):
        assert "one corpus or more, and none twice" in message_of(lambda c=corpora: Text(c))


# --- The standard library ------------------------------------------------------------------------


def test_the_standard_library_is_a_corpus_of_packages():
    library = Path(sysconfig.get_path("stdlib"))
    source = text_over("standard_library")
    texts = {
        split: [Bytes().decode(tokens) for tokens in read(source.documents(split))]
        for split in ("train", "valid", "test")
    }
    names = {}
    for split, split_texts in texts.items():
        names[split] = [
            text.split("\n")[0].removeprefix("# ").split("/")[0] for text in split_texts
        ]
        assert names[split] == sorted(names[split])
    assert len(set(sum(names.values(), []))) == len(sum(names.values(), []))
    assert {"asyncio", "json", "argparse.py"} <= set(sum(names.values(), []))
    assert (
        0.6 < sum(map(len, texts["train"])) / sum(len(t) for s in texts.values() for t in s) < 0.9
    )
    assert sum(len(text) > 60_000 for text in texts["valid"]) >= 4
    assert sum(len(text) > 60_000 for text in texts["test"]) >= 4

    (package,) = (t for ts in texts.values() for t in ts if t.startswith("# json/__init__.py\n"))
    files = sorted((library / "json").glob("*.py"))
    assert package == "\n".join(f"# json/{file.name}\n{file.read_text()}" for file in files)
    for text in sum(texts.values(), []):
        assert "/test/" not in text.split("\n")[0]
    ast.parse(next(t for t in texts["valid"] if t.startswith("# heapq.py") or "\n" in t))


def test_the_default_source_is_ready_to_train_on():
    source = Text()
    assert source.vocabulary.size == 1024
    long = [d for d in source.documents("valid") if len(d.tokens) > 21_000]
    assert len(long) >= 4
    text = source.vocabulary.decode(long[0].tokens)
    assert text.startswith("# ") and len(text) > 40_000
    assert take(source, 3, 1, 8) == take(Text(), 3, 1, 8)


# --- A real corpus -------------------------------------------------------------------------------

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "books").is_dir(), reason="the data is not on this machine")
def test_books(tmp_path):
    with gzip.open(DATA / "books" / "valid.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    source = Text([Corpus(str(DATA / "books"))])
    assert [source.vocabulary.decode(d.tokens) for d in source.documents("valid")] == texts
    source.vocabulary.save(tmp_path)
    model = SentencePiece(tmp_path / "tokenizer.model")
    tokens = read(source.with_vocabulary(model).documents("valid"))
    assert tokens == [(model.bos, *model.encode(text), model.eos) for text in texts]

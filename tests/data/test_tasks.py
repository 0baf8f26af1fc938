"""Documents of corpora on disk against plain readings of the same files."""

import ast
import collections
import dataclasses
import gzip
import itertools
import json
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from fot_jax.data import corpus as corpus_module
from fot_jax.data import tasks
from fot_jax.data.corpus import shard_of
from fot_jax.data.tasks import Corpus, Text
from fot_jax.data.vocabulary import Bytes, SentencePiece, TrainedSentencePiece
from fot_jax.errors import UserError


def framed(text):
    return (256, *text.encode(), 257)


def texts_of(count, start=0):
    """Different texts, some long, with characters of all widths."""
    return [f"№ {i} 🙂\n" + "word " * (7 * i % 23) for i in range(start, start + count)]


def write(file, rows):
    """Rows, or text as it stands, into a file; gzipped where the name says so."""
    content = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if file.suffix == ".gz" else open)(file, "wt") as f:
        f.write(content)


def write_corpus(directory, files, **texts):
    """Splits as {"text": ...} rows; training in as many files as told."""
    for split, split_texts in texts.items():
        rows = [{"text": text, "id": i} for i, text in enumerate(split_texts)]
        if split == "train" and files > 1:
            for i in range(files):
                part = rows[i * len(rows) // files : (i + 1) * len(rows) // files]
                write(directory / f"train-{i:05d}-of-{files:05d}.jsonl.gz", part)
        else:
            write(directory / f"{split}.jsonl", rows)
    return str(directory)


def text_over(*paths, **fields):
    """Documents of bytes, so that they can be predicted without a tokenizer."""
    fields = {"tokenizer": Bytes(), **fields}
    corpora = [path if isinstance(path, Corpus) else Corpus(str(path)) for path in paths]
    return Text(corpora, **fields)


def read(documents):
    return [tuple(document.tokens.tolist()) for document in documents]


def take(source, count, shard=0, shards=1, seed=0, position=(0, 0)):
    """The next (position, tokens) of a stream."""
    stream = source.stream(shard, shards, seed, position)
    return [(p, tuple(d.tokens.tolist())) for p, d in itertools.islice(stream, count)]


def epochs_of(source, shard, shards, count, seed=0):
    """Documents of a shard in each of its first epochs."""
    documents = collections.defaultdict(list)
    for (epoch, taken), document in source.stream(shard, shards, seed):
        if epoch == count:
            return [documents[i] for i in range(count)]
        documents[epoch].append(tuple(document.tokens.tolist()))
        assert taken == len(documents[epoch])


def message_of(function):
    with pytest.raises(UserError) as info:
        function()
    assert "\n" not in str(info.value)
    return str(info.value)


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
    assert "piece_tokens = 1: give 2 or more" in message_of(lambda: text_over(path, piece_tokens=1))


def test_pieces_of_a_mixture(tmp_path):
    """A corpus without a single piece is an error, not a search without end."""
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
    assert read(source.documents("valid")) == [framed(text) for text in few + many]
    stream = take(source, 600)
    assert [position for position, _ in stream] == [(0, i + 1) for i in range(600)]
    of_few = [t for _, t in stream if t in set(map(framed, few))]
    of_many = [t for _, t in stream if t not in set(of_few)]
    assert abs(len(of_few) / 600 - 0.75) < 0.06
    rounds = [of_few[i : i + 7] for i in range(0, len(of_few) - 6, 7)]
    assert all(sorted(r) == sorted(map(framed, few)) for r in rounds)
    assert len(set(map(tuple, rounds))) > len(rounds) // 2
    assert sorted(of_many[:50]) == sorted(map(framed, many))
    assert take(source, 5, position=(0, 321)) == stream[321:326]
    shards = [{t for _, t in take(source, 200, shard, 2)} for shard in range(2)]
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
        message = message_of(lambda split=split: list(source.documents(split)))
        assert f"a: no {split} split (there is: train, valid)" in message
    assert "test.jsonl.gz" in message_of(lambda: list(source.documents("test")))
    assert "a: the valid split is empty" in message_of(lambda: list(source.documents("valid")))
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


# --- Offline caches ------------------------------------------------------------------------------


def cached(source, directory):
    tasks.cache(source, directory)
    return dataclasses.replace(source, cache_dir=str(directory))


def test_a_cache_has_the_same_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "CACHE_SHARDS", 4)
    train, valid = texts_of(150), texts_of(40, start=200)
    path = write_corpus(tmp_path / "text", 2, train=train, valid=valid)
    source = cached(text_over(Corpus(path, min_document_length=30)), tmp_path / "cache")
    shutil.rmtree(path)  # all that is needed is in the cache
    long = sorted(framed(text) for text in train if len(framed(text)) >= 30)
    assert sorted(read(source.documents("train"))) == long
    assert read(source.documents("valid")) == [
        framed(text) for text in valid if len(framed(text)) >= 30
    ]
    for shards in (1, 3, 5):
        epochs = [epochs_of(source, shard, shards, 2) for shard in range(shards)]
        for epoch in range(2):
            assert sorted(t for shard in epochs for t in shard[epoch]) == long
        assert epochs[0][0] != epochs[0][1]
    stream = take(source, 250, 1, 2)
    assert stream == take(dataclasses.replace(source), 250, 1, 2)
    for i in (0, 17, len(long) // 2, 200):
        assert take(source, 3, 1, 2, position=stream[i][0]) == stream[i + 1 : i + 4]
    assert "no test split (there is: train, valid): make it with fot cache" in message_of(
        lambda: list(source.documents("test"))
    )


def test_a_mixture_of_caches(tmp_path):
    paths = [write_corpus(tmp_path / n, 1, train=texts_of(9, 100 * i)) for i, n in enumerate("ab")]
    source = cached(text_over(*paths), tmp_path / "cache")
    stream = take(source, 120)
    counts = collections.Counter(tokens for _, tokens in stream)
    assert set(counts) == {framed(text) for i in range(2) for text in texts_of(9, 100 * i)}
    assert max(counts.values()) < 30
    assert take(source, 9, position=(0, 33)) == stream[33:42]


def test_a_cache_is_of_its_corpus_and_tokenizer_only(tmp_path):
    path = write_corpus(tmp_path / "text", 1, train=texts_of(60))
    source = cached(text_over(path, tokenizer=TrainedSentencePiece(290)), tmp_path / "cache")
    assert len(take(source, 60)) == 60
    same = source.with_vocabulary(source.vocabulary)
    assert take(same, 60) == take(source, 60)
    others = [
        source.with_vocabulary(Bytes()),
        dataclasses.replace(source, tokenizer=TrainedSentencePiece(291)),
        dataclasses.replace(source, corpora=[Corpus(path, min_document_length=3)]),
        dataclasses.replace(source, cache_dir=str(tmp_path)),
    ]
    for other in others:
        message = message_of(lambda other=other: take(other, 1))
        assert "make it with: fot cache EXPERIMENT.gin --output" in message


def test_a_cache_that_is_not_finished_is_none(tmp_path):
    (tmp_path / "text").mkdir()
    write(tmp_path / "text" / "train.jsonl", '{"text": "a"}\n{"text": 1}')
    source = text_over(tmp_path / "text")
    assert "train.jsonl:2" in message_of(lambda: tasks.cache(source, tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("")
    write(tmp_path / "text" / "train.jsonl", '{"text": "a"}')
    assert "cannot be written" in message_of(lambda: tasks.cache(source, tmp_path / "file"))


def test_a_damaged_cache(tmp_path):
    source = cached(
        text_over(write_corpus(tmp_path / "text", 1, train=texts_of(3))), tmp_path / "cache"
    )
    files = sorted((tmp_path / "cache").rglob("*.tfrecord-*"))
    for file in files:
        file.write_bytes(file.read_bytes()[:-3])
    message = message_of(lambda: take(source, 9))
    assert "cache: damaged data (" in message and message.endswith("make it again")
    files[5].unlink()
    again = dataclasses.replace(source)
    assert f"{files[5]}: missing: copy the cache again" in message_of(lambda: take(again, 9))


def test_seqio_reads_the_cache_without_us(tmp_path):
    import seqio

    source = text_over(write_corpus(tmp_path / "text", 1, train=texts_of(30), valid=texts_of(5)))
    tasks.cache(source, tmp_path / "cache")
    task = seqio.get_mixture_or_task(source.provider.name)
    seqio.set_global_cache_dirs([str(tmp_path / "cache")])
    rows = task.get_dataset(split="train", use_cached=True, shuffle=False).as_numpy_iterator()
    seqio.set_global_cache_dirs([])
    assert sorted(tuple(row["targets"].tolist()) for row in rows) == sorted(
        map(framed, texts_of(30))
    )
    assert task.get_cached_stats("valid") == {
        "examples": 5,
        "targets_tokens": sum(len(framed(text)) for text in texts_of(5)),
        "targets_max_tokens": max(len(framed(text)) for text in texts_of(5)),
    }


# --- TensorFlow Datasets -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """A data set prepared by TensorFlow Datasets, like PG-19 in its fields; its directory."""
    tfds = pytest.importorskip("tensorflow_datasets")
    data_dir = tmp_path_factory.mktemp("tensorflow_datasets")

    class FewBooks(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"book_text": tfds.features.Text(), "book_id": np.int32}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._examples(0, 30), "validation": self._examples(100, 8)}

        def _examples(self, start, count):
            for i, text in enumerate(texts_of(count, start)):
                yield i, {"book_text": text, "book_id": i}

        def _generate_examples(self):
            raise NotImplementedError

    FewBooks(data_dir=data_dir).download_and_prepare()
    return str(data_dir)


def test_a_data_set_of_tensorflow_datasets(books):
    corpus = Corpus("tfds:few_books", text_field="book_text")
    source = text_over(corpus, data_dir=books)
    everything = sorted(map(framed, texts_of(30)))
    assert sorted(read(source.documents("valid"))) == sorted(map(framed, texts_of(8, 100)))
    for shards in (1, 2):
        epochs = [epochs_of(source, shard, shards, 2) for shard in range(shards)]
        for epoch in range(2):
            assert sorted(t for shard in epochs for t in shard[epoch]) == everything
    stream = take(source, 50, 1, 2)
    for i in (0, 7, 14, 31):
        assert take(source, 3, 1, 2, position=stream[i][0]) == stream[i + 1 : i + 4]
    assert "no test split (there is: train, valid): use another" in message_of(
        lambda: list(source.documents("test"))
    )
    trained = dataclasses.replace(source, tokenizer=TrainedSentencePiece(300))
    assert trained.vocabulary.size == 300


def test_a_cache_of_a_data_set(books, tmp_path):
    corpus = Corpus("tfds:few_books", text_field="book_text")
    source = cached(text_over(corpus, data_dir=books), tmp_path)
    source = dataclasses.replace(source, data_dir="/gone")
    assert sorted(t for _, t in take(source, 30)) == sorted(map(framed, texts_of(30)))


def test_data_sets_that_are_not_there(books, tmp_path):
    def first(path, field="text", data_dir=books):
        source = text_over(Corpus(path, text_field=field), data_dir=data_dir)
        return message_of(lambda: next(source.documents("train")))

    assert "tfds:no_such_set: Dataset no_such_set not found: use a name" in first(
        "tfds:no_such_set"
    )
    assert "tfds:few_books/other:" in first("tfds:few_books/other")
    assert f"not prepared yet: run: tfds build pg19 --data_dir {books}" in first("tfds:pg19")
    assert "'text' is none of its fields of text (book_text)" in first("tfds:few_books")
    assert "'book_id' is none of its fields" in first("tfds:few_books", "book_id")


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


# --- The process ---------------------------------------------------------------------------------


def run_python(code, *arguments):
    argv = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run


def test_importing_it_imports_neither_tensorflow_nor_seqio():
    code = "import sys, fot_jax.data.tasks as t; t.Text((t.Corpus('x'),)); print(*sys.modules)"
    assert not {"tensorflow", "seqio", "jax"} & set(run_python(code).stdout.split())


READ_IN_A_THREAD = """
import jax, sys, threading
from fot_jax.data.tasks import Bytes, Corpus, Text
from fot_jax.errors import UserError

def read():
    try:
        print(*(len(document.tokens) for document in source.documents("train")))
    except UserError as error:
        print(error)

source = Text([Corpus(sys.argv[1])], Bytes())
thread = threading.Thread(target=read)
thread.start()
thread.join()
"""


def test_tensorflow_says_nothing(tmp_path):
    """Neither when it is imported, in whatever thread, nor about an error that we report."""
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": "12345678"}\n')
    run = run_python(READ_IN_A_THREAD, tmp_path)
    assert (run.stdout, run.stderr) == ("10\n", "")
    file.write_text('{"text": "123')
    run = run_python(READ_IN_A_THREAD, tmp_path)
    assert run.stdout.startswith(f"{file}:1: broken row, not JSON") and run.stderr == ""


SLOW_READER = """
import dataclasses, time
from fot_jax.data.lanes import Lanes, Prefetch
from fot_jax.data.tasks import Bytes, Text

@dataclasses.dataclass(frozen=True)
class Slow(Bytes):
    def encode(self, text):
        time.sleep(0.5)
        return [0]

source = Text(tokenizer=Slow())
stream = source.stream(0, 2, seed=0)
next(stream)
import tensorflow as tf
print(tf.config.get_visible_devices("GPU"))
prefetch = Prefetch(Lanes(source, lanes=1, window=2), lambda batch: batch)
next(prefetch)
next(stream)
"""


@pytest.mark.slow
def test_a_process_ends_cleanly_while_documents_are_read_ahead():
    run = run_python(SLOW_READER)
    assert run.stdout == "[]\n"
    assert "Traceback" not in run.stderr and "Exception" not in run.stderr


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

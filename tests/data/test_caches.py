"""Offline caches against the documents they were made of, and against SeqIO alone."""

import collections
import dataclasses
import itertools
import shutil

from corpora import (
    cached,
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

from fot_jax.data import tasks
from fot_jax.data.sentencepiece_vocabulary import TrainedSentencePiece
from fot_jax.data.tasks import Corpus
from fot_jax.data.vocabulary import Bytes


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
    for shards in (1, 2, 5):  # of four files
        epochs = [epochs_of(source, shard, shards, 2) for shard in range(shards)]
        for epoch in range(2):
            assert sorted(t for shard in epochs for t in shard[epoch]) == long
        assert epochs[0][0] != epochs[0][1]
    stream = take(source, 250, 1, 2)
    assert stream == take(dataclasses.replace(source), 250, 1, 2)
    for i in (0, 17, len(long) // 2, 200):
        assert take(source, 3, 1, 2, position=stream[i][0]) == stream[i + 1 : i + 4]
    assert message_of(lambda: take(source, 1, 0, 3)) == (
        f"Data.lane_groups = 3: the files of {source.cache_dir} are dealt out among them, so give "
        "1, 2, 4, … 4"
    )
    assert take(source, 1, 0, 3, position=(0, 1))  # a run that began before it was refused
    assert "no test split (there is: train, valid): make it with fot cache" in message_of(
        lambda: source.check_split("test")
    )
    source.check_split("valid")


def test_a_mixture_of_caches(tmp_path):
    paths = [write_corpus(tmp_path / n, 1, train=texts_of(9, 100 * i)) for i, n in enumerate("ab")]
    source = cached(text_over(*paths), tmp_path / "cache")
    stream = take(source, 120)
    counts = collections.Counter(tokens for _, tokens in stream)
    assert set(counts) == {framed(text) for i in range(2) for text in texts_of(9, 100 * i)}
    assert max(counts.values()) < 30
    assert take(source, 9, position=(1, 33)) == stream[33:42]


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


def test_files_of_users_without_a_name(tmp_path, monkeypatch):
    """As in containers, and over NFS."""

    def nobody(number):
        raise KeyError(f"uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    source = text_over(write_corpus(tmp_path / "text", 1, train=texts_of(3)))
    assert source.settings() and len(take(source, 3)) == 3
    assert len(take(cached(source, tmp_path / "cache"), 3)) == 3


def test_all_is_looked_at_before_the_first_is_tokenized(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "write_split", None)
    good = write_corpus(tmp_path / "good", 1, train=texts_of(3))
    bad = write_corpus(tmp_path / "bad", 1, train=texts_of(3), valid=[])
    for corpora in ((bad,), (good, bad)):
        message = message_of(lambda c=corpora: tasks.cache(text_over(*c), tmp_path / "cache"))
        assert message == f"{bad}: the valid split is empty: give it some rows"


def test_the_longest_split_is_tokenized_last(tmp_path, monkeypatch):
    """What is wrong with another shows before."""
    written = []

    def write(directory, split, *rest):
        written.append(split)
        return {"examples": split != "valid"}

    monkeypatch.setattr(tasks, "write_split", write)
    path = write_corpus(tmp_path / "all", 1, train=texts_of(3), valid=["short"])
    source = text_over(Corpus(path, min_document_length=20))
    assert "valid split has no document of" in message_of(lambda: tasks.cache(source, tmp_path))
    assert written == ["valid"]


def test_a_cache_of_what_the_corpus_was(tmp_path):
    path = write_corpus(tmp_path / "text", 2, train=texts_of(6), valid=texts_of(2))
    source = cached(text_over(path), tmp_path / "cache")
    again = dataclasses.replace(source)
    assert len(take(again, 6)) == 6
    write_corpus(tmp_path / "text", 1, valid=texts_of(3))
    message = message_of(lambda: take(dataclasses.replace(source), 1))
    assert message.endswith(
        f"made of other files of {path} than are there now (valid.jsonl): make the cache again"
    )
    shutil.rmtree(path)
    assert len(take(dataclasses.replace(source), 6)) == 6


def test_a_cache_that_seqio_would_not_find(tmp_path):
    source = text_over(write_corpus(tmp_path / "text", 1, train=texts_of(3)))
    message = message_of(lambda: tasks.cache(source, tmp_path / "cache[1]"))
    assert message == f"{tmp_path}/cache[1]: '[' in the path of a cache: give one without it"


def test_a_damaged_cache(tmp_path):
    source = cached(
        text_over(write_corpus(tmp_path / "text", 1, train=texts_of(3))), tmp_path / "cache"
    )
    *_, file = (f for f in (tmp_path / "cache").rglob("*.tfrecord-*") if f.stat().st_size)
    size = file.stat().st_size
    content = file.read_bytes()

    def message():
        return message_of(lambda: take(dataclasses.replace(source), 9))

    file.write_bytes(content[:-3] + b"abc")
    assert "cache: damaged data (" in message() and message().endswith("make it again")
    file.write_bytes(b"")  # whole documents are lost, which reading would not notice
    assert message().startswith(f"{file}: damaged: it has 0 of {size} bytes: copy the cache again")
    file.unlink()
    assert message().startswith(f"{file}: missing: copy the cache again")
    file.mkdir()
    assert message().startswith(f"{file}: missing: copy the cache again")
    file.rmdir()
    file.write_bytes(content)
    names = ("info.train.json", "stats.train.json", "origin.json")
    for name, text in itertools.product(names, ("", "[]", "7", '{"bytes": "x"}', "\xff")):
        (notes,) = (tmp_path / "cache").rglob(name)
        whole = notes.read_bytes()
        notes.write_bytes(text.encode("latin-1"))
        assert message() == f"{notes}: damaged: copy the cache again, or make it again"
        if text == "\xff" and name != "stats.train.json":
            assert message_of(dataclasses.replace(source).settings) == message()
        notes.write_bytes(whole)
    assert len(take(dataclasses.replace(source), 3)) == 3


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

"""A data set of TensorFlow Datasets against the texts it was made of."""

import dataclasses
import json

import numpy as np
import pytest
from corpora import cached, epochs_of, framed, message_of, read, take, text_over, texts_of

from fot_jax.data.sentencepiece_vocabulary import TrainedSentencePiece
from fot_jax.data.tasks import Corpus


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """A data set prepared by TensorFlow Datasets, like PG-19 in its fields; its directory."""
    import tensorflow_datasets as tfds

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
        lambda: source.check_split("test")
    )
    source.check_split("valid")
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
    message = first("tfds:c4/en")
    assert (
        f"takes Apache Beam, in an environment of its own: tfds build c4/en --data_dir {books};"
        in (message)
    )
    message = first("tfds:pg19")
    assert "not prepared yet: run: pip install importlib_resources && python -c " in message or (
        "not prepared yet: run: python -c " in message
    )
    assert "'text' is none of its fields of text (book_text)" in first("tfds:few_books")
    assert "'book_id' is none of its fields" in first("tfds:few_books", "book_id")


def test_a_data_set_is_prepared_as_the_message_says(books, tmp_path):
    """`books` has made its builder known by name."""
    source = text_over(Corpus("tfds:few_books", text_field="book_text"), data_dir=str(tmp_path))
    message = message_of(lambda: next(source.documents("train")))
    exec(message.split('python -c "')[1].removesuffix('"'), {})
    assert len(read(dataclasses.replace(source).documents("train"))) == 30


def test_a_file_in_a_bucket_is_downloaded_once(bucket, cloud):
    """Its lines are not looked for in blocks of some MB each."""
    row = json.dumps({"text": "x" * 5_000}) + "\n"
    bucket.put("texts/train.jsonl", row * 2_400)
    assert len(read(text_over(f"{bucket.url}/texts").documents("train"))) == 2_400
    assert cloud.received("train.jsonl") < 2 * 2_400 * len(row)

"""Corpora on disk for tests, and what sources over them yield."""

import collections
import dataclasses
import gzip
import itertools
import json

import pytest

from fot_jax.common.errors import UserError
from fot_jax.data import tasks
from fot_jax.data.tasks import Corpus, Text
from fot_jax.data.vocabulary import Bytes


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
        if epoch >= count:  # a shard may have none in one
            return [documents[i] for i in range(count)]
        documents[epoch].append(tuple(document.tokens.tolist()))
        assert taken == len(documents[epoch])


def message_of(function):
    with pytest.raises(UserError) as info:
        function()
    assert "\n" not in str(info.value)
    return str(info.value)


def cached(source, directory):
    tasks.cache(source, directory)
    return dataclasses.replace(source, cache_dir=str(directory))

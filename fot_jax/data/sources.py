"""What SeqIO reads documents from: the files of a corpus, or a data set of TensorFlow Datasets."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fot_jax.data.corpus import SHUFFLED_BYTES, Corpus, parts_of, shard_of
from fot_jax.data.libraries import libraries
from fot_jax.errors import UserError


@contextlib.contextmanager
def kept_in(failures: list[Exception]) -> Iterator[None]:
    """Keeps an exception that TensorFlow would make a text of."""
    try:
        yield
    except Exception as error:
        failures.append(error)
        raise


def tfds_source(corpus: Corpus, data_dir: str | None) -> tuple[Any, int]:
    """A data set of TensorFlow Datasets, and how many of its documents to shuffle among."""
    tf, seqio = libraries().tf, libraries().seqio
    import tensorflow_datasets as tfds

    name = corpus.path.removeprefix("tfds:")
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".: ")
        raise UserError(
            f"{corpus.path}: {reason}: use a name from the catalog of TensorFlow Datasets, or of a "
            "data set in Text.data_dir"
        ) from error
    if not builder.info.splits:
        where = f" --data_dir {data_dir}" if data_dir else ""
        raise UserError(f"{corpus.path}: not prepared yet: run: tfds build {name}{where}")
    fields = builder.info.features
    texts = [field for field in fields if fields[field].tf_dtype == tf.string]
    if corpus.text_field not in texts:
        raise UserError(
            f"{corpus.path}: {corpus.text_field!r} is none of its fields of text "
            f"({', '.join(texts)}): set Corpus.text_field to one"
        )
    sizes = builder.info.splits.values()
    theirs = {"train": "train", "valid": "validation", "test": "test"}
    config = f"/{builder.builder_config.name}" if builder.builder_config else ""
    source = seqio.TfdsDataSource(
        f"{builder.name}{config}:{builder.version}",
        tfds_data_dir=data_dir,
        splits={ours: split for ours, split in theirs.items() if split in builder.info.splits},
        read_only=True,
    )
    return source, to_shuffle(
        sum(split.num_bytes for split in sizes), sum(split.num_examples for split in sizes)
    )


def to_shuffle(size: int, documents: int) -> int:
    """How many documents to shuffle among: of so many, with so many bytes in all (0: not known)."""
    return max(1, min(documents, documents * SHUFFLED_BYTES // size if size else 1000))


class CorpusSource:
    """What SeqIO asks of a data source, over `parts_of`."""

    caching_permitted = True
    supports_arbitrary_sharding = True
    performs_internal_shuffling = True

    def __init__(self, corpus: Corpus, splits: Sequence[str], failures: list[Exception]):
        self.splits = splits
        self._corpus, self._failures = corpus, failures

    def num_input_examples(self, split: str) -> None:
        return None  # not known without reading

    def get_dataset(self, split, shuffle=True, seed=None, shard_info=None) -> Any:
        """Texts of a shard. Where SeqIO repeats the dataset, every pass is shuffled anew."""
        tf = libraries().tf
        parts = parts_of(self._corpus, split)
        if all(next(part(), None) is None for part in parts):
            raise UserError(f"{self._corpus.path}: the {split} split is empty: give it some rows")
        shard, shards = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
        passes = itertools.count()

        def texts():
            rng = np.random.default_rng((seed, next(passes))) if shuffle else None
            with kept_in(self._failures):
                for text in shard_of(parts, shard, shards, rng):
                    yield {self._corpus.text_field: text}

        signature = {self._corpus.text_field: tf.TensorSpec([], tf.string)}
        return tf.data.Dataset.from_generator(texts, output_signature=signature)

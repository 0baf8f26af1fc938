"""What SeqIO reads documents from: the files of a corpus, or a data set of TensorFlow Datasets."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fot_jax.common.errors import UserError
from fot_jax.data.corpus import SHUFFLED_BYTES, Corpus, Part, dealt, shard_of, split_parts
from fot_jax.data.documents import NoDocuments
from fot_jax.data.tensorflow_imports import import_seqio, import_tensorflow

MAX_EMPTY_PASSES = 8  # at the start of a run: by then every shard must have had a document


def max_empty_passes(shards: int) -> int:
    """How many passes in a row a shard that has had documents may be without any.

    Files are dealt out anew in every pass, so a longer row means that the corpus was changed. The
    only shard there is has the same documents in every pass.
    """
    return max(1, 100 * (shards - 1))


@contextlib.contextmanager
def kept_in(failures: list[Exception]) -> Iterator[None]:
    """Keeps an exception of the block, of which TensorFlow would pass on the text alone."""
    try:
        yield
    except Exception as error:
        failures.append(error)
        raise


def tfds_source(corpus: Corpus, data_dir: str | None) -> tuple[Any, int]:
    """A data set of TensorFlow Datasets, and how many of its documents to shuffle among."""
    tf, seqio = import_tensorflow(), import_seqio()
    import tensorflow_datasets as tfds

    name = corpus.path.removeprefix("tfds:")
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".: ")
        raise NoDocuments(
            f"{corpus.path}: {reason}: use a name from the catalog of TensorFlow Datasets, or of a "
            "data set in Text.data_dir"
        ) from error
    if not builder.info.splits:
        raise NoDocuments(
            f"{corpus.path}: not prepared yet: {_how_to_prepare(builder, name, data_dir)}"
        )
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


def _how_to_prepare(builder: Any, name: str, data_dir: str | None) -> str:
    """Without the command `tfds`, which does not start where Apache Beam is not installed."""
    import tensorflow_datasets as tfds

    if isinstance(builder, tfds.core.BeamBasedBuilder):
        where = f" --data_dir {data_dir}" if data_dir else ""
        return (
            "that takes Apache Beam, in an environment of its own: tfds build "
            f"{name}{where}; or give a directory of JSON Lines (docs/training.md, Your own text)"
        )
    where = f", data_dir={data_dir!r}" if data_dir else ""
    code = f"import tensorflow_datasets as t; t.builder({name!r}{where}).download_and_prepare()"
    # Imported by builders that come in a directory, PG-19's, and not among what TFDS requires.
    missing = importlib.util.find_spec("importlib_resources") is None
    return f'run: {"pip install importlib_resources && " if missing else ""}python -c "{code}"'


def to_shuffle(size: int, documents: int) -> int:
    """How many documents to shuffle among: of so many, with so many bytes in all (0: not known)."""
    return max(1, min(documents, documents * SHUFFLED_BYTES // size if size else 1000))


class CorpusSource:
    """What SeqIO asks of a data source, over `split_parts`."""

    caching_permitted = True
    supports_arbitrary_sharding = True
    performs_internal_shuffling = True

    def __init__(
        self,
        corpus: Corpus,
        splits: Sequence[str],
        tokens_of: Callable[[bytes], np.ndarray],
        failures: list[Exception],
        of_mixture: bool = False,
    ):
        """Opens no file.

        Args:
          corpus: says which documents are left out.
          splits: those it has.
          tokens_of: of a document in UTF-8.
          failures: collects exceptions, of which TensorFlow passes on the texts alone.
          of_mixture: SeqIO repeats the dataset without end; it would stop where a pass has no
            documents, so such a pass is followed by the next one at once.
        """
        self.splits = splits
        self._corpus, self._tokens_of = corpus, tokens_of
        self._failures, self._of_mixture = failures, of_mixture

    def num_input_examples(self, split: str) -> None:
        return None  # not known without reading

    def texts(self, split: str) -> Iterator[bytes]:
        """Of all documents, in order."""
        return itertools.chain.from_iterable(part() for part in self.parts(split))

    def lengths(self, split: str, shard: int, shards: int, seed: int) -> Iterator[int]:
        """Tokens of the documents that a shard has in its first passes, but in another order."""
        parts = self.parts(split)
        for number in range(min(MAX_EMPTY_PASSES, max_empty_passes(shards))):
            rng = np.random.default_rng((seed, number))
            for tokens in self._tokenized(dealt(parts, shard, shards, rng)):
                yield len(tokens)

    def get_dataset(self, split, shuffle=True, seed=None, shard_info=None) -> Any:
        """Tokens of a shard. Where SeqIO repeats the dataset, every pass is shuffled anew."""
        tf = import_tensorflow()
        parts = self.parts(split)
        shard, shards = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
        passes = itertools.count()

        def rows():
            with kept_in(self._failures):
                for _ in range(max_empty_passes(shards) if shuffle and self._of_mixture else 1):
                    rng = np.random.default_rng((seed, next(passes))) if shuffle else None
                    tokenized = self._tokenized(shard_of(parts, shard, shards, rng))
                    if (first := next(tokenized, None)) is None:
                        continue
                    for tokens in itertools.chain([first], tokenized):
                        yield {"targets": tokens}
                    return

        signature = {"targets": tf.TensorSpec([None], tf.int32)}
        return tf.data.Dataset.from_generator(rows, output_signature=signature)

    def parts(self, split: str) -> list[Part]:
        """What the split consists of, of which the first document is read.

        Raises:
          UserError: there is none, or the files are not all there.
        """
        parts = split_parts(self._corpus, split)
        if all(next(part(), None) is None for part in parts):
            raise UserError(f"{self._corpus.path}: the {split} split is empty: give it some rows")
        return parts

    def _tokenized(self, texts: Iterator[bytes]) -> Iterator[np.ndarray]:
        """Tokens of those that are long enough."""
        everything = map(self._tokens_of, texts)
        return (x for x in everything if len(x) >= self._corpus.least_tokens)

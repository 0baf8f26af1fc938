"""Documents of text corpora, read through SeqIO: a task for each corpus, a mixture of several.

The only importer of SeqIO and TensorFlow, when they are first used: that takes some seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import time
import types
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from fot_jax.data.corpus import SHUFFLED_BYTES, Corpus, parts_of, shard_of
from fot_jax.data.lanes import Document, Position
from fot_jax.data.vocabulary import (
    Bytes,
    HuggingFaceTokenizer,
    SentencePiece,
    TrainedSentencePiece,
    Vocabulary,
    frame,
    new_directory,
)
from fot_jax.errors import UserError, check_range

SPLITS = ("train", "valid", "test")
CACHE_SHARDS = 64  # of a training split
SHUFFLED_TOKENS = 2**23  # of the pieces at hand, of which the next one is drawn
TRAINING_CHARACTERS = 4_000_000  # that a tokenizer is trained on, at most
TRAINING_EXCERPT = 32_000  # of them from one document


@dataclasses.dataclass(frozen=True)
class Text:
    """A DocumentSource: documents of one corpus, or of a mixture of several.

    Attributes:
      corpora: where documents come from.
      tokenizer: a vocabulary, or what trains one on the training documents.
      cache_dir: where `cache` put the tokens of these corpora for this tokenizer; None tokenizes
        documents as they are read.
      data_dir: of TensorFlow Datasets; None: its own default.
      piece_tokens: training documents are cut into pieces of so many tokens, which come in random
        order as documents of their own, so that one long document does not fill many steps on end;
        what is left over at the end of a document, or is shorter, is not used. None: whole
        documents.
    """

    corpora: Sequence[Corpus] = (Corpus(),)
    tokenizer: Vocabulary | TrainedSentencePiece = TrainedSentencePiece()
    cache_dir: str | None = None
    data_dir: str | None = None
    piece_tokens: int | None = None

    def __post_init__(self):
        check_range("Text", 2, piece_tokens=self.piece_tokens)
        different = {dataclasses.replace(corpus, weight=1.0) for corpus in self.corpora}
        if not self.corpora or len(different) < len(self.corpora):
            raise UserError("Text.corpora: name one corpus or more, and none twice")

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer; trained first, on excerpts of training documents, if it asks for that.

        Raises:
          UserError: as `documents`; or there is too little text to train on.
        """
        if not isinstance(self.tokenizer, TrainedSentencePiece):
            return self.tokenizer
        share = TRAINING_CHARACTERS // len(self.corpora)
        excerpts = (self._excerpts(corpus, share) for corpus in self.corpora)
        return self.tokenizer.train(itertools.chain.from_iterable(excerpts))

    def with_vocabulary(self, vocabulary: Vocabulary) -> Text:
        return dataclasses.replace(self, tokenizer=vocabulary)

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of a split, one corpus after another, in the order of their files.

        Raises:
          UserError: no such split, nothing in it, a broken row (file:line), no such cache.
        """
        self._check_split(split)
        for corpus, task in zip(self.corpora, self._tasks, strict=True):
            documents = self._read(task, split=split, shuffle=False, num_epochs=1)
            first = next(documents, None)
            if first is None:
                raise UserError(
                    f"{corpus.path}: the {split} split has no document of "
                    f"{corpus.min_document_length} tokens or more: lower min_document_length"
                )
            yield first
            yield from documents

    def stream(
        self, shard: int, shards: int, seed: int, position: Position = (0, 0)
    ) -> Iterator[tuple[Position, Document]]:
        """Training documents of a shard (see DocumentSource).

        Each epoch of a single corpus is shuffled anew. A mixture is one endless epoch, in which a
        corpus begins again, in another order, whenever it has been read (where SeqIO shuffles, as
        it does with caches and TensorFlow Datasets, its end mixes with its beginning). Going on
        from a position means reading up to it: use a cache if tokenizing that again takes too long.

        Raises:
          UserError: as `documents`; or the shard is empty.
        """
        self._check_split("train")
        endless = len(self.corpora) > 1
        if endless and self.piece_tokens is not None:
            self._check_pieces(shard, shards)
        epoch, taken = position
        while True:
            read = functools.partial(
                self._read,
                piece_tokens=self.piece_tokens,
                split="train",
                shuffle=True,
                seed=int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]),
                shard_info=_libraries().seqio.ShardInfo(shard, shards),
            )
            documents = read(self.provider, num_epochs=None if endless else 1, skip=taken)
            for document in documents:
                taken += 1
                yield (epoch, taken), document
            if endless or taken == 0:
                raise self._empty_shard(shard, shards, read)
            epoch, taken = epoch + 1, 0

    # --- SeqIO -----------------------------------------------------------------------------------

    @functools.cached_property
    def provider(self) -> Any:
        """The SeqIO task of the only corpus, or the mixture of several; registered by its name."""
        if len(self.corpora) == 1:
            return self._tasks[0]
        registry = _libraries().seqio.MixtureRegistry
        rates = [(task.name, c.weight) for task, c in zip(self._tasks, self.corpora, strict=True)]
        name = f"fot.mixture.{_digest(rates)}"
        registry.remove(name)
        return registry.add(name, rates)

    @functools.cached_property
    def _tasks(self) -> list[Any]:
        return [self._make_task(corpus) for corpus in self.corpora]

    def _make_task(self, corpus: Corpus) -> Any:
        seqio = _libraries().seqio
        name = _task_name(corpus, self.vocabulary)
        if self.cache_dir is None:
            source, to_shuffle = self._source(corpus)
            preprocessors = [
                _tokenize(self.vocabulary, corpus.text_field, self._failures),
                _at_least(corpus.min_document_length),
                seqio.CacheDatasetPlaceholder(),
            ]
        else:
            source, to_shuffle = _cached_source(self.cache_dir, name, corpus)
            preprocessors = [_as_int32]
        vocabulary = seqio.PassThroughVocabulary(self.vocabulary.size, self.vocabulary.eos)
        seqio.TaskRegistry.remove(name)
        return seqio.TaskRegistry.add(
            name,
            source,
            output_features={"targets": seqio.Feature(vocabulary, add_eos=False)},
            preprocessors=preprocessors,
            shuffle_buffer_size=to_shuffle,
        )

    def _source(self, corpus: Corpus) -> tuple[Any, int | None]:
        """A data source, and how many documents to shuffle among (None: it shuffles)."""
        if corpus.path.startswith("tfds:"):
            return _tfds_source(corpus, self.data_dir)
        splits = [split for split in SPLITS if parts_of(corpus, split)]
        return _Documents(corpus, splits, self._failures), None

    def _read(
        self, provider: Any, skip: int = 0, piece_tokens: int | None = None, **options
    ) -> Iterator[Document]:
        """Documents of a task or mixture, or pieces of them."""
        # Otherwise SeqIO keeps up to 10,000 documents in memory, however long they are.
        dataset = provider.get_dataset(try_in_mem_cache=False, **options)
        if piece_tokens is not None:
            dataset = _pieces(dataset, piece_tokens, options["seed"])
        rows = self._rows(dataset.skip(skip))
        _libraries().reading.add(rows)
        for row in rows:
            yield Document(row["targets"], np.ones(len(row["targets"]), np.float32))

    def _rows(self, dataset: Any) -> Generator[dict[str, Any]]:
        """Rows of a dataset. An error of ours inside TensorFlow is raised as it was."""
        errors = _libraries().tf.errors
        any_error, damage = errors.OpError, errors.DataLossError
        try:
            yield from dataset.as_numpy_iterator()
        except any_error as error:
            if self._failures:
                raise self._failures.pop() from None
            if isinstance(error, damage):
                where = self.cache_dir or ", ".join(corpus.path for corpus in self.corpora)
                why = error.message.splitlines()[0]
                raise UserError(f"{where}: damaged data ({why}): make it again") from error
            raise

    @functools.cached_property
    def _failures(self) -> list[Exception]:
        return []

    def _excerpts(self, corpus: Corpus, characters: int) -> Iterator[str]:
        """From the middle of one training document after another."""
        source, _ = self._source(corpus)
        self._check_has(corpus, source, "train")
        for row in self._rows(source.get_dataset(split="train", shuffle=False)):
            text = row[corpus.text_field].decode(errors="replace")
            start = max(0, len(text) - TRAINING_EXCERPT) // 2
            excerpt = text[start : start + min(TRAINING_EXCERPT, characters)]
            characters -= len(excerpt)
            yield excerpt
            if characters == 0:
                return

    # --- Checks ----------------------------------------------------------------------------------

    def _check_split(self, split: str) -> None:
        for corpus, task in zip(self.corpora, self._tasks, strict=True):
            self._check_has(corpus, task.source, split)

    def _check_has(self, corpus: Corpus, source: Any, split: str) -> None:
        if split in source.splits:
            return
        where, remedy = corpus.path, "use another"
        if self.cache_dir is not None:
            where, remedy = f"{self.cache_dir}: the cache of {where}", "make it with fot cache"
        elif isinstance(source, _Documents) and split in SPLITS:
            remedy = (
                f"a split is a file {split}.jsonl or {split}.jsonl.gz or {split}-00000.jsonl.gz"
            )
        there = ", ".join(source.splits) or "none"
        raise UserError(f"{where}: no {split} split (there is: {there}): {remedy}")

    def _check_pieces(self, shard: int, shards: int) -> None:
        """An endless search for the pieces of documents that are too short would have no end."""
        for corpus, task in zip(self.corpora, self._tasks, strict=True):
            info = _libraries().seqio.ShardInfo(shard, shards)
            documents = self._read(
                task, split="train", shuffle=False, num_epochs=1, shard_info=info
            )
            if all(len(document.tokens) < self.piece_tokens for document in documents):
                raise self._no_documents(corpus, shard, shards)

    def _empty_shard(self, shard: int, shards: int, read: Callable) -> UserError:
        """Says which corpus it is that has no documents for a shard."""
        corpus = next(
            corpus
            for corpus, task in zip(self.corpora, self._tasks, strict=True)
            if next(read(task, num_epochs=1), None) is None
        )
        return self._no_documents(corpus, shard, shards)

    def _no_documents(self, corpus: Corpus, shard: int, shards: int) -> UserError:
        what, remedy = "no training document", "lower Data.lane_groups"
        if self.piece_tokens is not None:
            what = f"no piece of {self.piece_tokens} tokens"
            remedy = "lower Text.piece_tokens or Data.lane_groups"
        if corpus.min_document_length:
            what += f" of {corpus.min_document_length} tokens or more"
            remedy += " or Corpus.min_document_length"
        return UserError(f"{corpus.path}: {what} in shard {shard} of {shards}: {remedy}")


# --- Tasks ---------------------------------------------------------------------------------------


@functools.cache
def _libraries() -> Any:
    """TensorFlow and SeqIO as .tf and .seqio: quiet, and kept off the accelerators.

    In .reading are the generators of rows that are in use. TensorFlow's threads read ahead, in
    Python; did they so while the interpreter goes away, they would abort the process.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # JAX sets that
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # or a broken row shows as a hundred lines
    with _silent_stderr():  # before TensorFlow knows of the level, it says what it looks for
        import seqio
        import tensorflow as tf

        for kind in ("GPU", "TPU"):
            with contextlib.suppress(RuntimeError, ValueError):  # none there, or they are in use
                tf.config.set_visible_devices([], kind)

    reading: weakref.WeakSet[Generator] = weakref.WeakSet()
    atexit.register(_close, reading)
    return types.SimpleNamespace(tf=tf, seqio=seqio, reading=reading)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what this process, all its threads, writes to file descriptor 2; exceptions pass."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _close(generators: Iterable[Generator]) -> None:
    """Closes generators, waiting up to a minute for a thread that is inside one."""
    for generator in list(generators):
        for _ in range(600):
            try:
                generator.close()
                break
            except ValueError:  # "already executing"
                time.sleep(0.1)


def _task_name(corpus: Corpus, vocabulary: Vocabulary) -> str:
    """Changes with all that changes the documents, so that no cache is read which has others."""
    content = dataclasses.replace(corpus, weight=1.0)
    version = platform.python_version() if corpus.path == "standard_library" else None
    kind, fields = type(vocabulary).__name__, dataclasses.astuple(vocabulary)
    stem = re.sub(r"\W+", "_", corpus.path, flags=re.ASCII).strip("_")[-40:]
    return f"fot.{stem}.{_digest((content, version, kind, fields))}"


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _tokenize(vocabulary: Vocabulary, field: str, failures: list[Exception]) -> Callable:
    """A preprocessor: rows with a text to rows with "targets", the tokens of a document."""

    def encode(text: bytes) -> np.ndarray:
        with _kept_in(failures):
            return frame(vocabulary, text.decode(errors="replace"))

    def tokens(row: Mapping[str, Any]) -> dict[str, Any]:
        tf = _libraries().tf
        targets = tf.numpy_function(encode, [row[field]], tf.int32)
        return {"targets": tf.ensure_shape(targets, [None])}

    return lambda dataset: dataset.map(tokens)


def _at_least(length: int) -> Callable:
    """A preprocessor: leaves out documents of fewer tokens."""
    size = _libraries().tf.size
    return lambda dataset: dataset.filter(lambda row: size(row["targets"]) >= length)


def _pieces(dataset: Any, length: int, seed: int) -> Any:
    """Rows of `length` tokens of a document each, in random order."""
    tf = _libraries().tf

    def cut(row):
        whole = tf.size(row["targets"], tf.int64) // length
        pieces = tf.reshape(row["targets"][: whole * length], [whole, length])
        return tf.data.Dataset.from_tensor_slices({"targets": pieces})

    pieces = dataset.flat_map(cut)
    return pieces.shuffle(max(1, SHUFFLED_TOKENS // length), seed, reshuffle_each_iteration=False)


def _as_int32(dataset: Any) -> Any:
    """A preprocessor: tokens as records have them to tokens as tasks have them."""
    cast, int32 = _libraries().tf.cast, _libraries().tf.int32
    return dataset.map(lambda row: {"targets": cast(row["targets"], int32)})


@contextlib.contextmanager
def _kept_in(failures: list[Exception]) -> Iterator[None]:
    """Keeps an exception that TensorFlow would make a text of."""
    try:
        yield
    except Exception as error:
        failures.append(error)
        raise


# --- Data sources --------------------------------------------------------------------------------


def _tfds_source(corpus: Corpus, data_dir: str | None) -> tuple[Any, int]:
    """A data set of TensorFlow Datasets, and how many of its documents to shuffle among."""
    tf, seqio = _libraries().tf, _libraries().seqio
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
    return source, _to_shuffle(
        sum(split.num_bytes for split in sizes), sum(split.num_examples for split in sizes)
    )


def _to_shuffle(size: int, documents: int) -> int:
    """How many documents to shuffle among: of so many, with so many bytes in all (0: not known)."""
    return max(1, min(documents, documents * SHUFFLED_BYTES // size if size else 1000))


class _Documents:
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
        tf = _libraries().tf
        parts = parts_of(self._corpus, split)
        if all(next(part(), None) is None for part in parts):
            raise UserError(f"{self._corpus.path}: the {split} split is empty: give it some rows")
        shard, shards = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
        passes = itertools.count()

        def texts():
            rng = np.random.default_rng((seed, next(passes))) if shuffle else None
            with _kept_in(self._failures):
                for text in shard_of(parts, shard, shards, rng):
                    yield {self._corpus.text_field: text}

        signature = {self._corpus.text_field: tf.TensorSpec([], tf.string)}
        return tf.data.Dataset.from_generator(texts, output_signature=signature)


# --- Offline caches ------------------------------------------------------------------------------


def cache(text: Text, directory: epath.PathLike, splits: Sequence[str] = SPLITS) -> None:
    """Writes the tokens of all corpora as SeqIO keeps them, to be read with Text.cache_dir.

    A cache replaces an older one when it is whole. Training documents are shuffled over many files,
    so that streams can shuffle files; others keep their order. Splits that a corpus lacks are left
    out.

    Raises:
      UserError: as `Text.documents`; or the directory cannot be written.
    """
    text = dataclasses.replace(text, tokenizer=text.vocabulary, cache_dir=None)
    for corpus, task in zip(text.corpora, text._tasks, strict=True):
        with new_directory(_cache_of(directory, task.name)) as half:
            for split in splits:
                if split in task.source.splits:
                    train = split == "train"
                    documents = text._read(task, split=split, shuffle=train, seed=0, num_epochs=1)
                    stats = _write_split(half, split, CACHE_SHARDS if train else 1, documents)
                    logging.info("cached %s of %s: %s", split, corpus.path, stats)
            (half / "COMPLETED").write_text("")


def _write_split(
    directory: epath.Path, split: str, shards: int, documents: Iterator[Document]
) -> dict[str, int]:
    tf, seqio = _libraries().tf, _libraries().seqio
    lengths = []
    try:
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(tf.io.TFRecordWriter(file))
                for file in _record_files(directory, split, shards)
            ]
            for i, document in enumerate(documents):
                example = seqio.dict_to_tfexample({"targets": document.tokens})
                writers[i % shards].write(example.SerializeToString())
                lengths.append(len(document.tokens))
    except tf.errors.OpError as error:
        raise UserError(f"{directory.parent}: cannot write the cache: {error.message}") from error
    info = {
        "num_shards": shards,
        "features": {"targets": {"shape": [None], "dtype": "int32"}},
        "seqio_version": seqio.__version__,
    }
    stats = {
        "examples": len(lengths),
        "targets_tokens": sum(lengths),
        "targets_max_tokens": max(lengths, default=0),
    }
    epath.Path(seqio.get_cached_info_path(directory, split)).write_text(json.dumps(info))
    epath.Path(seqio.get_cached_stats_path(directory, split)).write_text(json.dumps(stats))
    return stats


def _cache_of(directory: epath.PathLike, task_name: str) -> epath.Path:
    return epath.Path(directory) / _libraries().seqio.get_task_dir_from_name(task_name)


def _cached_source(cache_dir: epath.PathLike, task_name: str, corpus: Corpus) -> tuple[Any, int]:
    """A source of the rows in the cache of a task, and how many of them to shuffle among.

    What SeqIO itself reads them with has 256 documents in memory, of whatever length.
    """
    tf, seqio = _libraries().tf, _libraries().seqio
    directory = _cache_of(cache_dir, task_name)
    if not (directory / "COMPLETED").exists():
        raise UserError(
            f"{cache_dir}: no cache of {corpus.path} for this tokenizer and these settings of the "
            f"corpus: make it with: fot cache EXPERIMENT.gin --output {cache_dir}"
        )
    there = {file.name for file in directory.iterdir()}
    files = {}
    for split in SPLITS:
        info = epath.Path(seqio.get_cached_info_path(directory, split))
        if info.name in there:
            shards = json.loads(info.read_text())["num_shards"]
            files[split] = _record_files(directory, split, shards)
            if missing := [file for file in files[split] if epath.Path(file).name not in there]:
                raise UserError(f"{missing[0]}: missing: copy the cache again, or make it again")
    to_shuffle = 1
    if "train" in files:
        stats = json.loads(epath.Path(seqio.get_cached_stats_path(directory, "train")).read_text())
        to_shuffle = _to_shuffle(4 * stats["targets_tokens"], stats["examples"])
    source = seqio.TFExampleDataSource(
        files,
        {"targets": tf.io.FixedLenSequenceFeature([], tf.int64, allow_missing=True)},
        cycle_length=2,
        block_length=1,
    )
    return source, to_shuffle


def _record_files(directory: epath.Path, split: str, shards: int) -> list[str]:
    prefix = _libraries().seqio.get_cached_tfrecord_prefix(os.fspath(directory), split)
    return [f"{prefix}-{i:05d}-of-{shards:05d}" for i in range(shards)]


CONFIGURABLE = (Text, Corpus, Bytes, SentencePiece, HuggingFaceTokenizer, TrainedSentencePiece)

"""Documents of text corpora, read through SeqIO: a task for each corpus, a mixture of several."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import platform
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from fot_jax.common.atomic import new_directory
from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError, check_range
from fot_jax.common.paths import path_of
from fot_jax.data.caches import (
    cache_of,
    cached_source,
    notes_of,
    origin_of,
    write_origin,
    write_split,
)
from fot_jax.data.corpus import Corpus, files_there, splits_in
from fot_jax.data.documents import START, Document, Position, in_turn, single_source_position
from fot_jax.data.files import SPLITS, not_read
from fot_jax.data.sentencepiece_vocabulary import TrainedSentencePiece
from fot_jax.data.sources import (
    MAX_EMPTY_PASSES,
    CorpusSource,
    kept_in,
    max_empty_passes,
    tfds_source,
)
from fot_jax.data.tensorflow_imports import close_at_exit, import_seqio, import_tensorflow
from fot_jax.data.vocabulary import Vocabulary, encode_document

CACHE_SHARDS = 64  # of a training split
SHUFFLED_TOKENS = 2**23  # of the pieces at hand, of which the next one is drawn
TRAINING_CHARACTERS = 4_000_000  # that a tokenizer is trained on, at most
TRAINING_EXCERPT = 32_000  # of them from one document


@configurable
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
        what is left over at the end of a document, or is shorter, is not used. A piece fills one
        place less, as its last token is only ever a target. None: whole documents.
    """

    corpora: Sequence[Corpus] = (Corpus(),)
    tokenizer: Vocabulary | TrainedSentencePiece = TrainedSentencePiece()
    cache_dir: str | None = None
    data_dir: str | None = None
    piece_tokens: int | None = None

    def __post_init__(self):
        check_range("Text", 2, 2**31 - 1, piece_tokens=self.piece_tokens)
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

    def settings(self) -> dict[str, Any]:
        corpora = [dataclasses.asdict(corpus) for corpus in self.corpora]
        return {
            "Text.piece_tokens": self.piece_tokens,
            "Text.cache_dir": "a cache" if self.cache_dir is not None else None,
            **{f"Corpus.{name}": [each[name] for each in corpora] for name in corpora[0]},
            "corpus files": [self._digest_of_files(corpus) for corpus in self.corpora],
        }

    def check_split(self, split: str) -> None:
        """Looks up the split of every corpus, and reads the first row of it."""
        for corpus, (source, _) in zip(self.corpora, self._sources, strict=True):
            self._check_has(corpus, source, split)
            if isinstance(source, CorpusSource):
                source.parts(split)

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of a split, of each corpus in turn, in the order of their files.

        Raises:
          UserError: no such split, nothing in it, a broken row (file:line), no such cache.
        """
        self.check_split(split)
        yield from in_turn(
            map(functools.partial(self._of_corpus, split), self.corpora, self._tasks)
        )

    def _of_corpus(self, split: str, corpus: Corpus, task: Any) -> Iterator[Document]:
        documents = self._read(task, split=split, shuffle=False, num_epochs=1)
        first = next(documents, None)
        if first is None:
            raise _all_too_short(corpus, split)
        yield first
        yield from documents

    def stream(
        self, shard: int, shards: int, seed: int, position: Position = START
    ) -> Iterator[tuple[Position, Document]]:
        """Training documents of a shard (see DocumentSource).

        Each epoch of a single corpus is shuffled anew. A mixture is one endless epoch, in which
        every shard draws corpora by itself, and a corpus begins again, in another order, whenever
        it has been read (where SeqIO shuffles, as it does with caches and TensorFlow Datasets, its
        end mixes with its beginning). Going on from a position means reading up to it: use a cache
        if tokenizing that again takes too long.

        Files are shared out anew in every epoch, but for those of a cache; where a shard has got
        empty ones alone, or too short documents, it goes on to the next epoch.

        Raises:
          UserError: as `documents`; or the first MAX_EMPTY_PASSES epochs have none for the shard;
            or a cache's files cannot be shared out evenly.
        """
        self.check_split("train")
        endless = len(self.corpora) > 1
        epoch, taken = single_source_position(position)
        if endless and position == START:
            epoch = 1  # 0: of an earlier fot_jax, which goes on as it began (see _mixture_of)
        uneven = self.cache_dir is not None and shards < CACHE_SHARDS and CACHE_SHARDS % shards
        if uneven and position == START:  # a run of fot_jax 0.1 goes on as it began
            raise UserError(
                f"Data.lane_groups = {shards}: the files of {self.cache_dir} are dealt out among "
                f"them, so give 1, 2, 4, … {CACHE_SHARDS}"
            )
        if endless:
            self._check_shards(shard, shards, _seed_of(seed, epoch))
        empty, most = 0, max_empty_passes(shards)
        if position == START:
            most = min(MAX_EMPTY_PASSES, most)
        while True:
            read = functools.partial(
                self._read,
                piece_tokens=self.piece_tokens,
                split="train",
                shuffle=True,
                seed=_seed_of(seed, epoch),
                shard_info=import_seqio().ShardInfo(shard, shards),
            )
            provider = self._mixture_of(shard) if endless and epoch else self.provider
            documents = read(provider, num_epochs=None if endless else 1, skip=taken)
            for document in documents:
                taken += 1
                yield (epoch, taken), document
            if taken:
                empty, most = 0, max_empty_passes(shards)
            elif endless or (empty := empty + 1) == most:
                raise self._no_documents(self.corpora, shard, shards)
            elif empty == 1:
                logging.info(
                    "%s: no document for shard %d of %d in epoch %d: on to the next epoch",
                    self.corpora[0].path,
                    shard,
                    shards,
                    epoch,
                )
            epoch, taken = epoch + 1, 0

    # --- SeqIO -----------------------------------------------------------------------------------

    @functools.cached_property
    def provider(self) -> Any:
        """The SeqIO task of the only corpus, or the mixture of several; registered by its name."""
        if len(self.corpora) == 1:
            return self._tasks[0]
        registry = import_seqio().MixtureRegistry
        rates = [(task.name, c.weight) for task, c in zip(self._tasks, self.corpora, strict=True)]
        name = f"fot.mixture.{_digest(rates)}"
        registry.remove(name)
        return registry.add(name, rates)

    def _mixture_of(self, shard: int) -> Any:
        """The mixture as a shard draws from it.

        SeqIO seeds the draws of corpora as it seeds the order of files, which has to be one for all
        shards: all lane groups would read the same corpora at the same time.
        """

        def draw(datasets: Sequence[Any], rates: Sequence[float], seed: int) -> Any:
            data = import_tensorflow().data.Dataset
            return data.sample_from_datasets(
                datasets, rates, seed=_seed_of(seed, shard), stop_on_empty_dataset=True
            )

        pairs = [(task, c.weight) for task, c in zip(self._tasks, self.corpora, strict=True)]
        return import_seqio().Mixture(self.provider.name, pairs, sample_fn=draw)

    @functools.cached_property
    def _tasks(self) -> list[Any]:
        pairs = zip(self.corpora, self._sources, strict=True)
        return [self._make_task(corpus, *source) for corpus, source in pairs]

    def _make_task(self, corpus: Corpus, source: Any, to_shuffle: int | None) -> Any:
        seqio = import_seqio()
        name = _task_name(corpus, self.vocabulary)
        if self.cache_dir is not None:
            preprocessors = [_as_int32]
        else:
            preprocessors = [seqio.CacheDatasetPlaceholder()]
            if not isinstance(source, CorpusSource):
                tokenize = _tokenize(self._tokens_of, corpus.text_field, self._failures)
                preprocessors = [tokenize, _at_least(corpus.least_tokens), *preprocessors]
        vocabulary = seqio.PassThroughVocabulary(self.vocabulary.size, self.vocabulary.eos)
        seqio.TaskRegistry.remove(name)
        return seqio.TaskRegistry.add(
            name,
            source,
            output_features={"targets": seqio.Feature(vocabulary, add_eos=False)},
            preprocessors=preprocessors,
            shuffle_buffer_size=to_shuffle,
        )

    @functools.cached_property
    def _sources(self) -> list[tuple[Any, int | None]]:
        """Of each corpus what is read, as `_source` gives it, or its cache."""
        if self.cache_dir is None:
            return [self._source(corpus) for corpus in self.corpora]
        names = (_task_name(corpus, self.vocabulary) for corpus in self.corpora)
        pairs = zip(names, self.corpora, strict=True)
        return [cached_source(self.cache_dir, name, corpus) for name, corpus in pairs]

    def _source(self, corpus: Corpus) -> tuple[Any, int | None]:
        """A data source, and how many documents to shuffle among (None: it shuffles)."""
        if corpus.path.startswith("tfds:"):
            return tfds_source(corpus, self.data_dir)
        splits, several = splits_in(corpus), len(self.corpora) > 1
        return CorpusSource(corpus, splits, self._tokens_of, self._failures, several), None

    def _digest_of_files(self, corpus: Corpus) -> str:
        if self.cache_dir is None:
            return _digest(files_there(corpus, "train"))
        return _digest(notes_of(self.cache_dir, _task_name(corpus, self.vocabulary)))

    def _tokens_of(self, text: bytes) -> np.ndarray:
        return encode_document(self.vocabulary, text.decode(errors="replace"))

    def _read(
        self, provider: Any, skip: int = 0, piece_tokens: int | None = None, **options
    ) -> Iterator[Document]:
        """Documents of a task or mixture, or pieces of them."""
        # Otherwise SeqIO keeps up to 10,000 documents in memory, however long they are.
        dataset = provider.get_dataset(try_in_mem_cache=False, **options)
        if piece_tokens is not None:
            dataset = _pieces(dataset, piece_tokens, options["seed"])
        rows = self._rows(dataset.skip(skip))
        close_at_exit(rows)
        for row in rows:
            yield Document(row["targets"], np.ones(len(row["targets"]), np.float32))

    def _rows(self, dataset: Any) -> Generator[dict[str, Any]]:
        """Rows of a dataset. An error of ours inside TensorFlow is raised as it was."""
        errors = import_tensorflow().errors
        try:
            yield from dataset.as_numpy_iterator()
        except errors.OpError as error:
            if self._failures:
                raise self._failures.pop() from None
            if isinstance(error, errors.DataLossError | errors.NotFoundError):
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
        if isinstance(source, CorpusSource):
            texts = source.texts("train")
        else:
            rows = self._rows(source.get_dataset(split="train", shuffle=False))
            texts = (row[corpus.text_field] for row in rows)
        for text in (text.decode(errors="replace") for text in texts):
            start = max(0, len(text) - TRAINING_EXCERPT) // 2
            excerpt = text[start : start + min(TRAINING_EXCERPT, characters)]
            characters -= len(excerpt)
            yield excerpt
            if characters == 0:
                return

    # --- Checks ----------------------------------------------------------------------------------

    def _check_has(self, corpus: Corpus, source: Any, split: str) -> None:
        if split in source.splits:
            return
        where, remedy = corpus.path, "use another"
        if self.cache_dir is not None:
            where, remedy = f"{self.cache_dir}: the cache of {where}", "make it with fot cache"
        elif isinstance(source, CorpusSource) and split in SPLITS:
            remedy = (
                f"a split is a file {split}.jsonl or {split}.jsonl.gz or {split}-00000.jsonl.gz, "
                f"or a directory {split} of .jsonl.gz files"
            )
            if names := not_read(path_of(corpus.path)):
                remedy += f"; not read: {names} (docs/training.md, Your own text)"
        there = ", ".join(source.splits) or "none"
        raise UserError(f"{where}: no {split} split (there is: {there}): {remedy}")

    def _check_shards(self, shard: int, shards: int, seed: int) -> None:
        """What a mixture lacks would show when it is drawn, or never, in an endless search."""
        for corpus, task in zip(self.corpora, self._tasks, strict=True):
            if isinstance(task.source, CorpusSource):
                lengths = task.source.lengths("train", shard, shards, seed)
            else:
                info = import_seqio().ShardInfo(shard, shards)
                rows = self._read(task, split="train", shuffle=False, num_epochs=1, shard_info=info)
                lengths = (len(document.tokens) for document in rows)
            if all(length < (self.piece_tokens or 0) for length in lengths):
                raise self._no_documents([corpus], shard, shards)

    def _no_documents(self, corpora: Sequence[Corpus], shard: int, shards: int) -> UserError:
        what, remedy = "no training document", "lower Data.lane_groups"
        if self.piece_tokens is not None:
            what = f"no piece of {self.piece_tokens} tokens"
            remedy = "lower Text.piece_tokens or Data.lane_groups"
        if least := max(corpus.min_document_length for corpus in corpora):
            what += f" of {least} tokens or more"
            remedy += " or Corpus.min_document_length"
        paths = ", ".join(corpus.path for corpus in corpora)
        return UserError(f"{paths}: {what} in shard {shard} of {shards}: {remedy}")


def cache(text: Text, directory: epath.PathLike, splits: Sequence[str] = SPLITS) -> None:
    """Writes the tokens of all corpora as SeqIO keeps them, to be read with Text.cache_dir.

    A cache replaces an older one when it is whole. Training documents are shuffled over many files,
    so that streams can shuffle files; others keep their order. Splits that a corpus lacks are left
    out.

    Raises:
      UserError: as `Text.documents`; or the directory cannot be written.
    """
    text = dataclasses.replace(text, tokenizer=text.vocabulary, cache_dir=None)
    chosen = []
    for corpus, task in zip(text.corpora, text._tasks, strict=True):
        found = [split for split in splits if split in task.source.splits]
        origin = origin_of(corpus)  # what comes while they are read is not of it
        if isinstance(task.source, CorpusSource):
            for split in found:  # now, not after hours of another's
                task.source.parts(split)
        chosen.append((corpus, task, found, origin))
    for corpus, task, found, origin in chosen:
        with new_directory(cache_of(directory, task.name), "COMPLETED") as half:
            for split in sorted(found, key=lambda split: split == "train"):  # the short ones first
                train = split == "train"
                documents = text._read(task, split=split, shuffle=train, seed=0, num_epochs=1)
                stats = write_split(half, split, CACHE_SHARDS if train else 1, documents)
                if not stats["examples"]:
                    raise _all_too_short(corpus, split)
                logging.info("cached %s of %s: %s", split, corpus.path, stats)
            write_origin(half, origin)
            (half / "COMPLETED").write_text("")


def _all_too_short(corpus: Corpus, split: str) -> UserError:
    return UserError(
        f"{corpus.path}: the {split} split has no document of {corpus.least_tokens} tokens "
        "or more: lower min_document_length"
    )


# --- Tasks ---------------------------------------------------------------------------------------


def _task_name(corpus: Corpus, vocabulary: Vocabulary) -> str:
    """Differs wherever the documents would, so that no cache of other documents is read."""
    content = dataclasses.replace(corpus, weight=1.0)
    version = platform.python_version() if corpus.path == "standard_library" else None
    kind, fields = type(vocabulary).__name__, dataclasses.astuple(vocabulary)
    stem = re.sub(r"\W+", "_", corpus.path, flags=re.ASCII).strip("_")[-40:]
    return f"fot.{stem}.{_digest((content, version, kind, fields))}"


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _seed_of(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def _tokenize(
    tokens_of: Callable[[bytes], np.ndarray], field: str, failures: list[Exception]
) -> Callable:
    """A preprocessor: rows with a text to rows with "targets", the tokens of a document."""

    def encode(text: bytes) -> np.ndarray:
        with kept_in(failures):
            return tokens_of(text)

    def tokens(row: Mapping[str, Any]) -> dict[str, Any]:
        tf = import_tensorflow()
        targets = tf.numpy_function(encode, [row[field]], tf.int32)
        return {"targets": tf.ensure_shape(targets, [None])}

    return lambda dataset: dataset.map(tokens)


def _at_least(length: int) -> Callable:
    """A preprocessor: leaves out documents of fewer tokens."""
    tf = import_tensorflow()
    return lambda dataset: dataset.filter(lambda row: tf.size(row["targets"]) >= length)


def _pieces(dataset: Any, length: int, seed: int) -> Any:
    """Rows of `length` tokens of a document each, in random order."""
    tf = import_tensorflow()

    def cut(row):
        whole = tf.size(row["targets"], tf.int64) // length
        pieces = tf.reshape(row["targets"][: whole * length], [whole, length])
        return tf.data.Dataset.from_tensor_slices({"targets": pieces})

    pieces = dataset.flat_map(cut)
    return pieces.shuffle(max(1, SHUFFLED_TOKENS // length), seed, reshuffle_each_iteration=False)


def _as_int32(dataset: Any) -> Any:
    """A preprocessor: tokens as records have them to tokens as tasks have them."""
    tf = import_tensorflow()
    return dataset.map(lambda row: {"targets": tf.cast(row["targets"], tf.int32)})

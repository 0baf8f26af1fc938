"""SeqIO's offline caches: the tokens of a task's documents, written once and read many times."""

from __future__ import annotations

import contextlib
import json
import operator
import os
import re
from collections.abc import Iterator
from typing import Any

from etils import epath
from tensorboard.summary.writer.record_writer import RecordWriter

from fot_jax.common.errors import UserError
from fot_jax.common.paths import path_of, size_of
from fot_jax.data.corpus import Corpus, files_there, splits_in
from fot_jax.data.documents import Document, NoDocuments
from fot_jax.data.files import SPLITS
from fot_jax.data.sources import to_shuffle
from fot_jax.data.tensorflow_imports import import_seqio, import_tensorflow

_ORIGIN = "origin.json"


def cache_of(directory: epath.PathLike, task_name: str) -> epath.Path:
    """The directory of a task in a directory of caches.

    Raises:
      UserError: a path that caches cannot be read from.
    """
    if odd := re.search(r"[][*?]", str(directory)):  # SeqIO looks for files by patterns
        raise UserError(f"{directory}: {odd[0]!r} in the path of a cache: give one without it")
    return path_of(directory) / import_seqio().get_task_dir_from_name(task_name)


def write_split(
    directory: epath.Path, split: str, shards: int, documents: Iterator[Document]
) -> dict[str, int]:
    """Deals documents out to the files of a split, beside which SeqIO wants two of JSON.

    Args:
      directory: of the task's cache (`cache_of`).
      shards: files.

    Returns:
      examples, targets_tokens, targets_max_tokens.

    Raises:
      OSError: the directory cannot be written.
    """
    seqio = import_seqio()
    files = _record_files(directory, split, shards)
    count = total = longest = 0
    with contextlib.ExitStack() as stack:
        # Not TensorFlow's writer: there is one way into a bucket.
        opened = [stack.enter_context(epath.Path(file).open("wb")) for file in files]
        writers = [RecordWriter(file) for file in opened]
        for i, document in enumerate(documents):
            example = seqio.dict_to_tfexample({"targets": document.tokens})
            writers[i % shards].write(example.SerializeToString())
            length = len(document.tokens)
            count, total, longest = count + 1, total + length, max(longest, length)
    info = {
        "num_shards": shards,
        "features": {"targets": {"shape": [None], "dtype": "int32"}},
        "seqio_version": seqio.__version__,
        "bytes": [size_of(file) for file in files],
    }
    stats = {
        "examples": count,
        "targets_tokens": total,
        "targets_max_tokens": longest,
    }
    epath.Path(seqio.get_cached_info_path(directory, split)).write_text(json.dumps(info))
    epath.Path(seqio.get_cached_stats_path(directory, split)).write_text(json.dumps(stats))
    return stats


def origin_of(corpus: Corpus) -> dict[str, dict[str, int | None]] | None:
    """The files of each split; None of TFDS, whose versions are never changed."""
    if corpus.path.startswith("tfds:"):
        return None
    return {split: files_there(corpus, split) for split in splits_in(corpus)}


def write_origin(directory: epath.Path, origin: dict[str, Any] | None) -> None:
    """Writes which files a cache is made of."""
    if origin is not None:
        (directory / _ORIGIN).write_text(json.dumps(origin))


def _check_origin(directory: epath.Path, corpus: Corpus) -> None:
    """The files of the corpus, where they are here, are those that the cache is made of."""
    file = directory / _ORIGIN
    if not file.exists():
        return
    with _damaged(file):
        origin = {split: dict(files) for split, files in json.loads(file.read_bytes()).items()}
    for split, before in origin.items():
        try:
            now = files_there(corpus, split)
        except (OSError, UserError):  # a cache is read without its corpus
            continue
        differ = before.keys() ^ now.keys()
        differ |= {name for name in before.keys() & now.keys() if _unlike(before[name], now[name])}
        if now and differ:
            raise UserError(
                f"{directory}: made of other files of {corpus.path} than are there now "
                f"({min(differ)}): make the cache again"
            )


def _unlike(before: int | None, now: int | None) -> bool:
    return before != now and None not in (before, now)


def notes_of(cache_dir: epath.PathLike, task_name: str) -> list[str]:
    """What was noted of a cache as it was made; it differs where its training documents do."""
    directory = cache_of(cache_dir, task_name)
    info = epath.Path(import_seqio().get_cached_info_path(directory, "train"))
    notes = []
    for file in (info, directory / _ORIGIN):
        if file.exists():
            with _damaged(file):
                notes.append(file.read_text())
    return notes


def cached_source(cache_dir: epath.PathLike, task_name: str, corpus: Corpus) -> tuple[Any, int]:
    """A source of the rows in the cache of a task, and how many of them to shuffle among.

    What SeqIO itself reads them with has 256 documents in memory, of whatever length.
    """
    tf, seqio = import_tensorflow(), import_seqio()
    directory = cache_of(cache_dir, task_name)
    if not (directory / "COMPLETED").exists():
        raise NoDocuments(
            f"{cache_dir}: no cache of {corpus.path} for this tokenizer and these settings of the "
            f"corpus: make it with: fot cache EXPERIMENT.gin --output {cache_dir}"
        )
    _check_origin(directory, corpus)
    files, at_hand = {}, 1
    for split in SPLITS:
        info = epath.Path(seqio.get_cached_info_path(directory, split))
        if info.exists():
            with _damaged(info):
                sizes = [operator.index(size) for size in json.loads(info.read_bytes())["bytes"]]
            files[split] = _record_files(directory, split, len(sizes))
            for file, size in zip(files[split], sizes, strict=True):
                _check_whole(epath.Path(file), size)
    if "train" in files:
        file = epath.Path(seqio.get_cached_stats_path(directory, "train"))
        with _damaged(file):
            stats = json.loads(file.read_bytes())
            at_hand = to_shuffle(4 * stats["targets_tokens"], stats["examples"])
    source = seqio.TFExampleDataSource(
        files,
        {"targets": tf.io.FixedLenSequenceFeature([], tf.int64, allow_missing=True)},
        cycle_length=2,
        block_length=1,
    )
    return source, at_hand


@contextlib.contextmanager
def _damaged(file: epath.Path) -> Iterator[None]:
    """Of what `write_split` wrote beside the records: it is read inside."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: damaged: copy the cache again, or make it again") from error


def _check_whole(file: epath.Path, size: int) -> None:
    """What is lost at the end of a file may be whole documents, which reading would not miss."""
    there = size_of(file) if file.is_file() else None
    if there != size:
        what = "missing" if there is None else f"damaged: it has {there} of {size} bytes"
        raise UserError(f"{file}: {what}: copy the cache again, or make it again")


def _record_files(directory: epath.Path, split: str, shards: int) -> list[str]:
    prefix = import_seqio().get_cached_tfrecord_prefix(os.fspath(directory), split)
    return [f"{prefix}-{i:05d}-of-{shards:05d}" for i in range(shards)]

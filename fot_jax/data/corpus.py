"""Corpora on disk: JSON Lines files, or Python's own source files, to the texts of documents.

A split of a corpus is a list of parts, each of which can be opened and read from its start.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import io
import itertools
import json
import lzma
import math
import platform
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError, check_range
from fot_jax.common.paths import in_bucket, path_of, size_of, why_unavailable
from fot_jax.data.documents import NoDocuments
from fot_jax.data.files import READERS, SPLITS, files_of, splits_of, warn_once

SHUFFLED_BYTES = 32 * 2**20  # of the documents at hand, of which the next one is drawn


@configurable
@dataclasses.dataclass(frozen=True)
class Corpus:
    """One collection of documents.

    Attributes:
      path: a directory with train, valid and test as .jsonl or .jsonl.gz, possibly in shards
        (train-00000.jsonl.gz; data/files.py); or "tfds:NAME" or "tfds:NAME/CONFIG", a data set
        prepared with TensorFlow Datasets; or "standard_library": Python's own source files, a
        package a document.
      weight: share of this corpus among the documents of a mixture, whole ones, also where they are
        cut into pieces afterwards: of two with equal weights, that of longer documents has more
        pieces. Any scale.
      min_document_length: tokens, marks included; shorter documents are left out.
      text_field: where in a row the text is.
      join_by: a field; the texts of consecutive rows of a file that are equal in it are joined, by
        newlines, into one document. None: each row is a document.
    """

    path: str = "standard_library"
    weight: float = 1.0
    min_document_length: int = 0
    text_field: str = "text"
    join_by: str | None = None

    def __post_init__(self):
        for field in ("path", "text_field"):
            if not getattr(self, field):
                raise UserError(f'Corpus.{field} = "": give a name, or leave it out')
        check_range("Corpus", 0, 2**31 - 1, min_document_length=self.min_document_length)
        if not 0 < self.weight < math.inf:
            raise UserError(f"Corpus.weight = {self.weight} of {self.path}: give more than 0")
        if self.join_by and self.path.startswith("tfds:"):
            raise UserError(f"{self.path}: Corpus.join_by is for JSON Lines: leave it out")

    @property
    def least_tokens(self) -> int:
        """Of a document that is not left out: one token alone predicts nothing."""
        return max(2, self.min_document_length)


Part = Callable[[], Iterator[bytes]]  # opens a file of a split, or several: their documents, UTF-8


def shard_of(
    parts: Sequence[Part], shard: int, shards: int, rng: np.random.Generator | None
) -> Iterator[bytes]:
    """The documents of a shard, in order or shuffled; generators are alike in all shards."""
    texts = dealt(parts, shard, shards, rng)
    return texts if rng is None else _shuffled(texts, rng)


def dealt(
    parts: Sequence[Part], shard: int, shards: int, rng: np.random.Generator | None
) -> Iterator[bytes]:
    """The documents of a shard in the order of its files.

    Shards are of whole parts where there are enough, so that no file is read twice. So one may have
    no documents, where files are empty; with a generator, another one the next time.
    """
    if rng is not None:
        parts = [parts[i] for i in rng.permutation(len(parts))]
    whole = len(parts) >= shards
    texts = itertools.chain.from_iterable(
        part() for part in (parts[shard::shards] if whole else parts)
    )
    return texts if whole else itertools.islice(texts, shard, None, shards)


def _shuffled(texts: Iterator[bytes], rng: np.random.Generator) -> Iterator[bytes]:
    """Each time one of those at hand, which are all where they fit in SHUFFLED_BYTES."""
    at_hand: list[bytes] = []
    size = 0

    def draw() -> bytes:
        i = rng.integers(len(at_hand))
        at_hand[i], at_hand[-1] = at_hand[-1], at_hand[i]
        return at_hand.pop()

    for text in texts:
        at_hand.append(text)
        size += len(text)
        while size > SHUFFLED_BYTES:
            drawn = draw()
            size -= len(drawn)
            yield drawn
    while at_hand:
        yield draw()


def splits_in(corpus: Corpus) -> list[str]:
    """The splits that it has."""
    if corpus.path == "standard_library":
        return list(SPLITS)
    return splits_of(_directory(corpus))


def files_there(corpus: Corpus, split: str) -> dict[str, int | None]:
    """The files of a split and their bytes (None where a bucket would have to be asked for each).

    Of the standard library its version; nothing of what is not here, or of no files of ours.
    """
    if corpus.path == "standard_library":
        return {platform.python_version(): None}
    if corpus.path.startswith("tfds:") or not (there := path_of(corpus.path)).is_dir():
        return {}
    return {
        str(file.relative_to(there)): None if in_bucket(file) else size_of(file)
        for file in files_of(there, split)
    }


def split_parts(corpus: Corpus, split: str) -> list[Part]:
    """What a split consists of; nothing where there is none of that name."""
    if corpus.path == "standard_library":
        return [functools.partial(_package, files) for files in _packages().get(split, [])]
    return [functools.partial(_jsonl, corpus, file) for file in files_of(_directory(corpus), split)]


# --- JSON Lines ----------------------------------------------------------------------------------


def rows_of(path: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, row) of every row of a split of a directory, in order.

    Raises:
      UserError: no such directory, or a broken row.
    """
    for file in files_of(_directory(Corpus(path)), split):
        yield from _rows_of(file)


def field(place: str, row: dict[str, Any], name: str, kind: type, remedy: str = "") -> Any:
    """A field of a row: a text, or with `object` anything.

    Args:
      remedy: of a row without it.

    Raises:
      UserError: there is none, or it is no text; names the place.
    """
    if name not in row:
        has = ", ".join(row)
        raise UserError(f"{place}: no field {name!r} in the row, which has {has}{remedy}")
    value = row[name]
    if not isinstance(value, kind):
        raise UserError(
            f"{place}: field {name!r} is {json.dumps(value)[:40]}, not a text: correct it"
        )
    if kind is str and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place}: field {name!r} has half a character: {error.reason}"
            ) from error
    return value


def _directory(corpus: Corpus) -> epath.Path:
    directory = path_of(corpus.path)
    if not directory.is_dir():
        what = "is no directory" if directory.exists() else "no such directory"
        raise NoDocuments(
            f"{directory}: {what}: set Corpus.path to one with train.jsonl.gz "
            "and valid.jsonl.gz, to tfds:NAME, or to standard_library"
        )
    return directory


def _jsonl(corpus: Corpus, file: epath.Path) -> Iterator[bytes]:
    """Documents of a file."""
    remedy = ": set Corpus.text_field to the one with the text"
    if corpus.join_by is None:
        for place, row in _rows_of(file):
            yield field(place, row, corpus.text_field, str, remedy).encode()
    else:
        joined = itertools.groupby(_rows_of(file), lambda x: field(*x, corpus.join_by, object))
        for _, rows in joined:
            texts = (field(*x, corpus.text_field, str, remedy) for x in rows)
            yield "\n".join(texts).encode()


def _rows_of(file: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, row) of every line that is not blank."""
    number = 0
    try:
        # A file in a bucket has lines, too, but of a few MB read for each of them.
        with file.open("rb") as opened, io.BufferedReader(opened, 2**20) as raw:
            reader = READERS.get(file.suffix.lower(), READERS[""])
            for number, line in enumerate(reader(raw), 1):
                if line.strip():
                    yield f"{file}:{number}", _row(f"{file}:{number}", line)
            if number == 0 and reader is not READERS[""] and raw.tell() == 0:
                raise EOFError("no bytes")  # which gzip takes for an empty file
        if number == 0:
            warn_once(f"{file}: empty")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if why := why_unavailable(error):
            raise UserError(f"{file}:{number + 1}: {why}") from error
        raise UserError(
            f"{file}:{number + 1}: cannot be read ({error}): restore the file from a copy"
        ) from error


def _row(place: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = str(error)
        if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            why = "it is in UTF-16: write UTF-8"
        elif line.strip() == b"[":
            why = "an array begins: write one row a line, as jq -c '.[]' does"
        raise UserError(f"{place}: broken row, not JSON ({why}): correct or remove it") from error
    if not isinstance(row, dict):
        raise UserError(f'{place}: broken row, not an object like {{"text": "..."}}: correct it')
    return row


# --- Standard library ----------------------------------------------------------------------------

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TABLES = {"encodings", "pydoc_data"}  # of characters, of topics: hardly code


@functools.cache
def _packages() -> dict[str, list[list[Path]]]:
    """Files of each package and module of the standard library, by split, in order of name.

    By size, every eighth is for validation and every eighth for test: so all splits have long ones,
    whatever this Python's release has more or fewer of.
    """
    library = Path(sysconfig.get_path("stdlib"))
    packages: dict[str, list[Path]] = {}
    for file in sorted(library.rglob("*.py")):
        first, *_ = parts = file.relative_to(library).parts
        if not (LEFT_OUT & set(parts) or first in TABLES or first.startswith("_sysconfigdata")):
            packages.setdefault(first, []).append(file)
    if not packages:
        raise UserError(f"{library}: this Python came without its sources: set Corpus.path")
    sizes = {name: sum(f.stat().st_size for f in files) for name, files in packages.items()}
    by_size = sorted(packages, key=lambda name: (-sizes[name], name))
    splits = {"valid": by_size[3::8], "test": by_size[7::8]}
    splits["train"] = set(by_size) - {*splits["valid"], *splits["test"]}
    return {split: [packages[name] for name in sorted(names)] for split, names in splits.items()}


def _package(files: Sequence[Path]) -> Iterator[bytes]:
    """One document: the files, each after a line with its path."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = (
        f"# {file.relative_to(library).as_posix()}\n{file.read_text('utf-8', 'replace')}"
        for file in files
    )
    yield "\n".join(texts).encode()

"""Which files of a directory are the splits of a corpus, and which are there but not read.

Published corpora name shards in many ways (train-00000-of-00008.jsonl.gz, c4-train.00000-of-
01024.json.gz, validation/part_3.jsonl), and copies of them stay incomplete. What can be read is;
what cannot, or is plainly not all there, is refused by name; other data beside it is named.
"""

from __future__ import annotations

import bz2
import collections
import dataclasses
import functools
import gzip
import itertools
import lzma
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from fot_jax.common.errors import UserError

SPLITS = ("train", "valid", "test")
READERS = {  # by what a name ends in: an open file to its lines
    "": lambda raw: raw,
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}

_SPLIT_WORDS = {
    **dict.fromkeys(["train", "training"], "train"),
    **dict.fromkeys(["valid", "validation", "val", "dev"], "valid"),
    "test": "test",
}
_NOTES = ("json", "txt", "csv", "tsv")  # data where a split is in the name; else about data
_FORMS = rf"jsonl|ndjson|{'|'.join(_NOTES)}|parquet|arrow"
_PACKED = "gz|bz2|xz|zst|zstd|lz4|br|zip|7z|tar|tgz"
_NAME = re.compile(rf"(.+?)((?:\.(?:{_FORMS}|{_PACKED}))+)(.*)", re.IGNORECASE)
_READ = re.compile(rf"\.(jsonl|ndjson|json)({'|'.join(map(re.escape, READERS))})")
_UNFINISHED = re.compile(
    r"[._]+(part|partial|tmp|temp|crdownload|download|incomplete|filepart|aria2|gstmp)",
    re.IGNORECASE,
)
# What browsers, file managers and editors put into the name of a second copy: "train (1).jsonl".
_COPY = re.compile(
    r"(?: - copy| copy(?: \d+)?"
    r"|[ _-]?\((?:\d+|(?:another |\d+(?:st|nd|rd|th) )?copy(?: \d+)?)\))+$",
    re.IGNORECASE,
)
_SUMS = re.compile(r"\.(md5|sha1|sha256|sha512|idx|index|lock|meta|metadata)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class _File:
    """What looks like data.

    Attributes:
      path: of it.
      split: that its directory's name or its own says; None: neither does.
      word: how: "val"; a directory's with a slash.
      stem: the name without what says how it is written; "" for a directory with data.
      is_read: as JSON Lines.
      fatal: why its split cannot be read while it is there; None where it is merely not read.
      torn: it is not wholly there.
    """

    path: epath.Path
    split: str | None = None
    word: str = ""
    stem: str = ""
    is_read: bool = False
    fatal: str | None = None
    torn: bool = False

    @functools.cached_property
    def numbered(self) -> tuple[str, int | None, int | None]:
        """The name without its number, the number, and of how many: train-00003-of-00004."""
        for pattern in (r"[-_.]?(\d+)[-_.]of[-_.](\d+)", r"[-_.]?(\d+)$"):
            if found := re.search(pattern, self.stem, re.IGNORECASE):
                number, *total = map(int, found.groups())
                return self.stem[: found.start()], number, total[0] if total else None
        return self.stem, None, None


def splits_of(directory: epath.Path) -> list[str]:
    """The splits that have files which are read."""
    there = {file.split for file in _found(directory) if file.is_read}
    return [split for split in SPLITS if split in there]


def files_of(directory: epath.Path, split: str) -> list[epath.Path]:
    """The files of a split, in the order of their names; a warning names data that is not read.

    Raises:
      UserError: some of the split are missing, not wholly there, there twice, or in another form.
    """
    found = sorted(_found(directory), key=lambda file: str(file.path))
    files = [file for file in found if file.split == split and file.is_read]
    there = collections.defaultdict(list)
    for file in files:
        there[file.stem].append(file.path.parent)
    for file in found:
        if file.split == split and file.fatal and not _is_read_too(file, there[file.stem]):
            raise UserError(f"{file.path}: {file.fatal}")
    _check_one_of_each(files)
    _check_numbers(files)
    if names := not_read(directory):
        warn_once(f"{directory}: not read: {names}")
    return [file.path for file in files]


def _is_read_too(file: _File, directories: Sequence[epath.Path]) -> bool:
    """Whether the same data is read in another form; of what is torn, whole beside it.

    Args:
      directories: of the files of its name that are read. One beside it may have other shards.
    """
    own = file.path.parent
    if file.torn:  # aria2 leaves a note of its own beside what it has not finished
        return own in directories and file.path.suffix.lower() != ".aria2"
    return any(own == each or own in each.parents or each in own.parents for each in directories)


def not_read(directory: epath.Path) -> str:
    """Names of what looks like data and is of no split or not read; empty where nothing is."""
    others = [file for file in _found(directory) if not file.is_read]
    names = sorted(
        str(file.path.relative_to(directory)) + ("" if file.stem else "/") for file in others
    )
    return _some(names, len(names))


def _found(directory: epath.Path, split: str | None = None, word: str = "") -> Iterator[_File]:
    """In a directory, and in those of it that are named as splits are."""
    for path in directory.iterdir():
        name = path.name
        if name.startswith("."):  # of editors, of programs that copy, of operating systems
            continue
        if _NAME.fullmatch(name):
            if file := _file(path, split, word):
                yield file
        elif split and _SPLIT_WORDS.get(name.lower(), split) != split and path.is_dir():
            fatal = "named as a split within another: move it out, or give it another name"
            yield _File(path, split, word, fatal=fatal)
        elif (split or name.lower() in _SPLIT_WORDS) and path.is_dir():
            yield from _found(path, split or _SPLIT_WORDS[name.lower()], word or f"{name}/")
        elif "." not in name and path.is_dir():
            if any(_NAME.fullmatch(each.name) and _file(each) for each in path.iterdir()):
                yield _File(path)


def _file(path: epath.Path, split: str | None = None, word: str = "") -> _File | None:
    """None where it is hardly data: dataset_infos.json, README.txt, train.jsonl.sha256."""
    stem, form, rest = _NAME.fullmatch(path.name).groups()
    form = form.lower()
    if not split:
        split, word = _split_in(stem)
    note = form[1:] in _NOTES
    if _SUMS.fullmatch(rest) or note and not split:
        return None
    is_read = split is not None and bool(_READ.fullmatch(form)) and not rest
    if form == ".json" and not word.endswith("/"):  # or about a split: train_info.json
        is_read = is_read and re.sub(r"[\W_]|\d|of", "", stem).lower() in _SPLIT_WORDS
    fatal, torn = None, bool(_UNFINISHED.fullmatch(rest))
    if torn:
        fatal = "not wholly there: copy it again, or remove it"
    elif not rest and not is_read and not note:
        fatal = (
            "JSON Lines are read as they are and in .gz, .bz2 and .xz: convert it "
            "(docs/training.md, Your own text), or remove it"
        )
    return _File(path, split, word, stem, is_read, fatal, torn)


def _split_in(stem: str) -> tuple[str | None, str]:
    """What a name begins with, or else names once."""
    first, *others = re.split(r"[^a-z]+", stem.lower())
    words = [first] if first in _SPLIT_WORDS else [w for w in others if w in _SPLIT_WORDS]
    return (_SPLIT_WORDS[words[0]], words[0]) if len(words) == 1 else (None, "")


def _check_one_of_each(files: Sequence[_File]) -> None:
    """That nothing is there under two names."""
    by_stem, by_word = {}, {}
    stems = {file.stem for file in files}
    for file in files:
        original = _COPY.sub("", file.stem)
        stem = original if original in stems else file.stem  # "a (1)" and "a (2)" are two shards
        other = by_stem.setdefault((file.path.parent, stem), file)
        if other is not file:
            raise UserError(f"{other.path}: there is a {file.path.name} too: remove one of them")
        by_word.setdefault(file.word, file)
    if len(by_word) > 1:
        one, other, *_ = by_word.values()
        raise UserError(
            f"{one.path} and {other.path} are both of the {one.split} split, named in two ways: "
            "remove one, or name them alike"
        )


def _check_numbers(files: Sequence[_File]) -> None:
    """That shards are those of one set, and all of it."""
    sets: dict[Any, list[_File]] = collections.defaultdict(list)
    for file in files:
        sets[file.path.parent, file.numbered[0]].append(file)
    for shards in sets.values():
        first = shards[0]
        by_number: dict[int | None, _File] = {}
        for file in shards:
            _, number, total = file.numbered
            if (number is None, total) != (first.numbered[1] is None, first.numbered[2]):
                raise UserError(
                    f"{first.path} and {file.path.name} are of two sets of shards, each perhaps "
                    "the whole split: remove one set, or name it otherwise"
                )
            if by_number.setdefault(number, file) is not file:
                other = by_number[number].path
                raise UserError(f"{other}: there is a {file.path.name} too: remove one of them")
        if first.numbered[1] is not None:
            _check_no_gap(first, by_number)


def _check_no_gap(first: _File, by_number: Mapping[int, _File]) -> None:
    total = first.numbered[2]
    start = 0 if 0 in by_number else 1 if total else min(by_number)
    wanted = range(start, start + total if total else max(by_number) + 1)
    count = wanted.stop - start - sum(number in wanted for number in by_number)
    missing = (number for number in wanted if number not in by_number)
    if total and count:
        raise UserError(
            f"{first.path}: of {total} such files {count} are missing, {_some(missing, count)}: "
            f"copy them, or take -of-{total} out of the names to read these alone"
        )
    if total and (beyond := sorted(by_number.keys() - set(wanted))):
        raise UserError(
            f"{by_number[beyond[0]].path}: beyond the {total} files that its name says: remove it, "
            f"or take -of-{total} out of the names"
        )
    if 0 < count < len(by_number):  # not of dates, say
        warn_once(f"{first.path}: of such files these are not there: {_some(missing, count)}")


def _some(names: Iterable[Any], count: int) -> str:
    shown = ", ".join(map(str, itertools.islice(names, 5)))
    return shown if count <= 5 else f"{shown} and {count - 5} more"


@functools.cache
def warn_once(message: str) -> None:
    """Of a corpus; it is read in every epoch."""
    logging.warning("%s", message)

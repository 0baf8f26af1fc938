"""Files of directories as published corpora have them: which are read, which are refused."""

import bz2
import gzip
import itertools
import json
import logging
import lzma

import pytest
from corpora import framed, message_of, read, take, text_over

PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def lay_out(directory, *names):
    """Files of one row, their own name; of no bytes that are JSON where they could not be read."""
    for name in names:
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        row = json.dumps({"text": name}).encode() + b"\n"
        file.write_bytes(PACK.get(file.suffix.lower(), lambda row: row)(row))


def names_in(directory, split):
    documents = read(text_over(directory).documents(split))
    return [bytes(document[1:-1]).decode() for document in documents]


def of(total, form, numbers=None):
    return [form.format(i, total) for i in numbers or range(total)]


C4 = "c4-train.{:05d}-of-{:05d}.json.gz"
HUB = "train-{:05d}-of-{:05d}.jsonl"


@pytest.mark.parametrize(
    ("train", "valid"),
    [
        (["train.jsonl"], ["valid.jsonl.gz"]),
        (of(12, C4), of(2, "c4-validation.{:05d}-of-{:05d}.json.gz")),
        (of(3, HUB), ["validation-00000-of-00001.jsonl"]),
        (of(2, HUB, [1, 2]), ["val.jsonl"]),
        (["train-00000-of-00002-1a2b.jsonl", "train-00001-of-00002-3c4d.jsonl"], ["dev.jsonl"]),
        (["train_0001.jsonl.bz2", "train_0002.jsonl.xz"], ["validation.json"]),
        (["train/arxiv_0.jsonl", "train/b/web_test.json.gz"], ["valid/0.jsonl", "valid/1.jsonl"]),
        (["Train.JSONL"], ["VALID.jsonl.GZ"]),
        (["train-books.jsonl", "train-web.0.jsonl", "train-web.1.jsonl"], ["valid.ndjson"]),
        (["pile_train00.jsonl", "pile_train01.jsonl"], ["pile_val.jsonl"]),
        (["train-test.jsonl"], ["wikitext.valid.jsonl"]),
        (["train (1).jsonl", "train (2).jsonl"], ["valid (1).jsonl"]),
    ],
)
def test_names_of_published_corpora(tmp_path, caplog, train, valid):
    lay_out(tmp_path, *train, *valid)
    unrelated = [
        *(
            "README.md",
            "LICENSE",
            "LICENSE.txt",
            "dataset_infos.json",
            "state.json",
            ".train.jsonl",
        ),
        *(
            "train.jsonl.sha256",
            "_SUCCESS",
            "._train.jsonl",
            ".train-00000.jsonl.gz.Xy12",
            "a/b.md",
        ),
    ]
    lay_out(tmp_path, *unrelated)
    with caplog.at_level(logging.WARNING):
        assert names_in(tmp_path, "train") == train
        assert names_in(tmp_path, "valid") == valid
    assert caplog.records == []
    assert "no test split (there is: train, valid)" in message_of(
        lambda: names_in(tmp_path, "test")
    )


TWO = (
    "are of two sets of shards, each perhaps the whole split: remove one set, or name it otherwise"
)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            of(4, HUB, [0, 1, 3]),
            "train-00000-of-00004.jsonl: of 4 such files 1 are missing, 2: copy them, or take -of-",
        ),
        (
            of(1024, C4, range(9)),
            "of 1024 such files 1015 are missing, 9, 10, 11, 12, 13 and 1010 more: copy them",
        ),
        ([*of(2, HUB), *of(3, HUB)], f"train-00000-of-00002.jsonl and {HUB.format(0, 3)} {TWO}"),
        ([*of(2, HUB), "train-00002.jsonl"], f"train-00002.jsonl {TWO}"),
        (["train.jsonl", "train-00000.jsonl"], f"train.jsonl {TWO}"),
        (["train.jsonl", "train.jsonl.gz"], "train.jsonl: there is a train.jsonl.gz too: remove"),
        (["train.jsonl", "train.json"], "train.json: there is a train.jsonl too: remove one"),
        (["train_1.jsonl", "train-01.jsonl"], "train-01.jsonl: there is a train_1.jsonl too"),
        *(
            ([f"train{copy}.jsonl", "train.jsonl"], f"train{copy}.jsonl: there is a train.jsonl to")
            for copy in (" (1)", " copy", " copy 2", " - Copy", " - Copy (2)", " (copy)")
        ),
        (["train/a (3rd copy).jsonl", "train/a.jsonl.gz"], "there is a a.jsonl.gz too: remove one"),
        (["train/valid/x.jsonl", "train/y.jsonl"], "train/valid: named as a split within another"),
        (["train.jsonl", "train/0.jsonl"], "train.jsonl and "),
        (["train-0.jsonl.gz", "train-1.jsonl.gz.part"], "train-1.jsonl.gz.part: not wholly there"),
        (["train-0.jsonl", "train-1.jsonl.crdownload"], "train-1.jsonl.crdownload: not wholly"),
        (["train/0.jsonl", "train/1.jsonl_.gstmp"], "1.jsonl_.gstmp: not wholly there: copy it"),
        (["train/a/0.jsonl", "train/b/0.jsonl.part"], "b/0.jsonl.part: not wholly there: copy it"),
        (
            [*of(3, HUB), HUB.format(3, 3)],
            "train-00003-of-00003.jsonl: beyond the 3 files that its name says: remove it, or take",
        ),
        (["train-0.jsonl", "train-1.jsonl.zst"], "train-1.jsonl.zst: JSON Lines are read as they"),
        (  # shards of one name in several directories, of which one is unpacked
            ["train/1/a.jsonl", "train/1/a.jsonl.zst", "train/2/a.jsonl.zst"],
            "train/2/a.jsonl.zst: JSON Lines are read as they",
        ),
        (["train-0.jsonl", "train-0.jsonl.aria2"], "train-0.jsonl.aria2: not wholly there: copy"),
        (["train/0.jsonl", "train/1.parquet"], "1.parquet: JSON Lines are read as they are and"),
        ([*of(1, "train-{:05d}-of-{:05d}.parquet")], "no train split (there is: none): a split is"),
        (
            ["data/train-0.jsonl"],
            "or a directory train of .jsonl.gz files; not read: data/ (docs/training.md",
        ),
        (
            of(9, "arxiv_{:04d}.jsonl"),
            "; not read: arxiv_0000.jsonl, arxiv_0001.jsonl, arxiv_0002.jsonl, ar",
        ),
        (
            of(2, "{:02d}.jsonl.zst"),
            "no train split (there is: none): a split is a file train.json",
        ),
    ],
)
def test_what_is_not_wholly_there_or_there_twice(tmp_path, names, message):
    lay_out(tmp_path, *names)
    assert message in message_of(lambda: names_in(tmp_path, "train"))
    lay_out(tmp_path, "valid.jsonl")
    assert names_in(tmp_path, "valid") == ["valid.jsonl"]


@pytest.mark.parametrize(
    "names", [("valid.jsonl", "validation.jsonl"), ("val.jsonl", "valid/a.jsonl")]
)
def test_a_split_of_two_names(tmp_path, names):
    lay_out(tmp_path, *names)
    message = message_of(lambda: names_in(tmp_path, "valid"))
    assert "are both of the valid split, named in two ways: remove one" in message


@pytest.mark.parametrize(
    ("others", "warning"),
    [
        (["arxiv_0001.jsonl", "web.json.gz"], "{}: not read: arxiv_0001.jsonl, web.json.gz"),
        (["train-0.jsonl.zst"], "{}: not read: train-0.jsonl.zst"),  # the same rows, perhaps
        (["packed/train-0.jsonl.zst"], "{}: not read: packed/"),
        (["train-0.jsonl.bak", "train.txt"], "{}: not read: train-0.jsonl.bak, train.txt"),
        (["train_info.json"], "{}: not read: train_info.json"),
        (["more/0.jsonl"], "{}: not read: more/"),
        (
            ["train-3.jsonl", "train-1.jsonl"],
            "{}/train-0.jsonl: of such files these are not there: 2",
        ),
        (["train-20240101.jsonl"], None),
    ],
)
def test_what_is_not_read_is_named(tmp_path, caplog, others, warning):
    lay_out(tmp_path, "train-0.jsonl", *others)
    with caplog.at_level(logging.WARNING):
        assert names_in(tmp_path, "train")[0] == "train-0.jsonl"
        take(text_over(tmp_path), 3)
    assert [record.getMessage() for record in caplog.records] == (
        [warning.format(tmp_path)] if warning else []
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl.gz", b"", "train.jsonl.gz:1: cannot be read (no bytes): restore the file"),
        ("train.jsonl.bz2", b"", "train.jsonl.bz2:1: cannot be read ("),
        ("train.jsonl.xz", b"", "train.jsonl.xz:1: cannot be read ("),
        *(
            (f"train.jsonl{kind}", pack(b'{"text": "a"}\n' * 999)[:-9], ": cannot be read (")
            for kind, pack in PACK.items()
        ),
        ("train.jsonl.xz", b"no such thing" * 9, "train.jsonl.xz:1: cannot be read ("),
        (
            "train.jsonl",
            b'{"text": "a"}\n'.decode().encode("utf-16"),
            ":1: broken row, not JSON (it",
        ),
        (
            "train.json",
            b'[\n{"text": "a"}\n]',
            "train.json:1: broken row, not JSON (an array begins",
        ),
        ("train.json", b'[{"text": "a"}]', "train.json:1: broken row, not an object"),
        ("train.jsonl", b'{"text": null}', "train.jsonl:1: field 'text' is null, not a text"),
        ("train.jsonl", b'{"text": {"en": "a"}}', ':1: field \'text\' is {"en": "a"}, not a text'),
        ("train.jsonl", b'{"meta": {"text": "a"}}', "which has meta: set Corpus.text_field"),
        ("train.jsonl", b'{"text": "\xed\xa0\x80"}', "field 'text' has half a character"),
        (
            "train.jsonl",
            b'\n\r\n{"text": "a"\r{"text": "b"}',
            "train.jsonl:3: broken row, not JSON",
        ),
        ("train.jsonl", b"\n\0\0\0\0", "train.jsonl:2: broken row, not JSON"),
    ],
    ids=itertools.count(),  # contents differ from one process to the next: they have a time
)
def test_content_that_is_refused_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in message_of(lambda: names_in(tmp_path, "train"))


def test_content_that_is_read(tmp_path, caplog):
    mark = "\ufeff".encode()
    rows = b'{"text": "a"}\r\n\r\n{"text": "\\ud83d\\ude42"}\r\n' + mark + b'{"text": "c"}\n\n \n'
    (tmp_path / "train-0.jsonl").write_bytes(mark + rows)
    (tmp_path / "train-1.jsonl.gz").write_bytes(gzip.compress(rows[:15]) + gzip.compress(rows[15:]))
    (tmp_path / "train-2.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "train-3.jsonl").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        documents = read(text_over(tmp_path).documents("train"))
    assert documents == [framed(text) for text in ("a", "🙂", "c") * 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/train-{name}: empty" for name in ("2.jsonl.gz", "3.jsonl")
    ]


def test_shards_named_by_numbers_of_any_size(tmp_path, caplog):
    lay_out(tmp_path / "train", "1234567890123456789.jsonl", "17446744073709551615.jsonl")
    assert len(names_in(tmp_path, "train")) == 2 and not caplog.records


def test_a_file_in_place_of_a_directory(tmp_path):
    lay_out(tmp_path, "train.jsonl")
    message = message_of(lambda: names_in(tmp_path / "train.jsonl", "train"))
    assert "train.jsonl: is no directory: set Corpus.path to one with train.jsonl.gz" in message

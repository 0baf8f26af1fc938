"""Files and directories that are written whole or not at all."""

import errno
import json
import math

import pytest
import runs
from etils import epath

from fot_jax.common.atomic import (
    new_directory,
    remove_half_written,
    replacing,
    scratch_directory,
    write_file,
    write_json,
)
from fot_jax.common.errors import UserError


class Stop(Exception):
    """In the middle of writing."""


def test_a_file_has_its_old_content_until_all_of_the_new_is_there(tmp_path):
    path = tmp_path / "file"
    write_file(path, "old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert runs.files(tmp_path) == {"file": b"new"}
    with pytest.raises(Stop), replacing(path) as partial:
        partial.write_text("ha")
        raise Stop
    assert path.read_text() == "new"
    write_file(path, b"newer")
    assert runs.files(tmp_path) == {"file": b"newer"}


def test_numbers_that_json_has_not_are_null(tmp_path):
    """Of a model that diverged, say: a file with NaN is read by few but Python."""
    rows = [{"perplexity": math.nan, "stderr": None}, {"perplexity": 1.5, "all": (-math.inf, 2)}]
    write_json(tmp_path / "file", {"rows": rows, "made": "now"})
    found = json.loads((tmp_path / "file").read_text(), parse_constant=pytest.fail)
    plain = [{"perplexity": None, "stderr": None}, {"perplexity": 1.5, "all": [None, 2]}]
    assert found == {"rows": plain, "made": "now"}


def test_a_file_that_is_not_written_stays(tmp_path):
    write_file(tmp_path / "file", "old")
    with replacing(tmp_path / "file"), replacing(tmp_path / "none"):
        pass
    assert runs.files(tmp_path) == {"file": b"old"}


def test_what_a_link_leads_to_is_replaced(tmp_path):
    for name, write in (("file", write_file), ("directory", write_directory)):
        (tmp_path / "there").mkdir(exist_ok=True)
        write(tmp_path / "there" / name, "old")
        (tmp_path / name).symlink_to(tmp_path / "there" / name)
        write(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
    assert runs.files(tmp_path / "there") == {"file": b"new", "directory/mark": b"new"}


def write_directory(directory, content):
    with new_directory(directory, "mark") as half:
        (half / "mark").write_text(content)


def test_a_file_keeps_its_mode(tmp_path):
    path = tmp_path / "file"
    write_file(path, "old")
    path.chmod(0o600)
    write_file(path, "new")
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_a_killed_process_left_takes_no_place(tmp_path):
    write_file(tmp_path / "file", "old")
    (tmp_path / "file.partial").write_text("ha")
    with replacing(tmp_path / "file"):
        pass
    assert runs.files(tmp_path) == {"file": b"old"}


def test_an_older_directory_is_put_back(tmp_path, monkeypatch):
    write_directory(tmp_path / "a", "old")
    kind = type(epath.Path(tmp_path))
    rename = kind.rename

    def fails_for_new(self, target):
        if ".half-written-" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(kind, "rename", fails_for_new)
    with pytest.raises(UserError, match="a: cannot be written: No space left"):
        write_directory(tmp_path / "a", "new")
    assert runs.files(tmp_path) == {"a/mark": b"old"}


def test_a_directory_takes_the_place_of_an_older_one_when_it_is_whole(tmp_path):
    directory = tmp_path / "a" / "directory"
    for name in ("one", "two"):
        with new_directory(directory, name) as half:
            (half / name).write_text(name)
        assert runs.files(tmp_path) == {f"a/directory/{name}": name.encode()}
    with pytest.raises(Stop), new_directory(directory, "three") as half:
        (half / "three").write_text("")
        raise Stop
    assert runs.files(tmp_path) == {"a/directory/two": b"two"}


def test_a_file_where_a_directory_is(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_file(tmp_path / "a", "new")
    assert error.value.filename == str(tmp_path / "a")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/directory: cannot be written: Not a directory"):
        with new_directory(tmp_path / "file" / "directory", "mark"):
            pass


def test_a_full_disk_as_numpy_says_it(tmp_path):
    with pytest.raises(UserError, match="a: cannot be written: 5 requested and 3 written"):
        with new_directory(tmp_path / "a", "mark"):
            raise OSError("5 requested and 3 written")


def test_a_full_disk_is_that_of_the_file(tmp_path):
    """A write that fails does not say itself what it wrote to."""
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError) as error, replacing(tmp_path / "results.json"):
        raise full
    assert error.value.filename == str(tmp_path / "results.json") and not list(tmp_path.iterdir())


def test_what_is_written_for_a_while_goes(tmp_path):
    """At the end, at an error, and where the process is about to exit."""
    with scratch_directory(tmp_path) as scratch:
        (scratch / "file").write_text("")
        remove_half_written()
        assert not scratch.exists()
    with pytest.raises(Stop), scratch_directory(tmp_path) as scratch:
        (scratch / "file").write_text("")
        raise Stop
    with pytest.raises(Stop), replacing(tmp_path / "plot.png") as partial:
        partial.write_text("")
        raise Stop
    assert not list(tmp_path.iterdir())

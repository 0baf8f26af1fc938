"""Files in buckets, against a server of objects on this machine."""

import errno
import subprocess
import sys

import pytest
from etils import epath

from fot_jax.common.atomic import create_file
from fot_jax.common.bucket_files import staged_directory


@pytest.fixture
def files(bucket):
    for name in ("a/b/x", "a/bc/y", "a/bc.txt"):
        bucket.put(name, name)
    return epath.Path(bucket.url)


def test_directories_are_what_names_have_in_common(files, bucket):
    assert {path.name for path in (files / "a").iterdir()} == {"b", "bc", "bc.txt"}
    assert (files / "a/b").is_dir() and not (files / "a/b/x").is_dir()
    assert not (files / "a/").joinpath("bc.t").exists()
    (files / "a/b").rmtree()  # and not what begins like it
    assert bucket.names() == ["a/bc.txt", "a/bc/y"]
    (files / "empty").mkdir(parents=True)
    assert not (files / "empty").exists()
    assert (files / "a/bc/y").read_text() == "a/bc/y"
    with pytest.raises(FileNotFoundError):
        (files / "a/b").rmtree()


def test_what_another_process_writes_and_removes_is_seen(files, bucket):
    assert not (files / "a/new").exists() and len(list((files / "a").iterdir())) == 3
    bucket.put("a/new", "")
    assert (files / "a/new").exists() and len(list((files / "a").iterdir())) == 4
    bucket.remove("a/new")
    assert not (files / "a/new").exists() and len(list((files / "a").iterdir())) == 3


def test_no_bucket_is_made_or_removed(cloud, bucket):
    there = epath.Path("gs://no-such-bucket")
    there.mkdir(parents=True, exist_ok=True)
    (there / "a").mkdir(exist_ok=True, parents=True)
    with pytest.raises(OSError, match="no such bucket") as told:
        (there / "a" / "b").write_text("")
    assert told.value.errno == errno.ENXIO and told.value.filename == "gs://no-such-bucket"
    epath.Path(bucket.url).rmtree(missing_ok=True)
    epath.Path(bucket.url).unlink(missing_ok=True)
    bucket.put("still", "there")


def test_what_cannot_write_there_is_copied(bucket, tmp_path):
    for directory in (f"{bucket.url}/run/profile", tmp_path / "run" / "profile"):
        with staged_directory(directory) as here:
            (epath.Path(here) / "plugins").mkdir(parents=True)
            (epath.Path(here) / "plugins" / "trace").write_text("trace")
    assert bucket.files() == {"run/profile/plugins/trace": b"trace"}
    assert (tmp_path / "run" / "profile" / "plugins" / "trace").read_text() == "trace"


ASKED = {
    "storage.objects.list": lambda path: list(path.iterdir()),
    "storage.objects.get": lambda path: (path / "b/x").read_text(),
    "storage.objects.create": lambda path: (path / "new").write_text(""),
    "storage.objects.delete": lambda path: (path / "b/x").unlink(),
}


@pytest.mark.parametrize("permission", ASKED)
def test_a_role_without_a_right(permission, files, cloud):
    cloud.forbidden = {permission}
    with pytest.raises(PermissionError, match=rf"not allowed \(.*{permission}.*\): grant") as told:
        ASKED[permission](files / "a")
    assert told.value.filename.startswith(str(files))


LOOKS = [
    lambda path: path.exists(),
    lambda path: path.is_dir(),
    lambda path: path.is_file(),
    lambda path: list(path.iterdir()),
    lambda path: path.read_bytes(),
    lambda path: path.stat(),
    lambda path: path.write_text("x"),
    lambda path: create_file(path, b"x"),
]


@pytest.mark.parametrize("look", LOOKS)
def test_what_is_refused_does_not_pass_for_a_file_that_is_not_there(look, files, cloud, caplog):
    cloud.forbidden = {f"storage.objects.{verb}" for verb in ("get", "list", "create")}
    with pytest.raises(PermissionError, match="not allowed"):
        look(files / "a/b")
    cloud.anonymous = True
    with pytest.raises(PermissionError, match="Anonymous .*: log in"):
        look(files / "a/b")
    cloud.anonymous, cloud.forbidden = False, set()
    with pytest.raises(OSError, match="no such bucket: correct the name") as told:
        look(epath.Path("gs://no-such-bucket/a/b"))
    assert not isinstance(told.value, PermissionError)
    assert not [record for record in caplog.records if record.name == "gcsfs"]


CREATES = """
import sys
from fot_jax.common.atomic import create_file
from fot_jax.common.bucket_files import staged_directory
sys.stdin.readline()
try:
    create_file(sys.argv[1], sys.argv[2].encode())
except FileExistsError:
    print("late")
else:
    print("first")
"""


def test_of_several_that_create_a_file_one_succeeds(bucket, tmp_path):
    for path, read in (
        (f"{bucket.url}/lock", lambda: bucket.get("lock")),
        (tmp_path / "lock", lambda: (tmp_path / "lock").read_bytes()),
    ):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", CREATES, str(path), str(i)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(3)
        ]
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        said = [process.communicate(timeout=60)[0].strip() for process in processes]
        assert sorted(said) == ["first", "late", "late"]
        assert read() == str(said.index("first")).encode()

"""The archive of a run's code."""

import io
import os
import shutil
import subprocess
import sys
import tarfile

import pytest
from clouds import REPOSITORY

from fot_jax.common.errors import UserError
from tpu import ship


def packed(monkeypatch, repository, *experiments):
    with monkeypatch.context() as patch:
        patch.setattr(ship, "REPOSITORY", repository)
        return ship.pack([str(each) for each in experiments])


def members(code):
    return tarfile.open(fileobj=io.BytesIO(code.archive)).getmembers()


@pytest.fixture
def copy(repository, tmp_path):
    return shutil.copytree(repository, tmp_path / "copy")


def test_the_same_code_has_the_same_archive(copy, tmp_path, monkeypatch):
    one = packed(monkeypatch, copy)
    again = shutil.copytree(copy, tmp_path / "again")
    for file in again.rglob("*.py"):
        os.utime(file, (0, 0))
    (again / "fot_jax" / "__pycache__").mkdir()
    (again / "fot_jax" / "__pycache__" / "x.pyc").touch()
    assert packed(monkeypatch, again) == one

    (again / "fot_jax" / "cli.py").chmod(0o755)
    other_mode = packed(monkeypatch, again)
    (again / "fot_jax" / "cli.py").chmod(0o644)
    (again / "fot_jax" / "cli.py").write_text("")
    other_content = packed(monkeypatch, again)
    (again / "fot_jax" / "new.py").touch()
    other_names = packed(monkeypatch, again)
    digests = {each.digest for each in (one, other_mode, other_content, other_names)}
    assert len(digests) == 4


def test_what_is_shipped_can_be_imported(copy, tmp_path, monkeypatch):
    code = packed(monkeypatch, copy)
    tarfile.open(fileobj=io.BytesIO(code.archive)).extractall(tmp_path / "there", filter="data")
    run = [sys.executable, "-c", "import tpu.verbs, fot_jax.cli; print(tpu.__file__)"]
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    there = subprocess.run(run, cwd=tmp_path / "there", env=environment, capture_output=True)
    assert str(tmp_path / "there") in there.stdout.decode(), there.stderr


def test_with_git_new_files_are_shipped_and_ignored_ones_are_not(copy, monkeypatch):
    def git(*argv):
        subprocess.run(["git", "-C", str(copy), *argv], check=True, stdout=subprocess.DEVNULL)

    git("init", "--quiet")
    git("add", ".")
    (copy / ".gitignore").write_text("*.secret\n")
    (copy / "experiments" / "new.gin").touch()
    (copy / "experiments" / "key.secret").touch()
    (copy / "experiments" / "quickstart.gin").unlink()
    names = [each.name for each in members(packed(monkeypatch, copy))]
    assert "experiments/new.gin" in names and "tpu/host_agent.py" in names
    assert "experiments/key.secret" not in names and "experiments/quickstart.gin" not in names


def test_nothing_of_this_machine_is_in_it():
    code = ship.pack([])
    for member in members(code):
        assert (member.mtime, member.uid, member.uname) == (0, 0, "")
    names = [each.name for each in members(code)]
    assert names == sorted(names) and ".ci/constraints.txt" in names
    assert not any(name.startswith(("tests", ".git", "/")) for name in names)


def test_experiments_of_the_repository_stay_where_they_are():
    place = REPOSITORY / "experiments" / "quickstart.gin"
    assert ship.pack([str(place)]).experiments == ("experiments/quickstart.gin",)
    assert ship.pack([str(place)]).digest == ship.pack([]).digest


def test_experiments_from_elsewhere_come_with_what_they_include(copy, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    (mine / "shared").mkdir(parents=True)
    (mine / "a.gin").write_text(
        "include 'shared/b.gin'\ninclude 'experiments/quickstart.gin'\nX = 1\n"
    )
    (mine / "shared" / "b.gin").write_text('include "c.gin"\n')
    (mine / "shared" / "c.gin").write_text("Y = 1\n")
    code = packed(monkeypatch, copy, mine / "a.gin")
    assert code.experiments == ("experiments/a.gin",)
    names = [each.name for each in members(code)]
    for name in ("a.gin", "shared/b.gin", "shared/c.gin"):
        assert f"experiments/{name}" in names


def test_files_of_the_repository_come_with_what_they_include(copy, monkeypatch):
    """Wherever in it: from its root, beside them, or beside what includes them."""
    (copy / "mine" / "parts").mkdir(parents=True)
    (copy / "mine" / "a.gin").write_text("include 'mine/b.gin'\ninclude 'parts/c.gin'\n")
    (copy / "mine" / "b.gin").write_text("include 'experiments/quickstart.gin'\n")
    (copy / "mine" / "parts" / "c.gin").write_text("include 'd.gin'\n")
    (copy / "mine" / "d.gin").write_text("Y = 1\n")
    code = packed(monkeypatch, copy, copy / "mine" / "a.gin")
    assert code.experiments == ("mine/a.gin",)
    names = {each.name for each in members(code)}
    assert names >= {f"mine/{name}.gin" for name in ("a", "b", "parts/c", "d")}
    (copy / "mine" / "d.gin").write_text("Y = 2\n")  # another run than the one before
    assert packed(monkeypatch, copy, copy / "mine" / "a.gin").settings != code.settings
    (copy / "mine" / "d.gin").unlink()
    with pytest.raises(UserError, match="c.gin: includes d.gin: put it beside it, or below"):
        packed(monkeypatch, copy, copy / "mine" / "a.gin")


def test_an_include_that_may_be_another_there_is_refused(copy, tmp_path, monkeypatch):
    """From where the experiment is, its own part is read; on the pod that of the repository."""
    part = tmp_path / "mine" / "experiments" / "quickstart.gin"
    part.parent.mkdir(parents=True)
    part.write_text("X = 1\n")
    (tmp_path / "mine" / "a.gin").write_text("include 'experiments/quickstart.gin'\n")
    with pytest.raises(UserError, match="include 'experiments/quickstart.gin' may be .* or .*mine"):
        packed(monkeypatch, copy, tmp_path / "mine" / "a.gin")


def test_names_that_clash_are_refused(copy, tmp_path, monkeypatch):
    (tmp_path / "quickstart.gin").write_text("X = 1\n")
    with pytest.raises(UserError, match="another experiments/quickstart.gin in the repository"):
        packed(monkeypatch, copy, tmp_path / "quickstart.gin")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.gin").write_text("include '../quickstart.gin'\n")
    with pytest.raises(UserError, match="includes ../quickstart.gin: put it beside it, or below"):
        packed(monkeypatch, copy, tmp_path / "below" / "a.gin")

"""Paths as users give them."""

from pathlib import Path

import pytest

from fot_jax.checkpoints.manager import Checkpointer
from fot_jax.common.errors import UserError
from fot_jax.common.paths import absolute, path_of


def test_paths_of_this_machine_and_of_buckets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("a/b", "/a/b", "gs://bucket/a", "s3:/a"):
        assert str(path_of(text)) == text
    assert str(absolute("a/b")) == str(Path("a/b").absolute())
    assert str(Checkpointer("gs://bucket/run/checkpoints").directory) == (
        "gs://bucket/run/checkpoints"
    )


@pytest.mark.parametrize("text", ["", "https://host/a", "file:///a", "s3://bucket/a", "a\0b"])
def test_what_is_no_path(text):
    with pytest.raises(UserError, match="is no path: give one of this machine, or gs://"):
        path_of(text)


def test_a_home_directory_is_not_guessed():
    with pytest.raises(UserError, match="~/runs: ~ is not taken for your home directory"):
        path_of("~/runs")

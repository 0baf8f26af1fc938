"""Every `python -m tpu` and gcloud command of the pages; `fot compile`: test_compile.py."""

import re
import shlex
import shutil

import pages
import pytest
from clouds import REPOSITORY, Cloud, copy_repository
from test_gcloud import said_by_gcloud

import tpu.__main__
from fot_jax import cli
from fot_jax.data.sentencepiece_vocabulary import TrainedSentencePiece

PAGE = pages.text("tpu/README.md")
COMMANDS = [shlex.join(argv) for argv in pages.commands(*pages.PAGES)]
HERE = ("local", "worker")  # verbs that start processes on this machine
OURS = [
    line
    for line in COMMANDS
    if line.startswith("python -m tpu ") and shlex.split(line)[3] not in HERE
]
OF_GCLOUD = [line for line in COMMANDS if line.startswith("gcloud ")]
OF_AN_ACCOUNT = "do not currently have an active account"
SAID = {  # by commands that need none
    "auth": "Go to the following link in your browser",
    "config": "Updated property [core/project]",
}
MY_3B = re.search(r"`experiments/my_3b.gin` names them:\n\n```gin\n(.*?)```", PAGE, re.S)[1]


def test_all_verbs_are_there():
    verbs = {shlex.split(line)[3] for line in OURS}
    every = {"create", "setup", "run", "logs", "status", "recover", "delete", "manifest"}
    assert verbs == every


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    repository = copy_repository(tmp_path_factory.mktemp("repository"))
    (repository / "experiments" / "my_3b.gin").write_text(MY_3B)
    return Cloud(tmp_path_factory.mktemp("machine") / "cloud", repository)


@pytest.mark.parametrize("line", OURS)
def test_in_dry_run(cloud, line):
    argv = shlex.split(line)[3:]
    printed = cloud.works(*argv, "--dry_run")
    assert "gcloud compute tpus" in printed or "kind: JobSet" in printed
    assert not cloud.calls()


@pytest.mark.parametrize("verb", HERE)
def test_what_is_started_here_is_understood(verb):
    lines = [shlex.split(line)[3:] for line in COMMANDS if line.startswith(f"python -m tpu {verb}")]
    assert lines
    for argv in lines:
        assert callable(tpu.__main__._parser(argv).parse_args(argv).run)


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
@pytest.mark.parametrize("line", OF_GCLOUD)
def test_the_parser_of_gcloud_takes_it(line, tmp_path):
    argv = shlex.split(line)
    assert SAID.get(argv[1], OF_AN_ACCOUNT) in said_by_gcloud(argv, tmp_path)


def test_the_experiment_is_read(tmp_path, monkeypatch, capsys):
    """With a directory in place of the bucket: a tokenizer is all that a dry run reads of it."""
    (line,) = (line for line in COMMANDS if line.startswith("fot train experiments/my_3b.gin "))
    _, *argv = shlex.split(line)
    model = TrainedSentencePiece(300).train(f"some words, all different: {i}" for i in range(99))
    (tmp_path / "tokenizer.model").write_bytes(model.model)
    (tmp_path / argv[1]).parent.mkdir()
    (tmp_path / argv[1]).write_text(MY_3B.replace("gs://my-bucket", str(tmp_path)))
    shutil.copytree(REPOSITORY / "experiments", tmp_path / "experiments", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 0
    assert "3,426,473,600 parameters, mesh {'replica': 1, 'data': 4" in capsys.readouterr().out

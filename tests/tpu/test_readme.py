"""Every command of the user's page."""

import re
import shlex
import shutil

import pytest
from clouds import REPOSITORY, Cloud, copy_repository
from test_gcloud import refusal_of_gcloud

PAGE = (REPOSITORY / "tpu" / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()
]
OURS = [line for line in COMMANDS if line.startswith("python -m tpu ") and " local " not in line]
OF_GCLOUD = [line for line in COMMANDS if re.match(r"gcloud (services|storage)", line)]


def test_all_verbs_are_there():
    verbs = {shlex.split(line)[3] for line in OURS}
    every = {"create", "setup", "run", "logs", "status", "recover", "delete", "manifest"}
    assert verbs == every


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    repository = copy_repository(tmp_path_factory.mktemp("repository"))
    (gin,) = re.findall(r"`experiments/(my_3b.gin)` names them:\n\n```gin\n(.*?)```", PAGE, re.S)
    (repository / "experiments" / gin[0]).write_text(gin[1])
    return Cloud(tmp_path_factory.mktemp("machine") / "cloud", repository)


@pytest.mark.parametrize("line", OURS)
def test_in_dry_run(cloud, line):
    argv = shlex.split(line)[3:]
    printed = cloud.works(*argv, "--dry_run")
    assert "gcloud compute tpus" in printed or "kind: JobSet" in printed
    assert not cloud.calls()


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
@pytest.mark.parametrize("line", OF_GCLOUD)
def test_the_parser_of_gcloud_takes_it(line, tmp_path):
    said = refusal_of_gcloud(shlex.split(line), tmp_path)
    assert "do not currently have an active account" in said

"""Command lines of gcloud: what they say, and that the real one's parser takes them."""

import shlex
import shutil
import subprocess

import pytest
from hosts import alive, wait_until

from fot_jax.common.topologies import CHIPS, SHAPES, topology_of
from tpu import gcloud, process
from tpu.gcloud import Pod

POD = Pod("pod", "us-central2-b", "some-project")
V4, V5E = topology_of("v4-128"), topology_of("v5e-256")

COMMANDS = {
    "create": gcloud.create(POD, V4, 1, None),
    "create spot": gcloud.create(POD, V5E, 1, "spot"),
    "create reserved slices": gcloud.create(POD, V4, 4, "reserved"),
    "describe": gcloud.describe(POD),
    "nodes": gcloud.nodes(POD),
    "delete": gcloud.delete(POD),
    "ssh": gcloud.ssh(POD, "echo 'a  b' \"$(c)\" --zone=x"),
    "ssh in turn": gcloud.ssh(POD, "-v", "3", in_turn=True),
    "scp": gcloud.scp(POD, __file__, "fot/code/x.tar.gz"),
    "list_checkpoints": gcloud.list_checkpoints(POD, "gs://bucket/a b/"),
}


def test_create():
    assert shlex.join(COMMANDS["create spot"]) == (
        "gcloud compute tpus queued-resources create pod --node-id=pod "
        "--accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite --spot "
        "--zone=us-central2-b --project=some-project --quiet"
    )
    assert shlex.join(COMMANDS["create reserved slices"]) == (
        "gcloud compute tpus queued-resources create pod --node-count=4 --node-prefix=pod "
        "--accelerator-type=v4-128 --runtime-version=tpu-ubuntu2204-base --reserved "
        "--zone=us-central2-b --project=some-project --quiet"
    )


def test_without_a_project_gclouds_own_is_taken():
    pod = Pod("pod", "us-central2-b")
    for argv in (gcloud.create(pod, V4, 1, None), gcloud.ssh(pod, "x"), gcloud.nodes(pod)):
        assert not any("project" in word for word in argv)


def said_by_gcloud(argv, config):
    """What the real gcloud says to a command line, without an account."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(config), "CLOUDSDK_CONFIG": str(config)}
    quiet = {"CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1", "CLOUDSDK_CORE_CHECK_GCE_METADATA": "0"}
    quiet["CLOUDSDK_CORE_PROJECT"] = "some-project"
    program = shutil.which(argv[0])
    done = subprocess.run(
        [program, *argv[1:]],
        env=environment | quiet,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stderr


real_gcloud = pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")


@real_gcloud
@pytest.mark.parametrize("name", COMMANDS)
def test_the_parser_of_gcloud_takes_it(name, tmp_path):
    """It then wants an account: it has parsed everything before."""
    assert "do not currently have an active account" in said_by_gcloud(COMMANDS[name], tmp_path)


@real_gcloud
@pytest.mark.parametrize("name", ["create", "nodes", "ssh", "scp", "list_checkpoints"])
def test_the_parser_of_gcloud_would_refuse_other_flags(name, tmp_path):
    """So that the test above can fail."""
    said = said_by_gcloud([*COMMANDS[name], "--no-such-flag"], tmp_path)
    assert "unrecognized arguments: --no-such-flag" in said


def test_every_topology_can_be_asked_for():
    for generation, shapes in SHAPES.items():
        for chips in shapes:
            name = f"{generation}-{chips * CHIPS[generation].cores}"
            argv = gcloud.create(POD, topology_of(name), 1, None)
            assert f"--runtime-version={CHIPS[generation].runtime_version}" in argv


def test_a_command_that_hangs_is_ended(tmp_path):
    """With what it has started."""
    hangs = f"echo $$ > {tmp_path}/pid; sleep 600"
    with pytest.raises(process.CallFailed, match="not done after 1 seconds"):
        process.call(["sh", "-c", f"sh -c '{hangs}'"], limit=1)
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not alive(pid), "the end of what it has started")

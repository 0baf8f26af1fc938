"""The verbs, one by one, against a fake cloud with two workers."""

import contextlib
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clouds import POD, WORKDIR

from fot_jax.common.topologies import CHIPS, topology_of
from tpu import targets, verbs
from tpu.gcloud import Pod


@pytest.mark.slow
def test_from_nothing_to_a_finished_run(cloud):
    cloud.plan(["WAITING_FOR_RESOURCES", "ACTIVE"])
    assert "2 more" not in cloud.works("create", cloud.experiment, *POD, "--spot")
    assert "WAITING_FOR_RESOURCES" in cloud.works("status", *POD)
    status = cloud.works("status", *POD)
    assert "ACTIVE" in status and "READY" in status and "2 workers" in status
    assert status.count(" none") == 2

    assert "2 workers are ready" in cloud.works("setup", cloud.experiment, *POD)
    out = cloud.works("run", cloud.experiment, *POD, *WORKDIR)
    assert out == "worker 0: started\nworker 1: started\n"
    _until(cloud, "finished")
    logs = cloud.works("logs", *POD)
    assert [line for line in logs.splitlines() if line.startswith("[worker 0] step")] == [
        f"[worker 0] step {step}" for step in range(1, 6)
    ]
    assert logs.splitlines()[-1] == "[worker 1] step 5"
    assert cloud.checkpoints() == [1, 2, 3, 4, 5]
    assert "[worker 0]" not in cloud.works("logs", *POD, "--worker", 1, "--lines", 2)

    cloud.works("delete", *POD)
    code, _, err = cloud.tpu("status", *POD)
    assert code == 2
    assert err == ("tpu: error: there is no queued resource pod in us-central2-b: create it\n")


def _until(cloud, state):
    """What `status` says as soon as both workers are in a state."""
    for _ in range(120):
        status = cloud.works("status", *POD)
        if len(re.findall(f"^worker .* {state} ", status, re.MULTILINE)) == 2:
            return status
        time.sleep(0.5)
    raise AssertionError(f"never {state}: {status}")


@pytest.mark.slow
def test_a_run_that_goes_on_is_left_alone(cloud):
    cloud.train(steps=5, hold={"1": 2})
    _created_and_set_up(cloud)
    cloud.works("run", cloud.experiment, *POD, *WORKDIR)
    _until(cloud, "running")
    pid = int((cloud.home(0) / "fot" / "runs" / "pod" / "pid").read_text())
    os.kill(pid, signal.SIGHUP)
    out = cloud.works("run", cloud.experiment, *POD, *WORKDIR)
    assert out.count("left alone") == 2
    time.sleep(1)
    assert [len(cloud.starts(worker)) for worker in (0, 1)] == [1, 1]


def _created_and_set_up(cloud):
    cloud.works("create", cloud.experiment, *POD)
    cloud.works("setup", cloud.experiment, *POD)


@pytest.mark.slow
def test_environments_are_made_once(cloud):
    _created_and_set_up(cloud)
    made = (cloud.directory / "uv.log").read_text().splitlines()
    assert sorted(line.split()[0] for line in made) == ["pip", "pip", "venv", "venv"]
    assert all("--extra tpu -c" in line for line in made if line.startswith("pip"))
    (cloud.home(1) / "mark").touch()
    cloud.works("setup", cloud.experiment, *POD)
    assert (cloud.directory / "uv.log").read_text().splitlines() == made

    environment = next((cloud.home(1) / "fot" / "venv").iterdir())
    (environment / "whole").unlink()  # as if the worker had been stopped while it was made
    (environment / "half").touch()
    cloud.works("setup", cloud.experiment, *POD)
    assert len((cloud.directory / "uv.log").read_text().splitlines()) == len(made) + 2
    assert not (environment / "half").exists()


@pytest.mark.slow
def test_an_environment_that_cannot_be_made_is_told(cloud):
    cloud.works("create", cloud.experiment, *POD)
    (cloud.directory / "no_space").touch()
    code, _, err = cloud.tpu("setup", cloud.experiment, *POD)
    assert code == 2
    assert err.startswith("tpu: error: worker 0 (") and "no space left" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_run_without_setup_is_refused(cloud):
    cloud.works("create", cloud.experiment, *POD)
    code, _, err = cloud.tpu("run", cloud.experiment, *POD, *WORKDIR)
    assert code == 2 and "on_worker.py" in err
    cloud.works("setup", cloud.experiment, *POD)
    cloud.experiment.write_text(cloud.experiment.read_text() + "train.seed = 1\n")
    code, _, err = cloud.tpu("run", cloud.experiment, *POD, *WORKDIR)
    assert code == 2 and "is not set up here" in err


@pytest.mark.slow
def test_dropped_connections_are_tried_again(cloud):
    cloud.works("create", cloud.experiment, *POD)
    cloud.plan(drops=["before", "fine", "after", "after", "silent"])
    cloud.works("setup", cloud.experiment, *POD)
    cloud.plan(drops=["after", "silent"])
    cloud.works("run", cloud.experiment, *POD, *WORKDIR)
    _until(cloud, "finished")
    assert [len(cloud.starts(worker)) for worker in (0, 1)] == [1, 1]

    cloud.plan(drops=["before"] * 10)
    code, _, err = cloud.tpu("setup", cloud.experiment, *POD)
    assert (code, err.count("\n")) == (2, 1)
    assert "gcloud queued-resources ssh: ssh: connect to host" in err
    cloud.plan(drops=["before"] * 10)
    table = cloud.works("status", *POD)
    assert "ACTIVE" in table and "READY" in table
    assert re.search(r"^workers +2 +silent +gcloud .*ssh: connect to host", table, re.M)
    cloud.plan(drops=["fine", "nobody"])  # reached by the copy, which gcloud is content with
    cloud.works("setup", cloud.experiment, *POD)
    cloud.plan(drops=["fine", *["nobody"] * 10])
    code, _, err = cloud.tpu("setup", cloud.experiment, *POD)
    assert (code, err.count("\n")) == (2, 1) and "Please run ssh-add" in err
    cloud.plan(drops=["silent"] * 10)
    code, _, err = cloud.tpu("run", cloud.experiment, *POD, *WORKDIR)
    assert (code, err.count("\n")) == (2, 1)
    assert "1 of 2 workers answered (0)" in err


@pytest.mark.slow
def test_the_first_failure_is_shown_first(cloud):
    cloud.train(steps=5, fail={"1": [2]})
    _created_and_set_up(cloud)
    cloud.works("run", cloud.experiment, *POD, *WORKDIR)
    _until(cloud, "failed")
    logs = cloud.works("logs", *POD)
    assert logs.startswith("worker 1 (")
    first, rest = logs.split("\n\n", 1)
    assert "Traceback (most recent call last)" in first
    assert "RuntimeError: worker 1 broke at step 2" in first
    assert rest.startswith("[worker 0] ")


@pytest.mark.slow
def test_a_killed_run_is_lost_and_can_be_started_again(cloud):
    cloud.train(steps=5, hold={"1": 2})
    _created_and_set_up(cloud)
    cloud.works("run", cloud.experiment, *POD, *WORKDIR)
    _until(cloud, "running")
    cloud.end()
    _until(cloud, "lost")
    cloud.train(steps=5)
    cloud.works("run", cloud.experiment, *POD, *WORKDIR)
    _until(cloud, "finished")


@pytest.mark.slow
def test_logs_are_followed(cloud):
    cloud.train(steps=5, hold={"1": 2})
    _created_and_set_up(cloud)
    cloud.works("run", cloud.experiment, *POD, *WORKDIR)
    following = cloud.start("logs", *POD, "--follow", "--worker", 0)
    lines = iter(following.stdout.readline, "")
    assert any(line == "[worker 0] step 2\n" for line in lines)
    cloud.train(steps=5)
    cloud.end()
    cloud.works("run", cloud.experiment, *POD, *WORKDIR)
    assert any(line == "[worker 0] step 5\n" for line in lines)
    following.terminate()
    assert following.wait(60) == 143
    for _ in range(100):
        if not _who_names(cloud.directory):
            break
        time.sleep(0.1)
    assert not _who_names(cloud.directory)


def _who_names(directory):
    """Command lines of processes that have something to do with a directory."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines.append((process / "cmdline").read_bytes())
    return [line for line in lines if bytes(directory) in line]


@pytest.mark.slow
def test_several_slices(cloud):
    cloud.plan(workers=1)
    mesh = ("Compute.slices = 2", "Compute.mesh = @MeshShape()", "MeshShape.replica = 2")
    gin = [word for binding in mesh for word in ("--gin", binding)]
    with_slices = (cloud.experiment, *POD, *gin, "--topology", "v4-8")
    cloud.works("create", *with_slices)
    assert "2 workers are ready" in cloud.works("setup", *with_slices)
    for verb in ("run", "recover"):
        code, out, err = cloud.tpu(verb, *with_slices, *WORKDIR)
        assert (code, out) == (2, "") and "machines of a slice do not know those of" in err
    status = cloud.works("status", *POD)
    assert "pod-0 " in status and "pod-1 " in status


@pytest.mark.slow
def test_a_pod_of_another_slice_is_not_taken(cloud):
    """Whether it is there or still waited for."""
    cloud.plan(["WAITING_FOR_RESOURCES", "ACTIVE"])
    cloud.works("create", cloud.experiment, *POD)
    for verb, more in (("recover", WORKDIR), ("setup", ()), ("run", WORKDIR)):
        code, out, err = cloud.tpu(verb, cloud.experiment, *POD, *more, "--topology", "v4-32")
        assert (code, out) == (2, "")
        assert err == (
            "tpu: error: pod in us-central2-b is v4-16, not v4-32: give another --name, or delete "
            f"it: python -m tpu delete {' '.join(POD)}\n"
        )
    assert not cloud.calls("ssh") and not cloud.calls("delete")


@pytest.mark.parametrize("tpu", [None, {}, {"nodeSpec": [{}, {"node": {}}]}], ids=str)
def test_a_pod_that_does_not_say_its_slice_is_taken(monkeypatch, tpu):
    found = {} if tpu is None else {"tpu": tpu}
    monkeypatch.setattr(verbs, "look", lambda pod: found)
    slices = targets.Slices(topology_of("v4-16"), 1)
    assert verbs.look_for(Pod("pod", "us-central2-b"), slices) is found


HOSTILE = "-a \"b\" 'c' $(touch {0}/hacked) `touch {0}/hacked` \\ ; & | > * ~ ü \t %s {{}} !"


@pytest.mark.slow
def test_hostile_words_arrive_byte_for_byte(cloud):
    word = HOSTILE.format(cloud.directory)
    experiment = cloud.directory / f"{word.replace('/', ':')}.gin"
    uses = "train.initialize_from = %VOCABULARY\ntrain.seed = %X\n"
    experiment.write_text(cloud.experiment.read_text() + uses)
    binding = f"VOCABULARY = {word!r}\nX = 2"
    cloud.works("create", experiment, *POD)
    cloud.works("setup", experiment, *POD)
    cloud.works(
        "run", experiment, *POD, *WORKDIR, "--gin", binding, "--env", f"WORD={word}\n{word}"
    )
    _until(cloud, "finished")
    for worker in (0, 1):
        (start,) = cloud.starts(worker)
        assert start["argv"] == [
            *("train", f"experiments/{experiment.name}", "--workdir=gs://bucket/run"),
            f"--gin={binding}",
        ]
        assert start["environment"]["WORD"] == f"{word}\n{word}"
        assert start["environment"]["JAX_COMPILATION_CACHE_DIR"].endswith("/fot/cache")
        code = cloud.home(worker) / "fot" / "code"
        assert start["cwd"].startswith(str(code))
    assert not list(cloud.directory.rglob("hacked"))


REFUSED = {
    "a name with a space": ("--name", "a b"),
    "a name with quotes": ("--name", 'a"b'),
    "a name with a command": ("--name", "$(id)"),
    "a name that is a flag": ("--name=-a",),
    "a name with a line": ("--name", "a\n"),
    "a name too long": ("--name", "a" * 64),
    "a zone with a command": ("--zone", "a;id"),
    "a zone that is a flag": ("--zone=--help",),
    "a project with a space": ("--project", "a b"),
    "a project that is a flag": ("--project=--help",),
    "a workdir that is relative": ("--workdir", "$(id)"),
    "a workdir elsewhere": ("--workdir", "s3://bucket"),
    "a workdir of two lines": ("--workdir", "/a\n/b"),
    "a variable without a value": ("--env", "A"),
    "a variable with a command": ("--env", "$(id)=1"),
    "a topology that is not there": ("--topology", "v4-7"),
    "slices that are none": ("--gin", "Compute.slices = 0"),
    "slices that replicas span": ("--gin", "Compute.slices = 2"),
    "a mesh of other devices": (
        *("--gin", "Compute.mesh = @MeshShape()", "--gin", "MeshShape.fsdp = 3"),
    ),
    "a name nobody knows": ("--gin", "Nothing.at_all = 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(cloud, case):
    code, out, err = cloud.tpu("run", cloud.experiment, *POD, *WORKDIR, *REFUSED[case])
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("tpu: error: ")
    assert not cloud.calls()


def test_without_gcloud(cloud):
    (cloud.bin / "gcloud").unlink()
    code, _, err = cloud.tpu("create", cloud.experiment, *POD, PATH=str(cloud.bin))
    assert (code, err.count("\n")) == (2, 1)
    assert "gcloud on this machine: install the Google Cloud CLI" in err


@pytest.mark.parametrize(
    "signum, limit, code", [(signal.SIGTERM, 60, 143), (0, 1, 2)], ids=["stopped", "too long"]
)
def test_creating_that_does_not_end_may_be_billed(cloud, monkeypatch, signum, limit, code):
    call = verbs.process.call
    monkeypatch.setattr(verbs.process, "call", functools.partial(call, limit=limit))
    cloud.plan(hangs=signum)
    ended, out, _ = cloud.tpu("create", cloud.experiment, *POD)
    told = "pod may have been asked for; it is billed once ACTIVE: python -m tpu delete"
    assert (ended, out) == (code, f"{told} {' '.join(POD)}\n")


def test_errors_of_gcloud_are_one_line(cloud):
    cloud.plan(create=["PERMISSION_DENIED: The caller does not have permission"])
    code, _, err = cloud.tpu("create", cloud.experiment, *POD)
    assert code == 2
    assert err == (
        "tpu: error: gcloud queued-resources create: "
        "PERMISSION_DENIED: The caller does not have permission\n"
    )


VERBS = {
    "create": ["create"],
    "setup": ["describe", "ssh", "scp", "ssh"],
    "run": ["describe", "ssh"],
    "logs": ["ssh", "ssh"],
    "status": ["describe", "list", "ssh"],
    "delete": ["delete"],
    "recover": [
        *("describe", "create", "describe", "list", "ssh", "ssh", "scp", "ssh", "ssh"),
        *("describe", "list", "ssh"),
    ],
}


@pytest.mark.parametrize("verb", VERBS)
def test_dry_runs_print_commands_and_run_none(cloud, verb):
    experiment = () if verb in ("logs", "status", "delete") else (cloud.experiment,)
    workdir = WORKDIR if verb in ("run", "recover") else ()
    printed = cloud.works(verb, *experiment, *POD, *workdir, "--dry_run")
    commands = [shlex.split(line) for line in printed.splitlines()]
    assert [argv[4] for argv in commands] == VERBS[verb]
    assert all(argv[0] == "gcloud" for argv in commands)
    assert not cloud.calls()


@pytest.mark.slow
def test_dry_runs_print_what_runs(cloud):
    _created_and_set_up(cloud)
    for verb in ("create", "setup", "run", "status", "delete"):
        experiment = () if verb in ("status", "delete") else (cloud.experiment,)
        argv = (verb, *experiment, *POD, *(WORKDIR if verb == "run" else ()))
        (cloud.directory / "calls.jsonl").unlink()
        printed = cloud.works(*argv, "--dry_run")
        cloud.tpu(*argv)  # to create what is there fails, but is tried
        assert [shlex.split(line)[1:] for line in printed.splitlines()] == cloud.calls(), verb


def test_a_pod_is_of_the_slice_that_training_takes(cloud):
    """Not of a Compute that training does not see, whose mesh and dtype it would not have."""
    dry = ("create", cloud.experiment, *POD, "--dry_run")
    cloud.experiment.write_text('Compute.topology = "v4-16"\n')
    code, out, err = cloud.tpu(*dry)
    assert (code, out) == (2, "") and "set train.compute = @Compute()" in err
    with cloud.experiment.open("a") as file:
        file.write('train.compute = @pod/Compute()\npod/Compute.topology = "v4-8"\n')
    assert "--accelerator-type=v4-8 " in cloud.works(*dry)


@pytest.mark.slow
def test_tiers_and_chips(cloud):
    def flags(*more):
        return shlex.split(cloud.works("create", cloud.experiment, *POD, "--dry_run", *more))

    assert "--spot" in flags("--spot") and "--reserved" in flags("--reserved")
    assert not {"--spot", "--reserved"} & set(flags())
    for chip, topology in (("v5e", "v5e-16"), ("v6e", "v6e-8"), ("v5p", "v5p-8")):
        assert f"--runtime-version={CHIPS[chip].runtime_version}" in flags("--topology", topology)
    assert "--accelerator-type=v5litepod-16" in flags("--topology", "v5e-16")


@pytest.mark.slow
def test_answers_stay_short(cloud):
    """Pipes take 4096 bytes at once: longer ones could be torn."""
    cloud.works("create", cloud.experiment, *POD)
    cloud.works("setup", cloud.experiment, *POD)
    run = cloud.home(0) / "fot" / "runs" / "pod"
    run.mkdir(parents=True)
    (run / "pid").write_text("4999999")  # nobody
    told = {"state": "failed", "worker": 0, "why": "ü" * 10_000}
    (run / "state.json").write_text(json.dumps(told))
    (run / "log").write_text("Traceback (most recent call last)\n" + "  'ü\\'\n" * 10_000)
    status = cloud.works("status", *POD)
    assert "failed" in status
    assert max(map(len, status.splitlines())) < 4096


@pytest.mark.slow
def test_a_run_that_cannot_begin_has_failed(cloud):
    _created_and_set_up(cloud)
    for worker in (0, 1):
        (code,) = (x for x in (cloud.home(worker) / "fot" / "code").iterdir() if x.is_dir())
        (code / "tpu" / "supervisor.py").write_text("import no_such_module\n")
    cloud.works("run", cloud.experiment, *POD, *WORKDIR)
    status = _until(cloud, "failed")
    assert status.count("ended before it could count the workers") >= 1
    assert "No module named 'no_such_module'" in cloud.works("logs", *POD)


@pytest.mark.slow
def test_a_run_goes_on_until_its_process_is_gone(cloud):
    """Or it would be started again while it still is there, and that would do nothing."""
    _created_and_set_up(cloud)
    run = cloud.home(0) / "fot" / "runs" / "pod"
    run.mkdir(parents=True)
    sleeps = [sys.executable, "-c", "import time; time.sleep(300)", "--run_dir", str(run)]
    with subprocess.Popen(sleeps) as process:
        (run / "pid").write_text(str(process.pid))
        (run / "state.json").write_text(json.dumps({"state": "failed", "worker": 0}))
        try:
            assert " running" in cloud.works("status", *POD)
        finally:
            process.kill()
    assert " failed" in cloud.works("status", *POD)

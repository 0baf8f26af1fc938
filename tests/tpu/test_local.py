"""A pod made of processes trains as one process does, and goes on when one of them is killed."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import hosts
import numpy as np
import pytest
import runs
from hosts import alive, wait_until

from fot_jax import cli

EXPERIMENT = f"""{runs.DICTIONARY}
train.evaluation = @Evaluation()
Evaluation.evals = (@PerplexityByContext(), @PositiveMass(), @RetrievalTable())
PerplexityByContext.memory_sizes = (0, 16)
PositiveMass.ds = (1, 3)
RetrievalTable.memory = 16
RetrievalTable.k = 4
train.steps = 36
train.compute = @Compute()
Compute.mesh = @MeshShape()
MeshShape.data = 4
MeshShape.fsdp = 2
Data.lane_groups = 2
PreviousContext.d = 3
Checkpoints.every = 12
Checkpoints.keep_last = 3
"""
TRAINING = ("--gin", "Evaluation.evals = ()")
FAILED = "tpu local: failed first: worker {} (127.0.0.1) ended with signal 9\n"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "experiment.gin"
    path.write_text(EXPERIMENT)
    return path


@contextlib.contextmanager
def local(experiment, workdir, *flags, processes=4, devices=2):
    """The command as a process that has started; whatever comes, it does not outlive the test."""
    words = [str(experiment), "--workdir", str(workdir), *flags]
    with several(*words, processes=processes, devices=devices) as process:
        yield process


@contextlib.contextmanager
def several(*words, processes=4, devices=2):
    numbers = ["--processes", str(processes), "--devices", str(devices)]
    process = subprocess.Popen(
        [*hosts.verb("local"), *numbers, *words],
        cwd=hosts.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=hosts.LIMIT)


def end(process):
    """Exit code, standard output and standard error."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def children(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    return []


def commands(process, count):
    """Training processes by worker, once there are so many."""

    def found():
        pids = [pid for worker in children(process.pid) for pid in children(worker)]
        by_worker = {worker_of(pid): pid for pid in pids}
        return by_worker if set(by_worker) == set(range(count)) else None

    return wait_until(found, "the start of training")


def worker_of(pid):
    """From the environment of a process; None while it is just becoming its program."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found = [v.partition(b"=")[2] for v in variables if v.startswith(b"FOT_WORKER=")]
        return int(found[0]) if found else None
    return None


@pytest.fixture(scope="module")
def unbroken(experiment, tmp_path_factory):
    """A run on four processes that nothing disturbs: its workdir, and what it said."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    with local(experiment, workdir) as process:
        code, out, err = end(process)
    assert (code, err) == (0, ""), out
    return workdir, out


# --- Training ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_processes_train_as_one(unbroken, experiment, tmp_path):
    assert runs.train(experiment, tmp_path / "run") == 0
    (*one, evaluated), (*four, evaluated_by_four) = map(runs.curve, (tmp_path / "run", unbroken[0]))
    assert len(one) == 36
    assert [row["step"] for row in four] == [row["step"] for row in one]
    for name in ("loss", "accuracy", "grad_norm"):
        of_one, of_four = ([row[name] for row in rows] for rows in (one, four))
        np.testing.assert_allclose(of_four, of_one, rtol=1e-5, atol=1e-5, err_msg=name)
    assert {name.split("/")[0] for name in evaluated} == {
        *("step", "perplexity_by_context", "positive_mass", "retrieval")
    }
    assert evaluated_by_four == pytest.approx(evaluated, rel=1e-3)


@pytest.mark.slow
def test_processes_share_a_memory(unbroken, experiment, tmp_path):
    """Two that evaluate together; four have done that at the end of training."""
    sizes = "PerplexityByContext.memory_sizes = (0, 8, 16)"
    only = ["--gin", "Evaluation.evals = (@PerplexityByContext(),)", "--gin", sizes]
    argv = ["evaluate", str(experiment), *only, "--checkpoint", str(unbroken[0]), "--output"]
    assert cli.main([*argv, str(tmp_path / "one.json")]) == 0
    with several("--", *argv, str(tmp_path / "two.json"), processes=2) as process:
        code, out, err = end(process)
    assert (code, err) == (0, ""), out
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    rows = one["perplexity_by_context"]
    assert [row["memory"] for row in rows] == [0, 8, 16] and len({row["nats"] for row in rows}) > 1
    for ours, theirs in zip(two["perplexity_by_context"], rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    with several("--", *argv, str(tmp_path / "killed.json"), processes=2) as process:
        os.kill(commands(process, 2)[1], signal.SIGKILL)
        code, _, err = end(process)
    assert code == 1 and err.startswith(FAILED.format(1))


@pytest.mark.slow
def test_whole_lines_say_whose_they_are(unbroken):
    lines = unbroken[1].splitlines()
    assert all(re.match(r"\[worker [0-3]\] ", line) for line in lines)
    steps = [re.match(r"\[worker 0\] step (\d+)/36  loss ", line) for line in lines]
    assert [int(step[1]) for step in steps if step] == list(range(1, 37))


@pytest.mark.slow
def test_killed_and_started_again_it_ends_as_if_unbroken(unbroken, experiment, tmp_path):
    workdir = tmp_path / "run"
    with local(experiment, workdir, "--restarts", "1", *TRAINING) as process:
        before = commands(process, 4)
        wait_until(lambda: runs.steps_saved(workdir), "a checkpoint")
        os.kill(before[2], signal.SIGKILL)
        code, out, err = end(process)
    assert code == 0, out + err
    assert err.startswith(FAILED.format(2))
    assert err.endswith("tpu local: starting again, 1 of 1 times\n")
    for worker in (0, 1, 3):
        line = f"tpu worker {worker}: stopped because worker 2 (127.0.0.1) ended with signal 9"
        assert f"[worker {worker}] {line}\n" in out
    assert re.search(r"\[worker 0\] resuming .* after step (12|24)\n", out)
    assert runs.training_curve(workdir) == runs.training_curve(unbroken[0])
    runs.assert_same_parameters(workdir, unbroken[0])


@pytest.mark.slow
def test_stopped_on_one_host_all_stop_alike_and_fewer_go_on(unbroken, experiment, tmp_path):
    """What 4 processes have saved 2 go on from, and then 1: the same batches follow."""
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    for step in runs.steps_saved(workdir)[1:]:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert runs.steps_saved(workdir) == [12]
    with local(experiment, workdir, *TRAINING, processes=2, devices=4) as process:
        started = commands(process, 2)
        wait_until(lambda: 18 <= steps_done(workdir) < 36, "a few steps")
        os.kill(started[1], signal.SIGTERM)
        code, out, err = end(process)
    assert (code, err) == (143, ""), out
    assert "[worker 0] resuming" in out
    (said,) = re.findall(r"^\[worker 0\] stopped by SIGTERM after step (\d+), which", out, re.M)
    assert int(said) < 36 and runs.steps_saved(workdir)[-1] == int(said)
    assert runs.train(experiment, workdir, TRAINING[1]) == 0
    ours, theirs = runs.training_curve(workdir), runs.training_curve(unbroken[0])
    assert [row["step"] for row in ours] == list(range(1, 37))
    ours, theirs = ([row["loss"] for row in rows] for rows in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def steps_done(workdir):
    """As far as metrics are written."""
    with contextlib.suppress(FileNotFoundError):
        return (workdir / "metrics.jsonl").read_text().count("\n")
    return 0


# --- Ending --------------------------------------------------------------------------------------


def test_a_failure_without_restarts(experiment, tmp_path):
    with local(experiment, tmp_path / "run") as process:
        started = commands(process, 4)
        os.kill(started[2], signal.SIGKILL)
        code, _, err = end(process)
    assert code == 1 and err.startswith(FAILED.format(2)) and "again" not in err
    assert not any(map(alive, started.values()))


def test_stopped_early_it_leaves_nothing(experiment, tmp_path):
    with local(experiment, tmp_path / "run", processes=2) as process:
        started = commands(process, 2)
        process.send_signal(signal.SIGTERM)
        code, _, err = end(process)
    assert (code, err) == (143, "")
    assert not any(map(alive, started.values()))


def test_killed_it_leaves_no_processes(experiment, tmp_path):
    with local(experiment, tmp_path / "run", processes=2) as process:
        workers = children(process.pid)
        started = commands(process, 2)
        process.kill()
        everyone = [*workers, *started.values()]
        wait_until(lambda: not any(map(alive, everyone)), "the end of all processes")


def test_what_is_wrong_with_an_experiment_is_shown(experiment, tmp_path):
    binding = ("--gin", "train.stepz = 3")
    with local(experiment, tmp_path / "run", *binding, processes=2) as process:
        code, out, err = end(process)
    assert code == 1
    line = (
        "fot: error: train has no parameter 'stepz' (--gin 'train.stepz = 3'); did you mean steps?"
    )
    assert re.search(rf"^\[worker \d\] {re.escape(line)}$", out, re.MULTILINE)
    assert re.match(
        r"tpu local: failed first: worker \d \(127.0.0.1\) ended with exit code 2\n", err
    )
    assert f"  {line}\n" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (("quickstart.gin",), "--workdir is missing: give the directory of the run"),
        (("--workdir", "w", "generate"), "--workdir and --gin are of training: give those of"),
    ],
)
def test_flags_that_do_not_fit(words, message):
    with several(*words) as process:
        code, out, err = end(process)
    assert (code, out) == (2, "") and err.startswith(f"tpu: error: {message}")


@pytest.mark.parametrize(
    ("flag", "least"), [("--processes", 1), ("--devices", 1), ("--restarts", 0)]
)
def test_numbers_that_make_no_sense(experiment, tmp_path, flag, least):
    with local(experiment, tmp_path / "run", flag, str(least - 1)) as process:
        code, out, err = end(process)
    assert (code, out) == (2, "")
    assert err == f"tpu: error: {flag} {least - 1}: give {least} or more\n"

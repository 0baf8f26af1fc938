"""Runs that are killed, stopped and damaged end as if nothing had happened."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import runs
from runs import (
    DICTIONARY,
    PACKED,
    SWITCHING,
    curve,
    steps_saved,
    training_curve,
    write,
    write_corpus,
)
from tiny import tiny

from fot_jax import train as train_module
from fot_jax.checkpoints.items import DataHandler
from fot_jax.checkpoints.manager import Checkpointer
from fot_jax.common.agreement import AHEAD, Agreement
from fot_jax.data.synthetic import DictionaryLookup
from fot_jax.evals.evaluate import Evaluation
from fot_jax.evals.perplexity import PerplexityByContext
from fot_jax.model.schemes import PreviousContext
from fot_jax.training import saving
from fot_jax.training.optimizers import adamw


def last_step(workdir):
    """Of the last whole line of metrics.jsonl."""
    with contextlib.suppress(FileNotFoundError):
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                return json.loads(line)["step"]
    return 0


def interrupt(argv, workdir, how, steps):
    """Starts a run, sends a signal so many steps beyond what was reported before; stderr."""
    target = last_step(workdir) + steps
    process = runs.start(argv)
    while last_step(workdir) < target and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == (-9 if how == signal.SIGKILL else 128 + how), stderr
    assert "Traceback" not in stderr
    return stderr


ONE_AFTER_ANOTHER = """
import json, sys
from fot_jax import cli
for argv in map(json.loads, sys.argv[1:]):
    assert cli.main(argv) == 0
"""


def finish(*commands):
    """Runs them to their ends, one after another in one process that nothing disturbs; stderr."""
    process = runs.start(map(json.dumps, commands), program=("-c", ONE_AFTER_ANOTHER))
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    return stderr


def truncate_largest_file(directory):
    largest = max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


@pytest.mark.slow
def test_killed_at_any_step_it_ends_as_if_unbroken(tmp_path):
    """kill -9, ^C, SIGTERM, and then its checkpoint damaged; schedule of d by accuracy."""
    more = "train.steps = 100\nCheckpoints.every = 7\nEvaluation.every = 35\n"
    experiment = write(tmp_path, SWITCHING + more)
    workdir, unbroken = tmp_path / "run", tmp_path / "unbroken"
    argv = runs.arguments(experiment, workdir)
    rng = random.Random()
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        said = interrupt(argv, workdir, how, rng.randrange(3, 13))
    stopped = last_step(workdir)
    assert f"stopped by SIGTERM after step {stopped}, which is saved" in said
    *_, before, newest = steps_saved(workdir)
    assert newest == stopped < 100
    truncate_largest_file(workdir / "checkpoints" / str(newest) / "params")
    said = finish(argv, runs.arguments(experiment, unbroken))
    assert f"checkpoints/{newest} is damaged" in said and "Traceback" not in said
    assert f"resuming {workdir} after step {before}" in said
    assert said.count("resuming") == 1 and said.count("step 100/100") == 2
    assert curve(workdir) == curve(unbroken)
    runs.assert_same_parameters(workdir, unbroken)
    assert {row["d"] for row in training_curve(workdir)} == {1, 3}


@pytest.mark.slow
def test_stopped_between_logged_steps_it_ends_as_if_unbroken(tmp_path):
    """Text in two lane groups, accumulation, metrics every 4 steps and checkpoints every 7."""
    corpus = write_corpus(tmp_path / "corpus")
    experiment = write(tmp_path, PACKED + f'Corpus.path = "{corpus}"\n')
    argv = runs.arguments(experiment, tmp_path / "run")
    interrupt(argv, tmp_path / "run", signal.SIGKILL, 9)
    said = interrupt(argv, tmp_path / "run", signal.SIGTERM, 9)
    stopped = int(re.search(r"stopped by SIGTERM after step (\d+)", said)[1])
    assert stopped < 150 and steps_saved(tmp_path / "run")[-1] == stopped
    said = finish(argv, runs.arguments(experiment, tmp_path / "unbroken"))
    assert f"resuming {tmp_path / 'run'} after step {stopped}" in said
    want = curve(tmp_path / "unbroken")
    assert curve(tmp_path / "run") == want
    assert [row["step"] for row in want] == [*range(4, 150, 4), 150]
    runs.assert_same_parameters(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.slow
def test_a_second_sigterm_ends_the_process_at_once():
    code = """if True:
        import os, signal, time
        from fot_jax.training.signals import SAME_SECONDS, stop_signals
        with stop_signals() as signals:
            assert not signals.received
            for _ in range(2):  # sent to all processes, and passed on by another
                os.kill(os.getpid(), signal.SIGTERM)
            print(signals.received.name, flush=True)
            time.sleep(SAME_SECONDS)
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here", flush=True)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "SIGTERM\n"), done.stderr


@pytest.mark.slow
def test_a_save_that_fails_is_tried_again(tmp_path, one_device, monkeypatch, caplog):
    """At the step that finds out; training goes on as if nothing had happened."""
    experiment = tmp_path / "experiment.gin"
    long = "Checkpoints.keep_last = 9\nCheckpoints.every = 10\ntrain.steps = 22\n"
    experiment.write_text(f"{DICTIONARY}\n{long}")
    left, failed = fail_saves(monkeypatch, 2), Checkpointer.failed

    def ended(self):  # within the step, as in earnest steps take longer
        if self._waiting.is_alive():
            self._waiting.join()
        return failed(self)

    monkeypatch.setattr(Checkpointer, "failed", ended)
    assert runs.train(experiment, tmp_path / "run") == 0
    assert not left
    saved = steps_saved(tmp_path / "run")
    assert 10 < saved[0] < 20 and saved[1:] == [20, 22]
    said = [
        record.getMessage() for record in caplog.records if "not written" in record.getMessage()
    ]
    assert said[0] == "the checkpoint of step 10 was not written: the bucket sang"
    assert len(said) == 2
    assert runs.train(experiment, tmp_path / "unbroken") == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "unbroken")


def test_the_last_save_is_tried_again(tmp_path, one_device, monkeypatch):
    experiment = tmp_path / "experiment.gin"
    experiment.write_text(f"{DICTIONARY}\nCheckpoints.every = 500\ntrain.steps = 3\n")
    left = fail_saves(monkeypatch, 2)
    assert runs.train(experiment, tmp_path / "run") == 0
    assert not left and steps_saved(tmp_path / "run") == [3]


def test_saves_that_always_fail_end_the_run(tmp_path, one_device, monkeypatch):
    experiment = tmp_path / "experiment.gin"
    experiment.write_text(f"{DICTIONARY}\ntrain.steps = 9999\n")
    fail_saves(monkeypatch, 99)
    with pytest.raises(RuntimeError, match="the bucket sang"):
        runs.train(experiment, tmp_path / "run")
    assert steps_saved(tmp_path / "run") == []
    assert 4 < len(curve(tmp_path / "run")) < 9999


RETRIES_AT_ONCE = """
from fot_jax import cli
from fot_jax.training import saving
saving.RETRY_SECONDS = 0
cli.run()
"""


def test_a_process_that_can_save_no_longer_ends(tmp_path):
    """Threads of Orbax would keep it: they wait for a save that never comes."""
    experiment, checkpoints = tmp_path / "experiment.gin", tmp_path / "run" / "checkpoints"
    experiment.write_text(f"{DICTIONARY}\ntrain.steps = 99_999\n")
    argv = runs.arguments(experiment, tmp_path / "run")
    process = runs.start(argv, program=("-c", RETRIES_AT_ONCE))
    try:
        while last_step(tmp_path / "run") < 8 and process.poll() is None:  # one is saved
            time.sleep(0.01)
        checkpoints.rename(tmp_path / "taken_away")
        checkpoints.write_text("")
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith(f"fot: error: {checkpoints}/")


def fail_saves(monkeypatch, times):
    """The first saves fail in the background; gives those that are still to fail."""
    finalize, left = DataHandler.finalize, [None] * times

    def fail_first(self, directory):
        if left:
            left.pop()
            raise RuntimeError("the bucket sang")
        finalize(self, directory)

    monkeypatch.setattr(DataHandler, "finalize", fail_first)
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0)
    return left


@pytest.mark.parametrize("step, ahead", [(3, 0), (2, AHEAD), (3, AHEAD)])
def test_a_signal_in_the_last_steps_leaves_out_the_evaluation(
    tmp_path, one_device, monkeypatch, step, ahead
):
    """Of several processes, which stop only so many steps after it, as of one."""

    def request(self, name, step, value=0):
        self._alone.setdefault(name, (step + ahead, value))

    monkeypatch.setattr(Agreement, "request", request)

    def learning_rate(count):
        if isinstance(count, int) and count == step - 1:  # asked for the report of the step
            signal.raise_signal(signal.SIGTERM)
        return 0.01

    def run():
        return train_module.train(
            str(tmp_path),
            tiny(vocab_size=64, local_context=16),
            train_module.Data(DictionaryLookup(32, 1, 1), lanes=4),
            adamw,
            learning_rate,
            steps=3,
            scheme=PreviousContext(advance=2),
            evaluation=Evaluation(evals=(PerplexityByContext(memory_sizes=(0,)),)),
            log_every=1,
        )

    assert run() == signal.SIGTERM
    assert steps_saved(tmp_path) == [3] and not (tmp_path / "plots").exists()
    assert run() is None  # nothing is left but the evaluation
    assert (tmp_path / "plots" / "perplexity_by_context.png").exists()

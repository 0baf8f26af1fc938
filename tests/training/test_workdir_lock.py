"""One run at a time in a workdir, on a disk and in a bucket."""

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time

import pytest
import runs
import together

from fot_jax.common.errors import UserError
from fot_jax.training import workdir_lock
from fot_jax.training.workdir_lock import RUNNING, held

LONG = runs.DICTIONARY.replace("train.steps = 12", "train.steps = 60")

HOLD = """
import sys, time
from fot_jax.common.errors import UserError
from fot_jax.training import workdir_lock
try:
    with workdir_lock.held(sys.argv[1]):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
except UserError as error:
    print(error, flush=True)
"""


def holder(workdir, seconds=60.0):
    """A process that has a workdir, or was refused it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir), str(seconds)],
        env=runs.with_devices(1),
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


def kill(process):
    process.kill()
    process.wait()


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path):
    if request.param == "disk":
        return str(tmp_path / "a" / "run")
    return f"{request.getfixturevalue('bucket').url}/run"


def test_held_by_one_process_until_it_ends_however_it_does(workdir):
    first, said = holder(workdir)
    assert said == "held"
    refusal = rf"{workdir}: a run is going on there \(process {first.pid} on \S+, since .*\): wait"
    with pytest.raises(UserError, match=refusal):
        with held(workdir):
            pass
    kill(first)
    with held(workdir):
        assert holder(workdir)[1].startswith(f"{workdir}: a run is going on there (process")
    second, said = holder(workdir, 0)
    assert said == "held" and second.wait() == 0


def test_nothing_of_it_is_left(tmp_path, bucket):
    with pytest.raises(RuntimeError):
        with held(str(tmp_path / "a" / "b")):
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    with held(str(tmp_path / "run")):
        (tmp_path / "run" / "metrics.jsonl").touch()
        bucket.put("run/metrics.jsonl", "")
        with held(f"{bucket.url}/run/"):
            assert RUNNING in os.listdir(tmp_path / "run")
            assert f"run/{RUNNING}" in bucket.names()
    assert os.listdir(tmp_path / "run") == ["metrics.jsonl"]
    assert bucket.names() == ["run/metrics.jsonl"]


def test_spelt_in_another_way_it_is_the_same(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    with held("run"):
        for spelling in ("./run/", str(tmp_path / "run"), "link", "run/../run"):
            with pytest.raises(UserError, match="a run is going on there"):
                with held(spelling):
                    pass


def test_of_many_that_begin_at_once_one_has_it(workdir):
    """And each that was refused may begin again."""
    inside, had = [], []

    def begin(seed):
        pause = random.Random(seed)
        for _ in range(5):
            try:
                with held(workdir):
                    inside.append(seed)
                    had.append(list(inside))
                    time.sleep(0.01 * pause.random())
                    inside.remove(seed)
            except UserError:
                pass
            time.sleep(0.02 * pause.random())

    threads = [threading.Thread(target=begin, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert had and all(len(there) == 1 for there in had)


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(workdir_lock, "BEAT_SECONDS", 0.3)
    monkeypatch.setattr(workdir_lock, "LEASE_SECONDS", 2.0)


def as_of_another_machine(bucket):
    content = json.loads(bucket.get(f"run/{RUNNING}"))
    bucket.put(f"run/{RUNNING}", json.dumps(content | {"machine": "another", "host": "pod-7"}))


def test_a_workdir_that_is_moved_away_is_another(tmp_path):
    """The run that goes on in it removes no name of the one that was begun in its place."""
    run, moved = str(tmp_path / "run"), str(tmp_path / "moved")
    with contextlib.ExitStack() as first:
        first.enter_context(held(run))
        os.rename(run, moved)
        with held(run):
            first.close()
            with pytest.raises(UserError, match="a run is going on there"):
                with held(run):
                    pass


def test_without_the_right_to_give_signs_of_life_there_is_no_run(bucket, cloud):
    cloud.forbidden = {"storage.objects.update"}
    with pytest.raises(UserError, match="cannot be written .*does not have storage.objects.update"):
        with held(f"{bucket.url}/run"):
            pass
    assert bucket.names() == []


def test_in_a_bucket_a_process_that_nobody_waited_for_is_dead(bucket):
    process, said = holder(f"{bucket.url}/run")
    assert said == "held"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    with held(f"{bucket.url}/run"):
        pass
    process.wait()


def test_in_a_bucket_another_machine_that_lives_is_seen_to(bucket, soon, monkeypatch, caplog):
    url = f"{bucket.url}/run"
    with held(url):
        monkeypatch.setattr(workdir_lock, "_machine", lambda: "another")
        with pytest.raises(UserError, match="a run is going on there"):
            with held(url):
                pass
    assert "if it gives no sign of life for 2 s, this one goes on" in caplog.text


def test_in_a_bucket_another_machine_that_is_gone_is_waited_for(bucket, soon, caplog):
    url = f"{bucket.url}/run"
    kill(holder(url)[0])
    as_of_another_machine(bucket)
    with held(url):
        assert json.loads(bucket.get(f"run/{RUNNING}"))["pid"] == os.getpid()
    assert "its run (pod-7) is no more: going on" in caplog.text
    bucket.put(f"run/{RUNNING}", "no JSON")
    with held(url):
        pass


TWO = """
import sys
from fot_jax.training import cluster, workdir_lock
cluster.join()
workdir_lock.LEASE_SECONDS = 4.0
with workdir_lock.held(sys.argv[1]):
    print("held")
cluster.finish()
"""


@pytest.mark.slow
def test_all_processes_of_a_run_wait_for_a_machine_that_is_gone(bucket):
    url = f"{bucket.url}/run"
    kill(holder(url)[0])
    as_of_another_machine(bucket)
    codes, said = together.ended(together.start(["-c", TWO, url], 2))
    assert codes == [0, 0] and all("held" in output for output, _ in said), said


def test_a_run_that_was_taken_for_dead_ends_itself(bucket, soon, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(workdir_lock.os, "_exit", lambda code: ended.set())
    with held(f"{bucket.url}/run"):
        bucket.put(f"run/{RUNNING}", "{}")  # another generation
        assert ended.wait(10)


@pytest.mark.slow
def test_runs_of_one_workdir(tmp_path):
    """Two at once, and one later: one goes on, others are refused, the files are as of it alone."""
    experiment, processes = runs.write(tmp_path, LONG), []
    for later in (0.0, 0.0, 4.0):
        time.sleep(later)
        processes.append(runs.start(runs.arguments(experiment, tmp_path / "run")))
    said = [(process.communicate()[1], process.returncode) for process in processes]
    codes = [code for _, code in said]
    assert 0 in codes and set(codes) <= {0, 2}  # 0 of others, too, where one had ended before
    for error, code in said:
        if code == 2:
            assert error.splitlines()[-1].startswith(f"fot: error: {tmp_path / 'run'}: a run is")
            assert "Traceback" not in error
    assert [row["step"] for row in runs.training_curve(tmp_path / "run")] == [*range(1, 61)]
    assert runs.steps_saved(tmp_path / "run") == [56, 60]
    assert RUNNING not in os.listdir(tmp_path / "run")

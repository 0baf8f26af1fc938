"""`recover` against a fake cloud that delays, preempts, loses workers; and its decisions alone."""

import collections
import itertools
import time
from argparse import Namespace
from types import SimpleNamespace
from unittest import mock

import pytest
from clouds import POD, WORKDIR

from fot_jax.common.errors import UserError
from tpu import recover
from tpu.gcloud import Pod
from tpu.recover import Step

RECOVER = (*POD, *WORKDIR, "--spot", "--poll", "0.3")


@pytest.mark.slow
def test_through_delays_and_preemption_to_the_end(cloud):
    queue = ["ACCEPTED", "WAITING_FOR_RESOURCES", "SOMETHING_NEW", "PROVISIONING"]
    cloud.plan(
        [*queue, "ACTIVE until 2", "ACTIVE", "SUSPENDING", "SUSPENDED"],
        ["WAITING_FOR_RESOURCES", "ACTIVE CREATING", "ACTIVE"],
    )
    cloud.train(steps=5, hold={"1": 2})
    out = cloud.works("recover", cloud.experiment, *RECOVER)
    told = [line.partition(": ")[2] for line in out.splitlines()]
    told = [line for line in told if "starting" not in line and " waiting" not in line]  # if seen
    assert told[:8] == [
        "no queued resource: create",
        *(f"{state}: wait" for state in queue),
        "ACTIVE, workers: 2 none: start",
        "ACTIVE, workers: 2 running: wait",
        "SUSPENDING: wait",
    ]
    assert told[8:13] == [
        "SUSPENDED: delete",
        "no queued resource: create",
        "WAITING_FOR_RESOURCES: wait",
        "ACTIVE, node pod CREATING: wait",
        "ACTIVE, workers: 2 none: start",
    ]
    assert told[-2] == "ACTIVE, workers: 2 finished: end"
    assert [len(cloud.calls(verb)) for verb in ("create", "delete")] == [2, 1]
    assert cloud.calls("delete")[0][5:] == [
        *("--force", "--zone=us-central2-b", "--project=project", "--quiet")
    ]
    assert [len(cloud.starts(worker)) for worker in (0, 1)] == [2, 2]
    assert cloud.checkpoints() == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_nodes_that_are_gone_are_made_anew(cloud):
    """In whatever way, one after another."""
    lives = ("ACTIVE PREEMPTED", "ACTIVE TERMINATED", "ACTIVE gone", "FAILED")
    cloud.plan(*([life] for life in lives), ["DELETING", "gone"], ["ACTIVE"])
    out = cloud.works("recover", cloud.experiment, *POD, *WORKDIR, "--spot", "--poll", "0.05")
    assert len(cloud.calls("create")) == 6 and len(cloud.calls("delete")) == 4
    for seen in ("node pod PREEMPTED", "node pod TERMINATED", "0 of 1 nodes there"):
        assert out.count(f": ACTIVE, {seen}: delete\n") == 1
    assert out.count(": FAILED, no more capacity: delete\n") == 1
    assert ": DELETING: wait" in out
    assert cloud.checkpoints() == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_killed_and_started_again_it_picks_up_where_things_are(cloud):
    cloud.plan(["PROVISIONING", "PROVISIONING", "ACTIVE"])
    cloud.train(steps=5, hold={"1": 3})
    for seen in ("PROVISIONING: wait", "workers: 2 none: start", "2 running: wait"):
        recovering = cloud.start("recover", cloud.experiment, *RECOVER)
        assert any(seen in line for line in recovering.stdout)
        recovering.kill()
        recovering.wait()
    recovering = cloud.start("recover", cloud.experiment, *RECOVER)
    assert any("2 running: wait" in line for line in recovering.stdout)
    cloud.train(steps=5)
    cloud.end()
    rest = recovering.stdout.read()
    assert recovering.wait() == 0
    assert "lost: wait" in rest and "lost: start" in rest
    assert len(cloud.calls("create")) == 1
    assert [len(cloud.starts(worker)) for worker in (0, 1)] == [2, 2]


@pytest.mark.slow
def test_a_failure_is_shown_and_the_run_started_again(cloud):
    cloud.train(steps=5, fail={"1": [3]})
    out = cloud.works("recover", cloud.experiment, *RECOVER)
    assert out.count("Traceback (most recent call last)") == 1
    assert "RuntimeError: worker 1 broke at step 3" in out
    assert len(cloud.starts(1)) == 2
    assert cloud.checkpoints() == [1, 2, 3, 4, 5]
    more = (*RECOVER, "--gin", "train.log_every = 9")
    for last in ("finished another run: start", "finished: end"):
        assert f"ACTIVE, workers: 2 {last}" in cloud.works("recover", cloud.experiment, *more)
        assert len(cloud.starts(1)) == 3


@pytest.mark.slow
def test_too_many_failures_without_progress(cloud):
    cloud.train(steps=5, fail={"0": [3] * 10})
    code, out, _ = cloud.tpu("recover", cloud.experiment, *RECOVER)
    assert code == 1
    assert out.count("RuntimeError: worker 0 broke at step 3") == 3
    *_, given_up, billed = out.splitlines()
    assert given_up.endswith("given up after 3 failures without a new checkpoint")
    assert "billed" in billed and billed.endswith(f"python -m tpu delete {' '.join(POD)}")
    assert len(cloud.starts(0)) == 3
    assert not cloud.calls("delete")
    cloud.train(steps=5)
    out = cloud.works("recover", cloud.experiment, *RECOVER, "--max_failures", "1")
    assert "RuntimeError: worker 0 broke at step 3" in out


@pytest.mark.slow
def test_failures_with_progress_are_not_counted_together(cloud):
    cloud.train(steps=5, fail={"0": [3, 3, 5, 5]})
    out = cloud.works("recover", cloud.experiment, *RECOVER)
    assert out.count("Traceback (most recent call last)") == 4
    assert len(cloud.starts(0)) == 5


NO_QUOTA = "Quota limit for spot chips has been exceeded. Limit: 0 in zone."


@pytest.mark.slow
@pytest.mark.parametrize(
    "at, refused",
    [
        ("create", NO_QUOTA),
        ("create", "PERMISSION_DENIED: tpu.nodes.create"),
        ("FAILED", NO_QUOTA),
        ("FAILED", "Bad network"),
    ],
)
def test_requests_that_are_refused_are_given_up(cloud, at, refused):
    """A quota of 0, say: creating is accepted, and the request FAILED later."""
    how = {"create": [refused]} if at == "create" else {"failure": refused}
    cloud.plan(["WAITING_FOR_RESOURCES", "FAILED"], **how)
    code, out, _ = cloud.tpu("recover", cloud.experiment, *POD, *WORKDIR, "--poll", "0.05")
    assert code == 1
    deleted = 0 if at == "create" else 2
    assert [len(cloud.calls(verb)) for verb in ("create", "delete")] == [3, deleted]
    *_, given_up, _ = out.splitlines()
    assert "given up after 3 requests in a row that failed: " in given_up
    assert given_up.endswith(refused)


@pytest.mark.slow
def test_what_passes_by_itself_is_waited_for(cloud):
    """More often than --max_failures; requests that are refused count anew once there was a pod."""
    busy = ["UNAVAILABLE: 503", "connection reset", "ALREADY_EXISTS: pod", "INTERNAL: try again"]
    cloud.plan(
        *[["FAILED"]] * 4,
        ["ACTIVE", "ACTIVE until 2", "SUSPENDED"],
        ["ACTIVE"],
        create=[NO_QUOTA, NO_QUOTA, *busy, "", "", "", "", "", NO_QUOTA, NO_QUOTA, ""],
    )
    cloud.train(steps=5, hold={"5": 2})
    out = cloud.works("recover", cloud.experiment, *POD, *WORKDIR, "--poll", "0.02")
    assert len(cloud.calls("create")) == 14
    assert out.count("request 1 of 3 failed") == out.count("request 2 of 3 failed") == 2


@pytest.mark.slow
def test_a_start_that_fails_on_a_pod_about_to_be_preempted_is_no_failure(cloud):
    cloud.plan(*[["ACTIVE", "SUSPENDED"]] * 4, ["ACTIVE"], drops=["fine", *["before"] * 4] * 4)
    out = cloud.works("recover", cloud.experiment, *POD, *WORKDIR, "--spot", "--poll", "0.02")
    assert out.count("Connection refused") == out.count("SUSPENDED: delete") == 4
    assert cloud.checkpoints() == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_starts_that_fail_on_a_pod_that_is_there_are_given_up(cloud):
    (cloud.directory / "no_space").touch()
    code, out, _ = cloud.tpu("recover", cloud.experiment, *POD, *WORKDIR, "--poll", "0.02")
    assert code == 1 and out.count("no space left") == 3
    assert out.splitlines()[-2].endswith("given up after 3 failures without a new checkpoint")


def watch(monkeypatch, look, call=lambda *_: "", most=3):
    """The exit code of a watch in a made-up cloud, whose clock moves by sleeping alone."""
    clock = [0.0]

    def sleep(seconds):
        clock[0] += seconds

    made_up = SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0], strftime=time.strftime)
    monkeypatch.setattr(recover, "time", made_up)
    monkeypatch.setattr(recover, "_look", lambda *_: look(clock[0]))
    monkeypatch.setattr(recover.process, "call", lambda argv, *_: call(argv[4], clock[0]))
    args = Namespace(workdir="gs://b/run", max_failures=most, poll=1.0)
    create, slices = ["", "", "", "", "create"], SimpleNamespace(workers=1)
    return recover._until_done(Pod("pod", "zone"), slices, None, create, None, "", args)


def test_pods_that_were_asked_for_are_looked_at_soon(monkeypatch):
    """They are billed. It is the next request that comes later each time."""
    lives, there, times = iter(["FAILED"] * 4 + ["", "ACTIVE"]), [""], collections.defaultdict(list)

    def call(verb, now):
        times[verb].append(now)
        if verb in ("create", "delete"):
            there[0] = next(lives) if verb == "create" else ""
        if verb == "create" and there[0] != "FAILED":  # whether there is a pod now or not
            raise UserError("not done after 3600 seconds")
        return ""

    def look(now):
        times["look"].append(now)
        why = {"error": {"message": "no more capacity"}}
        found = {"state": {"state": there[0], "failedData": why}} if there[0] else None
        return Step("end", "") if there[0] == "ACTIVE" else recover.step_of_request(found)

    assert watch(monkeypatch, look, call) == 0
    assert {then + 1 for then in times["create"]} <= set(times["look"])
    between = [after - before for before, after in itertools.pairwise(times["create"])]
    assert between == [1 + 2, 1 + 4, 1 + 8, 1 + 16, 32]


def test_a_failure_from_before_the_watch_is_shown_and_not_counted(monkeypatch, capsys):
    """Even where it takes two looks to act on it."""
    monkeypatch.setattr(recover, "ssh", mock.Mock())
    told = {"worker": 0, "host": "a", "code": 1, "traceback": ""}
    old, new = ({**told, "why": f"broke {when}", "ended": when} for when in (1.0, 2.0))
    silent = Step("start", "one silent", if_still=True, failed=old, running=True)
    goes_on = Step("wait", "running", running=True)
    steps = iter([silent, silent, goes_on, Step("start", "failed", failed=new, running=True)])
    assert watch(monkeypatch, lambda _: next(steps), most=1) == 1
    out = capsys.readouterr().out
    assert [out.count(f"broke {when}") for when in (1.0, 2.0)] == [1, 1]


def test_pods_are_asked_for_ever_more_seldom_without_progress(monkeypatch):
    saved = "gs://b/run/checkpoints/3/commit_success.txt"
    listed = iter(["", saved, saved])
    monkeypatch.setattr(recover.process, "call", lambda *_: next(listed))
    failures = recover._Failures(Pod("pod", "zone"), "gs://b/run", 100, -1)
    patience = [failures.patience()]
    for _ in range(7):
        failures.of_requests("no quota", True)
        patience.append(failures.patience())
    assert patience == [1, 2, 4, 8, 16, 32, 32, 32]
    failures.requests = 0
    for wanted in (2, 1, 2):  # nothing new, a checkpoint, nothing new
        failures.of_requests("preempted", False)
        assert failures.patience() == wanted


def test_a_new_checkpoint_counts_for_failures_and_preemptions(monkeypatch):
    """Whichever of them comes first after it."""
    saved = (f"gs://b/run/checkpoints/{step}/commit_success.txt" for step in itertools.count())
    newest = ["gs://b/run/checkpoints/0/commit_success.txt"]
    monkeypatch.setattr(recover.process, "call", lambda *_: newest[0])
    failures = recover._Failures(Pod("pod", "zone"), "gs://b/run", 3, 0)
    for _ in range(9):
        assert not failures.of_the_run()
        newest[0] = next(saved)
        assert not failures.of_requests("preempted", False)
        newest[0] = next(saved)
    assert [failures.of_the_run() for _ in range(3)] == [False, False, True]


STATES = {
    "none": {},
    "running": {},
    "lost": {},
    "finished": {},
    "this": {"state": "finished", "asked": "this"},
    "that": {"state": "finished", "asked": "that"},
    "stopped": {},
    "failed": {"ended": 2.0},
    "first": {"state": "failed", "ended": 1.0},
}


@pytest.mark.parametrize(
    "states, do, if_still, failed",
    [
        ("none none", "start", False, None),
        ("running none", "start", False, None),
        ("running running", "wait", False, None),
        ("running failed", "wait", False, 1),
        ("running lost", "wait", False, None),
        ("running", "wait", False, None),
        ("finished finished", "end", False, None),
        ("finished", "end", False, None),
        ("this this", "end", False, None),
        ("that that", "start", False, None),
        ("that", "start", True, None),
        ("failed first", "start", False, 1),
        ("first failed", "start", False, 0),
        ("failed lost", "start", True, 0),
        ("failed", "start", True, 0),
        ("lost lost", "start", True, None),
        ("stopped stopped", "start", True, None),
        ("", "start", True, None),
    ],
)
def test_steps_of_runs(states, do, if_still, failed):
    answers = [
        {"worker": i, "state": state, **STATES[state]} for i, state in enumerate(states.split())
    ]
    step = recover.step_of_runs(answers, 2, "this")
    assert (step.do, step.if_still) == (do, if_still)
    if do == "start":
        assert (step.failed and step.failed["worker"]) == failed

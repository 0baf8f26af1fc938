"""`recover`: brings a run to its end, through preemptions, lost workers and dropped connections.

A state machine whose state is in the cloud: each turn asks for the queued resource and for the
runs of its workers, and takes one step. So it may be killed anywhere, and started again.

    queued resource     nodes, runs                                   step
    none                                                              create
    SUSPENDED, FAILED                                                 delete
    ACTIVE              a node is preempted, terminated, or gone      delete
    ACTIVE              nodes ready, a worker without a run           set up and start
    ACTIVE              nodes ready, all running                      wait
    ACTIVE              nodes ready, the run failed                   show why, set up and start
    ACTIVE              nodes ready, a worker lost, or run stopped    the same, if still so a turn
                                                                      later
    ACTIVE              nodes ready, finished                         end; start, if it was a run
                                                                      of something else
    all others                                                        wait
"""

from __future__ import annotations

import dataclasses
import re
import time
from argparse import Namespace

from fot_jax.common.errors import UserError
from tpu import gcloud, process, ship, ssh, targets, verbs
from tpu.gcloud import Argv, Pod

_GONE = ("PREEMPTED", "TERMINATED", "STOPPED", "DELETING", "HIDDEN")
_GOING_ON = ("starting", "waiting", "running")


@dataclasses.dataclass(frozen=True)
class Step:
    """What is to be done next.

    Attributes:
      do: create, delete, start, wait or end.
      why: what was seen.
      if_still: only when the turn before wanted it too: what was seen may be passing, or the first
        sign of something else.
      failed: the answer of the worker that ended the run.
      refused: the request FAILED, and not for want of capacity: asking again may not help.
      running: all nodes are there.
      denied: the account may not even look.
    """

    do: str
    why: str
    if_still: bool = False
    failed: dict | None = None
    refused: bool = False
    running: bool = False
    denied: bool = False


def recover(args: Namespace) -> int:
    """Creates, waits, sets up, starts, watches, deletes and creates again until the run is done.

    Returns 0 when it has finished, 1 after --max_failures failures (see _Failures).

    Raises:
      UserError: flags that cannot be, no login, or the pod of this name is another slice.
    """
    pod = targets.pod_of(args.name, args.zone, args.project)
    slices = targets.one_slice_of(args.experiment, args.gin, args.topology)
    code = ship.pack(args.experiment)
    create = gcloud.create(pod, slices.topology, slices.count, args.tier)
    start = verbs.start_command(pod, code, args)
    asked = ssh.asked(code, args.env, verbs.training_arguments(code, args))
    if args.dry_run:
        process.print_commands(_without_trouble(pod, code, create, start))
        return 0

    if args.tier == "spot" and not args.workdir.startswith("gs://"):
        _say(pod, f"{args.workdir} is lost with a spot pod, unless machines share it: use gs://…")
    verbs.look_for(pod, slices)  # a missing login, say, does not go away by waiting
    try:
        return _until_done(pod, slices, code, create, start, asked, args)
    except KeyboardInterrupt:
        _say(pod, "watched no more: the same command goes on where things are")
        raise
    finally:
        _say_billed(pod)


def _until_done(
    pod: Pod,
    slices: targets.Slices,
    code: ship.Code,
    create: Argv,
    start: Argv,
    asked: str,
    args: Namespace,
) -> int:
    """Turn after turn; the exit code."""
    newest = _newest_checkpoint(pod, args.workdir)
    failures = _Failures(pod, args.workdir, args.max_failures, newest)
    before, said, shown, unstarted = Step("wait", ""), None, None, False
    watched = False  # what failed before does not count
    next_request = 0.0  # not before this time
    while True:
        step = _look(pod, slices, asked)
        acts = not step.if_still or before.if_still and before.do == step.do
        if step.do == "create":
            acts = time.monotonic() >= next_request
        line = f"{step.why}: {step.do if acts else 'wait'}"
        if line != said:
            _say(pod, line)
        if step.do == "end":
            return 0
        if step.running:
            failures.requests = 0
        if acts and step.do == "start":
            failed = unstarted
            if step.failed and step.failed["ended"] != shown:
                shown, failed = step.failed["ended"], watched
                _say(pod, verbs.failure(step.failed))
            if failed and failures.of_the_run():
                return 1
        if acts and (step.do != "wait" or step.running):
            unstarted, watched = False, True
        try:
            if acts and step.do == "create":
                process.call(create)
                failures.requested_a_pod()
            elif acts and step.do == "delete":
                # Before it is deleted, so that giving up leaves it for its owner to look at. (What
                # was there before this watch is none of its failures.)
                if said is not None and failures.of_requests(step.why, step.refused):
                    return 1
                process.call(gcloud.delete(pod))
            elif acts and step.do == "start":
                ssh.set_up(pod, code, slices.workers)
                ssh.start(start, slices.workers)
            elif step.denied and failures.of_requests(step.why, True):
                return 1
        except UserError as error:
            if step.do == "start":
                # A failure of the run if it is to be started on these nodes again. They may be
                # about to go: that is preemption.
                unstarted = True
                _say(pod, str(error))
            else:
                done = "ALREADY_EXISTS" if step.do == "create" else "NOT_FOUND"
                counts = done not in str(error) and not _passes(str(error))
                if failures.of_requests(str(error), counts):
                    return 1
        before, said = step, line
        pause = args.poll * failures.patience()
        if acts and step.do == "create":
            # Not slept through: the pod may be there soon, even if the answer says otherwise.
            next_request = time.monotonic() + pause
        time.sleep(pause if step.denied or acts and step.do == "delete" else args.poll)


def _without_trouble(pod: Pod, code: ship.Code, create: Argv, start: Argv) -> list[Argv]:
    """The commands of a run without trouble; those that look at it would repeat."""
    look = [gcloud.describe(pod), gcloud.nodes(pod), ssh.status_command(pod)]
    return [gcloud.describe(pod), create, *look, *ssh.setup_commands(pod, code), start, *look]


# --- What is next --------------------------------------------------------------------------------


def _look(pod: Pod, slices: targets.Slices, asked: str) -> Step:
    """The next step of a pod, from what Google Cloud and the workers say now."""
    try:
        found = verbs.look_for(pod, slices)
        if found is None or verbs.state_of(found) != "ACTIVE":
            return step_of_request(found)
        step = step_of_nodes(verbs.nodes_of(pod), slices.count)
        if step is not None:
            return step
    except process.CallFailed as error:  # the network, or Google's servers: they come back
        denied = re.search("PERMISSION_DENIED|UNAUTHENTICATED", str(error)) is not None
        return Step("wait", f"unknown: {error}", denied=denied)
    try:
        status = ssh.status_command(pod)
        answers = ssh.ask(status, slices.workers, process.SHORT)
    except process.CallFailed as error:
        return Step("start", f"ACTIVE, no worker answers: {error}", if_still=True)
    return dataclasses.replace(step_of_runs(answers, slices.workers, asked), running=True)


def step_of_request(found: dict | None) -> Step:
    """The step for a queued resource that is not ACTIVE; None: there is none."""
    if found is None:
        return Step("create", "no queued resource")
    state = verbs.state_of(found)
    why = f"{state}, {verbs.message_of(found)}" if verbs.message_of(found) else state
    do = "delete" if state in ("SUSPENDED", "FAILED") else "wait"
    return Step(do, why, refused=state == "FAILED" and not _passes(why))


# What people wait for, and what of Google's servers and the network between comes back by itself.
_PASSES = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|INTERNAL|HTTPError 5"
    "|(?i:no more capacity|not enough (capacity|resources)|stockout)"
    "|(?i:not done after|timed out|timeout|connection|network is unreachable|could not resolve)"
)


def _passes(why: str) -> bool:
    """Whether what a request was refused for goes away by waiting."""
    return _PASSES.search(why) is not None and "quota" not in why.lower()


def step_of_nodes(nodes: list[dict], slices: int) -> Step | None:
    """The step for an ACTIVE queued resource by its nodes; None: all are ready."""
    states = {verbs.node_id(node): node.get("state", "") for node in nodes}
    gone = [f"{name} {state}" for name, state in states.items() if state in _GONE]
    if gone:
        return Step("delete", f"ACTIVE, node {', '.join(gone)}")
    if len(nodes) < slices:
        return Step("delete", f"ACTIVE, {len(nodes)} of {slices} nodes there", if_still=True)
    unready = [f"{name} {state}" for name, state in states.items() if state != "READY"]
    return Step("wait", f"ACTIVE, node {', '.join(unready)}") if unready else None


def step_of_runs(answers: list[dict], expected: int, asked: str) -> Step:
    """The step for nodes that are ready, by the states of their workers' runs.

    Args:
      asked: what the run is to do: one that has finished something else does not count.
    """
    by_state = {}
    for answer in answers:
        others = answer["state"] == "finished" and answer.get("asked", asked) != asked
        state = "finished another run" if others else answer["state"]
        by_state.setdefault(state, []).append(str(answer["worker"]))
    going_on = sum(len(by_state.get(state, ())) for state in _GOING_ON)
    counts = ", ".join(f"{len(by_state[state])} {state}" for state in sorted(by_state))
    why = f"ACTIVE, workers: {counts or 'no answer'}"
    if len(answers) < expected:
        why += f", {expected - len(answers)} silent"
    failed = verbs.first_failed(answers)
    lost = len(answers) < expected or "lost" in by_state or "stopped" in by_state
    if going_on:
        return Step("start" if "none" in by_state and not failed else "wait", why)
    if "finished" in by_state and not failed and "lost" not in by_state:
        return Step("end", why)  # workers finish together
    return Step("start", why, if_still=lost, failed=failed)


# --- Failures ------------------------------------------------------------------------------------


_MOST_PATIENCE = 32  # times --poll


@dataclasses.dataclass
class _Failures:
    """What has failed without anything having come of it since; when to wait longer, and give up.

    Runs that end with an error, or cannot be started, count from the last checkpoint that was new
    or, where checkpoints cannot be seen, from the last new pod. Requests that Google Cloud refuses
    or that FAIL (no quota, no such network, an account without rights) count from the last pod
    whose workers answered. Preemption and want of capacity do not end the watch, however often:
    they are what it is for. But each in a row without a new checkpoint, as each request that fails,
    doubles the time until the next is asked for.

    Attributes:
      workdir: of the run; progress is only seen in a bucket.
      most: when to give up.
      checkpoint: the newest that is known.
    """

    pod: Pod
    workdir: str
    most: int
    checkpoint: int
    runs: int = 0
    requests: int = 0
    lost: int = 0

    def of_the_run(self) -> bool:
        """Counts a failure; says whether to give up."""
        self._forget_if_progress()
        self.runs += 1
        if self.runs >= self.most:
            _say(self.pod, f"given up after {self.runs} failures without a new checkpoint")
        return self.runs >= self.most

    def of_requests(self, why: str, counts: bool) -> bool:
        """Takes in that there is no pod for a request, or no longer; says whether to give up.

        Args:
          counts: False for preemption and the like.
        """
        if not counts:
            if not self._forget_if_progress():
                self.lost += 1
            return False
        self.requests += 1
        if self.requests >= self.most:
            _say(self.pod, f"given up after {self.requests} requests in a row that failed: {why}")
        else:
            _say(self.pod, f"request {self.requests} of {self.most} failed: {why}")
        return self.requests >= self.most

    def requested_a_pod(self) -> None:
        if not self.workdir.startswith("gs://"):
            self.runs = 0

    def patience(self) -> int:
        """How many times --poll to wait before the next pod."""
        return min(2 ** max(self.requests, self.lost), _MOST_PATIENCE)

    def _forget_if_progress(self) -> bool:
        """Whether there is a newer checkpoint than when last asked: then counting begins anew."""
        newest = _newest_checkpoint(self.pod, self.workdir)
        if newest <= self.checkpoint:
            return False
        self.checkpoint, self.runs, self.lost = newest, 0, 0
        return True


def _newest_checkpoint(pod: Pod, workdir: str) -> int:
    """Its step; -1 where none is known."""
    if not workdir.startswith("gs://"):
        return -1
    try:
        listed = process.call(gcloud.list_checkpoints(pod, workdir), process.SHORT)
    except process.CallFailed:
        return -1
    steps = re.findall(r"/checkpoints/(\d+)/commit_success.txt$", listed, re.MULTILINE)
    return max(map(int, steps), default=-1)


def _say_billed(pod: Pod) -> None:
    _say(pod, f"is billed for as long as it is there: {verbs.delete_line(pod)}")


def _say(pod: Pod, what: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {pod.name}: {what}", flush=True)

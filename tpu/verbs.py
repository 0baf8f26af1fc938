"""The verbs of `python -m tpu` that a person calls one by one; recover.py calls them in order."""

from __future__ import annotations

import json
import re
import time
from argparse import Namespace

from fot_jax.common.errors import UserError
from tpu import gcloud, process, ship, ssh, targets
from tpu.gcloud import Pod


def create(args: Namespace) -> int:
    """Asks for the queued resource that the experiment names."""
    pod = targets.pod_of(args.name, args.zone, args.project)
    slices = targets.slices_of(args.experiment, args.gin, args.topology)
    command = gcloud.create(pod, slices.topology, slices.count, args.tier)
    if args.dry_run:
        process.print_commands([command])
        return 0
    try:
        process.call(command)
    except BaseException as error:
        refused = isinstance(error, UserError) and getattr(error, "code", 1) != process.DROPPED
        if not refused:  # stopped, or not done in time: Google Cloud may go on with it
            asked = f"{pod.name} may have been asked for; it is billed once ACTIVE"
            print(f"{asked}: {delete_line(pod)}", flush=True)
        raise
    tier = args.tier or "on demand"
    what = f"{slices.count} x {slices.topology.name}, {tier}"
    print(f"{pod.name}: asked for {what}; it is billed once ACTIVE")
    return 0


def setup(args: Namespace) -> int:
    """Ships the code to every worker and makes its environment there."""
    pod = targets.pod_of(args.name, args.zone, args.project)
    slices = targets.slices_of(args.experiment, args.gin, args.topology)
    code = ship.pack(args.experiment)
    if args.dry_run:
        process.print_commands([gcloud.describe(pod), *ssh.setup_commands(pod, code)])
        return 0
    look_for(pod, slices)
    print(f"{pod.name}: setting up code {code.digest}; the first time takes minutes", flush=True)
    ssh.set_up(pod, code, slices.workers)
    print(f"{pod.name}: {slices.workers} workers are ready")
    return 0


def run(args: Namespace) -> int:
    """Starts training on every worker, detached."""
    pod = targets.pod_of(args.name, args.zone, args.project)
    slices = targets.one_slice_of(args.experiment, args.gin, args.topology)
    code = ship.pack(args.experiment)
    command = start_command(pod, code, args)
    if args.dry_run:
        process.print_commands([gcloud.describe(pod), command])
        return 0
    look_for(pod, slices)
    for answer in ssh.start(command, slices.workers):
        told = {"started": "started", "going on": "a run of this name is going on: left alone"}
        print(f"worker {answer['worker']}: {told[answer['state']]}")
    return 0


def start_command(pod: Pod, code: ship.Code, args: Namespace) -> gcloud.Argv:
    """The command that starts what the flags of `run` say.

    Raises:
      UserError: a flag that cannot be.
    """
    targets.check_workdir(args.workdir)
    targets.check_environment(args.env)
    return ssh.start_command(pod, code, args.env, training_arguments(code, args))


def training_arguments(code: ship.Code, args: Namespace) -> list[str]:
    """Of `fot`, on a worker."""
    bindings = [f"--gin={binding}" for binding in args.gin]
    return ["train", *code.experiments, f"--workdir={args.workdir}", *bindings]


def logs(args: Namespace) -> int:
    """Prints the ends of the workers' logs; a worker that failed first comes first."""
    pod = targets.pod_of(args.name, args.zone, args.project)
    worker = "all" if args.worker is None else str(args.worker)
    ask = ssh.status_command(pod)
    show = ssh.logs_command(pod, worker, args.lines, args.follow)
    if args.dry_run:
        process.print_commands([ask, show])
        return 0
    failed = first_failed(ssh.ask(ask, 1, process.SHORT))
    if failed:
        print(failure(failed), flush=True)  # before what gcloud writes
    return min(process.show(show), 1)


def first_failed(answers: list[dict]) -> dict | None:
    """The worker whose failure ended the run; None where none failed."""
    failed = [each for each in answers if each["state"] == "failed"]
    # By what the workers agreed on; their clocks are the next best.
    key = lambda each: (each.get("failed") != each["worker"], each["ended"] or 0)  # noqa: E731
    return min(failed, key=key, default=None)


def failure(answer: dict) -> str:
    """What there is to say of a worker that failed, its traceback included."""
    why = answer["why"] or f"exit code {answer['code']}"
    return f"worker {answer['worker']} ({answer['host']}) failed: {why}\n{answer['traceback']}\n"


def status(args: Namespace) -> int:
    """Prints the queued resource, its nodes, and every worker's run, as one table."""
    pod = targets.pod_of(args.name, args.zone, args.project)
    commands = [gcloud.describe(pod), gcloud.nodes(pod), ssh.status_command(pod)]
    if args.dry_run:
        process.print_commands(commands)
        return 0
    found = look(pod)
    if found is None:
        raise UserError(f"there is no queued resource {pod.name} in {pod.zone}: create it")
    rows = [("queued resource", pod.name, state_of(found), message_of(found))]
    nodes = nodes_of(pod)
    for node in nodes:
        count = len(node.get("networkEndpoints", ()))
        more = f"{node.get('health', '')} {count} workers".strip()
        rows.append(("node", node_id(node), node.get("state", ""), more))
    if state_of(found) == "ACTIVE":
        expected = sum(len(node.get("networkEndpoints", ())) for node in nodes)
        answers, why = [], "did not answer"
        try:
            answers = ssh.ask(ssh.status_command(pod), expected, process.SHORT)
        except process.CallFailed as error:  # the rest is the more worth knowing
            why = str(error)
        rows += [_row(answer) for answer in answers]
        silent = expected - len(answers)
        more = f"{silent} more" if answers else str(silent)
        rows += [("workers", more, "silent", why)] if silent > 0 else []
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[3]]).rstrip())
    return 0


def _row(answer: dict) -> tuple[str, str, str, str]:
    since = answer.get("ended") or answer.get("started")
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since)) if since else ""
    more = answer.get("why") or answer.get("last") or ""
    name = f"worker {'?' if answer['worker'] is None else answer['worker']}"
    return name, answer["host"], answer["state"], f"{when} {more}".strip()


def delete(args: Namespace) -> int:
    """Deletes the queued resource and all that is on its workers."""
    pod = targets.pod_of(args.name, args.zone, args.project)
    command = gcloud.delete(pod)
    if args.dry_run:
        process.print_commands([command])
        return 0
    process.call(command)
    print(f"{pod.name}: deleted")
    return 0


# --- What Google Cloud says of a pod -------------------------------------------------------------


def look(pod: Pod) -> dict | None:
    """The queued resource as it is now; None where there is none.

    Raises:
      UserError: gcloud fails.
    """
    try:
        return _read(process.call(gcloud.describe(pod), process.SHORT), dict)
    except process.CallFailed as error:
        if "NOT_FOUND" in error.text:
            return None
        raise


def look_for(pod: Pod, slices: targets.Slices) -> dict | None:
    """The same, where it has to have these slices.

    Raises:
      UserError: gcloud fails, or the queued resource is one of other slices.
    """
    found = look(pod)
    wanted = slices.topology.accelerator_type
    for spec in (found or {}).get("tpu", {}).get("nodeSpec", ()):
        kind = (spec.get("node", {}).get("acceleratorType") or wanted).split("/")[-1]
        if kind != wanted:
            raise UserError(
                f"{pod.name} in {pod.zone} is {kind}, not {wanted}: give another --name, or delete "
                f"it: {delete_line(pod)}"
            )
    return found


def delete_line(pod: Pod) -> str:
    """What the user types to delete a pod."""
    project = f" --project {pod.project}" if pod.project else ""
    return f"python -m tpu delete --name {pod.name} --zone {pod.zone}{project}"


def _read(printed: str, kind: type):
    try:
        if isinstance(found := json.loads(printed), kind):
            return found
    except ValueError:
        pass
    raise process.CallFailed(f"gcloud printed no JSON {kind.__name__}", 0, printed, "")


def nodes_of(pod: Pod) -> list[dict]:
    """The TPU nodes of a queued resource that are there now.

    Raises:
      UserError: gcloud fails.
    """
    everything = _read(process.call(gcloud.nodes(pod), process.SHORT), list)
    ours = re.compile(rf"{re.escape(pod.name)}(-\d+)?")
    return sorted((node for node in everything if _is_of(node, pod, ours)), key=node_id)


def _is_of(node: dict, pod: Pod, name: re.Pattern) -> bool:
    """By the queued resource that it names; by its own name where it names none."""
    of = node.get("queuedResource")
    return of.split("/")[-1] == pod.name if of else bool(name.fullmatch(node_id(node)))


def node_id(node: dict) -> str:
    """The name of a node."""
    return node["name"].split("/")[-1]


def state_of(queued_resource: dict) -> str:
    """Its state: ACTIVE, SUSPENDED, ..."""
    return queued_resource.get("state", {}).get("state", "STATE_UNSPECIFIED")


def message_of(queued_resource: dict) -> str:
    """What Google Cloud says of a failure; "" where nothing."""
    state = queued_resource.get("state", {})
    return state.get("failedData", {}).get("error", {}).get("message", "")

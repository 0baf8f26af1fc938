"""A `gcloud` for tests: queued resources, nodes, ssh, scp and a bucket in a directory.

FAKE_GCLOUD is the directory. `plan.json` in it says what is going to happen:

  lives: for each queued resource created, the states that describing it goes through; the last one
    stays. "ACTIVE PREEMPTED": the state of its node, too; "ACTIVE gone": it has no nodes; "ACTIVE
    until 3": until there is a checkpoint of step 3; "gone": it is not there any more.
  workers: of a slice.
  drops: what happens to the next calls of ssh and scp, one word each: "before" or "after" the
    command has run the connection is lost; "silent": the last worker is not reached, with a warning
    only; "nobody": none of them is; "fine".
  create: errors of creating, one after the other; the last one stays.
  hangs: creating never returns, and sends a signal of this number to what called it; 0: none.
  failure: why a queued resource is FAILED.

`state.json` is what has happened, `calls.jsonl` every command line. Workers are directories,
NAME/NODE/WORKER, which are the homes of what ssh runs there. Buckets are buckets/NAME.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import power

ROOT = Path(os.environ["FAKE_GCLOUD"])


def main(argv):
    with open(ROOT / "calls.jsonl", "a") as calls:
        calls.write(json.dumps(argv) + "\n")
    if argv[:2] == ["storage", "ls"]:
        return storage_ls(argv[2])
    args = parser().parse_args(argv)
    return args.run(args)


def parser():
    top = argparse.ArgumentParser(prog="gcloud", allow_abbrev=False)
    compute = top.add_subparsers(required=True).add_parser("compute").add_subparsers(required=True)
    groups = compute.add_parser("tpus").add_subparsers(required=True)
    queued = groups.add_parser("queued-resources").add_subparsers(required=True)
    nodes = groups.add_parser("tpu-vm").add_subparsers(required=True)

    def verb(group, name, run, *positional, flags=(), values=()):
        added = group.add_parser(name, allow_abbrev=False)
        for each in positional:
            added.add_argument(each)
        for each in ("--quiet", *flags):
            added.add_argument(each, action="store_true")
        for each in ("--zone", "--project", *values):
            added.add_argument(each)
        added.set_defaults(run=run)

    of_creation = ("--accelerator-type", "--runtime-version", "--node-id", "--node-count")
    verb(
        *(queued, "create", create, "name"),
        flags=("--spot", "--reserved"),
        values=(*of_creation, "--node-prefix"),
    )
    verb(queued, "describe", describe, "name", values=("--format",))
    verb(queued, "delete", delete, "name", flags=("--force",))
    there = ("--node", "--worker")
    verb(queued, "ssh", ssh, "name", values=(*there, "--command", "--batch-size"))
    verb(queued, "scp", scp, "source", "destination", values=there)
    verb(nodes, "list", list_nodes, values=("--format",))
    return top


@contextlib.contextmanager
def changing():
    """The plan, and the state, which is written back."""
    with open(ROOT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        plan, path = json.loads((ROOT / "plan.json").read_text()), ROOT / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {"created": 0, "there": {}}
        yield plan, state
        replace(path, state)
        replace(ROOT / "plan.json", plan)


def replace(path, content):
    """Whole at any moment: training and tests read it without the lock."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)


def create(args):
    with changing() as (plan, state):
        if plan.get("create"):
            refused = plan["create"].pop(0) if len(plan["create"]) > 1 else plan["create"][0]
            if refused:
                return error("create", refused)
        if args.name in state["there"]:
            return error("create", "ALREADY_EXISTS: Requested entity already exists")
        lives, state["created"] = plan["lives"], state["created"] + 1
        slices = int(args.node_count or 1)
        ids = [args.node_id] if args.node_id else [f"{args.name}-{i}" for i in range(slices)]
        life = lives[min(state["created"], len(lives)) - 1]
        made = {"life": life, "now": life[0], "nodes": ids, "workers": plan["workers"]}
        made["type"] = args.accelerator_type
        state["there"][args.name] = made
        for home in homes(args.name, state):
            home.mkdir(parents=True)
    if "hangs" in plan:
        os.kill(os.getppid(), plan["hangs"])
        time.sleep(600)
    return 0


def describe(args):
    with changing() as (plan, state):
        there = state["there"].get(args.name)
        now = there and there["life"][0]
        if there:
            there["now"] = now  # what listing the nodes shows, too
        if there and len(there["life"]) > 1 and may_pass(now):
            there["life"] = there["life"][1:]
        if now == "gone" or not there:
            if state["there"].pop(args.name, None):
                power_off(args.name)
                shutil.rmtree(ROOT / args.name)
            resource = f"projects/p/locations/{args.zone}/queuedResources/{args.name}"
            return error("describe", f"NOT_FOUND: Resource '{resource}' was not found")
        if not now.startswith("ACTIVE") or now.endswith(("PREEMPTED", "gone")):
            power_off(args.name)
        shown = {"state": now.split()[0]}
        if shown["state"] == "FAILED":
            shown["failedData"] = {"error": {"code": 8, "message": plan["failure"]}}
        spec = {"nodeSpec": [{"node": {"acceleratorType": there["type"]}}]}
        print(json.dumps({"name": args.name, "state": shown, "tpu": spec}))
    return 0


def may_pass(now):
    _, _, step = now.partition(" until ")
    return not step or any((ROOT / "buckets").glob(f"**/checkpoints/{step}"))


def list_nodes(args):
    with changing() as (_, state):
        shown = [
            {"name": f"projects/p/locations/z/nodes/{id_}", **node_of(there)}
            for there in state["there"].values()
            for id_ in there["nodes"]
            if there["now"] != "ACTIVE gone"
        ]
        somebody_elses = {"name": "projects/p/locations/z/nodes/other", "state": "TERMINATED"}
        print(json.dumps([*shown, somebody_elses]))
    return 0


def node_of(there):
    _, _, state = there["now"].partition(" ")
    state = "READY" if not state or state.startswith("until") else state
    endpoints = [{"ipAddress": f"10.0.0.{i}"} for i in range(there["workers"])]
    return {"state": state, "health": "HEALTHY", "networkEndpoints": endpoints}


def delete(args):
    with changing() as (_, state):
        if state["there"].pop(args.name, None) is None:
            return error("delete", "NOT_FOUND: Resource was not found")
        power_off(args.name)
        shutil.rmtree(ROOT / args.name)
    return 0


def power_off(name):
    """Kills what runs on the workers, and empties them."""
    power.off(ROOT)
    for home in (ROOT / name).glob("*/*"):
        shutil.rmtree(home)
        home.mkdir()


def homes(name, state):
    there = state["there"][name]
    return [ROOT / name / id_ / str(i) for id_ in there["nodes"] for i in range(there["workers"])]


def reached(name, verb, worker):
    """The homes of the workers that a call reaches, and what becomes of its connection."""
    with changing() as (plan, state):
        if name not in state["there"]:
            sys.exit(error(verb, "NOT_FOUND: Resource was not found"))
        what = plan["drops"].pop(0) if plan.get("drops") else "fine"
        everywhere = list(enumerate(homes(name, state)))
    if what == "before":
        print("ssh: connect to host 10.0.0.1 port 22: Connection refused", file=sys.stderr)
        sys.exit(255)
    if what == "nobody":
        print("The SSH key is not in the agent. Please run ssh-add.", file=sys.stderr)
        print("WARNING: Could not prepare all 1 nodes", file=sys.stderr)
        everywhere = []
    if what == "silent":
        print("WARNING: Could not prepare all 2 nodes", file=sys.stderr)
        everywhere.pop()
    return [(i, home) for i, home in everywhere if worker in ("all", home.name)], what


def ssh(args):
    assert args.node == "all"
    to, what = reached(args.name, "ssh", args.worker)
    addresses = (ROOT / "addresses").read_text()
    running = []
    for index, home in to:
        environment = {"HOME": str(home), "FOT_WORKER": str(index), "FOT_WORKERS": addresses}
        command = ["bash", "-c", args.command]
        running.append(subprocess.Popen(command, cwd=home, env={**os.environ, **environment}))
        if args.batch_size == "1":
            running[-1].wait()
    codes = [process.wait() for process in running]
    if len(to) > 1:
        for (index, _), code in zip(to, codes, strict=True):
            if code:
                said = f"Command execution on worker {index} failed with exit status {code}."
                print(f"##### {said} Continuing.", file=sys.stderr)
    return 255 if what == "after" else max(codes)


def scp(args):
    name, _, destination = args.destination.partition(":")
    to, what = reached(name, "scp", args.worker)
    for _, home in to:
        shutil.copyfile(args.source, home / destination)
    return 255 if what == "after" else 0


def storage_ls(url):
    found = list((ROOT / "buckets").glob(url.removeprefix("gs://")))
    if not found:
        print("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.", file=sys.stderr)
        return 1
    print("\n".join(f"gs://{each.relative_to(ROOT / 'buckets')}" for each in found))
    return 0


def error(verb, text):
    print(f"ERROR: (gcloud.compute.tpus.queued-resources.{verb}) {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

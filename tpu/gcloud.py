"""Command lines of gcloud: one pure function each, and no other place that knows its flags.

Flags and values are one word (--zone=Z), so that no value is taken for a flag.
"""

from __future__ import annotations

import dataclasses

from fot_jax.common.topologies import Topology

Argv = list[str]


@dataclasses.dataclass(frozen=True)
class Pod:
    """A queued resource: one slice, or several, asked for together.

    Attributes:
      name: of the queued resource, its only node, and its runs.
      zone: of Google Cloud.
      project: None: the one that gcloud is configured for.
    """

    name: str
    zone: str
    project: str | None = None


def create(pod: Pod, topology: Topology, slices: int, tier: str | None) -> Argv:
    """Asks for slices.

    Args:
      tier: "spot", "reserved", or None: on demand.
    """
    if slices == 1:
        nodes = [f"--node-id={pod.name}"]
    else:
        nodes = [f"--node-count={slices}", f"--node-prefix={pod.name}"]
    return [
        *_queued_resources("create", pod.name),
        *nodes,
        f"--accelerator-type={topology.accelerator_type}",
        f"--runtime-version={topology.chip.runtime_version}",
        *([f"--{tier}"] if tier else []),
        *_where(pod),
    ]


def describe(pod: Pod) -> Argv:
    """The queued resource as JSON."""
    return [*_queued_resources("describe", pod.name), *_where(pod), "--format=json"]


def nodes(pod: Pod) -> Argv:
    """All TPU nodes of the zone as JSON: those of the pod are among them, however many it has."""
    return ["gcloud", "compute", "tpus", "tpu-vm", "list", *_where(pod), "--format=json"]


def delete(pod: Pod) -> Argv:
    """Deletes the queued resource with its nodes, in whatever state they are."""
    return [*_queued_resources("delete", pod.name), "--force", *_where(pod)]


def ssh(pod: Pod, command: str, worker: str = "all", in_turn: bool = False) -> Argv:
    """A shell command on workers.

    `queued-resources ssh` and not `tpu-vm ssh`, because it reaches the workers of all slices, and
    can take one after the other. (--output-directory, which would keep their outputs apart, writes
    to a directory called None in SDK 528.)

    Args:
      worker: index within each slice, or all.
      in_turn: one worker at a time, so that long outputs do not mix.
    """
    return [
        *_queued_resources("ssh", pod.name),
        "--node=all",
        f"--worker={worker}",
        *(["--batch-size=1"] if in_turn else []),
        f"--command={command}",
        *_where(pod),
    ]


def scp(pod: Pod, source: str, destination: str) -> Argv:
    """Copies a file of this machine to every worker; the destination is relative to the home."""
    there = f"{pod.name}:{destination}"
    return [*_queued_resources("scp", source, there), "--node=all", "--worker=all", *_where(pod)]


def list_checkpoints(pod: Pod, workdir: str) -> Argv:
    """The marks of finished checkpoints in a bucket, one a line."""
    marks = f"{workdir.rstrip('/')}/checkpoints/*/commit_success.txt"
    project = [f"--project={pod.project}"] if pod.project else []
    return ["gcloud", "storage", "ls", marks, *project, "--quiet"]


def _queued_resources(verb: str, *names: str) -> Argv:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, *names]


def _where(pod: Pod) -> Argv:
    project = [f"--project={pod.project}"] if pod.project else []
    return [f"--zone={pod.zone}", *project, "--quiet"]

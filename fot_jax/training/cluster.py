"""Which host of how many this is, and how a process becomes one of several that train together.

Importing this loads no JAX: the supervisor of `python -m tpu worker` asks the same question.
"""

from __future__ import annotations

import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

from fot_jax.common.errors import UserError

CONTROL_PORT = 8475  # of worker 0's supervisor, unless FOT_WORKERS says another
METADATA_HOST = "metadata.google.internal"
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
METADATA_TRIES = 3

INITIALIZATION_SECONDS = 300  # from the first process that is ready to join to the last
HEARTBEAT_SECONDS = 100  # without a sign of life; supervisors notice a death long before
SHUTDOWN_SECONDS = 100  # from the first process that is ready to end to the last


class Place(NamedTuple):
    """One of the hosts that run together.

    Attributes:
      index: which of them, from 0.
      hosts: names or addresses of all, in order.
      port: where worker 0's supervisor listens.
    """

    index: int
    hosts: tuple[str, ...]
    port: int


ALONE = Place(0, ("localhost",), CONTROL_PORT)


def place() -> Place:
    """The place of this host among those of its pod, or ALONE.

    Said by FOT_WORKERS ("host0:port,host1:port,…") and FOT_WORKER; else by TPU_WORKER_HOSTNAMES and
    TPU_WORKER_ID, which GKE sets; else, on a TPU virtual machine, by its metadata server.

    Raises:
      UserError: what they say makes no sense, or leaves out hosts.
    """
    if workers := os.environ.get("FOT_WORKERS"):
        hosts, ports = zip(*map(_address, workers.split(",")), strict=True)
        return _place("FOT_WORKER", os.environ.get("FOT_WORKER", ""), hosts, ports[0])
    slices = os.environ.get("MEGASCALE_NUM_SLICES", "1")
    if names := os.environ.get("TPU_WORKER_HOSTNAMES"):
        hosts = tuple(name.strip() for name in names.split(","))
        index = os.environ.get("TPU_WORKER_ID", "0" if len(hosts) == 1 else "")
        found = _place("TPU_WORKER_ID", index, hosts)
    elif _has_metadata():
        found, slices = _place_in_metadata(), _slices_in_metadata() or slices
    else:
        return ALONE
    if slices != "1":
        raise UserError(
            f"MEGASCALE_NUM_SLICES = {slices}: a slice knows the hosts of its own alone: set "
            "FOT_WORKERS=host0,host1,… to those of all slices, and FOT_WORKER on each"
        )
    return found


def join() -> None:
    """Makes this process one of several, where FOT_PROCESSES says so; before JAX has devices.

    `python -m tpu worker` sets FOT_COORDINATOR, FOT_PROCESSES and FOT_PROCESS_ID.

    Raises:
      UserError: they make no sense, or a process is started alone on one host of a pod.
    """
    count = os.environ.get("FOT_PROCESSES")
    if count is None:
        _check_alone()
    elif count != "1":
        _initialize(*_membership(os.environ))


def finish() -> None:
    """Waits until the devices have done all they were given; one of several calls it at its end.

    A result is there when one device has it. The others may still be meeting those of another
    process, and wait forever if that one has ended.
    """
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return
    mesh = jax.sharding.Mesh(jax.devices(), "all")
    sharded, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (("all",), ())
    )
    ones = jax.make_array_from_callback((mesh.size,), sharded, lambda index: np.ones(1, np.float32))
    jax.jit(jax.numpy.sum, out_shardings=whole)(ones).block_until_ready()  # after all else, on all


def _check_alone() -> None:
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    if "tpu" not in platforms.split(","):  # other devices are used without the other hosts
        return
    here = place()
    if len(here.hosts) > 1:
        raise UserError(
            f"this machine is worker {here.index} of {len(here.hosts)} of a pod: started alone it "
            "would wait for the others forever: start the same on all of them, under python -m tpu "
            "worker (tpu/README.md), or set JAX_PLATFORMS=cpu to compute on this machine's CPUs "
            "alone"
        )


def _membership(environment: Mapping[str, str]) -> tuple[str, int, int]:
    coordinator = environment.get("FOT_COORDINATOR", "")
    count, process = environment["FOT_PROCESSES"], environment.get("FOT_PROCESS_ID", "")
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"FOT_COORDINATOR = {coordinator!r}: give host:port of process 0")
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"FOT_PROCESSES = {count!r}: give the number of processes")
    if not process.isdecimal() or int(process) >= int(count):
        raise UserError(
            f"FOT_PROCESS_ID = {process!r}: give a number from 0 to {int(count) - 1}, below "
            "FOT_PROCESSES"
        )
    return coordinator, int(count), int(process)


def _check_free(port: int) -> None:
    """Checks that process 0 can listen on a port; JAX would crash where it cannot."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen on port {port} of FOT_COORDINATOR ({error.strerror}): is "
                "another run still going on here?"
            ) from error


def _initialize(coordinator: str, count: int, process: int) -> None:
    import jax

    if process == 0:
        _check_free(int(coordinator.rpartition(":")[2]))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It takes SIGTERM for itself, and lets a process that is still starting live on.
    jax.config.update("jax_enable_preemption_service", False)
    # All is said here: left to find out more, JAX would take one GPU for each of Slurm's tasks.
    jax.distributed.initialize(
        coordinator,
        count,
        process,
        cluster_detection_method="deactivate",
        initialization_timeout=INITIALIZATION_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


# --- Where a place is written ---------------------------------------------------------------------


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.strip().partition(":")
    if not host or colon and not (port.isdecimal() and 0 < int(port) < 65535):
        raise UserError(f"FOT_WORKERS: {text!r} is no address: give host0:port,host1:port,…")
    return host, int(port) if colon else CONTROL_PORT


def _place(name: str, index: str, hosts: tuple[str, ...], port: int = CONTROL_PORT) -> Place:
    if not index.isdecimal() or int(index) >= len(hosts):
        raise UserError(
            f"{name} = {index!r}, with {len(hosts)} workers ({', '.join(hosts[:8])}"
            f"{', …' if len(hosts) > 8 else ''}): give a number from 0 to {len(hosts) - 1}"
        )
    return Place(int(index), hosts, port)


def _has_metadata() -> bool:
    """Whether this may be a TPU virtual machine that should look at its metadata server."""
    if "TPU_SKIP_MDS_QUERY" in os.environ:
        return False
    return "GCE_METADATA_HOST" in os.environ or any(map(os.path.exists, TPU_DEVICES))


def _place_in_metadata() -> Place:
    endpoints = _metadata("worker-network-endpoints")
    if not endpoints:
        return ALONE
    # An entry is an address, or name:id:address.
    hosts = tuple(entry.strip().split(":")[-1] for entry in endpoints.split(","))
    return _place("agent-worker-number", _metadata("agent-worker-number") or "", hosts)


def _slices_in_metadata() -> str | None:
    """Of several slices how many, where JAX finds it (jax/_src/clusters/cloud_tpu_cluster.py)."""
    line = re.search(r"^\s*MEGASCALE_NUM_SLICES\s*:\s*'?(\d+)", _metadata("tpu-env") or "", re.M)
    return line and line[1]


def _metadata(attribute: str) -> str | None:
    """An attribute of this virtual machine; None where it has none, or there is no such server."""
    host = os.environ.get("GCE_METADATA_HOST", METADATA_HOST)
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{attribute}",
        headers={"Metadata-Flavor": "Google"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for left in reversed(range(METADATA_TRIES)):
        try:
            with opener.open(request, timeout=5) as answer:
                return answer.read().decode().strip()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            if not left:
                raise UserError(
                    f"the metadata server answers {error.code} when asked for {attribute}: try "
                    "again, or set FOT_WORKERS and FOT_WORKER"
                ) from error
        except OSError:  # no such host, or no answer
            if not left:
                return None
        time.sleep(1)
    return None

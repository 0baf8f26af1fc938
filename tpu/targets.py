"""The targets of a command: its pod, workdir and environment, checked, and its slices."""

from __future__ import annotations

import copy
import dataclasses
import re

from fot_jax.common.errors import UserError
from fot_jax.common.topologies import Topology, topology_of
from tpu.gcloud import Pod

_NAME = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"


@dataclasses.dataclass(frozen=True)
class Slices:
    """The hardware of an experiment.

    Attributes:
      topology: of each slice.
      count: how many.
    """

    topology: Topology
    count: int

    @property
    def workers(self) -> int:
        """Hosts of all slices."""
        return self.topology.hosts * self.count


def pod_of(name: str, zone: str, project: str | None) -> Pod:
    """The pod of --name, --zone and --project.

    Raises:
      UserError: one of them cannot be that.
    """
    check_name(name)
    _check("--zone", zone, _NAME, "a zone of Google Cloud, us-central2-b")
    if project is not None:
        _check("--project", project, rf"([a-z0-9][-.a-z0-9]*:)?{_NAME}", "the ID of a project")
    return Pod(name, zone, project)


def check_name(name: str) -> None:
    """Checks --name.

    Raises:
      UserError: it is none.
    """
    wanted = "small letters, digits and '-', at most 63, the first a letter, the last no '-'"
    _check("--name", name, _NAME, wanted)


def check_workdir(workdir: str) -> None:
    """Checks --workdir: a bucket's path, or one that every worker has.

    Raises:
      UserError: it is none.
    """
    bucket_or_root = r"(gs://[a-z0-9][-_.a-z0-9]+(/[^\x00-\x1f]*)?|/[^\x00-\x1f]*)"
    _check("--workdir", workdir, bucket_or_root, "gs://BUCKET/DIRECTORY, or a path from the root")
    if odd := re.search(r"[][*?\\]", workdir):
        raise UserError(f"--workdir {workdir!r}: {odd[0]!r} in it: give one without")


def check_environment(assignments: list[str]) -> None:
    """Checks what --env sets.

    Raises:
      UserError: one is no NAME=VALUE.
    """
    for assignment in assignments:
        _check("--env", assignment, r"(?s)[A-Za-z_][A-Za-z0-9_]*=.*", "NAME=VALUE")


def one_slice_of(files: list[str], bindings: list[str], topology: str | None) -> Slices:
    """The slice that training is started on, by `python -m tpu` itself.

    Raises:
      UserError: as of slices_of; or there are several.
    """
    slices = slices_of(files, bindings, topology)
    if slices.count > 1:
        raise UserError(
            f"Compute.slices = {slices.count}: machines of a slice do not know those of others, so "
            "training is started by hand: see FOT_WORKERS in tpu/README.md"
        )
    return slices


def slices_of(files: list[str], bindings: list[str], topology: str | None) -> Slices:
    """The slices that experiment files, or --topology, name.

    They are those of `train.compute`, as training takes mesh and dtype from there.

    Raises:
      UserError: they name none, or one that does not exist, or whose devices the mesh does not use
        exactly; or they do not parse.
    """
    from fot_jax import gin_files  # brings JAX: only where an experiment is read
    from fot_jax.training.experiment import Compute

    gin_files.load(files, bindings)
    with gin_files.gin_errors():
        compute = copy.deepcopy(gin_files.value_of("train.compute"))  # evaluates @Compute()
    if not isinstance(compute, Compute):
        raise UserError(f"{files[0]}: set train.compute = @Compute(), where training looks for it")
    name = compute.topology if topology is None else topology
    if name is None:
        raise UserError(
            f'{files[0]} asks for no TPU: set Compute.topology = "v4-128", or add --topology'
        )
    slices = Slices(topology_of(name), compute.slices)
    devices = slices.topology.devices * slices.count
    compute.mesh.sizes(devices, slices.count)  # what does not divide shows before it costs anything
    return slices


def _check(flag: str, value: str, pattern: str, wanted: str) -> None:
    if not re.fullmatch(pattern, value):
        raise UserError(f"{flag} {value!r}: give {wanted}")

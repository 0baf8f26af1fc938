"""What experiment files set of data, devices and checkpoints."""

from __future__ import annotations

import dataclasses

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import LARGEST_SEED, UserError, check_range
from fot_jax.common.topologies import topology_of
from fot_jax.data.documents import DocumentSource
from fot_jax.training.partitioning import MeshShape


@configurable
@dataclasses.dataclass(frozen=True)
class Data:
    """Documents and how they are laid out in a batch (data/lanes.py).

    Attributes:
      source: yields documents.
      lanes: documents read side by side; the batch has lanes * windows-of-the-scheme rows of
        the model's local context.
      lane_groups: shards of the document stream. Any number of hosts sees the same data; where it
        divides this number, no document is read by two of them.
      group_lanes: lanes of a crossbatch group, within which negatives are drawn; None: all.
      seed: of the order of documents.
      documents_apart: documents begin where new windows of a step do, and what one leaves of these
        is padding; else the next one begins there, so that rows may hold two, and earlier windows
        may be of another document (which the paper accepts in packs).
    """

    source: DocumentSource
    lanes: int
    lane_groups: int = 1
    group_lanes: int | None = None
    seed: int = 0
    documents_apart: bool = False

    def __post_init__(self):
        counts = {"lanes": self.lanes, "lane_groups": self.lane_groups}
        check_range("Data", 1, **counts, group_lanes=self.group_lanes)
        check_range("Data", 0, LARGEST_SEED, seed=self.seed)
        if self.lanes % self.lane_groups:
            raise UserError(
                f"Data.lanes = {self.lanes} is not a multiple of Data.lane_groups = "
                f"{self.lane_groups}: change one of them"
            )


@configurable
@dataclasses.dataclass(frozen=True)
class Compute:
    """How a step is computed; none of it changes the objective.

    Attributes:
      dtype: of activations and matrix products: "float32" or "bfloat16".
      remat: what is recomputed in the backward pass: "none", "dots" or "full".
      accumulation: microbatches a step, each of whole crossbatch groups.
      mesh: devices along the axes replica, data, fsdp, tensor.
      topology: the TPU slice that the mesh is for, "v4-128": what `fot compile` compiles for and
        `python -m tpu` asks for. Training takes the devices that there are.
      slices: how many of them, connected by the data-centre network.
      cpu_devices: devices that a CPU is taken for, where there is nothing else. Each computes its
        rows with a thread of its own: of products as small as those of short windows, XLA computes
        one after another. Each holds its parameters, too.
    """

    dtype: str = "float32"
    remat: str = "none"
    accumulation: int = 1
    mesh: MeshShape = MeshShape()
    topology: str | None = None
    slices: int = 1
    cpu_devices: int = 1

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"Compute.dtype = {self.dtype!r}: choose one of float32, bfloat16")
        counts = {"slices": self.slices, "cpu_devices": self.cpu_devices}
        check_range("Compute", 1, whole=True, accumulation=self.accumulation, **counts)
        if self.topology is not None:
            topology_of(self.topology)


@configurable
@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """When checkpoints are written and which are kept. The last step is always written.

    Attributes:
      every: steps between checkpoints; there is one before each evaluation, too.
      keep_last: how many of the newest stay.
      keep_every: steps whose multiples stay forever; None: none do.
    """

    every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None

    def __post_init__(self):
        check_range("Checkpoints", 1, **dataclasses.asdict(self))

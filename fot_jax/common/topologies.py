"""TPU slices by the names that Cloud TPU gives them, with what is published of their chips.

A name is a chip and a count: of TensorCores for v2, v3, v4 and v5p (two a chip), of chips for v5e
and v6e (one TensorCore each). A JAX device is a TensorCore on v2 and v3, and a chip on all others.
"""

from __future__ import annotations

import dataclasses
import math

from fot_jax.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPU.

    Attributes:
      cores: TensorCores that the name of a slice counts of a chip.
      devices: JAX devices of a chip.
      program_bytes: memory of a device that a program may take.
      flops: bfloat16 products, FLOP/s of a chip.
      hbm_rate: bytes/s between a chip and its memory.
      ici_rate: bytes/s that a chip can send to its neighbours, all links together, one way.
      accelerator: how gcloud spells the chip in an accelerator type.
      runtime_version: the TPU software of its virtual machines.
      machine_type, accelerator_label: of its nodes in a GKE cluster; None: no such nodes.
      one_host: the two of a slice that is one machine, where they are others.
    """

    cores: int
    devices: int
    program_bytes: int
    flops: float
    hbm_rate: float
    ici_rate: float
    accelerator: str
    runtime_version: str
    machine_type: str | None
    accelerator_label: str | None
    one_host: tuple[str, str] | None = None


_BASE = "tpu-ubuntu2204-base"


def _gib(number: float) -> int:
    return round(number * 2**30)


# Memory: what the compiler says is available where a program takes more (libtpu 0.0.42.1), to two
# digits. FLOP/s and rates: the "System architecture" page of each chip in Cloud TPU's
# documentation; links of v2 … v4: Jouppi et al., arXiv 2304.01433, tables 1 and 4.
CHIPS = {
    "v2": Chip(
        cores=2,
        devices=2,
        program_bytes=_gib(7.48),
        flops=46e12,
        hbm_rate=700e9,
        ici_rate=248e9,
        accelerator="v2",
        runtime_version=_BASE,
        machine_type=None,
        accelerator_label=None,
    ),
    "v3": Chip(
        cores=2,
        devices=2,
        program_bytes=_gib(15.48),
        flops=123e12,
        hbm_rate=900e9,
        ici_rate=280e9,
        accelerator="v3",
        runtime_version=_BASE,
        machine_type="ct3p-hightpu-4t",
        accelerator_label="tpu-v3-slice",
        one_host=("ct3-hightpu-4t", "tpu-v3-device"),
    ),
    "v4": Chip(
        cores=2,
        devices=1,
        program_bytes=_gib(30.75),
        flops=275e12,
        hbm_rate=1228e9,
        ici_rate=300e9,
        accelerator="v4",
        runtime_version=_BASE,
        machine_type="ct4p-hightpu-4t",
        accelerator_label="tpu-v4-podslice",
    ),
    "v5e": Chip(
        cores=1,
        devices=1,
        program_bytes=_gib(15.75),
        flops=197e12,
        hbm_rate=819e9,
        ici_rate=200e9,
        accelerator="v5litepod",
        runtime_version="v2-alpha-tpuv5-lite",
        machine_type="ct5lp-hightpu-4t",
        accelerator_label="tpu-v5-lite-podslice",
    ),
    "v5p": Chip(
        cores=2,
        devices=1,
        program_bytes=_gib(95.74),
        flops=459e12,
        hbm_rate=2765e9,
        ici_rate=600e9,
        accelerator="v5p",
        runtime_version="v2-alpha-tpuv5",
        machine_type="ct5p-hightpu-4t",
        accelerator_label="tpu-v5p-slice",
    ),
    "v6e": Chip(
        cores=1,
        devices=1,
        program_bytes=_gib(31.25),
        flops=918e12,
        hbm_rate=1640e9,
        ici_rate=400e9,
        accelerator="v6e",
        runtime_version="v2-alpha-tpuv6e",
        machine_type="ct6e-standard-4t",
        accelerator_label="tpu-v6e-slice",
    ),
}

_SHAPES_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16"}
_SHAPES_2D[256] = "16x16"
_SHAPES_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
_SHAPES_3D[256] = "4x8x8"

# Shape of a slice by its number of chips.
SHAPES = {
    "v2": {n: _SHAPES_2D[n] for n in (4, 16, 64, 256)},
    "v3": {n: _SHAPES_2D[n] for n in (4, 16, 32, 64)},
    "v4": _SHAPES_3D,
    "v5e": _SHAPES_2D,
    "v5p": _SHAPES_3D,
    "v6e": _SHAPES_2D,
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice.

    Attributes:
      name: as Cloud TPU uses it, "v4-128".
      chip: of CHIPS.
      chips: how many.
      shape: chips along each dimension of the interconnect, "4x4x4".
    """

    name: str
    chip: Chip
    chips: int
    shape: str

    @property
    def generation(self) -> str:
        """v2, v3, v4, v5e, v5p or v6e."""
        return self.name.split("-")[0]

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """Virtual machines, each with 4 chips; the smallest slices of v5e and v6e have one."""
        one_host = self.generation in ("v5e", "v6e") and self.chips <= 8
        return 1 if one_host else math.ceil(self.chips / 4)

    @property
    def accelerator_type(self) -> str:
        """What gcloud calls it: "v5litepod-256" for v5e-256."""
        return f"{self.chip.accelerator}-{self.name.split('-')[1]}"


def topology_of(name: str) -> Topology:
    """The slice of a name.

    Raises:
      UserError: there is no such slice.
    """
    generation, _, count = name.partition("-")
    if generation not in CHIPS:
        ours = [f"{each}-{count}" for each in CHIPS if CHIPS[each].accelerator == generation]
        names = ours or [f"{each}-…" for each in CHIPS]
        raise UserError(f"there is no TPU slice {name!r}: names are {', '.join(names)}")
    chip = CHIPS[generation]
    by_name = {f"{generation}-{n * chip.cores}": n for n in SHAPES[generation]}
    if name not in by_name:
        raise UserError(
            f"there is no TPU slice {name!r}: of {generation} there are {', '.join(by_name)}"
        )
    chips = by_name[name]
    return Topology(name, chip, chips, SHAPES[generation][chips])

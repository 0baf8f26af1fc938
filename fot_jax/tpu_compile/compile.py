"""`fot compile`: an experiment's training step compiled for a TPU slice that is not there.

libtpu compiles for any slice on any machine. What comes out says whether the step fits into the
memory of the devices, what it computes and moves, and so how fast it can be at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError
from fot_jax.common.topologies import Topology, topology_of
from fot_jax.common.trees import leaves_by_path
from fot_jax.common.units import bytes_of
from fot_jax.model import schemes
from fot_jax.model.config import ModelConfig
from fot_jax.model.crossbatch import BrokenGroups, Plan
from fot_jax.model.lora import Lora
from fot_jax.model.transformer import REMAT_POLICIES
from fot_jax.tpu_compile import costs
from fot_jax.training.experiment import Compute, Data
from fot_jax.training.partitioning import MeshShape
from fot_jax.training.program import Program, make_program
from fot_jax.training.schedules import ScheduleOfD

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Report:
    """What compiling a training step for a slice has shown. Memory is in bytes of one device.

    Attributes:
      fits: into the memory of a device.
      used, available: of that memory; `used` is what the compiler reports.
      parameters, optimizer, batch, temporaries, code: what takes memory, None where it did not
        fit; temporaries, as the compiler counts them, are not all there at once.
      model_flops, flops: of a step over all devices; the second as computed, with what is computed
        again in the backward pass.
      memory_traffic: bytes a device reads from and writes to its memory in a step.
      messages, collectives: bytes a device sends in a step, and how many, by kind of collective.
      least_messages: bytes that it must send: parameters gathered once and the gradients of those
        that train reduced once over the axis fsdp, keys and values of memory layers passed on as
        far as they are seen.
      compute_seconds, memory_seconds, message_seconds: what these take at the chip's published
        rates.
      compile_seconds: on this machine.
    """

    topology: str
    slices: int
    mesh: dict[str, int]
    remat: str
    accumulation: int
    d: int | None
    fits: bool
    used: int
    available: int
    model_flops: int
    compile_seconds: float
    parameters: int | None = None
    optimizer: int | None = None
    batch: int | None = None
    temporaries: int | None = None
    code: int | None = None
    flops: int | None = None
    memory_traffic: int | None = None
    messages: dict[str, int] | None = None
    least_messages: int | None = None
    collectives: dict[str, int] | None = None
    compute_seconds: float | None = None
    memory_seconds: float | None = None
    message_seconds: float | None = None
    tokens_per_step: int = 0

    @property
    def step_seconds(self) -> float:
        """The least that a step takes: everything that can overlap does."""
        return max(self.compute_seconds, self.memory_seconds, self.message_seconds)

    @property
    def utilisation(self) -> float:
        """Model FLOPs of such a step as a share of the chips' rate."""
        topology = topology_of(self.topology)
        rate = topology.chip.flops * topology.chips * self.slices
        return self.model_flops / rate / self.step_seconds


@configurable(flags=("topology", "suggest", "as_json"))
def compile_experiment(
    model: ModelConfig,
    data: Data,
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
    learning_rate: optax.Schedule,
    scheme: schemes.Scheme = schemes.NoCrossbatch(),  # noqa: B008 (frozen)
    d: ScheduleOfD | None = None,
    compute: Compute = Compute(),  # noqa: B008
    z_loss: float = 0.0,
    trainable: Sequence[str] | None = None,
    lora: Lora | None = None,
    topology: str | None = None,
    suggest: bool = False,
    as_json: bool = False,
) -> bool:
    """Compiles the training step of an experiment for a TPU slice and prints what that shows.

    Args:
      model … lora: as for `train`; documents are not read. Of several d the largest is taken.
      topology: "v4-128"; None: compute.topology.
      suggest: compile with other meshes, remat policies and microbatches too, and print the one
        with the lowest estimate among those that fit.
      as_json: print a JSON object; with `suggest` a list of those that fit.

    Returns:
      Whether it fits; with `suggest`, whether anything does.

    Raises:
      UserError: no or an unknown topology, no libtpu, parts of the experiment that do not fit each
        other or the slice.
    """
    name = compute.topology if topology is None else topology
    if name is None:
        raise UserError(
            "the experiment names no TPU slice: add --topology v4-128, or set train.compute = "
            "@Compute() and Compute.topology = 'v4-128'"
        )
    devices = devices_of(topology_of(name), compute.slices)
    refused: set[int] = set()  # numbers of microbatches that would cut crossbatch groups

    def report(compute: Compute) -> Report:
        mesh = compute.mesh.make(devices)
        try:
            program = make_program(
                mesh=mesh,
                model=model,
                data=data,
                optimizer=optimizer,
                learning_rate=learning_rate,
                scheme=scheme,
                d=d,
                compute=compute,
                z_loss=z_loss,
                trainable=trainable,
                lora=lora,
            )
        except BrokenGroups:
            refused.add(compute.accumulation)
            raise
        return compile_program(program, compute, name)

    if not suggest:
        result = report(compute)
        print(json.dumps(_as_json(result)) if as_json else table(result))
        return result.fits
    results = []
    for result in suggestions(compute, len(devices), report):
        results.append(result)
        if not as_json:
            print(_line(result), flush=True)
    fitting = sorted((each for each in results if each.fits), key=lambda each: each.step_seconds)
    if as_json:
        print(json.dumps([_as_json(each) for each in fitting]))
    elif fitting:
        print(f"\n{table(fitting[0])}\n\n{_bindings(fitting[0])}")
    else:
        groups = _smaller_groups(scheme, d, data.lanes, refused)
        print(f"nothing fits: take a larger slice, or fewer tokens a step{groups}")
    return bool(fitting)


def devices_of(topology: Topology, slices: int = 1) -> list[jax.Device]:
    """Descriptions of a slice's devices, to compile for.

    Raises:
      UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs libtpu: pip install -e '.[tpu]'")
    surroundings = {  # or libtpu looks for a cloud, and complains when there is none
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": topology.accelerator_type,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chips are taken
    }
    for name, value in surroundings.items():
        os.environ.setdefault(name, value)
    megacore = topology.chip.cores == 2 and topology.chip.devices == 1
    options: dict[str, Any] = {"chip_config_name": "megacore"} if megacore else {}
    if topology.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        options["num_slices"] = slices
    return list(
        topologies.get_topology_desc(
            platform="tpu", topology_name=f"{topology.generation}:{topology.shape}", **options
        ).devices
    )


def compile_program(program: Program, compute: Compute, name: str) -> Report:
    """Compiles a program whose mesh is of devices of the slice `name`.

    Raises:
      jax.errors.JaxRuntimeError: what the compiler cannot do, other than find enough memory.
    """
    topology = topology_of(name)
    d = max(program.ds, key=lambda d: d or 0)
    start = time.perf_counter()
    traced = program.step_of(d).trace(program.state, program.batch)
    known = dict(
        topology=name,
        slices=compute.slices,
        mesh=dict(program.mesh.shape),
        remat=compute.remat,
        accumulation=compute.accumulation,
        d=d,
        model_flops=program.flops_of(d),
        tokens_per_step=program.tokens_per_step,
    )
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        seconds = time.perf_counter() - start
        used, available = _out_of_memory(error)
        return Report(**known, fits=False, used=used, available=available, compile_seconds=seconds)
    seconds = time.perf_counter() - start
    memory, traffic = compiled.memory_analysis(), costs.traffic(compiled.as_text())
    devices = program.mesh.size
    flops = costs.product_flops(traced.jaxpr.jaxpr, devices)
    chip = topology.chip
    parameters, optimizer, batch = (
        _bytes_on_a_device(tree)
        for tree in (program.state.params, program.state.opt_state, program.batch)
    )
    return Report(
        **known,
        fits=True,
        used=memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes,
        available=chip.program_bytes,
        parameters=parameters,
        optimizer=optimizer,
        batch=batch,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=flops,
        memory_traffic=traffic.memory,
        messages=traffic.messages,
        least_messages=_least_messages(program, program.plan_of(d), compute),
        collectives=traffic.counts,
        compute_seconds=flops / devices / (chip.flops / chip.devices),
        memory_seconds=traffic.memory / (chip.hbm_rate / chip.devices),
        message_seconds=sum(traffic.messages.values()) / (chip.ici_rate / chip.devices),
        compile_seconds=seconds,
    )


def _bytes_on_a_device(tree) -> int:
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
    )


def _least_messages(program: Program, plan: Plan, compute: Compute) -> int:
    """What Report.least_messages says."""
    fsdp, tensor = (program.mesh.shape[axis] for axis in ("fsdp", "tensor"))
    item = jnp.dtype(compute.dtype).itemsize
    # Of each parameter: its elements, and those of its layers that train.
    trained = {path: x.size for path, x in leaves_by_path(program.trained).items()}
    sharded = sum(
        (x.size + trained.get(path, 0)) // (tensor if "tensor" in x.sharding.spec else 1)
        for path, x in leaves_by_path(program.state.params).items()
        if "fsdp" in x.sharding.spec
    )
    c = program.transformer.config
    keys = c.local_context * c.num_kv_heads // tensor * c.head_dim
    hops = 0 if plan.contexts.ring is None else jax.tree.leaves(plan.contexts.ring)[0].shape[1]
    passed_on = 2 * keys * len(plan.contexts.sent) * hops * len(c.memory_layers)
    return item * (sharded * (fsdp - 1) // fsdp + passed_on * compute.accumulation)


def _out_of_memory(error: Exception) -> tuple[int, int]:
    """Bytes needed and available, as the compiler says them; or raises its error."""
    size = r"([\d.]+[KMGTPE]?i?B?)"
    found = re.search(rf"\({size}\) exceeds available HBM \({size}\)", str(error))
    found = found or re.search(rf"Used {size} of {size} hbm", str(error))
    if not found:
        raise error
    return bytes_of(found[1]), bytes_of(found[2])


# --- Suggestions ---------------------------------------------------------------------------------


def suggestions(
    compute: Compute, devices: int, report: Callable[[Compute], Report]
) -> Iterator[Report]:
    """Reports of other meshes, each with the least recomputation and fewest microbatches that fit.

    A mesh or number of microbatches that rows or heads do not divide over is left out.

    Raises:
      UserError: nothing divides; why the first did not.
    """
    rest = devices // compute.slices
    meshes = [
        MeshShape(rest // (fsdp * tensor), fsdp, tensor, compute.slices)
        for tensor in (1, 2, 4, 8)
        for fsdp in sorted({rest // tensor // n for n in (1, 4, 16) if rest // tensor >= n})
        if rest % (fsdp * tensor) == 0
    ]
    # The file's own, if it leaves a device for a row: the slice may be another one than it is for.
    own = compute.mesh.replica * compute.mesh.fsdp * compute.mesh.tensor
    if devices >= own:
        meshes.insert(0, dataclasses.replace(compute.mesh, data=devices // own))
    refused, tried = None, False
    for mesh in dict.fromkeys(meshes):
        microbatches = sorted({1, 2, 4, compute.accumulation})
        for accumulation, remat in itertools.product(microbatches, ("none", *REMAT_POLICIES)):
            try:
                result = report(
                    dataclasses.replace(compute, mesh=mesh, accumulation=accumulation, remat=remat)
                )
            except UserError as error:
                refused = refused or error
                continue
            tried = True
            yield result
            if result.fits:
                break
    if not tried:
        raise refused


def _smaller_groups(
    scheme: schemes.Scheme, d: ScheduleOfD | None, lanes: int, microbatches: Iterable[int]
) -> str:
    """The crossbatch groups that would allow the fewest microbatches of those, in words."""
    by_d = [scheme] if d is None else [scheme.with_d(value) for value in d.values]
    for n in sorted(n for n in microbatches if lanes % n == 0):
        with contextlib.suppress(UserError):  # too few lanes for d
            for each in by_d:
                each.contexts(lanes // n * scheme.windows)
            return (
                f", or set Data.group_lanes = {lanes // n} for {n} microbatches, which changes "
                "which negatives there are"
            )
    return ""


# --- In words ------------------------------------------------------------------------------------


def table(report: Report) -> str:
    """A report for people."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in report.mesh.items() if n > 1) or "one device"
    several = f"{report.slices} x " if report.slices > 1 else ""
    verdict = "fits" if report.fits else "DOES NOT FIT"
    lines = [
        f"{several}{report.topology}: {verdict}: {_gib(report.used)} of "
        f"{_gib(report.available)} GiB that a program may take of a device's memory",
        f"  mesh {mesh}; remat {report.remat}; {report.accumulation} microbatches"
        + ("" if report.d is None else f"; d = {report.d}"),
    ]
    if report.fits:
        parts = ("parameters", "optimizer", "batch", "temporaries", "code")
        memory = ", ".join(f"{name} {_gib(getattr(report, name))}" for name in parts)
        messages = ", ".join(
            f"{report.collectives[kind]:,} {kind} {_gib(size)}"
            for kind, size in sorted(report.messages.items(), key=lambda each: -each[1])
        )
        seconds = {
            "products": report.compute_seconds,
            "memory": report.memory_seconds,
            "messages": report.message_seconds,
        }
        times = ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
        lines += [
            f"  memory of a device (GiB): {memory}",
            f"  a step: {report.tokens_per_step:,} tokens, {report.model_flops:.3g} model FLOPs, "
            f"{report.flops:.3g} computed",
            f"  a device reads and writes {_gib(report.memory_traffic)} GiB",
            f"  a device sends {_gib(sum(report.messages.values()))} GiB, at least "
            f"{_gib(report.least_messages)} whatever the program: {messages or 'nothing'}",
            f"  at the chip's published rates: {times}",
            f"  so a step takes {report.step_seconds:.3f} s at least, "
            f"{report.tokens_per_step / report.step_seconds:,.0f} tokens/s, utilisation "
            f"{report.utilisation:.0%} at most",
        ]
    return "\n".join([*lines, f"  compiled in {report.compile_seconds:.0f} s"])


def _line(report: Report) -> str:
    mesh = " ".join(f"{axis}={n}" for axis, n in report.mesh.items())
    result = (
        f"{report.step_seconds:.3f} s a step, {_gib(report.used)} GiB"
        if report.fits
        else f"does not fit: {_gib(report.used)} of {_gib(report.available)} GiB"
    )
    return f"{mesh} remat={report.remat} accumulation={report.accumulation}: {result}"


def _bindings(report: Report) -> str:
    """What to write into the experiment file."""
    mesh = [f"MeshShape.{axis} = {n}" for axis, n in report.mesh.items()]
    compute = {"mesh": "@MeshShape()", "topology": f'"{report.topology}"', "slices": report.slices}
    compute |= {"remat": f'"{report.remat}"', "accumulation": report.accumulation}
    lines = (f"Compute.{name} = {value}" for name, value in compute.items())
    return "\n".join(["train.compute = @Compute()", *lines, *mesh])


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _as_json(report: Report) -> dict:
    more = {}
    if report.fits:
        more = {"step_seconds": report.step_seconds, "utilisation": report.utilisation}
    return {**dataclasses.asdict(report), **more}

"""Reading checkpoints of a run: the newest that is whole, with its checksums compared.

Where the parameters of a run come from:
1. A workdir with checkpoints resumes from the newest that can be read: Checkpointer.restore_latest.
2. Else, if the experiment names a checkpoint (initialize_from), its parameters are taken and
   nothing else: step 0, a new optimizer state, the data from the start: restore_params.
3. Else training starts from fresh parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from fot_jax.checkpoints import items
from fot_jax.checkpoints.array_checksums import array_checksums
from fot_jax.checkpoints.orbax_errors import (
    of_reading,
    raise_without_printing,
    short_reason,
)
from fot_jax.checkpoints.steps import locate
from fot_jax.common.agreement import all_values
from fot_jax.common.errors import UserError
from fot_jax.common.paths import absolute, why_unavailable
from fot_jax.common.trees import leaves_by_path
from fot_jax.model import lora
from fot_jax.model.config import ModelConfig, RopeScaling

T = TypeVar("T")


class Restored(NamedTuple):
    """A checkpoint that was read.

    Attributes:
      step: its step.
      params: tree of arrays.
      opt_state: None where only parameters were wanted.
      data: the lane groups' state, as of `items.read_data`.
      meta: as saved, after a round trip through JSON.
    """

    step: int
    params: Any
    opt_state: Any
    data: dict[int, dict[str, np.ndarray]]
    meta: dict[str, Any]


def restore_params(path: epath.PathLike, params: Any = None) -> Restored:
    """The parameters and meta of a checkpoint.

    Args:
      path: of a step, which is read or refused, or of a workdir, whose newest step that can be read
        is taken.
      params: tree of `jax.ShapeDtypeStruct` with shardings, cast to while reading; None: as saved,
        on the first local device.

    Raises:
      UserError: nothing there, nothing readable, or parameters of other shapes.
    """
    directory, steps = locate(path)
    return newest_readable(directory, steps, lambda step: read_step(directory, step, params))[0]


def restore_model(path: epath.PathLike) -> tuple[ModelConfig, Any]:
    """The configuration and parameters of a checkpoint.

    Raises:
      UserError: as of restore_params; or the checkpoint does not say what model it is of.
    """
    restored = restore_params(path)
    return model_config_of(path, restored.meta), restored.params


def config_of(path: epath.PathLike) -> ModelConfig:
    """The configuration alone, of the newest step that has one.

    Raises:
      UserError: as of restore_model.
    """
    directory, steps = locate(path)
    meta, _ = newest_readable(directory, steps, lambda step: _read_meta(directory, step).meta)
    return model_config_of(path, meta)


def model_config_of(path: epath.PathLike, meta: Mapping[str, Any]) -> ModelConfig:
    """The model that the meta of a checkpoint says it is of.

    Args:
      path: of the checkpoint, for the message.

    Raises:
      UserError: meta has no model, or one with fields that are not known.
    """
    try:
        fields = dict(meta["model"])
        if fields["rope_scaling"] is not None:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        return ModelConfig(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: written by another version of fot_jax: its model configuration is not known "
            f"here ({error})"
        ) from error


# --- One step of several -------------------------------------------------------------------------


class DamagedCheckpoint(Exception):
    """A checkpoint cannot be read, or is not what was saved."""


def newest_readable(
    directory: epath.Path, steps: list[int], read: Callable[[int], T]
) -> tuple[T, list[int]]:
    """What `read` returns for the newest step it can read, and the damaged steps after that.

    Args:
      read: raises DamagedCheckpoint for a step that is damaged.

    Raises:
      UserError: all are damaged; or what `read` raises of other kinds.
    """
    damaged: list[tuple[int, str]] = []
    for step in reversed(steps):
        try:
            return read(step), [step for step, _ in damaged]
        except DamagedCheckpoint as error:
            damaged.append((step, str(error)))
            if step != steps[0] and jax.process_index() == 0:
                logging.warning(
                    "%s is damaged (%s): taking the checkpoint before", directory / str(step), error
                )
    step, why = damaged[0]
    raise UserError(
        f"{directory}: of checkpoints {', '.join(map(str, steps))} none can be read "
        f"({step}: {why}): restore one from a copy, or start in another workdir"
    )


def read_step(
    directory: epath.Path,
    step: int,
    params: Any = None,
    opt_state: Any = None,
    groups: Iterable[int] | None = (),
) -> Restored:
    """Reads one step, on all processes alike.

    Args:
      params: tree of `jax.ShapeDtypeStruct` with shardings; None: as saved. Adapters that were
        saved and are not in it are merged.
      opt_state: likewise; None: not read.
      groups: lane groups that this process wants; None for all.

    Raises:
      DamagedCheckpoint: a part of it is missing or is not what was saved.
      UserError: a newer format, arrays of other shapes, or a bucket that cannot be read.
    """
    folder = directory / str(step)
    saved = _read_meta(directory, step)
    as_saved = items.shapes_as_saved(saved.params)
    adapters = lora.split(as_saved)[1]
    merge = bool(adapters) and (params is None or not lora.split(params)[1])
    if params is None:
        params = as_saved
    else:
        if merge:
            params = lora.joined(params, _on_all_devices_of(params, adapters))
        check_shapes(folder, "parameter", saved.params, params)
    if opt_state is not None and not saved.opt_state and jax.tree.leaves(opt_state):
        raise UserError(
            f"{directory.parent}: a converted model, no run: set train.initialize_from = "
            f"'{directory.parent}', and choose another workdir"
        )
    if opt_state is not None:
        check_shapes(folder, "optimizer state", saved.opt_state, opt_state)
    data = _on_all("data", lambda: items.read_data(folder, groups))
    params = _read_arrays(folder / "params", saved.params, params)
    params = lora.merged(params, _added) if merge else params
    if opt_state is not None:
        opt_state = _read_arrays(folder / "opt_state", saved.opt_state, opt_state)
    return Restored(step, params, opt_state, data, saved.meta)


def _read_meta(directory: epath.Path, step: int) -> items.Meta:
    return _on_all("meta", lambda: items.read_meta(directory / str(step), step))


def _on_all(item: str, read: Callable[[], T]) -> T:
    """What `read` returns, if it succeeds on all processes; else an error of one kind on all."""
    value, failure, refusal = None, None, None
    try:
        value = read()
    except UserError as error:
        refusal = error
    except Exception as raised:
        error = of_reading(raised)
        # Memory, of the machine or a device, not the files.
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            refusal = error
        elif why := why_unavailable(error):
            refusal = UserError(why)
        else:
            failure = f"{item}: {short_reason(error)}"
    worst = max(all_values(2 if refusal is not None else 1 if failure is not None else 0))
    if worst == 2:  # here or elsewhere, which says nothing of the files
        raise refusal or UserError(f"{item}: another process cannot read it now: see what it says")
    if worst == 1:
        raise DamagedCheckpoint(failure or f"{item}: another process finds it damaged")
    return value


def _on_all_devices_of(params: Any, adapters: Any) -> Any:
    """Shapes of adapters, with the sharding of arrays that every device has whole."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), adapters
    )


def _added(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """As `lora.added_on_host`, where the kernel was; it is deleted.

    The adapters are whole on every device.
    """
    a, b, scale = (np.asarray(x.addressable_data(0)) for x in (a, b, scale))
    parts, shape, sharding = {}, kernel.shape, kernel.sharding
    for shard in kernel.addressable_shards:
        L, E, F = shard.index
        if str(shard.index) not in parts:  # or another device has the same
            part = lora.added_on_host(np.asarray(shard.data), a[L, E], b[L, :, F], scale[L])
            parts[str(shard.index)] = part
    kernel.delete()
    return jax.make_array_from_callback(shape, sharding, lambda index: parts[str(index)])


# --- Arrays --------------------------------------------------------------------------------------


def check_shapes(folder: epath.Path, kind: str, recorded: Mapping[str, Any], wanted: Any) -> None:
    """Checks that a checkpoint has the arrays of a tree.

    Args:
      folder: of the checkpoint, for the message.
      kind: of arrays, for the message.
      recorded: {"shape": ...} by path.
      wanted: tree of arrays or of `jax.ShapeDtypeStruct`.

    Raises:
      UserError: names the first array that is missing, has another shape, or is one too many.
    """
    by_path = leaves_by_path(wanted)
    for name, leaf in by_path.items():
        there = tuple(recorded[name]["shape"]) if name in recorded else "missing"
        if there != tuple(leaf.shape):
            raise UserError(
                f"{folder}: {kind} {name} is {there} in the checkpoint and {tuple(leaf.shape)} in "
                f"this experiment: use the configuration it was saved with, or another workdir"
            )
    for name in recorded:
        if name not in by_path:
            raise UserError(
                f"{folder}: {kind} {name} of the checkpoint is not part of this experiment: use "
                f"the configuration it was saved with, or another workdir"
            )


def _read_arrays(folder: epath.Path, recorded: Mapping[str, Any], wanted: Any) -> Any:
    """Reads the arrays of one item as saved, compares checksums, then casts to the wanted types."""
    leaves, structure = jax.tree.flatten(wanted)
    if not leaves:
        return wanted
    paths = list(leaves_by_path(wanted))
    one_device = SingleDeviceSharding(jax.local_devices()[0])

    def as_recorded(path, leaf):
        sharding = getattr(leaf, "sharding", None) or one_device
        return jax.ShapeDtypeStruct(leaf.shape, recorded[path]["dtype"], sharding=sharding)

    target = jax.tree.unflatten(structure, map(as_recorded, paths, leaves))
    handler = ocp.StandardCheckpointHandler()
    raise_without_printing()
    arrays = _on_all(
        folder.name,
        lambda: handler.restore(absolute(folder), args=ocp.args.StandardRestore(target)),
    )
    arrays = jax.tree.leaves(arrays)
    for path, checksum in zip(paths, array_checksums(arrays), strict=True):
        if checksum != recorded[path]["checksum"]:
            raise DamagedCheckpoint(
                f"{folder.name}: {path} is not what was saved: its checksum differs"
            )
    cast = [
        a if a.dtype == leaf.dtype else a.astype(leaf.dtype)
        for a, leaf in zip(arrays, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, cast)

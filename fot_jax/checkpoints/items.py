"""The items of a checkpoint, and the checksums that show whether they are damaged.

params and opt_state are Orbax items; their shapes, dtypes and checksums are in meta. data has one
file for each lane group, so that every host can read the groups it needs, whatever the number of
hosts, and groups.json, which lists these files with a CRC of each. meta and groups.json are sealed
(common/checksums.py).
"""

from __future__ import annotations

import dataclasses
import io
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from fot_jax.checkpoints.array_checksums import array_checksums
from fot_jax.common import formats
from fot_jax.common.checksums import seal, unseal
from fot_jax.common.trees import leaves_by_path, tree_of_leaves

LaneGroups = Mapping[int, Mapping[str, np.ndarray]]  # the state of each, by its number

# --- Arrays --------------------------------------------------------------------------------------


def describe(tree: Any) -> dict[str, Any]:
    """Shape, dtype and checksum of every array of a tree, by its path, for meta."""
    named = leaves_by_path(tree)
    return {
        name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "checksum": checksum}
        for (name, leaf), checksum in zip(
            named.items(), array_checksums(named.values()), strict=True
        )
    }


def shapes_as_saved(recorded: Mapping[str, Any]) -> Any:
    """Nested dictionaries of `jax.ShapeDtypeStruct` for what `describe` recorded."""
    return tree_of_leaves(
        {name: jax.ShapeDtypeStruct(x["shape"], x["dtype"]) for name, x in recorded.items()}
    )


# --- Data ----------------------------------------------------------------------------------------


def read_data(
    folder: epath.PathLike, groups: Iterable[int] | None = None
) -> dict[int, dict[str, np.ndarray]]:
    """Reads the lane groups' state.

    Args:
      folder: of a step.
      groups: those to read, whichever process wrote them; None for all.

    Returns:
      {group: {name: array}}, without groups that were never saved.

    Raises:
      OSError, ValueError, zipfile.BadZipFile: a file is missing or damaged.
    """
    folder = epath.Path(folder) / "data"
    saved = _saved_groups(folder)
    state = {}
    for group in saved if groups is None else sorted(set(groups) & set(saved)):
        content = (folder / _group_file(group)).read_bytes()
        if saved[group] not in (None, zlib.crc32(content)):
            raise ValueError(f"{_group_file(group)} is not what was saved")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            state[group] = dict(arrays)
    return state


def _saved_groups(folder: epath.Path) -> dict[int, int | None]:
    """The lane groups that were saved, and the CRC of each one's file, where there is one."""
    saved = json.loads((folder / "groups.json").read_text())
    if isinstance(saved, list):  # of fot_jax 0.1
        return dict.fromkeys(map(int, saved))
    return {int(group): crc for group, crc in unseal(saved).items()}


def _group_file(group: int) -> str:
    return f"group-{group:05d}.npz"


class DataHandler(ocp.AsyncCheckpointHandler):
    """Writes lane groups: each process those it owns, and one of them groups.json."""

    async def async_save(self, directory: epath.Path, args: SaveData):
        async def write():
            for name, content in args.files.items():
                (directory / name).write_bytes(content)

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="lane_groups")]

    def finalize(self, directory: epath.Path) -> None:
        """Writes groups.json. Orbax calls it on one process, after all have written."""
        files = sorted(path for path in directory.iterdir() if path.name.startswith("group-"))
        content = {
            path.name.removeprefix("group-").removesuffix(".npz"): zlib.crc32(path.read_bytes())
            for path in files
        }
        (directory / "groups.json").write_text(json.dumps(seal(content)))

    def save(self, directory, *args, **kwargs):
        raise NotImplementedError("saved asynchronously only")

    def restore(self, directory, *args, **kwargs):
        raise NotImplementedError("read by read_data")


@ocp.args.register_with_handler(DataHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class SaveData(ocp.args.CheckpointArgs):
    """The files of the lane groups that a process owns: content by name."""

    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, lane_groups: LaneGroups) -> SaveData:
        files = {}
        for group, arrays in lane_groups.items():
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **arrays)
            files[_group_file(group)] = buffer.getvalue()
        return cls(files)


# --- Meta ----------------------------------------------------------------------------------------


class Meta(NamedTuple):
    """What meta says.

    Attributes:
      meta: the caller's own.
      params, opt_state: as of `describe`.
    """

    meta: dict[str, Any]
    params: dict[str, Any]
    opt_state: dict[str, Any]


def sealed_meta(step: int, meta: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON to write.

    Args:
      meta: the caller's own.
      arrays: {"params": ..., "opt_state": ...} as of `describe`.
    """
    return seal({**formats.CHECKPOINT.number, "step": step, "meta": dict(meta), "arrays": arrays})


def read_meta(folder: epath.Path, step: int) -> Meta:
    """Reads the meta of a step.

    Raises:
      UserError: the checkpoint has a newer format.
      OSError, ValueError, KeyError, TypeError: the file is missing or damaged.
    """
    content = unseal(json.loads((folder / "meta" / "metadata").read_text()))
    formats.CHECKPOINT.check(folder, content)
    if content["step"] != step:
        raise ValueError(f"of step {content['step']}")
    return Meta(content["meta"], **content["arrays"])

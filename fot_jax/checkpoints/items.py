"""What a step directory holds, item by item, and how damage to it is noticed.

params and opt_state are Orbax items; their shapes, types and checksums stand in meta. data has one
file a lane group, so that any number of hosts can read back what it needs, and a list of these with
a CRC of each. meta and the list are JSON with a CRC over themselves.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from fot_jax.checkpoints.array_checksums import array_checksums
from fot_jax.common import formats
from fot_jax.common.checksums import seal, unseal
from fot_jax.common.trees import leaves_by_path, tree_of_leaves

Data = Mapping[int, Mapping[str, np.ndarray]]  # lane group -> its state

# --- Arrays --------------------------------------------------------------------------------------


def describe(tree: Any) -> dict[str, Any]:
    """Shape, type and checksum of every array, for meta."""
    named = leaves_by_path(tree)
    return {
        name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "checksum": checksum}
        for (name, leaf), checksum in zip(
            named.items(), array_checksums(named.values()), strict=True
        )
    }


def as_saved(recorded: Mapping[str, Any]) -> Any:
    """The nested dictionaries of shapes that parameters were saved as."""
    return tree_of_leaves(
        {name: jax.ShapeDtypeStruct(x["shape"], x["dtype"]) for name, x in recorded.items()}
    )


# --- Data ----------------------------------------------------------------------------------------


def read_data(folder: epath.PathLike, groups: Iterable[int] | None = None):
    """The lane groups' state in a step directory: {group: {name: array}}.

    Args:
      groups: the ones wanted, whoever wrote them; None for all. Those never saved are left out.

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
    """The lane groups that were saved, and the CRC of each one's file."""
    saved = json.loads((folder / "groups.json").read_text())
    if isinstance(saved, list):  # of fot_jax 0.1
        return dict.fromkeys(map(int, saved))
    return {int(group): crc for group, crc in unseal(saved).items()}


def _group_file(group: int) -> str:
    return f"group-{group:05d}.npz"


class DataHandler(ocp.AsyncCheckpointHandler):
    """Writes lane groups: each process the files of its own, the first one a list of them."""

    async def async_save(self, directory: epath.Path, args: SaveData):
        async def write():
            for name, content in args.files.items():
                (directory / name).write_bytes(content)

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="lane_groups")]

    def finalize(self, directory: epath.Path) -> None:  # on one process, after all have written
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
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, data: Data) -> SaveData:
        files = {}
        for group, arrays in data.items():
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **arrays)
            files[_group_file(group)] = buffer.getvalue()
        return cls(files)


# --- Meta ----------------------------------------------------------------------------------------


def sealed_meta(step: int, meta: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    return seal({**formats.CHECKPOINT.number, "step": step, "meta": dict(meta), "arrays": arrays})


def read_meta(folder: epath.Path, step: int) -> tuple[dict, dict, dict]:
    """The caller's own, and what the arrays of params and of opt_state were.

    Raises:
      UserError: the checkpoint has a newer format.
      OSError, ValueError, KeyError, TypeError: the file is missing or damaged.
    """
    content = unseal(json.loads((folder / "meta" / "metadata").read_text()))
    formats.CHECKPOINT.check(folder, content)
    if content["step"] != step:
        raise ValueError(f"of step {content['step']}")
    return content["meta"], content["arrays"]["params"], content["arrays"]["opt_state"]

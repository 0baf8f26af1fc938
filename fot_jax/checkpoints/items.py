"""What a step directory holds, item by item, and how damage to it is noticed.

params and opt_state are Orbax items; their shapes, types and checksums stand in meta. data has one
file a lane group, so that any number of hosts can read back what it needs, and a list of these with
a CRC of each. meta and the list are JSON with a CRC over themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

Data = Mapping[int, Mapping[str, np.ndarray]]  # lane group -> its state

# --- Arrays --------------------------------------------------------------------------------------


def names(tree: Any) -> dict[str, Any]:
    """Leaves by path, "layers/mlp/down"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def describe(tree: Any) -> dict[str, Any]:
    """Shape, type and checksum of every array, for meta."""
    named = names(tree)
    return {
        name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "checksum": checksum}
        for (name, leaf), checksum in zip(named.items(), checksums(named.values()), strict=True)
    }


def tree_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries of leaves by path: the opposite of `names`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *outer, last = name.split("/")
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), outer, tree)
        node[last] = leaf
    return tree


def as_saved(recorded: Mapping[str, Any]) -> Any:
    """The nested dictionaries of shapes that parameters were saved as."""
    return tree_of(
        {name: jax.ShapeDtypeStruct(x["shape"], x["dtype"]) for name, x in recorded.items()}
    )


def checksums(arrays: Iterable[jax.Array]) -> list[int]:
    """32 bits for each array: its bits and their places, whatever its sharding."""
    arrays = list(arrays)
    result = [0] * len(arrays)
    places: dict[Any, list[int]] = {}  # arrays of one set of devices are done in one program
    for i, array in enumerate(arrays):
        sharding = array.sharding
        if [device.platform for device in sharding.device_set] == ["cpu"]:
            # XLA's CPU backend would hold all the words that it adds up.
            result[i] = checksum_of_slice(np.asarray(array), 0)
            continue
        whole = None
        if isinstance(sharding, NamedSharding):
            whole = NamedSharding(sharding.mesh, PartitionSpec())
        places.setdefault((frozenset(sharding.device_set), whole), []).append(i)
    for (_, whole), indices in places.items():
        sums = jax.jit(_checksum_program, out_shardings=whole)([arrays[i] for i in indices])
        for i, checksum in zip(indices, np.asarray(sums), strict=True):
            result[i] = int(checksum)
    return result


def _checksum_program(arrays: list[jax.Array]) -> jax.Array:
    def of(x):
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
        bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
        place = jnp.uint32(0)
        for axis, size in enumerate(bits.shape):
            along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            place = place * jnp.uint32(size % 2**32) + along
        # An odd factor for each place: no change of a single element goes unseen.
        return (bits * (place * jnp.uint32(2) + jnp.uint32(1))).sum(dtype=jnp.uint32)

    return jnp.stack([of(x) for x in arrays])


def checksum_of_slice(x: np.ndarray, first: int) -> int:
    """What a part of an array adds to its checksum, modulo 2**32.

    Args:
      x: the part.
      first: elements of the array before it.
    """
    bits = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * min(x.dtype.itemsize, 4)}")
    total = 0
    for start in range(0, bits.size, 2**20):
        some = bits[start : start + 2**20].astype(np.uint32)
        at = np.uint32((first + start) % 2**32)
        places = np.arange(some.size, dtype=np.uint32) + at
        total += int((some * (places * np.uint32(2) + np.uint32(1))).sum(dtype=np.uint32))
    return total % 2**32


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
    if saved["crc32"] != _crc32(saved["content"]):
        raise ValueError("groups.json is not what was saved")
    return {int(group): crc for group, crc in saved["content"].items()}


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
        sealed = {"crc32": _crc32(content), "content": content}
        (directory / "groups.json").write_text(json.dumps(sealed))

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
    content = json.loads(json.dumps({"step": step, "meta": dict(meta), "arrays": arrays}))
    return {"crc32": _crc32(content), "content": content}


def read_meta(folder: epath.Path, step: int) -> tuple[dict, dict, dict]:
    """The caller's own, and what the arrays of params and of opt_state were."""
    sealed = json.loads((folder / "meta" / "metadata").read_text())
    content = sealed["content"]
    if sealed["crc32"] != _crc32(content) or content["step"] != step:
        raise ValueError("not what was saved")
    return content["meta"], content["arrays"]["params"], content["arrays"]["opt_state"]


def _crc32(content: Any) -> int:
    return zlib.crc32(json.dumps(content).encode())

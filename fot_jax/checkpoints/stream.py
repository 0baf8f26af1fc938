"""Checkpoints larger than memory: parameters written and read layer by layer.

The files are those that manager.py writes: an Orbax item of parameters stacked by layer, whose
checksums stand in meta. Here one layer of one parameter is held at a time. For one process; writes
to disks only.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from fot_jax.checkpoints import items
from fot_jax.checkpoints.array_checksums import slice_checksum
from fot_jax.checkpoints.orbax_errors import raise_without_printing
from fot_jax.checkpoints.restore import model_config_of
from fot_jax.checkpoints.steps import COMMITTED, locate
from fot_jax.common.errors import UserError
from fot_jax.common.paths import absolute, kvstore, why_unavailable
from fot_jax.common.trees import tree_of_leaves
from fot_jax.model import lora
from fot_jax.model.config import ModelConfig

# --- Writing -------------------------------------------------------------------------------------


@dataclasses.dataclass
class StreamedArray:
    """An array to be written, slice by slice along its first axis if it is `sliced`.

    Attributes:
      read: given an index, reads that slice; given None, the whole array.
      checksum: as of `array_checksums`, when the array has been written.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    sliced: bool
    read: Callable[[int | None], np.ndarray]
    checksum: int = 0

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _StreamedArrayHandler(ocp.type_handlers.NumpyHandler):
    """Writes a StreamedArray as Orbax writes NumPy arrays.

    The method below is a private one of Orbax 0.12.
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._one_at_a_time = asyncio.Lock()
        self._failed = False

    async def _open_and_write(
        self, value: StreamedArray, tspec: dict[str, Any], ts_context: ts.Context
    ):
        async with self._one_at_a_time:
            if self._failed:  # the error of another array has ended the save
                return
            try:
                array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
                for index in range(value.shape[0]) if value.sliced else (None,):
                    x = value.read(index)
                    first = 0 if index is None else index * x.size
                    value.checksum = (value.checksum + slice_checksum(x, first)) % 2**32
                    await (array if index is None else array[index]).write(x)
            except BaseException:
                self._failed = True
                raise


def save(workdir: epath.Path, c: ModelConfig, arrays: Mapping[str, StreamedArray]) -> None:
    """Writes step 0 of a new workdir, with parameters and nothing else.

    Args:
      c: the model.
      arrays: by path, "layers/mlp/down".

    Raises:
      UserError: it cannot be written, or what reading an array raises.
    """
    folder = absolute(workdir) / "checkpoints" / "0"
    folder.mkdir(parents=True)
    raise_without_printing()
    registry = ocp.type_handlers.create_type_handler_registry(
        (StreamedArray, _StreamedArrayHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # or Orbax warns
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    tree = tree_of_leaves(arrays)
    # A chunk holds what is written at once.
    chunks = {
        name: ocp.SaveArgs(shard_axes=(0,)) if x.sliced else ocp.SaveArgs()
        for name, x in arrays.items()
    }
    args = ocp.args.PyTreeSave(tree, save_args=tree_of_leaves(chunks))
    try:
        handler.save(folder / "params", args=args)
        handler.finalize(folder / "params")
    except UserError:
        raise
    except ValueError as error:  # TensorStore's, of a full disk for one
        raise UserError(f"{workdir}: cannot be written: {str(error).splitlines()[0]}") from error
    handler.close()
    data = folder / "data"
    data.mkdir()
    items.DataHandler().finalize(data)  # of no lane group
    recorded = {
        name: {"shape": list(x.shape), "dtype": x.dtype.name, "checksum": x.checksum}
        for name, x in arrays.items()
    }
    meta = {"model": dataclasses.asdict(c)}
    sealed = items.sealed_meta(0, meta, {"params": recorded, "opt_state": {}})
    (folder / "meta").mkdir()
    (folder / "meta" / "metadata").write_text(json.dumps(sealed))
    (folder / COMMITTED).write_text("")


# --- Reading -------------------------------------------------------------------------------------


class Reader:
    """The parameters of a checkpoint, each read on request; adapters are merged into their kernels.

    Attributes:
      directory: the workdir.
      step: of training.
      config: of the model.
      meta: what the run saved beside the parameters.
      adapters: of kernels (model/lora.py), float32; {} where there are none.
      arrays: parameters by path: (shape, dtype).
    """

    def __init__(self, path: epath.PathLike):
        """Args: path of a workdir, whose newest step is meant, or of a step.

        Raises:
          UserError: no checkpoint there, or it is damaged.
        """
        directory, steps = locate(path)
        self.directory, self.step = directory.parent, steps[-1]
        self._folder = directory / str(self.step)
        try:
            meta = items.read_meta(self._folder, self.step)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged("meta", error) from error
        self._recorded, self.meta = meta.params, meta.meta
        self.config = model_config_of(path, meta.meta)
        self.arrays = {
            name: (tuple(x["shape"]), jax.numpy.dtype(x["dtype"]))
            for name, x in self._recorded.items()
        }
        of_adapters = [name for name in self.arrays if name.startswith(f"layers/{lora.NAME}/")]
        self._open: tuple[str | None, Any] = None, None
        # Of arrays read in order: checksum and number of the elements read so far.
        self._sums: dict[str, list[int]] = {}
        self.adapters = tree_of_leaves(
            {name.split("/", 2)[2]: self._read(name).astype(np.float32) for name in of_adapters}
        )
        for name in of_adapters:
            del self.arrays[name]

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """Reads a parameter.

        Args:
          path: of `arrays`.
          layer: of parameters stacked by layer, the one to read; None: the whole array.

        Raises:
          UserError: it is damaged. Of layers that are read in order, the last one shows it.
        """
        x = self._read(path, layer)
        name = path.split("/")[-1]
        adapter = self.adapters.get(name) if name in lora.KERNELS else None
        if adapter is None:
            return x
        at = slice(None) if layer is None else layer
        return lora.added_on_host(x, adapter["a"][at], adapter["b"][at], self.adapters["scale"][at])

    def _read(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter as saved."""
        try:
            if self._open[0] != path:
                self._open = path, self._array(path)
            array = self._open[1]
            x = array if layer is None else array[layer]
            x = np.ascontiguousarray(x if isinstance(x, np.ndarray) else x.read().result())
        except (OSError, ValueError) as error:
            raise self._damaged(path, error) from error
        sums = self._sums.setdefault(path, [0, 0])
        first = 0 if layer is None else layer * x.size
        if first == sums[1]:
            sums[0] = (sums[0] + slice_checksum(x, first)) % 2**32
            sums[1] += x.size
            whole = sums[1] == math.prod(self.arrays[path][0])
            if whole and sums[0] != self._recorded[path]["checksum"]:
                raise self._damaged(path)
        return x

    def _array(self, path: str) -> ts.TensorStore | np.ndarray:
        """Opens an array where Orbax puts it; reads it all if a chunk holds several layers."""
        folder = self._folder / "params"
        tree = json.loads((folder / "_METADATA").read_text())
        spec = {
            "driver": "zarr3" if tree.get("use_zarr3") else "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": kvstore(folder),
                "path": f"{path.replace('/', '.')}/",
            },
        }
        array = ts.open(spec, open=True, read=True).result()
        if (array.shape, array.dtype.name) != (self.arrays[path][0], self.arrays[path][1].name):
            raise ValueError("not the array that was saved")
        return array if array.chunk_layout.read_chunk.shape[0] == 1 else array.read().result()

    def _damaged(self, what: str, error: Exception | None = None) -> UserError:
        if error is not None and (why := why_unavailable(error)):
            return UserError(why)
        return UserError(
            f"{self._folder}: {what} is damaged: restore the checkpoint from a copy, or give "
            "another step"
        )

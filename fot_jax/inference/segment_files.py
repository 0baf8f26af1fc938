"""Memories in a directory: larger than RAM, and kept when the process that reads is killed.

What has left the window goes to the *open segment*, a memory in RAM like any other. When a window
no longer fits into it, it is *closed*: written to files that never change, and begun anew. So a
segment ends where a window does, and holds at most 65,536 tokens (or a window of all rows, if that
is more).

    segments.json     sealed, written once: of which model the memory is, and how it is kept
    segment-000000/   a closed segment: an .npy file for the keys, the values and, in int8, the
                      scales of every memory layer, [1, K, slots, ...], and segment.json, sealed:
                      how many slots are in use, and a CRC of every file
    segment-000001/   ...
    open/             what save_memory writes: the open segment and the window, as a memory of its
                      own (memory_files.py), with the number of segments that it comes after

**Reading.** Files are memory-mapped, and arrays of the CPU backend lie right in the mapped pages:
what is resident is the page cache's, which the system takes back as it needs. Other devices get a
copy of one segment after another. All segments have arrays of one shape, so one compiled program
looks them all up, however many there come to be.

**Being killed.** A segment's directory is written under another name and renamed when whole, so
that what is there is what was closed, and a kill costs the open segment. As windows ended where the
last segment did, reading on from its last token gives what reading in one go does. Each
segment.json has the checksum of the one before: segments cannot change places. `open` counts only
if no segment was closed after it. All checksums are compared once, when the directory is opened.

**One writer.** The state that began the memory, or loaded it, adds to it. Copies of a state see the
segments that there were, and keep in RAM what they read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from fot_jax.common import formats
from fot_jax.common.atomic import new_directory
from fot_jax.common.checksums import seal, unseal
from fot_jax.common.errors import UserError
from fot_jax.common.paths import path_of
from fot_jax.common.trees import leaves_by_path
from fot_jax.model import memory as memories
from fot_jax.model.lookup import Segment
from fot_jax.model.memory import LayerMemory, Memory

DESCRIPTION = "segments.json"
OF_SEGMENT = "segment.json"
OPEN = "open"
TOKENS = 2**16  # of a segment


@dataclasses.dataclass(frozen=True)
class Segments:
    """The closed segments of a memory.

    Attributes:
      directory: that they are in.
      slots: of each.
      crc32: of the description of the last one.
      closed: what each has for every memory layer.
      counts: tokens of each.
    """

    directory: epath.Path
    slots: int
    crc32: int
    closed: tuple[tuple[LayerMemory, ...], ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    def of_layers(self) -> list[list[Segment]]:
        """The segments of each memory layer, on the default device once they are used."""
        visible = [np.full(1, count, np.int32) for count in self.counts]
        by_layer = zip(*self.closed, strict=True)
        return [[Segment(*each) for each in zip(x, visible, strict=True)] for x in by_layer]

    def with_closed(self, memory: Memory, tokens: int) -> Segments:
        """Writes the first slots of a memory of one row as the next segment.

        Raises:
          UserError: it cannot be written, or is there already.
        """
        path = self.directory / _name(len(self.counts))
        if path.exists():
            raise UserError(
                f"{path}: written by another process or state: only one adds to a memory; load it "
                "anew, or ask several things of copies of a state"
            )
        for left in self.directory.glob("*.half-written-*"):  # by a killed process
            left.rmtree()
        with new_directory(path, OF_SEGMENT) as half:
            crcs = {}
            for name, x in leaves_by_path(memory.layers).items():
                name = f"{name.replace('/', '_')}.npy"
                x = np.asarray(x)[:, :, :tokens]
                widths = [(0, 0), (0, 0), (0, self.slots - tokens)] + [(0, 0)] * (x.ndim - 3)
                with open(half / name, "wb") as file:
                    np.save(file, np.pad(x, widths))
                    file.flush()
                    os.fsync(file.fileno())
                crcs[name] = _crc32(half / name)
            content = seal({"after": self.crc32, "tokens": tokens, "crc32": crcs})
            (half / OF_SEGMENT).write_text(json.dumps(content))
        (self.directory / OPEN).rmtree(missing_ok=True)
        return self._with(path, memory.layers, content)

    def _with(self, path: epath.Path, like, sealed: dict[str, Any]) -> Segments:
        """With the segment of a sealed description, of arrays of the types of `like`.

        Raises:
          ValueError: a file is not of such arrays.
        """

        def mapped(name, x):
            array = np.load(path / f"{name.replace('/', '_')}.npy", mmap_mode="r")
            shape = (*x.shape[:2], self.slots, *x.shape[3:])
            if (array.shape, array.dtype) != (shape, x.dtype):
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}")
            return array

        leaves = [mapped(name, x) for name, x in leaves_by_path(like).items()]
        return dataclasses.replace(
            self,
            crc32=sealed["crc32"],
            closed=(*self.closed, jax.tree.unflatten(jax.tree.structure(like), leaves)),
            counts=(*self.counts, sealed["content"]["tokens"]),
        )


def create(directory: epath.PathLike, window: int, **content: Any) -> Segments:
    """Makes a directory for a memory with nothing in it.

    Args:
      window: most tokens that are moved to memory at a time.
      content: of its description: what is needed to go on from it.

    Raises:
      UserError: something is there, or it cannot be made.
    """
    path = epath.Path(os.path.realpath(path_of(directory)))
    if path.exists() and (not path.is_dir() or {x.name for x in path.iterdir()} - {DESCRIPTION}):
        what = "holds a memory already: go on from it with load_memory, or"
        raise UserError(
            f"{path}: {what if is_one(path) else 'something else is there:'} give a new name"
        )
    slots = memories.slots_for(max(TOKENS, window))
    sealed = seal({**formats.SEGMENTS.number, "slots": slots, **content})
    with new_directory(path, DESCRIPTION) as half:
        (half / DESCRIPTION).write_text(json.dumps(sealed))
    return Segments(path, slots, sealed["crc32"])


def is_one(path: epath.Path) -> bool:
    """Whether a directory holds a memory in segments."""
    return (path / DESCRIPTION).exists()


def describe(path: epath.Path) -> dict[str, Any]:
    """What `create` was told.

    Raises:
      UserError: it is damaged, or of a newer fot_jax.
    """
    content = _unsealed(path / DESCRIPTION)["content"]
    formats.SEGMENTS.check(path, content)
    return content


def load(path: epath.Path, like: Memory) -> Segments:
    """The segments of a directory, with all checksums compared.

    Args:
      like: a memory of the same types and shapes, but for its slots.

    Raises:
      UserError: names the first segment that is not what was written.
    """
    path = epath.Path(os.path.realpath(path))
    sealed = _unsealed(path / DESCRIPTION)
    segments = Segments(path, sealed["content"]["slots"], sealed["crc32"])
    written = {each.name for each in path.glob("segment-*") if "." not in each.name}
    for number in range(len(written)):
        place = path / _name(number)
        if not place.exists():
            raise UserError(f"{place}: missing: read the text again")
        sealed = _unsealed(place / OF_SEGMENT)
        try:
            if sealed["content"]["after"] != segments.crc32:
                raise ValueError("of another memory or place")
            for name, crc32 in sealed["content"]["crc32"].items():
                if _crc32(place / name) != crc32:
                    raise ValueError(f"{name} is not what was written")
            segments = segments._with(place, like.layers, sealed)
        except (ValueError, OSError) as error:
            raise UserError(f"{place}: damaged ({error}): read the text again") from error
    return segments


def restart(memory: Memory) -> Memory:
    """The open segment after it was closed: nothing in it."""
    return memory._replace(appended=jnp.zeros_like(memory.appended))


def _name(number: int) -> str:
    return f"segment-{number:06}"


def _unsealed(path: epath.Path) -> dict[str, Any]:
    try:
        sealed = json.loads(path.read_text())
        unseal(sealed)
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: damaged: read the text again") from error
    return sealed


def _crc32(path: epath.Path) -> int:
    return zlib.crc32(np.memmap(path, mode="r"))

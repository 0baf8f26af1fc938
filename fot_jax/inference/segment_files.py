"""Memories in segments: with an index, in files, larger than RAM, and there after a kill.

What has left the window goes to the *open segment*, a memory in RAM like any other. When a window
no longer fits into it, it is *closed*: its keys are put in the order of their clusters
(model/clusters.py), it is written to files that never change, and begun anew. So a segment ends
where a window does, and holds at most 65,536 tokens (or a window of all rows, if that is more).
Four segments of a size that follow each other are *merged* into one, so that there are at most
three of each size, and a token is written once for each size.

    segments.json     sealed, written once: of which model the memory is, and how it is kept
    segment-000000-000003/
                      the first four that were closed: an .npy file for the keys, the values and, in
                      int8 and int4, the scales of every memory layer, [1, K, slots, ...], and for
                      centres, deviations and starts of its clusters; and segment.json, sealed: how
                      many slots are in use, and a CRC of every file
    segment-000004-000004/
                      the next one
    open/             what save_memory writes: the open segment and the window, as a memory of its
                      own (memory_files.py), with the CRC of the segment that it comes after

**Reading.** Files are memory-mapped, and arrays of the CPU backend lie right in the mapped pages:
what is resident is the page cache's, which the system takes back as it needs. Other devices get a
copy of one segment after another. With IndexedTopK centres and deviations of all clusters are on
the device, and the host reads what queries go to (model/segments.py).

**Being killed.** A segment's directory is written under another name and renamed when whole, and
those that were merged into it are removed after that: what is there is what was closed, and a kill
costs the open segment and the window. As windows ended where the last segment did, reading on from
its last token gives what reading in one go does. Each segment.json has the checksum of the one
before: segments cannot change places. `open` counts only if no segment was closed after it. All
checksums are compared once, when the directory is opened.

**One writer.** The state that began the memory, or loaded it, adds to it. Copies of a state see the
segments that there were, and keep in RAM what they read.

Without a directory the same segments are in RAM.

**Several processes** that read the same text (LanguageModel.load) spread it: slot s of the open
segment, which all of them have, goes to process s % P's segment when it is closed. So each closes,
clusters, merges and looks up a share of every part of the text, in a directory of its own,
process-0-of-4, in which all is as above. What the processes have after a kill is as many segments
as all of them have: none is merged, and no older one removed, before all have closed the last one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental.multihost_utils import process_allgather

from fot_jax.common import formats
from fot_jax.common.atomic import new_directory
from fot_jax.common.checksums import seal, unseal
from fot_jax.common.errors import UserError
from fot_jax.common.paths import path_of
from fot_jax.common.trees import leaves_by_path
from fot_jax.model import clusters
from fot_jax.model import memory as memories
from fot_jax.model.clusters import Clusters, Index
from fot_jax.model.memory import LayerMemory, Memory
from fot_jax.model.segments import Closed, Segment

DESCRIPTION = "segments.json"
OF_SEGMENT = "segment.json"
OPEN = "open"
_AGAIN = "remove the memory, or give a new name, and read the text again"
_ONE_ADDS = (
    "written by another process or state: only one adds to a memory; load it anew, or ask several "
    "things of copies of a state"
)
ADDED_TO = "another process is adding to it: load it when that is done"
TOKENS = 2**16  # of a segment that was not merged
MERGED = 4  # segments of a size into one
CHUNK = 2**16  # vectors of a merged segment that are written at a time
LISTINGS = 5  # of a directory to which another process adds, before loading it is given up


class _Layer(NamedTuple):
    """What is kept of a layer."""

    memory: LayerMemory
    clusters: Clusters


class _Segment(NamedTuple):
    """A closed segment.

    Attributes:
      first, count: those that were closed and are in it.
      tokens: that it holds.
      of_all: tokens that this and the same segment of other processes hold.
      crc32: of its description.
      after: of that of the segment before it.
      layers: arrays [1, K, slots, ...], in RAM or mapped.
    """

    first: int
    count: int
    tokens: int
    of_all: int
    crc32: int
    after: int
    layers: Sequence[_Layer]

    @property
    def stop(self) -> int:
        return self.first + self.count


@dataclasses.dataclass(frozen=True)
class Segments:
    """The closed segments of a memory.

    Attributes:
      directory: that they are in; None: they are in RAM.
      slots: of the open segment.
      root: CRC of the description of the memory.
      indexes: of each memory layer, to all of them.
      closed: all of them.
      process, processes: which it is, of those that have the memory together.
      torn: names of segments that other processes were killed before they closed.
    """

    directory: epath.Path | None
    slots: int
    root: int
    indexes: tuple[Index, ...]
    closed: tuple[_Segment, ...] = ()
    process: int = 0
    processes: int = 1
    torn: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Of closed segments of all processes."""
        return sum(segment.of_all for segment in self.closed)

    @property
    def room(self) -> int:
        """Slots of a segment that was not merged."""
        return memories.slots_for(-(-self.slots // self.processes))

    @property
    def crc32(self) -> int:
        """Of the description of the last one."""
        return self.closed[-1].crc32 if self.closed else self.root

    def of_layers(self) -> list[Closed]:
        """The segments of each memory layer, on the default device once they are used."""
        return [
            Closed(
                [Segment(x.layers[i].memory, np.full(1, x.tokens, np.int32)) for x in self.closed],
                *(index, self.process, self.processes),
            )
            for i, index in enumerate(self.indexes)
        ]

    def with_closed(self, memory: Memory, tokens: int) -> Segments:
        """With the first slots of a memory of one row as the next segment, which is written.

        All processes call it.

        Raises:
          UserError: it cannot be written, or is there already.
        """
        number = self.closed[-1].stop if self.closed else 0
        ours = len(range(self.process, tokens, self.processes))
        layers = self._clustered(memory.layers, ours)
        with self._locked():
            if self.directory is not None:
                self._clear()
            before = self._compact()  # a kill may have left what was to be merged
            segment = before._written(number, 1, (ours, tokens), before.crc32, layers)
            of_all_processes(True)
            segments = dataclasses.replace(before._with(segment), torn=())._compact()
            if self.directory is not None:
                (self.directory / OPEN).rmtree(missing_ok=True)
        return segments

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else adds a segment meanwhile, nor takes what is half written for a kill's.

        Raises:
          UserError: somebody does.
        """
        if self.directory is None:
            yield
            return
        with open(self.directory / DESCRIPTION, "r+b") as file:  # NFS locks what can be written
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                # Not waited for: several processes would wait for each other, each with one lock.
                raise UserError(f"{self.directory}: {_ONE_ADDS}") from error
            except OSError as error:
                # A file system without locks: what others have closed is seen still.
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
            yield

    def check_alone(self) -> None:
        """Checks that nobody else has added a segment.

        Raises:
          UserError: names it.
        """
        stop = self.closed[-1].stop if self.closed else 0
        for name, (first, count) in _names(self.directory).items():
            if first + count > stop and name not in self.torn:
                raise UserError(f"{self.directory / name}: {_ONE_ADDS}")

    def _clear(self) -> None:
        """Checks that nobody else adds segments; removes what a kill left."""
        self.check_alone()
        kept = {_name(segment.first, segment.count) for segment in self.closed}
        for path in self.directory.iterdir():
            if re.match(rf"segment-|{OPEN}\.", path.name) and path.name not in kept:
                path.rmtree()

    def _clustered(self, layers: Sequence[LayerMemory], tokens: int) -> list[_Layer]:
        """This process's share of all layers as a segment has them: its first slots hold it."""

        def of_segment(x):
            x = x[:, :, self.process :: self.processes]
            more = max(0, self.room - x.shape[2])
            return jnp.pad(x, [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (x.ndim - 3))

        padded = jax.tree.map(of_segment, layers)
        return [_Layer(*clusters.clustered(layer, jnp.int32(tokens))) for layer in padded]

    def _compact(self) -> Segments:
        """With segments merged until there are fewer than MERGED of the last size."""
        last = self.closed[-MERGED:]
        if [segment.count for segment in last] != [last[-1].count if last else 0] * MERGED:
            return self
        return self._merged(last)._compact()

    def _merged(self, last: Sequence[_Segment]) -> Segments:
        """With the last segments as one."""
        counts = [segment.tokens for segment in last]
        layers = []
        for each in zip(*(segment.layers for segment in last), strict=True):
            each_memory = [layer.memory for layer in each]
            orders, merged = clusters.merged(
                [memory.k for memory in each_memory], [layer.clusters for layer in each], counts
            )
            ordered = functools.partial(_Ordered, counts=counts, orders=orders)
            layers.append(_Layer(jax.tree.map(lambda *x, f=ordered: f(x), *each_memory), merged))
        first, count = last[0].first, sum(segment.count for segment in last)
        tokens = sum(counts), sum(segment.of_all for segment in last)
        segment = self._written(first, count, tokens, last[0].after, layers)
        if self.directory is not None:
            for old in last:
                (self.directory / _name(old.first, old.count)).rmtree()
        kept = self.closed[: -len(last)]
        indexes = tuple(index.up_to(len(kept)) for index in self.indexes)
        return dataclasses.replace(self, closed=kept, indexes=indexes)._with(segment)

    def _written(
        self, first: int, count: int, tokens: tuple[int, int], after: int, layers: Sequence[_Layer]
    ) -> _Segment:
        """A segment with the arrays of `layers`, of which some are _Ordered, in files or in RAM.

        Args:
          tokens: of it, and of all processes'.
        """
        if self.directory is None:
            layers = jax.tree.map(_in_ram, layers)
            return _Segment(first, count, *tokens, crc32=0, after=after, layers=layers)
        path = self.directory / _name(first, count)
        with new_directory(path, OF_SEGMENT) as half:
            crcs = {}
            for name, x in leaves_by_path(layers).items():
                name = f"{name.replace('/', '_')}.npy"
                with open(half / name, "wb") as file:  # not through a map: a full disk then kills
                    _save(file, x)
                    file.flush()
                    os.fsync(file.fileno())
                crcs[name] = _crc32(half / name)
            counts = dict(zip(("tokens", "of_all"), tokens, strict=True))
            content = seal({"after": after, **counts, "crc32": crcs})
            with open(half / OF_SEGMENT, "w") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
        layers = _mapped(path, [layer.memory for layer in layers], self.room * count)
        return _Segment(first, count, *tokens, content["crc32"], after, layers)

    def _up_to(self, stop: int) -> Segments:
        """Without the segments from `stop` on, which not all processes have."""
        kept = tuple(segment for segment in self.closed if segment.stop <= stop)
        torn = tuple(_name(x.first, x.count) for x in self.closed[len(kept) :])
        indexes = tuple(index.up_to(len(kept)) for index in self.indexes)
        return dataclasses.replace(self, indexes=indexes, closed=kept, torn=torn)

    def _with(self, segment: _Segment) -> Segments:
        both = zip(self.indexes, segment.layers, strict=True)
        indexes = tuple(index.with_segment(layer.clusters) for index, layer in both)
        return dataclasses.replace(self, indexes=indexes, closed=(*self.closed, segment))


@dataclasses.dataclass(frozen=True, eq=False)
class _Ordered:
    """The first vectors of several arrays [1, K, slots, ...] in an order of each head's own.

    Attributes:
      arrays: perhaps in files.
      counts: how many vectors each has.
      orders: for each head the numbers of all vectors, one array's after another's.
    """

    arrays: Sequence[np.ndarray]
    counts: Sequence[int]
    orders: Sequence[np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        rows, heads, _, *rest = self.arrays[0].shape
        return rows, heads, sum(x.shape[2] for x in self.arrays), *rest

    @property
    def dtype(self) -> np.dtype:
        return self.arrays[0].dtype

    def chunks(self) -> Iterator[np.ndarray]:
        """All vectors, head by head, and zeros in the slots that are free."""
        _, heads, slots, *rest = self.shape
        for head in range(heads):
            of_head = [a[0, head, :n] for a, n in zip(self.arrays, self.counts, strict=True)]
            order = self.orders[head]
            for start in range(0, len(order), CHUNK):
                yield clusters.taken(of_head, order[start : start + CHUNK])
            yield np.zeros((slots - len(order), *rest), self.dtype)


def _in_ram(x: jax.Array | np.ndarray | _Ordered) -> np.ndarray:
    if not isinstance(x, _Ordered):
        return np.asarray(x)
    out, start = memories.empty_on_host(x.shape, x.dtype), 0
    rows = out.reshape(-1, *x.shape[3:])
    for chunk in x.chunks():
        rows[start : (start := start + len(chunk))] = chunk
    return out


def _save(file: IO[bytes], x: jax.Array | np.ndarray | _Ordered) -> None:
    """Writes an array as np.save does."""
    if not isinstance(x, _Ordered):
        np.save(file, x)
        return
    header = {"descr": x.dtype.str, "fortran_order": False, "shape": x.shape}
    np.lib.format.write_array_header_1_0(file, header)
    for chunk in x.chunks():
        file.write(chunk.data)


def _mapped(path: epath.Path, like: Sequence[LayerMemory], slots: int) -> list[_Layer]:
    """The files of a segment as arrays of the types and shapes of `like`, but for their slots.

    Raises:
      ValueError: a file is not of such an array.
    """

    def of_file(name: str, dtype, *shape: int | None):
        array = np.load(path / f"{name}.npy", mmap_mode="r")
        fits = len(shape) == array.ndim and all(
            n in (None, m) for n, m in zip(shape, array.shape, strict=True)
        )
        if array.dtype != dtype or not fits:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}")
        return array

    layers = []
    for i, layer in enumerate(like):
        arrays = []
        for name, x in leaves_by_path(layer).items():
            shape = (*x.shape[:2], slots, *x.shape[3:])
            arrays.append(of_file(f"{i}_memory_{name.replace('/', '_')}", x.dtype, *shape))
        memory = jax.tree.unflatten(jax.tree.structure(layer), arrays)
        K, D = layer.k.x.shape[1], layer.k.dim
        centres = of_file(f"{i}_clusters_centres", np.float32, 1, K, None, D)
        deviations = of_file(f"{i}_clusters_deviations", np.float32, 1, K, centres.shape[2])
        starts = of_file(f"{i}_clusters_starts", np.int32, 1, K, centres.shape[2] + 1)
        layers.append(_Layer(memory, Clusters(centres, deviations, starts)))
    return layers


def own(path: epath.Path) -> epath.Path:
    """The directory of this process in that of a memory, which is the same where it is alone."""
    if jax.process_count() == 1:
        return path
    return path / f"process-{jax.process_index()}-of-{jax.process_count()}"


def check_processes(path: epath.Path) -> None:
    """Checks that a directory has no memory of another number of processes.

    Raises:
      UserError: says of how many it is.
    """
    names = [x.name for x in path.iterdir()] if path.is_dir() else []
    found = (re.fullmatch(r"process-\d+-of-(\d+)", name) for name in names)
    counts = {int(x[1]) for x in found if x} | ({1} if (path / DESCRIPTION).exists() else set())
    if wrong := counts - {jax.process_count()}:
        raise UserError(
            f"{path}: a memory that {max(wrong)} processes have written, and of these there are "
            f"{jax.process_count()}: run as many, or read the text again"
        )


def of_all_processes(value: Any) -> np.ndarray:
    """What all processes say, [processes]; each waits for the others."""
    return process_allgather(np.asarray(value)).reshape(-1)


def create(directory: epath.PathLike, like: Memory, window: int, **content: Any) -> Segments:
    """Makes a directory for a memory with nothing in it.

    Args:
      like: a memory of the same types and shapes, but for its slots.
      window: most tokens that are moved to memory at a time.
      content: of its description: what is needed to go on from it.

    Raises:
      UserError: something is there, or it cannot be made.
    """
    whole = epath.Path(os.path.realpath(path_of(directory)))
    path, ours = own(whole), rf"{DESCRIPTION}|process-\d+-of-{jax.process_count()}.*"
    for place in (whole, path):
        names = [x.name for x in place.iterdir()] if place.is_dir() else []
        if place.exists() and not (place.is_dir() and all(re.fullmatch(ours, x) for x in names)):
            what = "holds a memory already: go on from it with --memory (load_memory), or"
            if content["text"] is None:
                what = (
                    "holds a memory already, and only one text without a mask that is read or "
                    "continued goes on after a kill: load what is there (load_memory), or"
                )
            raise UserError(
                f"{place}: {what if is_one(place) else 'something else is there:'} give a new name"
            )
    slots = _slots(window)
    of = {"slots": slots, "processes": jax.process_count()}
    sealed = seal({**formats.SEGMENTS.number, **of, **content})
    with new_directory(path, DESCRIPTION) as half:
        (half / DESCRIPTION).write_text(json.dumps(sealed))
    return _empty(path, like, slots, sealed["crc32"])


def in_ram(like: Memory, window: int) -> Segments:
    """No segments yet, of a memory in RAM; arguments as of `create`."""
    return _empty(None, like, _slots(window), 0)


def segmented(memory: Memory, tokens: int, slots: int = TOKENS) -> Segments:
    """The first tokens of a memory of one row in closed segments of at most so many slots, in RAM.

    Each process has all of them.
    """
    slots = min(slots, tokens)
    segments = dataclasses.replace(_empty(None, memory, slots, 0), process=0, processes=1)
    for start in range(0, tokens, slots):
        stop = min(tokens, start + slots)
        layers = jax.tree.map(lambda x, a=start, b=stop: x[:, :, a:b], memory.layers)
        segments = segments.with_closed(memory._replace(layers=layers), stop - start)
    return segments


def _slots(window: int) -> int:
    return memories.slots_for(max(TOKENS, window))


def _empty(path: epath.Path | None, like: Memory, slots: int, root: int) -> Segments:
    keys = [layer.k for layer in like.layers]
    indexes = tuple(clusters.no_index(k.x.shape[1], k.dim) for k in keys)
    place = {"process": jax.process_index(), "processes": jax.process_count()}
    return Segments(path, slots, root, indexes, **place)


def is_one(path: epath.Path) -> bool:
    """Whether a directory holds a memory in segments, or this process's part of one."""
    return (own(path) / DESCRIPTION).exists()


def describe(path: epath.Path) -> dict[str, Any]:
    """What `create` was told.

    Raises:
      UserError: it is damaged, of a newer fot_jax, or the share of one of several processes.
    """
    content = _unsealed(own(path) / DESCRIPTION)["content"]
    formats.SEGMENTS.check(path, content)
    if content.get("processes", 1) != jax.process_count():
        raise UserError(
            f"{path}: one process's share of a memory: give the directory that it is in, to "
            f"{content['processes']} processes"
        )
    return content


def load(path: epath.Path, like: Memory) -> Segments:
    """The segments of a directory, with all checksums compared; those that all processes have.

    Args:
      like: a memory of the same types and shapes, but for its slots.

    Raises:
      UserError: names the first segment that is not what was written; or another process adds to
        the memory so fast that its segments are merged and removed before they are read.
    """
    path = own(epath.Path(os.path.realpath(path)))
    sealed = _unsealed(path / DESCRIPTION)
    empty = _empty(path, like, sealed["content"]["slots"], sealed["crc32"])
    if len(set(of_all_processes(np.uint32(empty.root)).tolist())) > 1:
        raise UserError(f"{path}: another memory than those of other processes: give a new name")
    for _ in range(listings()):
        names = _names(path)
        try:
            segments, position = _with_files(empty, names, like)
        except UserError:
            if _names(path) == names:
                raise
        else:
            stop = of_all_processes(position).min()
            segments = segments._up_to(stop)
            whole = not stop if not segments.closed else segments.closed[-1].stop == stop
            if of_all_processes(whole).all():
                return segments
    raise UserError(f"{path}: {ADDED_TO}")


def listings() -> int:
    """How often a directory is listed; several processes would have to do it together."""
    return LISTINGS if jax.process_count() == 1 else 1


def _with_files(
    segments: Segments, names: dict[str, tuple[int, int]], like: Memory
) -> tuple[Segments, int]:
    """With those of the names, and how many were closed for them; as of `load`."""
    path, position = segments.directory, 0
    while names:
        here = [each for each in names.values() if each[0] == position]
        if not here:
            raise UserError(f"{path / _name(position, 1)}: missing: {_AGAIN}")
        first, count = max(here)  # what was merged into it may still be there
        place, position = path / _name(first, count), first + count
        names = {name: each for name, each in names.items() if sum(each) > position}
        sealed = _unsealed(place / OF_SEGMENT)
        content = sealed["content"]
        try:
            if content["after"] != segments.crc32:
                raise ValueError("of another memory or place")
            for name, crc32 in content["crc32"].items():
                if _crc32(place / name) != crc32:
                    raise ValueError(f"{name} is not what was written")
            layers = _mapped(place, like.layers, segments.room * count)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(f"{place}: damaged ({error}): {_AGAIN}") from error
        tokens = content["tokens"], content.get("of_all", content["tokens"])
        segment = _Segment(first, count, *tokens, sealed["crc32"], content["after"], layers)
        segments = segments._with(segment)
    return segments, position


def restart(memory: Memory) -> Memory:
    """The open segment after it was closed: nothing in it."""
    return memory._replace(appended=jnp.zeros_like(memory.appended))


def _name(first: int, count: int) -> str:
    return f"segment-{first:06}-{first + count - 1:06}"


def _names(path: epath.Path) -> dict[str, tuple[int, int]]:
    """The names of segments in a directory: first and count.

    A glob would take characters of the directory's own name for a pattern.
    """
    found = (re.fullmatch(r"segment-(\d+)-(\d+)", each.name) for each in path.iterdir())
    return {x[0]: (int(x[1]), int(x[2]) - int(x[1]) + 1) for x in found if x}


def _unsealed(path: epath.Path) -> dict[str, Any]:
    try:
        sealed = json.loads(path.read_text())
        unseal(sealed)
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise UserError(f"{path}: damaged: {_AGAIN}") from error
    return sealed


def _crc32(path: epath.Path) -> int:
    return zlib.crc32(np.memmap(path, mode="r"))

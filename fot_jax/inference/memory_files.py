"""Saved memories: a book is read once, and many questions are put to it.

A directory with memory.json, which says of what model it is and what shapes there are, and a
TensorStore (zarr) array for the keys and for the values of every memory layer and of the local
window of every layer. Chunks have checksums. Slots stand in the order they were filled, so that a
memory can be loaded onto any number of devices. Written whole or not at all.

A memory in segments (segment_files.py) has such a directory inside of its own, for what is not in
segments yet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from absl import logging
from etils import epath
from jax.sharding import Mesh

from fot_jax.common import formats
from fot_jax.common.atomic import new_directory
from fot_jax.common.checksums import seal, unseal
from fot_jax.common.errors import UserError
from fot_jax.common.paths import in_bucket, kvstore, path_of, why_unavailable
from fot_jax.common.trees import leaves_by_path
from fot_jax.inference import forward, segment_files
from fot_jax.inference.forward import Cache
from fot_jax.inference.segment_files import Segments
from fot_jax.inference.state import (
    SETTINGS_OF_READING,
    MemoryConfig,
    State,
    begin,
    check_segments,
)
from fot_jax.model import memory as memories
from fot_jax.model.config import ModelConfig
from fot_jax.model.lookup import Dense, IndexedTopK, Lookup
from fot_jax.model.memory import Memory

DESCRIPTION = "memory.json"
CHUNK = 2**24  # bytes of an array that are written at a time; a file says what its own are


def save(path: epath.PathLike, state: State, fingerprint: Any, mesh: Mesh | None) -> None:
    """Writes a state; see LanguageModel.save_memory.

    Args:
      fingerprint: what keys and values depend on, comparable after a turn through JSON.
      mesh: of the memory.

    Raises:
      UserError: the path cannot be written, or something else is there.
    """
    path = _resolved(path)
    check_processes(path, state)
    if not state.memory.layers:
        raise UserError(f"{path}: the model has no memory layers: there is no memory to save")
    path = place_of(path, state)
    _check_writable(path)
    appended = np.asarray(state.memory.appended)
    content = {
        **formats.MEMORY.number,
        "fingerprint": fingerprint,
        "config": _kept(state.config),
        "storage": state.memory.storage,
        # A full ring keeps its size; any other memory is saved as large as what is in it.
        "limit": min(state.limit, int(appended.max())),
        "appended": appended.tolist(),
        "stored": state.stored.tolist(),
        "held": state.held.tolist(),
        "places": state.places.tolist(),
        "window_dtype": jnp.dtype(state.cache.layers[0].k.dtype).name,
    }
    if state.segments is not None:
        content["after_segments"] = state.segments.crc32
    with new_directory(path, DESCRIPTION) as half:
        try:
            shards, arrays = memories.shards_of(mesh), {}
            for i, layer in enumerate(state.memory.layers if content["limit"] else ()):
                arrays |= _write_tree(half, f"memory_{i}", layer, content["limit"], shards)
            window, places = _window(state.cache), int(state.places.max())
            content["arrays"] = arrays | _write_tree(half, "window", window, places, 1)
        except ValueError as error:  # TensorStore's, of a full disk for one
            raise UserError(f"{path}: cannot be written: {_first_line(error)}") from error
        (half / DESCRIPTION).write_text(json.dumps(seal(content)))


def place_of(path: epath.PathLike, state: State) -> epath.Path:
    """Where a state is written when it is saved there.

    Raises:
      UserError: its memory is in segments, and in RAM or another directory, or this state a copy.
    """
    path = _resolved(path)
    if state.segments is None:
        _check_whole(path)
        return path
    if state.segments.directory is None:
        raise UserError(
            f"{path}: a memory with an index is saved where it is read into: give the directory "
            "before, as MemoryConfig.directory"
        )
    if segment_files.own(path) != state.segments.directory:
        raise UserError(f"{path}: the memory is in {state.segments.directory}: save it there")
    if not state.closes:
        raise UserError(f"{path}: of a copy of a state nothing is added to its directory")
    state.segments.check_alone()
    return state.segments.directory / segment_files.OPEN


def check_processes(path: epath.PathLike, state: State | None) -> None:
    """Checks that such a state, or a new one in RAM, can be saved by as many processes as run.

    Raises:
      UserError: only those in segments are, by several.
    """
    if jax.process_count() > 1 and (state is None or state.segments is None):
        raise UserError(
            f"{path}: a memory over several processes is saved in files as it is read, or not at "
            "all: give the directory before, as --memory_directory or MemoryConfig.directory"
        )


def check_place(path: epath.PathLike, loaded: epath.PathLike | None = None) -> None:
    """Checks that a memory can be saved there.

    Args:
      loaded: the memory that was read on from, if any.

    Raises:
      UserError: something else is there, or no directory can be made.
    """
    path = _resolved(path)
    if loaded is not None and path == _resolved(loaded) and segment_files.is_one(path):
        path = segment_files.own(path) / segment_files.OPEN
    else:
        _check_whole(path)
    _check_writable(path)


def _check_writable(path: epath.Path) -> None:
    """As `check_place`, of what is to be a memory by itself or after segments."""
    if path.exists() and not _is_memory(path):
        raise UserError(f"{path}: not a memory, so it is not replaced: give a new name")
    missing = []
    if not in_bucket(path):  # where directories neither are made nor stay
        missing = [parent for parent in path.parents if not parent.exists()]
    with contextlib.suppress(_Writable), new_directory(path, DESCRIPTION) as half:
        (half / DESCRIPTION).write_text("")
        raise _Writable
    for parent in missing:
        parent.rmdir()


class _Writable(Exception):
    """A directory could be made; none is wanted yet."""


def _kept(config: MemoryConfig) -> dict[str, Any]:
    """What a saved memory keeps of it."""
    config = dataclasses.asdict(config)
    return {name: config[name] for name in ("size", "ring", "storage", "shared")}


def _is_memory(path: epath.Path) -> bool:
    """Whether a directory holds a memory and nothing else."""
    try:
        arrays = _description(path)["arrays"]
    except UserError:
        return False
    return {each.name for each in path.iterdir()} <= {DESCRIPTION, *arrays}


def _resolved(path: epath.PathLike) -> epath.Path:
    """The path that a link leads to."""
    path = path_of(path)
    return path if in_bucket(path) else epath.Path(os.path.realpath(path))


def load(
    path: epath.PathLike, c: ModelConfig, fingerprint: Any, lookup: Lookup, mesh: Mesh | None
) -> State:
    """Reads a state; see LanguageModel.load_memory.

    Raises:
      UserError: nothing there, damaged, or of a model with another fingerprint.
    """
    path = path_of(path)
    if in_segments(path):
        return _load_directory(path, c, fingerprint, lookup, mesh)
    if isinstance(lookup, IndexedTopK):
        raise UserError(
            f"{path}: has no index, which memories in a directory of segments have: choose the "
            "best keys with TopK, or read the text again with MemoryConfig.directory"
        )
    _check_whole(path)
    return _load(path, c, fingerprint, lookup, mesh)


def _check_whole(path: epath.Path) -> None:
    """Checks that a memory, if one is there, is not what was read after segments."""
    if _is_memory(path) and "after_segments" in _description(path):
        raise UserError(f"{path}: the end of the memory in {path.parent}: give that")


def _load(path: epath.Path, c: ModelConfig, fingerprint, lookup, mesh) -> State:
    """A memory that is in no segments."""
    content = _description(path)
    _check_same_model(path, content["fingerprint"], fingerprint)
    config = MemoryConfig(**content["config"], lookup=lookup)
    storage = content["storage"]
    appended, places = np.asarray(content["appended"]), np.asarray(content["places"])
    rows = len(places)
    memory = memories.empty(c, len(appended), content["limit"], storage, mesh)
    cache = forward.empty_cache(c, rows, jnp.dtype(content["window_dtype"]), mesh)
    try:
        if memory.slots:
            memory = _read_memory(path, memory, content["arrays"], mesh)
        where = memory.appended.sharding
        memory = memory._replace(appended=jnp.asarray(appended, jnp.int32, device=where))
        cache = _read_window(path, cache, content["arrays"], places)
    except ValueError as error:  # TensorStore's
        if why := why_unavailable(error):
            raise UserError(f"{path}: {why}") from error
        raise UserError(f"{path}: damaged ({_first_line(error)}): read the text again") from error
    stored, held = (np.asarray(content[name]) for name in ("stored", "held"))
    return State(
        model=c,
        mesh=mesh,
        cache=cache,
        memory=memory,
        config=config,
        places=places,
        held=held,
        stored=stored,
        limit=content["limit"],
    )


# --- In segments ---------------------------------------------------------------------------------


def in_segments(path: epath.PathLike) -> bool:
    """Whether a directory holds a memory in segments.

    Raises:
      UserError: of another number of processes.
    """
    path = path_of(path)
    if not in_bucket(path):
        segment_files.check_processes(path)
    return segment_files.is_one(path)


def begin_segments(state: State, fingerprint: Any, text: np.ndarray | None) -> State:
    """The state with segments and their directory; or what a kill left of the same reading.

    Args:
      state: in which nothing was read.
      fingerprint: of the model; not needed for segments in RAM.
      text: [1, N] int32, all that is to be read; None: nobody reads it a second time.

    Raises:
      UserError: something is there, or it cannot be made.
    """
    config, window = state.config, state.rows * state.model.local_context
    if config.directory is None:
        segments = segment_files.in_ram(state.memory, window)
        return dataclasses.replace(state, segments=segments, closes=True)
    content = {
        "fingerprint": fingerprint,
        "config": _kept(config),
        "storage": state.memory.storage,
        "rows": state.rows,
        "text": None if text is None else {"tokens": text.size, "crc32": zlib.crc32(text.data)},
    }
    path, begun = path_of(config.directory), False
    if text is not None and in_segments(path):
        there = segment_files.describe(path)
        there, ours = (x | {"fingerprint": _comparable(x["fingerprint"])} for x in (there, content))
        begun = all(there.get(name) == x for name, x in ours.items())
    if segment_files.of_all_processes(begun).all():
        segments = segment_files.load(path, state.memory)
        if segments.tokens < text.size and not is_whole(segments):
            logging.warning(
                "%s: has the first %d of %d tokens: going on from there",
                *(path, segments.tokens, text.size),
            )
            return _after_segments(state, segments)
    segments = segment_files.create(config.directory, state.memory, window, **content)
    segment_files.of_all_processes(True)  # none writes a segment before all have a directory
    return dataclasses.replace(state, segments=segments, closes=True)


def is_whole(segments: Segments) -> bool:
    """Whether what was read after the segments of a directory is there, too, of all processes."""
    rest = segments.directory / segment_files.OPEN
    whole = rest.exists() and _description(rest).get("after_segments") == segments.crc32
    return bool(segment_files.of_all_processes(whole).all())


def _load_directory(path: epath.Path, c: ModelConfig, fingerprint, lookup, mesh) -> State:
    content = segment_files.describe(path)
    _check_same_model(path, content["fingerprint"], fingerprint)
    config = MemoryConfig(**content["config"], lookup=lookup, directory=str(path))
    rows, dtype = content["rows"], content["fingerprint"]["dtype"]
    check_segments(c, mesh, rows, config)
    like = memories.empty(c, 1, 0, content["storage"])
    for _ in range(segment_files.listings()):
        segments = segment_files.load(path, like)
        end = segments.directory / segment_files.OPEN
        before = _marks(end)
        try:
            if is_whole(segments):
                state = _load(end, c, fingerprint, Dense(), mesh)
                return dataclasses.replace(state, config=config, segments=segments, closes=True)
            break
        except UserError:
            if _marks(end) == before:
                raise
    else:
        raise UserError(f"{path}: {segment_files.ADDED_TO}")
    logging.warning(
        "%s: has the first %d tokens that were read, and not what was read after them: read on "
        "from there",
        path,
        segments.tokens,
    )
    # Of the type that its segments have, whatever the model's own is now.
    as_kept = dataclasses.replace(config, storage=content["storage"])
    state = begin(c, dtype, mesh, rows=rows, config=as_kept, state=None)
    return dataclasses.replace(_after_segments(state, segments), config=config)


def _marks(path: epath.Path) -> str | None:
    """The description of a memory as it is now; None: there is none."""
    try:
        return (path / DESCRIPTION).read_text()
    except FileNotFoundError:
        return None


def _after_segments(state: State, segments: Segments) -> State:
    """A state in which nothing was read, as it was when the last segment had been closed."""
    stored = state.stored + segments.tokens
    return dataclasses.replace(state, stored=stored, segments=segments, closes=True)


# --- Memories ------------------------------------------------------------------------------------


def _window(cache: Cache):
    """The arrays of a window, all of them with places on the third axis."""
    return cache.layers, cache.valid[:, None]


def _read_memory(path: epath.Path, memory: Memory, crcs, mesh: Mesh | None) -> Memory:
    put = jax.jit(functools.partial(memories.write, mesh=mesh), donate_argnums=0)
    layers = list(memory.layers)
    for i in range(len(layers)):
        for start, chunk in _read_tree(path, f"memory_{i}", layers[i], crcs):
            length = jax.tree.leaves(chunk)[0].shape[2]
            slots = np.tile(start + np.arange(length, dtype=np.int32), (memory.rows, 1))
            layers[i] = put(layers[i], chunk, slots)
    return memory._replace(layers=tuple(layers))


def _read_window(path: epath.Path, cache: Cache, crcs, places: np.ndarray) -> Cache:
    window = _window(cache)
    for start, chunk in _read_tree(path, "window", window, crcs):
        window = jax.tree.map(
            lambda x, new, start=start: jax.lax.dynamic_update_slice_in_dim(x, new, start, 2),
            window,
            chunk,
        )
    length = jnp.asarray(places, jnp.int32, device=cache.length.sharding)
    return Cache(window[0], window[1][:, 0], length)


# --- Arrays --------------------------------------------------------------------------------------


def _spec(path: epath.Path, name: str) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": kvstore(path / name),
        # A missing chunk is damage, not zeros.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }


def _write_tree(path: epath.Path, prefix: str, tree, length: int, shards: int) -> dict[str, int]:
    """The first `length` slots of every array [B, K, M, ...]. Returns a checksum of each."""
    crcs = {}
    for name, x in leaves_by_path(tree).items():
        name = f"{prefix}_{name.replace('/', '_')}"
        per_slot = x.nbytes // max(1, x.shape[2])
        chunk = max(1, min(length, CHUNK // max(1, per_slot)))
        array = ts.open(
            _spec(path, name),
            create=True,
            dtype=ts.dtype(x.dtype.name),
            shape=[*x.shape[:2], length, *x.shape[3:]],
            chunk_layout=ts.ChunkLayout(chunk_shape=[*x.shape[:2], chunk, *x.shape[3:]]),
            codec=ts.CodecSpec(
                {"driver": "zarr3", "codecs": [{"name": "bytes"}, {"name": "crc32c"}]}
            ),
        ).result()
        crcs[name] = 0  # of no slots, too: the description names all that is there
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            content = _slots(x, start, stop, shards)
            array[:, :, start:stop].write(content).result()
            crcs[name] = _crc32(content, crcs[name])
    return crcs


def _crc32(x: np.ndarray, crc: int) -> int:
    """Of the bytes: NumPy gives no buffer of bfloat16 ones."""
    return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8), crc)


def _slots(x: jax.Array, start: int, stop: int, shards: int) -> np.ndarray:
    """Slots start … stop - 1 in the order they were filled: slot s is on shard s % shards."""
    first, last, of_shard = start // shards, -(-stop // shards), x.shape[2] // shards
    parts = [
        np.asarray(x[:, :, shard * of_shard + first : shard * of_shard + last])
        for shard in range(shards)
    ]
    in_order = np.stack(parts, 3).reshape(*x.shape[:2], -1, *x.shape[3:])
    return in_order[:, :, start - first * shards : stop - first * shards]


def _read_tree(path: epath.Path, prefix: str, tree, crcs) -> Iterator[tuple[int, Any]]:
    """Chunks of slots of all arrays of a tree: (first slot, tree of [B, K, slots, ...]).

    Raises:
      ValueError: an array is not what was written, known at the end only.
    """
    leaves = {f"{prefix}_{name.replace('/', '_')}": x for name, x in leaves_by_path(tree).items()}
    arrays = {name: ts.open(_spec(path, name), open=True).result() for name in leaves}
    written = {
        name: _Checksum(array.chunk_layout.read_chunk.shape[2]) for name, array in arrays.items()
    }
    length = min(array.shape[2] for array in arrays.values())
    for name, array in arrays.items():
        x = leaves[name]
        shape = (*x.shape[:2], length, *x.shape[3:])
        if array.shape != shape or array.dtype.name != x.dtype.name or length > x.shape[2]:
            raise ValueError(f"{name} is {array.dtype.name}{list(array.shape)}")
    chunk = min(each.slots for each in written.values())
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        reads = [array[:, :, start:stop].read() for array in arrays.values()]
        chunks = [np.ascontiguousarray(read.result()) for read in reads]
        for name, content in zip(leaves, chunks, strict=True):
            written[name].add(content)
        yield start, jax.tree.unflatten(jax.tree.structure(tree), chunks)
    if wrong := [name for name in leaves if written[name].value() != crcs.get(name, 0)]:
        raise ValueError(f"{wrong[0]} is not what was written")


class _Checksum:
    """Of an array as `_write_tree` went through it: chunk by chunk, each in the order of its axes.

    Attributes:
      slots: of a chunk.
    """

    def __init__(self, slots: int):
        self.slots, self._crc, self._rest = slots, 0, None

    def add(self, content: np.ndarray) -> None:
        """More slots [B, K, slots, ...], as many as were read at a time."""
        if self._rest is not None:
            content = np.concatenate([self._rest, content], axis=2)
        while content.shape[2] >= self.slots:
            self._take(content[:, :, : self.slots])
            content = content[:, :, self.slots :]
        self._rest = content

    def value(self) -> int:
        if self._rest is not None and self._rest.shape[2]:
            self._take(self._rest)
            self._rest = None
        return self._crc

    def _take(self, chunk: np.ndarray) -> None:
        self._crc = _crc32(chunk, self._crc)


# --- Description ---------------------------------------------------------------------------------


def _description(path: epath.Path) -> dict[str, Any]:
    if not (path / DESCRIPTION).exists() or (path / DESCRIPTION).is_dir():
        raise UserError(f"{path}: no memory here: give a directory that a memory was saved in")
    try:
        content = unseal(json.loads((path / DESCRIPTION).read_text()))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path / DESCRIPTION}: damaged: read the text again") from error
    formats.MEMORY.check(path, content)
    return content


def _comparable(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint of this or an earlier version, as it is after a turn through JSON."""
    fields = dataclasses.fields(ModelConfig)
    defaults = {x.name: x.default for x in fields if x.default is not dataclasses.MISSING}
    model = defaults | fingerprint["model"]  # of before a field was there
    model = {name: value for name, value in model.items() if name not in SETTINGS_OF_READING}
    return json.loads(json.dumps(fingerprint | {"model": model}))


def _check_same_model(path: epath.Path, saved: Any, ours: Any) -> None:
    saved, ours = _comparable(saved), _comparable(ours)
    for field, value in ours["model"].items():
        if saved["model"].get(field) != value:
            raise UserError(
                f"{path}: the memory of another model, with {field} = "
                f"{saved['model'].get(field)} and not {value}: load that model, or read the text "
                "again"
            )
    if saved["dtype"] != ours["dtype"]:
        raise UserError(
            f"{path}: a memory that was computed in {saved['dtype']}, not in {ours['dtype']}: load "
            f"the model in {saved['dtype']}, or read the text again"
        )
    if saved != ours:
        raise UserError(
            f"{path}: the memory of a model with other parameters, of another run or step: load "
            "that checkpoint, or read the text again"
        )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].split(" [")[0]

"""The tensors of a Hugging Face directory: their names, and files of them read and written.

Theirs are of a layer each, [out, in], ours of all layers together, [layers, in, out]. Both keep
rotary dimensions as two halves, so nothing needs to be permuted. Tensors are read and written one
by one, whatever the size of the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from fot_jax.common.errors import UserError
from fot_jax.hugging_face.weight_files import DTYPES, SAFETENSORS, Entry, open_weights
from fot_jax.model.config import ModelConfig

SHARD = 5 * 10**9  # bytes of a file, as transformers cuts them
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Tensor(NamedTuple):
    """A tensor of theirs, and what it is of ours."""

    name: str
    shape: tuple[int, ...]
    path: str  # of our parameter
    layer: int | None  # its place on the leading axis; None: the whole
    transposed: bool


def of_model(c: ModelConfig) -> Iterator[Tensor]:
    """All tensors of a model, in the order they are computed with."""
    E, F, V = c.hidden_size, c.mlp_dim, c.vocab_size
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def norm(name: str, path: str, layer: int | None = None):
        yield Tensor(f"{name}.weight", (E,), f"{path}/scale", layer, False)
        if c.norm == "layernorm":
            yield Tensor(f"{name}.bias", (E,), f"{path}/bias", layer, False)

    yield Tensor(_EMBEDDING, (V, E), "embedding", None, False)
    for i in range(c.num_layers):
        theirs = f"model.layers.{i}"
        yield from norm(f"{theirs}.input_layernorm", "layers/attention_norm", i)
        for name, ours, shape in (
            ("q_proj", "query", (queries, E)),
            ("k_proj", "key", (keys, E)),
            ("v_proj", "value", (keys, E)),
            ("o_proj", "out", (E, queries)),
        ):
            name = f"{theirs}.self_attn.{name}.weight"
            yield Tensor(name, shape, f"layers/attention/{ours}", i, True)
        if c.qk_norm:
            name = f"{theirs}.self_attn.log_scale"
            yield Tensor(name, (c.num_heads,), "layers/attention/log_scale", i, False)
        if c.memory_gate:
            name = f"{theirs}.self_attn.memory_gate"
            yield Tensor(name, (c.num_heads,), "layers/attention/memory_gate", i, False)
        yield from norm(f"{theirs}.post_attention_layernorm", "layers/mlp_norm", i)
        for ours, shape in (("gate", (F, E)), ("up", (F, E)), ("down", (E, F))):
            if ours != "gate" or c.mlp == "swiglu":
                name = f"{theirs}.mlp.{ours}_proj.weight"
                yield Tensor(name, shape, f"layers/mlp/{ours}", i, True)
    yield from norm("model.norm", "final_norm")
    if not c.tie_embeddings:
        yield Tensor(_HEAD, (V, E), "head", None, True)


def by_parameter(c: ModelConfig) -> list[Tensor]:
    """The same in our order: all layers of a parameter one after the other."""
    tensors = list(of_model(c))
    order = {path: i for i, path in enumerate(dict.fromkeys(each.path for each in tensors))}
    return sorted(tensors, key=lambda each: order[each.path])


# --- Reading -------------------------------------------------------------------------------------


class Reader:
    """The parameters of a Hugging Face directory, as ours, read when they are asked for.

    They are those that `transformers` takes, or the directory is refused.

    Attributes:
      config: of the model; not tied where the files have a head that is not the embedding.
      arrays: our parameters by path: (shape, dtype).
    """

    def __init__(self, directory: epath.PathLike, config: ModelConfig):
        """Looks at the files' headers; pickles are read.

        Raises:
          UserError: a file is missing or damaged, or the tensors are not those of the model.
        """
        self.directory = epath.Path(directory)
        self._files, self._index = open_weights(self.directory)
        self._entries = _by_usual_name(self._files.entries)
        self._check_layers(config.num_layers)
        self.config = self._tied(config)
        self._tensors = {(each.path, each.layer): each for each in of_model(self.config)}
        self._check()
        self.arrays: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for each in self._tensors.values():
            dtype, layers = DTYPES[self._entries[each.name].type], each.layer is not None
            shape = each.shape[::-1] if each.transposed else each.shape
            shape = (config.num_layers, *shape) if layers else shape
            before = self.arrays.get(each.path, (shape, dtype))[1]
            self.arrays[each.path] = shape, _wider(before, dtype)

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter of ours, of one layer if it is of a layer."""
        tensor = self._tensors[path, layer]
        x = self._files.read(self._entries[tensor.name])
        x = x.astype(self.arrays[path][1], copy=False)
        return np.ascontiguousarray(x.T) if tensor.transposed else x

    def _check_layers(self, count: int) -> None:
        """Before all tensors of as many layers as config.json likes are listed."""
        last = f"model.layers.{count - 1}."
        if not any(name.startswith(last) for name in self._entries):
            raise UserError(
                f"{self.directory}: has no tensor {last}input_layernorm.weight, which config.json "
                "needs: restore the files from a copy"
            )

    def _tied(self, config: ModelConfig) -> ModelConfig:
        """The configuration, with the head as the files have it.

        As transformers ties them: either gives the other one; two that differ stay two.
        """
        if not config.tie_embeddings or _HEAD not in self._entries:
            return config
        head = self._entries[_HEAD]
        embedding = self._entries.setdefault(_EMBEDDING, head)
        if embedding is head:
            del self._entries[_HEAD]
        elif (
            head.shape != embedding.shape
            or not {head.type, embedding.type} <= set(DTYPES)
            or not np.array_equal(*map(self._files.read, (head, embedding)))
        ):
            return dataclasses.replace(config, tie_embeddings=False)
        return config

    def _check(self) -> None:
        wanted = {each.name: each.shape for each in self._tensors.values()}
        for name, shape in wanted.items():
            if name not in self._entries:
                advice = "restore the files from a copy"
                if name == _HEAD:
                    advice += ", or set tie_word_embeddings where the embedding is the head"
                raise UserError(
                    f"{self.directory}: has no tensor {name}, which config.json needs: {advice}"
                )
            entry = self._entries[name]
            file = self._index.get(entry.name, entry.file)
            if file != entry.file:
                raise UserError(
                    f"{entry.file}: has {entry.name}, which the index says is in {file.name}: get "
                    "both and the index again"
                )
            if entry.type not in DTYPES:
                raise UserError(
                    f"{entry.file}: {entry.name} is of type {entry.type}: have {', '.join(DTYPES)}"
                )
            if entry.shape != shape:
                raise UserError(
                    f"{entry.file}: {entry.name} is {list(entry.shape)}, but {list(shape)} by "
                    "config.json: correct config.json"
                )
        for name, entry in self._entries.items():
            # Angles, which older releases of transformers saved though they are computed.
            if name not in wanted and name != _HEAD and ".rotary_emb." not in f".{name}":
                raise UserError(
                    f"{entry.file}: {entry.name} is no tensor of a LLaMA: the model is of another "
                    "architecture than config.json says"
                )


def _wider(a: np.dtype, b: np.dtype) -> np.dtype:
    return a if a == b else np.dtype(np.float32)


def _by_usual_name(entries: dict[str, Entry]) -> dict[str, Entry]:
    """By the names of a model with its head.

    transformers adds what the names of a model without its head lack, and takes away a prefix that
    is there once more.
    """
    parts = "embed_tokens.", "layers.", "norm."
    whole = tuple(f"model.{part}" for part in parts) + ("lm_head.",)
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        within = name.removeprefix("model.")
        usual = f"model.{name}" if name.startswith(parts) else name
        usual = within if within != name and within.startswith(whole) else usual
        if (other := found.setdefault(usual, entry)) is not entry:
            raise UserError(
                f"{entry.file}: {other.name} and {name} are two names of one tensor: save the "
                "model again"
            )
    return found


# --- Writing -------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a tensor goes."""

    file: str
    start: int  # byte of the file
    dtype: np.dtype


def write(
    directory: epath.Path,
    c: ModelConfig,
    dtype_of: Callable[[str], np.dtype],
    read: Callable[[str, int | None], np.ndarray],
    progress: Callable[[int], Any],
) -> None:
    """Writes safetensors of at most 5 GB and, of several, their index.

    A parameter of ours is read layer after layer before the next one, though its layers are far
    apart in the files.

    Args:
      dtype_of: of a parameter of ours, by path.
      read: a parameter of ours, by path and layer, of that dtype.
      progress: called with the bytes of each tensor when it is written.
    """
    tensors = list(of_model(c))
    places, headers = _layout(tensors, dtype_of)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((directory / name).open("wb")) for name in headers}
        for name, header in headers.items():
            files[name].write(header)
        for tensor in by_parameter(c):
            x = read(tensor.path, tensor.layer)
            x = np.ascontiguousarray(x.T if tensor.transposed else x)
            place = places[tensor.name]
            files[place.file].seek(place.start)
            files[place.file].write(x.view(np.uint8).data)
            progress(x.nbytes)
    if len(headers) > 1:
        total = sum(math.prod(each.shape) * places[each.name].dtype.itemsize for each in tensors)
        where = {name: place.file for name, place in places.items()}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _layout(
    tensors: list[Tensor], dtype_of: Callable[[str], np.dtype]
) -> tuple[dict[str, _Place], dict[str, bytes]]:
    """Where each tensor goes, in which file, and the beginning of each file.

    https://github.com/huggingface/safetensors#format; ours because the library's own writer wants
    all tensors of a file in memory.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for tensor in tensors:
        dtype = dtype_of(tensor.path)
        nbytes = math.prod(tensor.shape) * dtype.itemsize
        if size + nbytes > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][tensor.name] = {
            "dtype": names[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [size, size + nbytes],
        }
        size += nbytes
    places, headers = {}, {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else SAFETENSORS
        text = json.dumps({"__metadata__": {"format": "pt"}, **shard}, separators=(",", ":"))
        text += " " * (-len(text) % 8)  # tensors are aligned
        headers[file] = len(text).to_bytes(8, "little") + text.encode()
        for name, entry in shard.items():
            start = len(headers[file]) + entry["data_offsets"][0]
            places[name] = _Place(file, start, DTYPES[entry["dtype"]])
    return places, headers

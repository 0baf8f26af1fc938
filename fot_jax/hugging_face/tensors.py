"""The tensors of a Hugging Face directory: their names, and files of them read and written.

Theirs are of a layer each, [out, in], ours of all layers together, [layers, in, out]. Both keep
rotary dimensions as two halves, so nothing needs to be permuted. Tensors are read and written one
by one, whatever the size of the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from fot_jax.common.bucket_files import read_range
from fot_jax.common.errors import UserError
from fot_jax.common.paths import in_bucket, is_file
from fot_jax.model.transformer import ModelConfig

SHARD = 5 * 10**9  # bytes of a file, as transformers cuts them
_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


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


class Entry(NamedTuple):
    """Where a tensor is, and what its file says of it."""

    file: epath.Path
    name: str  # there
    shape: tuple[int, ...]
    type: str  # as the file calls it, which may be one that no weight has


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
        self._files, self._index = _files(self.directory)
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
                    "config.json: mend config.json"
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


def _files(directory: epath.Path) -> tuple[_Safetensors | _Pickles, dict[str, epath.Path]]:
    """The files of tensors there, and in which of them an index says that each is.

    The first that transformers looks for; it passes over the others.
    """
    if is_file(directory / "adapter_config.json"):
        raise UserError(
            f"{directory}: holds an adapter (adapter_config.json), which is not applied: merge it "
            "into the model (peft: merge_and_unload), or remove it"
        )
    for name, kind in ((_SAFETENSORS, _Safetensors), (_PICKLE, _Pickles)):
        index = directory / f"{name}.index.json"
        if is_file(directory / name):
            return kind([directory / name]), {}
        if is_file(index):
            files, where = _indexed(index)
            return kind(files), where
    raise UserError(
        f"{directory}: no {_SAFETENSORS} (or index, or pytorch_model.bin): the directory has no "
        "weights"
    )


def _indexed(index: epath.Path) -> tuple[list[epath.Path], dict[str, epath.Path]]:
    """The files that an index names, and in which of them each tensor is."""
    try:
        where = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(name, str) for name in where.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{index}: damaged: it has no weight_map: restore it from a copy"
        ) from error
    for name in where.values():
        if "/" in name or name in ("", ".", ".."):
            raise UserError(f"{index}: names a file {name!r} outside the directory")
    where = {tensor: index.parent / name for tensor, name in where.items()}
    files = sorted(set(where.values()))
    for file in files:
        if not is_file(file):
            raise UserError(f"{file}: missing, though {index.name} names it: get it again")
    return files, where


def _damaged(file: epath.Path, said: str) -> UserError:
    with file.open("rb") as content:
        if content.read(11) == b"version htt":  # https://git-lfs.github.com/spec/v1
            return UserError(f"{file}: a pointer of Git LFS, not the file: run git lfs pull there")
    return UserError(f"{file}: damaged{said}: get it again")


class _Safetensors:
    def __init__(self, files: list[epath.Path]):
        self.entries: dict[str, Entry] = {}
        # Anew each time: a file is mapped, and what was read of it stays in memory. Of one in a
        # bucket no more is kept than its header.
        self._opened = functools.cache(_opened) if in_bucket(files[0]) else _opened
        for file in files:
            with self._opened(file) as tensors:
                for name in tensors.keys():
                    header = tensors.get_slice(name)
                    shape = tuple(header.get_shape())
                    self.entries[name] = Entry(file, name, shape, header.get_dtype())

    def read(self, entry: Entry) -> np.ndarray:
        with self._opened(entry.file) as tensors:
            return tensors.get_tensor(entry.name)


def _opened(file: epath.Path):
    if in_bucket(file):
        return _InBucket(file)
    try:
        return safetensors.safe_open(str(file), "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(file, f" ({error})") from error


class _InBucket:
    """A file of safetensors in a bucket, as the library opens one of this machine.

    The library wants a file that can be mapped, or all of it in memory. Of this one the header is
    read once, and a tensor when it is asked for. https://github.com/huggingface/safetensors#format
    """

    def __init__(self, file: epath.Path):
        self._file = file
        try:
            self._data = 8 + int.from_bytes(self._read(0, 8), "little")
            if self._data > 10**8:  # the library's limit
                raise ValueError("a header of more than 100 MB")
            self._header = json.loads(self._read(8, self._data))
            self._header.pop("__metadata__", None)
            places = sorted(x["data_offsets"] for x in self._header.values())
            ends = [0, *(stop for _, stop in places)]
            if [start for start, _ in places] != ends[:-1]:
                raise ValueError("tensors that overlap, or with something between them")
            for name, x in self._header.items():
                (start, stop), dtype = x["data_offsets"], DTYPES.get(x["dtype"])
                if dtype is not None and math.prod(x["shape"]) * dtype.itemsize != stop - start:
                    raise ValueError(f"{name} has {stop - start} bytes for {x['shape']}")
            if self._data + ends[-1] != file.stat().length:
                raise ValueError("it is cut off, or has something after its end")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(file, f" ({error})") from error

    def __enter__(self) -> _InBucket:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def keys(self) -> list[str]:
        return list(self._header)

    def get_slice(self, name: str) -> _InBucket._Slice:
        return self._Slice(self._header[name])

    class _Slice(NamedTuple):
        of_header: dict[str, Any]

        def get_dtype(self) -> str:
            return self.of_header["dtype"]

        def get_shape(self) -> list[int]:
            return self.of_header["shape"]

    def get_tensor(self, name: str) -> np.ndarray:
        x = self._header[name]
        start, stop = x["data_offsets"]
        content = self._read(self._data + start, self._data + stop)
        return np.frombuffer(content, DTYPES[x["dtype"]]).reshape(x["shape"])

    def _read(self, start: int, stop: int) -> bytes:
        content = read_range(self._file, start, stop)
        if len(content) != stop - start:
            raise ValueError("it is cut off")
        return content


class _Pickles:
    """Files of torch.save, which only torch can read without running what is in them."""

    def __init__(self, files: list[epath.Path]):
        if in_bucket(files[0]):
            raise UserError(
                f"{files[0]}: a pickle, of which no part can be read alone: copy the directory "
                "here, or give safetensors"
            )
        try:
            import torch
        except ImportError as error:
            raise UserError(
                f"{files[0]}: a pickle, which is read by torch alone: install it "
                "(pip install 'fot_jax[torch]'), or give safetensors"
            ) from error
        self._torch = torch
        self._held: tuple[Any, dict[str, Any]] = None, {}
        self.entries: dict[str, Entry] = {}
        kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        for file in files:
            for name, tensor in self._load(file).items():
                if not isinstance(tensor, torch.Tensor):
                    raise UserError(f"{file}: {name} is no tensor: save tensors alone")
                kind = kinds.get(tensor.dtype, str(tensor.dtype))
                self.entries[name] = Entry(file, name, tuple(tensor.shape), kind)

    def _load(self, file: epath.Path) -> dict[str, Any]:
        if self._held[0] != file:
            mapped = zipfile.is_zipfile(file)  # files of 2019 and before are not
            try:
                with warnings.catch_warnings(action="ignore"):
                    tensors = self._torch.load(
                        str(file), map_location="cpu", weights_only=True, mmap=mapped
                    )
            except Exception as error:  # torch raises many kinds, and advice that is none
                raise _damaged(file, ", or holds more than tensors") from error
            if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
                raise UserError(f"{file}: holds a {type(tensors).__name__}, not named tensors")
            self._held = file, tensors
        return self._held[1]

    def read(self, entry: Entry) -> np.ndarray:
        try:
            tensor = self._load(entry.file)[entry.name].detach().resolve_neg().contiguous()
            if entry.type == "BF16":
                return tensor.view(self._torch.int16).numpy().view(ml_dtypes.bfloat16)
            return tensor.numpy()
        except (RuntimeError, TypeError) as error:  # sparse ones and their like
            raise UserError(
                f"{entry.file}: {entry.name} is no plain tensor: save it as one"
            ) from error


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
        (directory / f"{_SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n")


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
        file = file if len(shards) > 1 else _SAFETENSORS
        text = json.dumps({"__metadata__": {"format": "pt"}, **shard}, separators=(",", ":"))
        text += " " * (-len(text) % 8)  # tensors are aligned
        headers[file] = len(text).to_bytes(8, "little") + text.encode()
        for name, entry in shard.items():
            start = len(headers[file]) + entry["data_offsets"][0]
            places[name] = _Place(file, start, DTYPES[entry["dtype"]])
    return places, headers

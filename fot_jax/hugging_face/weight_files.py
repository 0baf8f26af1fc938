"""The files of weights in a Hugging Face directory: safetensors or pickles, here or in a bucket.

The files are opened, and their tensors listed; a tensor is read when it is asked for.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from fot_jax.common.bucket_files import read_range
from fot_jax.common.errors import UserError
from fot_jax.common.paths import in_bucket, is_file

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Entry(NamedTuple):
    """Where a tensor is, and what its file says of it."""

    file: epath.Path
    name: str  # there
    shape: tuple[int, ...]
    type: str  # as the file calls it, which may be one that no weight has


def open_weights(directory: epath.Path) -> tuple[Safetensors | Pickles, dict[str, epath.Path]]:
    """The files of tensors there, and in which of them an index says that each is.

    The first that transformers looks for; it passes over the others.
    """
    if is_file(directory / "adapter_config.json"):
        raise UserError(
            f"{directory}: holds an adapter (adapter_config.json), which is not applied: merge it "
            "into the model (peft: merge_and_unload), or remove it"
        )
    for name, kind in ((SAFETENSORS, Safetensors), (PICKLE, Pickles)):
        index = directory / f"{name}.index.json"
        if is_file(directory / name):
            return kind([directory / name]), {}
        if is_file(index):
            files, where = _indexed(index)
            return kind(files), where
    raise UserError(
        f"{directory}: no {SAFETENSORS} (or index, or pytorch_model.bin): the directory has no "
        "weights"
    )


def _indexed(index: epath.Path) -> tuple[list[epath.Path], dict[str, epath.Path]]:
    """The files that an index names, and in which of them each tensor is."""
    try:
        where = json.loads(index.read_text())["weight_map"]
        if not where or not all(isinstance(name, str) for name in where.values()):
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


class Safetensors:
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


class Pickles:
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
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # CVE-2025-32434
            raise UserError(
                f"{files[0]}: a pickle, which torch {torch.__version__} does not read safely: "
                "install 2.6 or newer (pip install 'fot_jax[torch]'), or give safetensors"
            )
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

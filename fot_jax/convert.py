"""`fot convert`: checkpoints from and to the directories of the `transformers` library.

Parameters are copied one layer of one matrix at a time (of a checkpoint that training wrote: one of
all layers), so that large models can be converted on small machines. What is written takes its name
when all of it is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from fot_jax.checkpoints import loading, stream
from fot_jax.common.atomic import new_directory
from fot_jax.common.errors import UserError
from fot_jax.common.paths import in_bucket, path_of
from fot_jax.common.progress import bar
from fot_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer
from fot_jax.data.saved_vocabulary import load_vocabulary
from fot_jax.data.vocabulary import Symbols, Vocabulary
from fot_jax.gguf import directory as gguf_directory
from fot_jax.gguf import weights as gguf_weights
from fot_jax.hugging_face import config as configs
from fot_jax.hugging_face import tensors, tokenizers, weight_files
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import MemoryConfig
from fot_jax.model.transformer import ModelConfig

DTYPES = {dtype.name: dtype for dtype in weight_files.DTYPES.values()}


class Reader(Protocol):
    """The parameters of a checkpoint of either kind."""

    directory: epath.Path  # a workdir, or a Hugging Face directory
    config: ModelConfig
    arrays: dict[str, tuple[tuple[int, ...], np.dtype]]  # by path

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter, of one layer if it is of a layer."""


def reader(
    path: epath.PathLike,
    memory_layers: Sequence[int] | None = None,
    local_context: int | None = None,
) -> Reader:
    """Opens a checkpoint of either kind; the arguments after the path are for Hugging Face ones."""
    path = path_of(path)
    if configs.is_directory(path):
        return tensors.Reader(path, configs.read(path, memory_layers, local_context))
    return stream.Reader(path)


# --- Verbs ---------------------------------------------------------------------------------------


def from_hugging_face(
    source: epath.PathLike,
    output: epath.PathLike,
    memory_layers: Sequence[int] | None = None,
    local_context: int | None = None,
    dtype: str | None = None,
) -> None:
    """Writes a workdir with the parameters of a Hugging Face directory, as step 0.

    `train.initialize_from` starts from it; LanguageModel.load and the other verbs read it.

    Args:
      source: of any LLaMA-architecture model.
      output: new, or an empty directory.
      memory_layers, local_context: as of hugging_face.config.read.
      dtype: float32, float16 or bfloat16; None: what the files have.

    Raises:
      UserError: the directory is not complete, or of another architecture; the output is there.
    """
    source, output = path_of(source), _output(output)
    with new_directory(output, "checkpoints") as half, contextlib.ExitStack() as stack:
        content, vocabulary = _opened(source, half, memory_layers, local_context)
        config, arrays, dtype_of = content.config, content.arrays, _dtypes(content, dtype)
        if vocabulary is not None:
            loading.check_rows(source, vocabulary, config.vocab_size)
            vocabulary.save(half / "vocabulary")
        progress = stack.enter_context(bar(_bytes(content, dtype_of), "byte"))
        streams = {
            path: stream.StreamedArray(
                *(shape, dtype_of(path), path.startswith("layers/")),
                functools.partial(_read, content, dtype_of, path, progress=progress),
            )
            for path, (shape, _) in arrays.items()
        }
        stream.save(half, config, streams)
        _output(output)  # or what has come there since would be lost
    _say_done(output, config, dtype_of)


def to_hugging_face(
    checkpoint: epath.PathLike, output: epath.PathLike, dtype: str | None = None
) -> None:
    """Writes a checkpoint as a directory for PyTorch.

    Of a model with memory it holds our modelling files too. LLaMA code of any kind reads the same
    directory as the model without its memory.

    Args:
      checkpoint: a workdir, a step inside it, or a Hugging Face directory (of LongLLaMA, say).
      output: new, or an empty directory.
      dtype: float32, float16 or bfloat16; None: as saved.

    Raises:
      UserError: no checkpoint, a damaged one; the output is there.
    """
    output = _output(output)
    content = reader(checkpoint)
    c, dtype_of = content.config, _dtypes(content, dtype)
    with (
        new_directory(output, configs.CONFIG) as half,
        bar(_bytes(content, dtype_of), "byte") as progress,
    ):
        marks = _others(content, half)  # may be refused, and is quick
        tensors.write(half, c, dtype_of, functools.partial(_read, content, dtype_of), progress)
        if configs.needs_our_code(c):
            for file in (Path(__file__).parent / "pytorch").glob("*_fot.py"):
                (half / file.name).write_bytes(file.read_bytes())
        name = dtype_of("embedding").name
        values = configs.content(_as_read(content), name, marks)
        (half / configs.CONFIG).write_text(_json(values))
        if configs.is_directory(_kept(content)):
            _same_tokens(loading.vocabulary_of(content.directory), half)
        _output(output)  # or what has come there since would be lost
    _say_done(output, c, dtype_of)


def _opened(
    source: epath.Path,
    workdir: epath.Path,
    memory_layers: Sequence[int] | None,
    local_context: int | None,
) -> tuple[tensors.Reader | gguf_weights.Reader, Vocabulary | None]:
    """Weights and tokenizer of a model; what came beside the weights is kept in the workdir."""
    if source.suffix != gguf_weights.SUFFIX:
        content = tensors.Reader(source, configs.read(source, memory_layers, local_context))
        vocabulary = tokenizers.vocabulary_of(source)
        loading.keep_files(source, workdir)
        return content, vocabulary
    file = gguf_weights.File(source)
    (workdir / loading.KEPT).mkdir()
    vocabulary = gguf_directory.write(file, workdir / loading.KEPT)
    config = configs.read(workdir / loading.KEPT, memory_layers, local_context)
    return gguf_weights.Reader(file, config), vocabulary


def _say_done(output: epath.Path, c: ModelConfig, dtype_of: Callable[[str], np.dtype]) -> None:
    layers = ", ".join(map(str, c.memory_layers)) or "none"
    print(
        f"{output}: {c.num_layers} layers, with memory: {layers}; windows of {c.local_context} "
        f"tokens; {dtype_of('embedding').name}"
    )


def _kept(content: Reader) -> epath.Path:
    """Where the files are that came with a model, if it came from Hugging Face."""
    workdir = content.directory
    return workdir if configs.is_directory(workdir) else workdir / loading.KEPT


def _as_read(content: Reader) -> ModelConfig:
    """The model; how it reads a long text, which a run may leave open, as where it came from."""
    c, kept = content.config, _kept(content)
    said = configs.Fields(kept).memory() if configs.is_directory(kept) else {}
    return dataclasses.replace(c, **{k: x for k, x in said.items() if getattr(c, k) is None})


def _others(content: Reader, output: epath.Path) -> dict[str, Any]:
    """Writes what is no weight: files that came with the model, or else new ones.

    Returns:
      The marks of a document, as config.json names them.
    """
    workdir, kept, marks = content.directory, _kept(content), {}
    if configs.is_directory(kept):
        marks = configs.Fields(kept).marks()
        for name in (tokenizers.GENERATION, *tokenizers.FILES):
            if (kept / name).exists():
                (kept / name).copy(output / name)
    elif (workdir / "vocabulary").exists():
        vocabulary = load_vocabulary(workdir / "vocabulary")
        tokenizers.write(vocabulary, output)
        ends = vocabulary.ends[0] if len(vocabulary.ends) == 1 else list(vocabulary.ends)
        marks = {"bos_token_id": vocabulary.bos, "eos_token_id": ends}
    padding = _padding(marks, content.config.vocab_size)
    if marks.get("pad_token_id") is not None:
        marks["pad_token_id"] = padding
    if not (output / tokenizers.GENERATION).exists():
        generation = {"_from_model_config": True, **marks, "pad_token_id": padding}
        (output / tokenizers.GENERATION).write_text(_json(generation))
    return marks


def _padding(marks: dict[str, Any], vocab_size: int) -> int | None:
    """The token to fill rows with: the model's, or a text's end, of several the first."""
    named = (marks.get("pad_token_id"), marks.get("eos_token_id"))
    tokens = (i for each in named for i in (each if isinstance(each, list) else [each]))
    return next((i for i in tokens if i is not None and 0 <= i < vocab_size), None)


def _same_tokens(vocabulary: Vocabulary | None, output: epath.Path) -> None:
    """Has a written directory make the tokens of a vocabulary.

    The files that came with a model may not: which class of tokenizer reads them depends on the
    type of the model, which may have been another. Then they are written in a form without classes.
    """
    read = tokenizers.vocabulary_of(output)
    known = isinstance(vocabulary, HuggingFaceTokenizer) and vocabulary.marks is not None
    if vocabulary is not None and (read is None or known and read != vocabulary):
        tokenizers.write(vocabulary, output)


def _read(
    content: Reader,
    dtype_of: Callable[[str], np.dtype],
    path: str,
    layer: int | None,
    progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """A parameter as the type that is written."""
    x = content.read(path, layer)
    dtype = dtype_of(path)
    if dtype == np.float16 and x.dtype != dtype:
        values = x.astype(np.float32)
        largest = float(np.abs(values, out=values)[np.isfinite(values)].max(initial=0))
        if largest > float(np.finfo(np.float16).max):
            where = path if layer is None else f"{path} of layer {layer}"
            raise UserError(
                f"{where} has values up to {largest:.3g}, beyond float16: choose bfloat16"
            )
    x = x.astype(dtype, copy=False)
    if progress is not None:
        progress(x.nbytes)
    return x


def _dtypes(content: Reader, dtype: str | None) -> Callable[[str], np.dtype]:
    """The type that each parameter is written as."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r}: choose one of {', '.join(DTYPES)}")

    def of(path: str) -> np.dtype:
        # A logarithm, of which a thousandth is as much of the temperature of a softmax.
        wanted = "float32" if path.endswith("/log_scale") else dtype
        return DTYPES[wanted] if wanted else content.arrays[path][1]

    return of


def _bytes(content: Reader, dtype_of: Callable[[str], np.dtype]) -> int:
    """That are written."""
    arrays = content.arrays.items()
    return sum(math.prod(shape) * dtype_of(path).itemsize for path, (shape, _) in arrays)


def _output(path: epath.PathLike) -> epath.Path:
    """A place for a new directory: nothing, or an empty one."""
    path = path_of(path)
    if in_bucket(path):  # where nothing can be written out of order
        raise UserError(
            f"{path}: give a directory of this machine, and copy it there: gcloud storage cp "
            "--recursive"
        )
    there = os.path.realpath(path)  # where a link leads
    if os.path.lexists(there) and not (os.path.isdir(there) and not os.listdir(there)):
        raise UserError(f"{path}: exists and is not empty: give a new directory")
    if os.path.ismount(there) or there == os.path.realpath("."):
        raise UserError(f"{path}: cannot be replaced when all is written: give a new directory")
    if odd := re.search(r"[][*?\\\udc80-\udcff]", there):  # Orbax takes them for patterns
        raise UserError(f"{path}: {odd[0]!a} in the path: give one without it")
    return epath.Path(there)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


# --- Check ---------------------------------------------------------------------------------------

_OF_READING = ("last_context_length", "memory_dtype")
_FLOAT32 = MemoryConfig(storage="float32")
_PROBE, _WINDOW = 200, 64  # tokens read, in windows of so many


class Difference(NamedTuple):
    """The largest between two arrays."""

    size: float  # infinite where one of them is no number and the other is
    largest: float  # of the values themselves
    where: tuple[int, ...]


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """Of two arrays of one shape, in float32."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    with np.errstate(invalid="ignore"):
        apart = np.where((a == b) | np.isnan(a) & np.isnan(b), 0, np.abs(a - b))
    apart = np.where(np.isnan(apart), np.inf, apart)
    where = np.unravel_index(apart.argmax(), apart.shape)
    return Difference(float(apart[where]), float(np.abs(a).max()), tuple(map(int, where)))


def check(a: epath.PathLike, b: epath.PathLike) -> bool:
    """Compares two checkpoints, of either kind each, and prints where they differ most.

    Their configurations, but for rounding to float32; then tensors one by one; then logits of a
    text that is read as each of them reads it and, where their memory differs, of the same text
    without memory: in float32, for which both models are held, one after the other.

    Returns:
      Whether they are the same, but for the rounding where their types differ.

    Raises:
      UserError: one of them cannot be read.
    """
    ours, theirs = reader(a), reader(b)
    differences = {
        name: pair
        for name, pair in ours.config.differences(theirs.config).items()
        if name not in _OF_READING or None not in pair  # one of them leaves it open
    }
    for name, (one, other) in differences.items():
        print(f"{name}: {one} in {a}, {other} in {b}")
    same_tensors = _check_tensors(ours, theirs)
    of_memory = [name for name in differences if name.startswith("memory_")]
    if ours.config.vocab_size == theirs.config.vocab_size:
        _check_logits(a, b, ours.config, bool(of_memory))
    if (
        same_tensors
        and differences
        and {*differences} <= {*of_memory, *_OF_READING, "local_context"}
    ):
        print(f"the same model, but for {', '.join(differences)}")
    return same_tensors and not differences


def _check_tensors(ours: Reader, theirs: Reader) -> bool:
    """Prints the largest difference between tensors. Returns whether there is none."""
    there = {(each.path, each.layer): each for each in tensors.of_model(theirs.config)}
    compared = identical = rounded = 0
    worst, worst_of = Difference(0.0, 0.0, ()), None
    same = True
    listed = tensors.by_parameter(ours.config)
    with bar(len(listed), "tensor") as progress:
        for each in listed:
            progress(1)
            other = there.pop((each.path, each.layer), None)
            if other is None or other.shape != each.shape:
                shape = "missing" if other is None else list(other.shape)
                print(f"{each.name}: {list(each.shape)} and {shape}")
                same = False
                continue
            x, y = (r.read(each.path, each.layer) for r in (ours, theirs))
            found = difference(*((v.T if each.transposed else v) for v in (x, y)))
            compared, identical = compared + 1, identical + (found.size == 0)
            narrower = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
            if found.size and x.dtype != y.dtype:
                rounded += difference(x.astype(narrower), y.astype(narrower)).size == 0
            if found.size > worst.size:
                worst, worst_of = found, each.name
    for each in there.values():
        print(f"{each.name}: missing and {list(each.shape)}")
        same = False
    after = f", {rounded} after rounding" if rounded else ""
    print(f"{compared} tensors compared, {identical} the same{after}")
    if worst_of is not None:
        print(
            f"largest difference: {worst.size:.3g} (values up to {worst.largest:.3g}) in "
            f"{worst_of} at {list(worst.where)}"
        )
    return same and identical + rounded == compared


def _check_logits(a: epath.PathLike, b: epath.PathLike, c: ModelConfig, plain: bool) -> None:
    """Prints the largest difference between logits; `plain`: without memory, too."""
    window = min(_WINDOW, c.local_context)

    def logits(path) -> list[np.ndarray]:
        lm, found = LanguageModel.load(path), []
        for layers in (lm.config.memory_layers, ())[: 1 + plain]:
            config = dataclasses.replace(lm.config, local_context=window, memory_layers=layers)
            lm = dataclasses.replace(lm, config=config)
            found.append(
                lm.logits(tokens, last_context_length=max(1, window // 2), memory=_FLOAT32)
            )
        return found

    vocabulary = loading.vocabulary_of(a)
    tokens = np.arange(_PROBE) * 7919 % c.vocab_size
    if vocabulary is not None and not isinstance(vocabulary, Symbols):  # which are no text's
        text = Path(__file__).read_text()[: 20 * _PROBE]
        tokens = np.resize(vocabulary.encode(text), _PROBE) % c.vocab_size
    tokens = tokens[None]
    ways = ("each with its own memory", "without memory") if plain else ("with memory",)
    for way, x, y in zip(ways, *map(logits, (a, b)), strict=True):
        found = difference(x, y)
        print(
            f"logits of {_PROBE} tokens in windows of {window}, {way}: largest difference "
            f"{found.size:.3g} (values up to {found.largest:.3g}) at token {found.where[1]}, entry "
            f"{found.where[2]}"
        )

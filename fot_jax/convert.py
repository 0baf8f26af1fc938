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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from etils import epath

from fot_jax.checkpoints import loading, stream
from fot_jax.common.atomic import new_directory
from fot_jax.common.errors import UserError
from fot_jax.common.paths import check_for_orbax, in_bucket, path_of
from fot_jax.common.progress import bar
from fot_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer
from fot_jax.data.saved_vocabulary import load_vocabulary
from fot_jax.data.vocabulary import Vocabulary
from fot_jax.gguf import directory as gguf_directory
from fot_jax.gguf import weights as gguf_weights
from fot_jax.hugging_face import config as configs
from fot_jax.hugging_face import model_card, peft, tensors, tokenizers, weight_files
from fot_jax.model import lora
from fot_jax.model.config import ModelConfig

DTYPES = {dtype.name: dtype for dtype in weight_files.DTYPES.values()}


class Reader(Protocol):
    """The parameters of a checkpoint of either kind."""

    directory: epath.Path  # a workdir, or a Hugging Face directory
    config: ModelConfig
    arrays: dict[str, tuple[tuple[int, ...], np.dtype]]  # by path

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter, of one layer if it is of a layer."""


def open_checkpoint(path: epath.PathLike, window: int | None = None) -> Reader:
    """Opens a checkpoint of either kind; `window` is as of hugging_face.config.read."""
    path = path_of(path)
    if configs.is_directory(path):
        return tensors.Reader(path, configs.read(path, window=window))
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
    source, output = path_of(source), _checked_output(output)
    with new_directory(output, "checkpoints") as half, contextlib.ExitStack() as stack:
        content, vocabulary = _open_model(source, half, memory_layers, local_context)
        config, arrays, dtype_of = content.config, content.arrays, _dtypes_written(content, dtype)
        if vocabulary is not None:
            loading.check_rows(source, vocabulary, config.vocab_size)
            vocabulary.save(half / "vocabulary")
        progress = stack.enter_context(bar(_bytes_written(content, dtype_of), "byte"))
        streams = {
            path: stream.StreamedArray(
                shape=shape,
                dtype=dtype_of(path),
                sliced=path.startswith("layers/"),
                read=functools.partial(
                    _read_as_written, content, dtype_of, path, progress=progress
                ),
            )
            for path, (shape, _) in arrays.items()
        }
        stream.save(half, config, streams)
        _checked_output(output)  # or what has come there since would be lost
    _report(output, config, dtype_of)


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
    output = _checked_output(output)
    content = open_checkpoint(checkpoint)
    c, dtype_of = content.config, _dtypes_written(content, dtype)
    with (
        new_directory(output, configs.CONFIG) as half,
        bar(_bytes_written(content, dtype_of), "byte") as progress,
    ):
        marks = _write_other_files(content, half)  # may be refused, and is quick
        name = dtype_of("embedding").name
        values = configs.content(_with_reading_settings(content), name, marks)  # may be, too
        kept = _hugging_face_files(content)
        base = kept if configs.is_directory(kept) else None
        if base is not None and c.rope_scaling is not None and c.rope_scaling.kind == "llama3":
            # Less or more than factor x original: a promise of its own, that positions ignore.
            fields, field = configs.Fields(kept), "max_position_embeddings"
            longest = fields.number(field, values[field])
            if configs.rope(fields, longest)[1] == c.rope_scaling:
                values[field] = max(longest, c.local_context)
        k = None if base is None else configs.Fields(kept).values.get("mem_topk")
        if k is not None and c.memory_layers:  # of PyTorch alone; here `--k`
            values["mem_topk"] = k
        (half / configs.CONFIG).write_text(_json_text(values))
        tensors.write(
            half, c, dtype_of, functools.partial(_read_as_written, content, dtype_of), progress
        )
        if configs.needs_our_code(c):
            for file in (Path(__file__).parent / "pytorch").glob("*_fot.py"):
                (half / file.name).write_bytes(file.read_bytes())
        if base is not None:
            _ensure_same_tokens(loading.vocabulary_of(content.directory), base, half)
        model_card.write(
            half,
            name=output.name,
            c=c,
            parameters=sum(math.prod(shape) for shape, _ in content.arrays.values()),
            base=base,
            workdir=content.directory if isinstance(content, stream.Reader) else None,
            step=content.step if isinstance(content, stream.Reader) else None,
        )
        _checked_output(output)  # or what has come there since would be lost
    _report(output, c, dtype_of)


def to_peft(checkpoint: epath.PathLike, output: epath.PathLike) -> None:
    """Writes the adapters of a checkpoint as a directory for PEFT.

    Args:
      checkpoint: a workdir, or a step inside it.
      output: new, or an empty directory.

    Raises:
      UserError: no checkpoint, one without adapters, or one in which more was trained; the output
        is there.
    """
    output = _checked_output(output)
    content = open_checkpoint(checkpoint)
    if not isinstance(content, stream.Reader) or not content.adapters:
        raise UserError(f"{checkpoint}: has no adapters: give a workdir trained with train.lora")
    own = f"layers/{lora.NAME}/"
    if more := [path for path in content.meta["trains"] if not path.startswith(own)]:
        raise UserError(
            f"{checkpoint}: {', '.join(more)} were trained beside the adapters, and PEFT's files "
            "have adapters alone: use fot convert to-hf"
        )
    with new_directory(output, peft.CONFIG) as half:
        peft.write(half, content.config, content.adapters)
        _checked_output(output)  # or what has come there since would be lost
    print(f"{output}: adapters of {', '.join(name for name in peft.kernels(content.adapters))}")


def _open_model(
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


def _report(output: epath.Path, c: ModelConfig, dtype_of: Callable[[str], np.dtype]) -> None:
    layers = ", ".join(map(str, c.memory_layers)) or "none"
    print(
        f"{output}: {c.num_layers} layers, with memory: {layers}; windows of {c.local_context} "
        f"tokens; {dtype_of('embedding').name}"
    )


def _hugging_face_files(content: Reader) -> epath.Path:
    """Where the files are that came with a model, if it came from Hugging Face."""
    workdir = content.directory
    return workdir if configs.is_directory(workdir) else workdir / loading.KEPT


def _with_reading_settings(content: Reader) -> ModelConfig:
    """The configuration, with settings of long texts of the original model where it has none."""
    c, kept = content.config, _hugging_face_files(content)
    said = configs.Fields(kept).memory() if configs.is_directory(kept) else {}
    return dataclasses.replace(c, **{k: x for k, x in said.items() if getattr(c, k) is None})


def _write_other_files(content: Reader, output: epath.Path) -> dict[str, Any]:
    """Writes all but weights and config.json: files that came with the model, or else new ones.

    Returns:
      The marks of a document, as config.json names them.
    """
    workdir, kept, marks = content.directory, _hugging_face_files(content), {}
    own = (workdir / "vocabulary").exists()
    if configs.is_directory(kept):
        marks = configs.Fields(kept).marks()
        tokenizers.copy_files(kept, output)
        own = own and tokenizers.vocabulary_of(kept) is None
    if own:
        vocabulary = load_vocabulary(workdir / "vocabulary")
        tokenizers.write(vocabulary, output)
        ends = vocabulary.ends[0] if len(vocabulary.ends) == 1 else list(vocabulary.ends)
        marks = {"bos_token_id": vocabulary.bos, "eos_token_id": ends}
        (output / tokenizers.GENERATION).unlink(missing_ok=True)  # of other tokens
    padding = _padding_token(marks, content.config.vocab_size)
    if marks.get("pad_token_id") is not None:
        marks["pad_token_id"] = padding
    if not (output / tokenizers.GENERATION).exists():
        generation = {"_from_model_config": True, **marks, "pad_token_id": padding}
        (output / tokenizers.GENERATION).write_text(_json_text(generation))
    return marks


def _padding_token(marks: dict[str, Any], vocab_size: int) -> int | None:
    """The padding token: the model's own, or else the first of those that end a text."""
    named = (marks.get("pad_token_id"), marks.get("eos_token_id"))
    tokens = (i for each in named for i in (each if isinstance(each, list) else [each]))
    return next((i for i in tokens if i is not None and 0 <= i < vocab_size), None)


def _ensure_same_tokens(
    vocabulary: Vocabulary | None, kept: epath.Path, output: epath.Path
) -> None:
    """Makes sure that the tokenizer of a written directory makes the tokens of a vocabulary.

    The files that came with a model may not: which class of tokenizer reads them depends on the
    type of the model, which may have been another. Then a tokenizer.json replaces them, which is
    read by no class of a model.

    Args:
      kept: the directory with the files that came with the model.
    """
    read = tokenizers.vocabulary_of(output)
    known = isinstance(vocabulary, HuggingFaceTokenizer) and vocabulary.marks is not None
    if vocabulary is not None and (read is None or known and read != vocabulary):
        tokenizers.write(vocabulary, output, tokenizers.special_tokens_of(kept))


def _read_as_written(
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


def _dtypes_written(content: Reader, dtype: str | None) -> Callable[[str], np.dtype]:
    """The type that each parameter is written as."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r}: choose one of {', '.join(DTYPES)}")

    def of(path: str) -> np.dtype:
        # A logarithm, of which a thousandth is as much of the temperature of a softmax.
        wanted = "float32" if path.endswith("/log_scale") else dtype
        return DTYPES[wanted] if wanted else content.arrays[path][1]

    return of


def _bytes_written(content: Reader, dtype_of: Callable[[str], np.dtype]) -> int:
    """How many bytes of parameters are written."""
    arrays = content.arrays.items()
    return sum(math.prod(shape) * dtype_of(path).itemsize for path, (shape, _) in arrays)


def _checked_output(path: epath.PathLike) -> epath.Path:
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
    check_for_orbax(path)
    return epath.Path(there)


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"

"""Loads checkpoints of both kinds, ours and Hugging Face directories, into a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from fot_jax.checkpoints import restore
from fot_jax.checkpoints.steps import locate
from fot_jax.common.errors import UserError
from fot_jax.common.paths import real_path
from fot_jax.common.trees import leaves_by_path, tree_of_leaves
from fot_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer
from fot_jax.data.saved_vocabulary import load_vocabulary
from fot_jax.data.vocabulary import Vocabulary
from fot_jax.hugging_face import config as configs
from fot_jax.hugging_face import model_card, tokenizers
from fot_jax.hugging_face.tensors import Reader
from fot_jax.model.config import ModelConfig
from fot_jax.model.parameters import parameters_by_layer

KEPT = "hugging_face"  # folder of a workdir: the files of a Hugging Face model beside its weights


def vocabulary_of(path: epath.PathLike) -> Vocabulary | None:
    """The tokenizer of a checkpoint; None where it has none.

    Raises:
      UserError: there is no checkpoint, or its tokenizer cannot be read.
    """
    if configs.is_directory(path):
        return tokenizers.vocabulary_of(path)
    workdir = locate(path)[0].parent
    if configs.is_directory(workdir / KEPT) and not (workdir / "vocabulary").exists():
        return None  # converted from a directory without a tokenizer
    return load_vocabulary(workdir / "vocabulary")


def config_of(path: epath.PathLike) -> ModelConfig:
    """The model that a checkpoint is of; its arrays are not read.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    if configs.is_directory(path):
        return Reader(path, configs.read(path)).config
    return restore.config_of(path)


def check_rows(path: epath.PathLike, vocabulary: Vocabulary | None, rows: int) -> None:
    """Checks that the embedding has a row for every token of the tokenizer.

    It may have more rows, as those of published models have. Tokens that were added to a tokenizer,
    such as one for padding, may have none: only texts with these tokens cannot be read.

    Args:
      path: of the checkpoint, for the message.
      rows: of the embedding.

    Raises:
      UserError: the tokenizer is of another model.
    """
    if vocabulary is not None and (size := rows_needed(vocabulary)) > rows:
        raise UserError(
            f"{path}: the tokenizer has {size} tokens, the model's embedding {rows} rows: get both "
            "from the same model"
        )


def rows_needed(vocabulary: Vocabulary) -> int:
    """Rows of an embedding for its tokens, but those that were added and stand in no text."""
    is_hugging_face = isinstance(vocabulary, HuggingFaceTokenizer)
    marks = (mark + 1 for mark in (*vocabulary.before, *vocabulary.after))
    return max(vocabulary.model_size if is_hugging_face else vocabulary.size, *marks, 0)


def files_of(path: epath.PathLike) -> epath.Path | None:
    """The directory with the files of a Hugging Face model beside its weights; None: none."""
    if configs.is_directory(path):
        return epath.Path(path)
    kept = locate(path)[0].parent / KEPT
    return kept if configs.is_directory(kept) else None


def keep_files(path: epath.PathLike, workdir: epath.Path) -> None:
    """Copies the files of `files_of` into a workdir, for `fot convert to-hf` to copy back."""
    source = files_of(path)
    if source is not None and real_path(source) != real_path(workdir / KEPT):
        (workdir / KEPT).mkdir(exist_ok=True)
        tokenizers.copy_files(source, workdir / KEPT)
        for name in (model_card.CARD, *model_card.LICENSES):
            if (source / name).exists():
                (source / name).copy(workdir / KEPT / name, overwrite=True)


def load_model(path: epath.PathLike, dtype, window: int | None = None) -> tuple[ModelConfig, Any]:
    """Loads a model for inference.

    Args:
      dtype: of matrices; vectors are float32.
      window: as of hugging_face.config.read.

    Returns:
      Its configuration, and parameters as of `parameters_by_layer`, none of which is held twice.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    if configs.is_directory(path):
        content = Reader(path, configs.read(path, window=window))
        return content.config, _by_layer(content, dtype)
    config, params = restore.restore_model(path)
    return config, parameters_by_layer(params, dtype, use_up=True)


def load_params(
    path: epath.PathLike, target: Any, window: int | None = None
) -> tuple[ModelConfig, Any]:
    """Loads parameters to train from.

    Args:
      target: tree of `jax.ShapeDtypeStruct` with shardings; parameters are cast to its dtypes.
      window: as of hugging_face.config.read.

    Returns:
      The configuration of the checkpoint, and its parameters as the target.

    Raises:
      UserError: there is no checkpoint, it is damaged, or its parameters have other shapes.
    """
    if configs.is_directory(path):
        content = Reader(path, configs.read(path, window=window))
        return content.config, _stacked(content, target)
    restored = restore.restore_params(path, target)
    return restore.model_config_of(path, restored.meta), restored.params


def _by_layer(content: Reader, dtype) -> Any:
    """Parameters of a Hugging Face directory as of `parameters_by_layer`."""

    def read(path: str, layer: int | None = None) -> jax.Array:
        x = content.read(path, layer)
        return jnp.asarray(x, dtype if x.ndim > 1 else jnp.float32)

    of_layers = [path for path in content.arrays if path.startswith("layers/")]
    others = [path for path in content.arrays if not path.startswith("layers/")]
    layers = tuple(
        tree_of_leaves({path.removeprefix("layers/"): read(path, i) for path in of_layers})
        for i in range(content.config.num_layers)
    )
    return {**tree_of_leaves({path: read(path) for path in others}), "layers": layers}


def _stacked(content: Reader, target: Any) -> Any:
    """Parameters of a Hugging Face directory stacked by layer, as the target."""
    recorded = {path: {"shape": shape} for path, (shape, _) in content.arrays.items()}
    restore.check_shapes(content.directory, "parameter", recorded, target)

    def read(path: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if path.startswith("layers/"):
            whole = np.empty(wanted.shape, wanted.dtype)
            for i in range(len(whole)):
                whole[i] = content.read(path, i)
        else:
            whole = content.read(path).astype(wanted.dtype)
        of_device: Callable[[Any], np.ndarray] = whole.__getitem__
        return jax.make_array_from_callback(wanted.shape, wanted.sharding, of_device)

    return tree_of_leaves(
        {path: read(path, wanted) for path, wanted in leaves_by_path(target).items()}
    )

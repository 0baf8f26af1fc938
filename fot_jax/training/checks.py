"""Whether the parts of an experiment fit each other."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from fot_jax.checkpoints.loading import rows_needed
from fot_jax.common.agreement import all_values
from fot_jax.common.errors import LARGEST_SEED, UserError, check_range
from fot_jax.data.documents import DocumentSource
from fot_jax.model import schemes
from fot_jax.model.config import ModelConfig
from fot_jax.model.lora import NAME, Lora
from fot_jax.model.trained import Trained


def check_numbers(steps: int, z_loss: float, seed: int, log_every: int, max_skipped: int) -> None:
    """Raises UserError where one of these arguments of `train` is out of range."""
    check_range("train", 1, steps=steps, log_every=log_every)
    check_range("train", 0, z_loss=z_loss, max_skipped=max_skipped)
    check_range("train", 0, LARGEST_SEED, seed=seed)


def check_profile(profile_steps: tuple[int, int] | None, steps: int) -> None:
    """Raises UserError where steps to profile are not among those of the run."""
    if profile_steps and not 1 <= profile_steps[0] <= profile_steps[1] <= steps:
        raise UserError(
            f"train.profile_steps = {profile_steps}: give (first, last), two of the steps 1 … "
            f"{steps}, in order"
        )


def check_positive_mass(
    every: int | None, log_every: int, model: ModelConfig, scheme: schemes.Scheme
) -> None:
    """Raises UserError where r_d cannot be measured, or not when metrics are written."""
    check_range("train", 1, positive_mass_every=every)
    if every and every % log_every:
        raise UserError(
            f"train.positive_mass_every = {every} is not a multiple of train.log_every = "
            f"{log_every}: change one of them"
        )
    if every and not (model.memory_layers and scheme.has_contexts):
        raise UserError(
            f"train.positive_mass_every = {every}: r_d is of memory layers in crossbatch, and "
            "there are none: set it to None"
        )


def check_first_step(first_step: int, steps: int, workdir: epath.Path) -> None:
    """Raises UserError where a workdir has more steps than the run is to have."""
    if first_step > steps:
        raise UserError(
            f"{workdir} has a checkpoint of step {first_step}, beyond train.steps = {steps}: "
            "raise train.steps, or choose another workdir"
        )


def check_vocabulary(source: DocumentSource, model: ModelConfig) -> None:
    """Raises UserError where the tokenizer has more tokens than the model."""
    size = max(rows_needed(source.vocabulary), source.vocabulary.eos + 1)  # it ends documents
    if size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {size} tokens, the model a vocabulary of "
            f"{model.vocab_size}: raise the model's vocab_size or use a smaller tokenizer"
        )


def check_same_documents(source: DocumentSource, settings: Mapping[str, Any]) -> None:
    """Checks that all processes, which wait for each other here, read the same documents.

    Args:
      settings: of the lanes.

    Raises:
      UserError: another process has another tokenizer, other files or settings.
    """
    vocabulary = source.vocabulary
    fields = dataclasses.astuple(vocabulary) if dataclasses.is_dataclass(vocabulary) else ()
    kind = type(vocabulary).__name__, vocabulary.size, fields
    for what, value in (("tokenizer", kind), ("documents", sorted(settings.items()))):
        found = all_values(zlib.crc32(repr(value).encode()) >> 1)
        others = [i for i, each in enumerate(found) if each != found[0]]
        if others:
            raise UserError(
                f"process {others[0]} has another {what} than process 0: give all machines the "
                "same files and settings"
            )


def check_part(
    workdir: epath.Path, meta: Mapping[str, Any], params: Any, part: Trained, lora: Lora | None
) -> None:
    """Raises UserError where a run that goes on would train other parameters, or other adapters.

    Args:
      meta, params: of the checkpoint.
      part, lora: of this run.
    """
    as_before = "use the configuration it was saved with, or another workdir"
    now = {path: None if x is None else list(x) for path, x in part.parameters}
    before = meta.get("trains", now)  # fot_jax 0.1 trained everything
    for path in sorted({*now, *before}):
        said = [_layers_that_train(each, path) for each in (before, now)]
        if said[0] != said[1]:
            raise UserError(
                f"{workdir}: of {path} {said[0]} trained before, and {said[1]} in this experiment: "
                f"{as_before}"
            )
    if lora is not None:
        scale = float(np.asarray(params["layers"][NAME]["scale"])[0])
        if not math.isclose(scale, lora.alpha / lora.rank, rel_tol=1e-6):
            raise UserError(
                f"{workdir} was trained with Lora.alpha = {scale * lora.rank:.6g}, and this "
                f"experiment has {lora.alpha:g}: {as_before}"
            )


def _layers_that_train(trains: Mapping[str, Any], path: str) -> str:
    if path not in trains:
        return "nothing"
    return "all" if trains[path] is None else f"layers {', '.join(map(str, trains[path]))}"


def check_function(
    checkpoint: str, there: ModelConfig, model: ModelConfig, resumed: bool = False
) -> None:
    """Warns where this run computes something else from the parameters of a checkpoint.

    Args:
      resumed: the run goes on from there: it is to have the same memory, too.

    Raises:
      UserError: kernels of the same shapes are cut into other heads.
    """
    differences = there.differences(model)
    for name in ("num_heads", "num_kv_heads", "head_dim"):
        if name in differences:
            before, now = differences[name]
            raise UserError(
                f"{checkpoint} has {name} = {before}, this run {now}: set the model's {name} to "
                f"{before}"
            )
    names = ("norm_epsilon", "qk_norm", "rope_theta", "rope_scaling", "norm", "mlp")
    names += ("memory_layers", "memory_before", "memory_scaling") if resumed else ()
    compared = [(name, *differences[name]) for name in names if name in differences]
    rotated = [
        tuple(i for i in range(c.num_layers) if c.memory_positions or i not in c.memory_layers)
        for c in (there, model)
    ]
    compared.append(("positions in the window in layers", *rotated))
    for name, before, now in compared:
        if before != now and jax.process_index() == 0:
            logging.warning(
                "%s was trained with %s = %s, this run has %s", checkpoint, name, before, now
            )

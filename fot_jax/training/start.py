"""Where a run starts: at the newest checkpoint of its workdir, or with parameters of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from fot_jax.checkpoints import loading
from fot_jax.checkpoints.items import LaneGroups
from fot_jax.checkpoints.manager import Checkpointer
from fot_jax.checkpoints.restore import model_config_of
from fot_jax.checkpoints.steps import complete_steps
from fot_jax.common.atomic import write_file
from fot_jax.common.errors import UserError
from fot_jax.common.paths import path_of, real_path
from fot_jax.data.documents import DocumentSource
from fot_jax.data.saved_vocabulary import load_vocabulary
from fot_jax.hugging_face import config as configs
from fot_jax.model import lora
from fot_jax.model.config import ModelConfig
from fot_jax.training.checks import check_function, check_part
from fot_jax.training.history import History
from fot_jax.training.program import Program
from fot_jax.training.step import TrainState


class Start(NamedTuple):
    """What the first step of this process needs.

    Attributes:
      state: on the devices of the mesh.
      history: of the steps before.
      lanes: their place in the documents; None at step 0.
    """

    state: TrainState
    history: History
    lanes: LaneGroups | None = None


def documents(
    source: DocumentSource, workdir: epath.Path, initialize_from: str | None
) -> DocumentSource:
    """`source` with the vocabulary of the workdir, if it has a checkpoint, else with that of the
    checkpoint that the run starts from, if that has one.

    Raises:
      UserError: it cannot be read.
    """
    vocabulary = None
    if complete_steps(workdir / "checkpoints"):
        vocabulary = load_vocabulary(workdir / "vocabulary")
    elif initialize_from is not None:
        vocabulary = loading.vocabulary_of(initialize_from)
    return source if vocabulary is None else source.with_vocabulary(vocabulary)


def documents_if_here(
    source: DocumentSource, workdir: epath.Path, initialize_from: str | None
) -> DocumentSource:
    """As `documents`, but `source` as it is where what has the vocabulary is on another machine.

    Raises:
      UserError: as of `documents`.
    """
    try:
        if initialize_from is not None and not path_of(initialize_from).exists():
            initialize_from = None
        return documents(source, workdir, initialize_from)
    except OSError:  # a bucket that takes a login
        return source


def resume(
    program: Program,
    checkpointer: Checkpointer,
    workdir: epath.Path,
    lane_groups: Iterable[int],
) -> Start | None:
    """The newest whole checkpoint of a workdir; None where it has none.

    Args:
      lane_groups: those whose rows this process reads.

    Raises:
      UserError: no checkpoint can be read, its parameters have other shapes or heads, or others of
        them trained.
    """
    template = program.state
    restored = checkpointer.restore_latest(template.params, template.beside, lane_groups)
    if restored is None:
        return None
    there = model_config_of(workdir, restored.meta)
    check_function(str(workdir), there, program.transformer.config, resumed=True)
    check_part(workdir, restored.meta, restored.params, program.part, program.transformer.lora)
    step = jax.device_put(np.int32(restored.step), template.step.sharding)
    return Start(
        state=template.restored(step, restored.params, restored.opt_state),
        history=History(**restored.meta["history"]),
        lanes=restored.data,
    )


def begin(
    program: Program,
    model: ModelConfig,
    initialize_from: str | None,
    seed: int,
) -> Start:
    """Step 0: parameters drawn from `seed`, or those of a checkpoint.

    Raises:
      UserError: the checkpoint cannot be read, or its parameters have other shapes or heads.
    """
    shardings = jax.tree.map(lambda x: x.sharding, program.state)
    state = jax.jit(program.init, out_shardings=shardings)(jax.random.key(seed))
    if initialize_from is not None:
        wanted, _ = lora.split(program.state.params)
        there, params = loading.load_params(initialize_from, wanted, model.local_context)
        state = state._replace(params=lora.joined(params, lora.split(state.params)[1]))
        check_function(initialize_from, there, model)
    return Start(state, History())


def check_workdir(workdir: epath.Path) -> None:
    """Checks that what a run saves there would be what is read from there.

    Raises:
      UserError: it is a Hugging Face directory.
    """
    if configs.is_directory(workdir):
        begun = (workdir / "checkpoints").exists()
        remedy = "move config.json and the weights beside it" if begun else "choose another workdir"
        raise UserError(
            f"{workdir}: a Hugging Face directory, whose weights would be read in place of what is "
            f"trained: {remedy}"
        )


def check_kept_files(workdir: epath.Path, initialize_from: str | None) -> None:
    """Checks that a new run would not take the place of files that are of no run.

    Raises:
      UserError: they are where a run keeps those of the model that it begins with.
    """
    kept = workdir / loading.KEPT
    of_a_run = (workdir / "config.gin").exists() or _is_within(initialize_from, kept)
    if not of_a_run and kept.exists():
        raise UserError(
            f"{kept}: files are kept there of the model that a run begins with, and these are of "
            "no run: move them, or choose another workdir"
        )


def write_settings(
    workdir: epath.Path,
    config_text: str,
    source: DocumentSource,
    initialize_from: str | None,
    resumed: bool,
) -> None:
    """Writes the configuration, and at step 0 what else stays: the vocabulary, kept files."""
    if jax.process_index() != 0:
        return
    kept = workdir / loading.KEPT
    if not resumed and not _is_within(initialize_from, kept):
        kept.rmtree(missing_ok=True)  # of a run that was killed at step 0
    write_file(workdir / "config.gin", config_text)
    if not resumed:
        if initialize_from is not None:
            loading.keep_files(initialize_from, workdir)
        source.vocabulary.save(workdir / "vocabulary")


def _is_within(path: epath.PathLike | None, directory: epath.Path) -> bool:
    if path is None:
        return False
    path, directory = map(real_path, (path, directory))
    return path == directory or directory in path.parents


def cache_compiled_programs(workdir: epath.Path) -> None:
    """Keeps compiled programs in the workdir, unless JAX was told of another place."""
    if jax.default_backend() != "cpu" and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compilation_cache"))

"""The steps that a directory of checkpoints has, and what the path of a checkpoint means."""

from __future__ import annotations

import re

import orbax.checkpoint as ocp
from etils import epath

from fot_jax.checkpoints import items
from fot_jax.common.errors import UserError
from fot_jax.common.paths import in_bucket, path_of

COMMITTED = "commit_success.txt"  # Orbax's mark: in a bucket, a step without it is no checkpoint

_STEP = re.compile("0|[1-9][0-9]{0,17}")  # as they are named here; a copy may be called "good_12"


def locate(path: epath.PathLike) -> tuple[epath.Path, list[int]]:
    """Finds the checkpoints that a path means.

    Args:
      path: of a workdir, of its folder of checkpoints, or of a step in it.

    Returns:
      The folder of checkpoints and the complete steps that are meant, ascending.

    Raises:
      UserError: there is none.
    """
    path = path_of(path)
    if steps := complete_steps(path / "checkpoints"):
        return path / "checkpoints", steps
    if _STEP.fullmatch(path.name) and int(path.name) in complete_steps(path.parent):
        return path.parent, [int(path.name)]
    if steps := complete_steps(path):
        return path, steps
    if not path.exists():
        raise UserError(f"{path}: does not exist: give a workdir or a step inside its checkpoints")
    if path.suffix == ".gguf":
        raise UserError(f"{path}: make a workdir of it: fot convert from-hf {path} WORKDIR")
    raise UserError(f"{path}: no checkpoint here: give a workdir or a step inside its checkpoints")


def complete_steps(directory: epath.PathLike) -> list[int]:
    """Steps whose checkpoints were written to the end, ascending."""
    directory = epath.Path(directory)
    finished = ocp.utils.checkpoint_steps_paths(directory) if directory.is_dir() else []
    steps = [int(path.name) for path in finished if _STEP.fullmatch(path.name)]
    if 0 not in steps and is_unmarked_copy(directory):
        steps.append(0)
    return sorted(steps)


def is_unmarked_copy(directory: epath.Path) -> bool:
    """Whether step 0 is a conversion of fot_jax 0.1, without marks, copied into a bucket.

    Training saves no step 0, and none without lane groups. Whether the copy is whole, its checksums
    show.
    """
    if not in_bucket(directory):
        return False
    try:
        meta = items.read_meta(directory / "0", 0)
        return not meta.opt_state and not items.read_data(directory / "0")
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False

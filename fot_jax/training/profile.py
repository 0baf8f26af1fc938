"""JAX profiler traces of some steps of a run."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from etils import epath

from fot_jax.common.bucket_files import staged_directory


class Profile:
    """A trace in workdir/profile of the steps `train.profile_steps`, as far as this process does
    them."""

    def __init__(self, workdir: epath.Path, steps: tuple[int, int] | None, first_step: int):
        """`steps`: (first, last), or None; `first_step`: the first that this process does."""
        self._directory = workdir / "profile"
        self._first, self._last = (0, -1) if steps is None else steps
        self._first = max(self._first, first_step)
        self._open = contextlib.ExitStack()

    def start(self, step: int) -> None:
        """Before a step."""
        if step == self._first <= self._last:
            directory = self._open.enter_context(staged_directory(self._directory))
            jax.profiler.start_trace(directory)

    def stop(self, step: int, state: Any) -> None:
        """After a step, whose result is `state`."""
        if step == self._last:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._open.close()

"""Checkpoints of a run: parameters, optimizer state, the lanes' place in the data, and meta.

Saving goes on in the background, and a step appears only when all of it is written. Reading
compares checksums (items.py), so whatever happened to the files, what is restored is what was
saved; a damaged checkpoint is passed over for the one before it (restore.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from fot_jax.checkpoints import items
from fot_jax.checkpoints.orbax_errors import cause_of, raise_without_printing
from fot_jax.checkpoints.restore import Restored, newest_readable, read_step
from fot_jax.checkpoints.steps import COMMITTED, complete_steps, is_unmarked_copy
from fot_jax.common.agreement import all_agree, all_values
from fot_jax.common.errors import UserError
from fot_jax.common.paths import absolute, google_errors, in_bucket
from fot_jax.common.units import in_bytes

BARRIER_SECONDS = 300  # of a save, beside what writing takes at SLOWEST; then it has failed
SLOWEST = 10 * 2**20  # bytes that a process writes in a second, at least
MAX_FAILURES = 5  # saves in a row that may fail before the run ends


class Checkpointer:
    """The checkpoints of one run: saved in the background, old ones removed, the newest restored.

    All processes call the same methods in the same order.
    """

    def __init__(
        self, directory: epath.PathLike, keep_last: int = 2, keep_every: int | None = None
    ):
        """Touches no file yet.

        Args:
          directory: for checkpoints of this run and nothing else.
          keep_last: how many of the newest stay.
          keep_every: steps whose multiples are never removed; None: none.
        """
        self.directory = absolute(directory)
        self._keep_last, self._keep_every = keep_last, keep_every
        self._damaged: list[int] = []  # steps newer than the one restored
        self._needed = 0  # bytes of the last save
        self._removal = _Removal()
        self._saving: int | None = None  # the step that is being written
        self._waiting = threading.Thread()  # until it is written, or has failed
        self._raised: Exception | None = None  # where its bucket did not answer from the start
        self._stale = False  # whether Orbax may know steps that are not there
        self._seconds = 0  # that writing may take
        self.failures = 0  # saves in a row that failed
        self._error: Exception = UserError(f"{self.directory}: another process cannot write here")

    def open(self, arrays: Any = ()) -> None:
        """Makes the directory and removes unfinished saves, which else the first save does.

        Args:
          arrays: what saves will write: the time that they may take grows with it.

        Raises:
          UserError: the directory cannot be made or written to.
        """
        here = sum(
            shard.data.nbytes
            for x in jax.tree.leaves(arrays)
            for shard in x.addressable_shards
            if shard.replica_id == 0
        )
        self._seconds = max(all_values(here // SLOWEST))
        self._manager  # noqa: B018

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        raise_without_printing()
        keep = [self._removal, checkpoint_managers.LatestN(self._keep_last)]
        if self._keep_every is not None:
            keep.append(checkpoint_managers.EveryNSteps(self._keep_every))
        try:
            if is_unmarked_copy(self.directory):
                (self.directory / "0" / COMMITTED).write_text("")  # or Orbax would remove it
            # Try now whether files can be written: a save fails in the background, and so late.
            self.directory.mkdir(parents=True, exist_ok=True)
            trial = self.directory / f"trial-of-process-{jax.process_index()}"
            trial.write_text("")
            with google_errors(self.directory):
                list(ocp.path.step.standard_name_format().find_all(self.directory))  # allowed to?
                unfinished = ocp.utils.tmp_checkpoints(self.directory)
            trial.unlink()
            for temporary in unfinished if jax.process_index() == 0 else ():
                logging.warning("%s: a save that never finished: removing it", temporary.get())
            with google_errors(self.directory):
                return ocp.CheckpointManager(
                    self.directory,
                    options=ocp.CheckpointManagerOptions(
                        preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
                        cleanup_tmp_directories=True,
                        async_options=ocp.options.AsyncOptions(
                            timeout_secs=BARRIER_SECONDS + self._seconds
                        ),
                    ),
                )
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot keep checkpoints here ({error.strerror or error}): "
                f"{'correct that, or ' if in_bucket(self.directory) else ''}choose another workdir"
            ) from error

    def steps(self) -> list[int]:
        """Steps that are complete on disk, ascending."""
        return complete_steps(self.directory)

    def save(
        self,
        step: int,
        params: Any,
        opt_state: Any,
        data: items.LaneGroups,
        meta: Mapping,
        removes_older: bool = True,
    ) -> None:
        """Starts saving a step; the arrays may be donated or changed as soon as this returns.

        Waits for the save before it, if that has not ended. If that one failed, a warning says so
        and this one is tried. Saving a step that exists does nothing.

        Args:
          data: state of the lane groups that this process owns.
          meta: anything JSON can hold; tuples come back as lists.
          removes_older: else all older ones stay, until the next save that removes some.

        Raises:
          UserError: no space left.
          Exception: the last MAX_FAILURES saves have failed; the last one's error.
        """
        self.ended_well()
        if not all_agree(self.failures < MAX_FAILURES):
            raise self._error
        self._set_damaged_aside()
        if self._stale:
            self._forget()
        if step in self._manager.all_steps():
            return
        lane_groups = items.SaveData.of(data)
        leaves = jax.tree.leaves((params, opt_state))
        self._needed = _bytes_to_save(leaves, lane_groups)
        if not all_agree(self._needed <= self._free()):
            raise UserError(self._no_space(f"the checkpoint of step {step}"))
        arrays = {"params": items.describe(params), "opt_state": items.describe(opt_state)}
        args = {
            "params": ocp.args.StandardSave(params),
            "data": lane_groups,
            "meta": ocp.args.JsonSave(items.sealed_meta(step, meta, arrays)),
        }
        if arrays["opt_state"]:  # Orbax saves no empty item
            args["opt_state"] = ocp.args.StandardSave(opt_state)
        self._saving, self._removal.allowed = step, removes_older
        try:
            with self._disk_errors():
                self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except (OSError, UserError) as error:
            # Of several processes the first one alone asks the bucket before it goes on.
            if not in_bucket(self.directory) or jax.process_count() > 1:
                raise
            self._raised = error  # as if in the background: it is tried again
        # Orbax's is_saving_in_progress() stays True where one of several processes has failed.
        self._waiting = threading.Thread(target=self._wait_aside, daemon=True)
        self._waiting.start()

    def _wait_aside(self) -> None:
        with contextlib.suppress(Exception):  # Orbax raises it in each thread that waits
            self._manager.wait_until_finished()

    def failed(self) -> bool:
        """Whether the last save has ended and failed, of which a warning tells (once)."""
        if self._saving is None or self._waiting.is_alive():
            return False
        return not self.ended_well()

    def saved(self) -> bool:
        """Waits for the last save: whether all processes have it. If not, it can be tried again."""
        if all_agree(self.ended_well()):
            return True
        self._forget()  # the step, which other processes have not
        return False

    def ended_well(self) -> bool:
        """Waits for the last save of this process: whether it is there; else a warning says so."""
        try:
            self.wait()
        except Exception as error:
            self._failed(error)
            return False
        return True

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self._error = error
        line = " ".join(str(error).split())
        logging.warning("the checkpoint of step %d was not written: %s", self._saving, line)
        self._saving = None

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
          UserError: no space, or no permission.
        """
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised
        with self._disk_errors():
            self._manager.wait_until_finished()
        if self._saving is not None:
            self._saving, self.failures = None, 0

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Where the block fails, the save that is going on is finished first."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # the block's error is the one to be told
                self.ended_well()  # or a warning says that it has not
            raise

    def close(self) -> None:
        """Waits for the last save, then ends threads and closes files."""
        self.wait()
        self._manager.close()

    def restore_latest(
        self, params: Any, opt_state: Any, groups: Iterable[int] | None = None
    ) -> Restored | None:
        """The newest step that can be read; None where none was ever saved.

        A damaged checkpoint is named in a warning and the one before it taken; training goes on
        from there, and the next save renames the damaged one to damaged-STEP.

        Args:
          params: tree of `jax.ShapeDtypeStruct` with shardings, on any mesh; opt_state likewise.
          groups: the lane groups wanted, whichever process saved them; None for all.

        Raises:
          UserError: no checkpoint can be read, or one has arrays of other shapes or a newer format;
            or processes see different ones.
        """
        steps = self.steps()
        if len(set(all_values(zlib.crc32(repr(steps).encode()) >> 1))) > 1:
            raise UserError(
                f"{self.directory}: not all processes see the same checkpoints there: give all "
                "machines one workdir, and start again"
            )
        if not steps:
            return None
        groups = None if groups is None else tuple(groups)
        restored, self._damaged = newest_readable(
            self.directory,
            steps,
            lambda step: read_step(self.directory, step, params, opt_state, groups),
        )
        return restored

    def _set_damaged_aside(self) -> None:
        if not self._damaged:
            return
        if jax.process_index() == 0:
            for step in self._damaged:
                aside = self.directory / f"damaged-{step}"
                if aside.exists():
                    aside.rmtree()
                (self.directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._damaged = []
        self._manager.reload()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns errors of a full or read-only disk into one line; raises what else has failed."""
        try:
            yield
        except Exception as raised:
            error = cause_of(raised)
            self._forget()
            if jax.process_index() == 0:  # its files would take the space of the next try
                with contextlib.suppress(OSError):
                    for temporary in ocp.utils.tmp_checkpoints(self.directory):
                        temporary.get().rmtree(missing_ok=True)
            if any(sign in str(error) for sign in ("No space left", "ENOSPC", "quota exceeded")):
                raise UserError(self._no_space("a checkpoint")) from error
            if isinstance(error, PermissionError) and in_bucket(self.directory):
                raise UserError(f"{self.directory}: {error.strerror or error}") from error
            if isinstance(error, PermissionError):
                raise UserError(
                    f"{self.directory}: not allowed to write a checkpoint: choose another workdir"
                ) from error
            raise error from error.__cause__

    def _forget(self) -> None:
        """The steps that Orbax knows are those that are there, and not the one that failed."""
        self._stale = True
        alone = jax.process_count() == 1
        # A bucket may not answer now; it is asked again before the next save.
        with contextlib.suppress(*[OSError] * alone), google_errors(self.directory):
            self._manager.reload()
            self._stale = False

    def _no_space(self, what: str) -> str:
        return (
            f"{self.directory}: no space left for {what}: {in_bytes(self._needed)} needed, "
            f"{in_bytes(self._free())} free: make room or lower keep_last"
        )

    def _free(self) -> float:
        try:
            return shutil.disk_usage(self.directory).free
        except OSError:  # not a local disk
            return math.inf


@dataclasses.dataclass
class _Removal(checkpoint_managers.PreservationPolicy):
    """Preserves all checkpoints while none are to be removed."""

    allowed: bool = True

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        return [not self.allowed] * len(checkpoints)


def _bytes_to_save(arrays: list[Any], lane_groups: items.SaveData) -> int:
    """Upper bound of what a save takes on a disk: compression may save nothing.

    Beside the arrays themselves 170 KB, and 1 KB for each array, were measured.
    """
    of_lane_groups = sum(map(len, lane_groups.files.values())) * jax.process_count()
    overhead = 2**18 + 2**12 * len(arrays)
    return sum(x.size * x.dtype.itemsize for x in arrays) + overhead + of_lane_groups

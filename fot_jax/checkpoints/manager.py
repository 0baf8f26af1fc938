"""Checkpoints: parameters, optimizer state, the lanes' place in the data, and what describes them.

Saving goes on in the background, and a step appears only when all of it is written. Reading
compares checksums (items.py), so whatever happened to the files, what is restored is
what was saved; a damaged checkpoint is passed over for the one before it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging as python_logging
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from fot_jax.checkpoints import items
from fot_jax.checkpoints.array_checksums import array_checksums
from fot_jax.common.agreement import all_agree
from fot_jax.common.errors import UserError
from fot_jax.common.paths import absolute, google_errors, in_bucket, path_of
from fot_jax.common.trees import leaves_by_path
from fot_jax.common.units import in_bytes
from fot_jax.model.transformer import ModelConfig, RopeScaling

T = TypeVar("T")

BARRIER_SECONDS = 300  # for the last process to have written its part after the first has
FINISHED = "commit_success.txt"  # Orbax's mark: in a bucket, a step without it is no checkpoint
MOST_FAILURES = 5  # saves in a row, before the run ends


class Restored(NamedTuple):
    """A checkpoint read back."""

    step: int
    params: Any
    opt_state: Any  # None when only parameters were asked for
    data: dict[int, dict[str, np.ndarray]] | None  # as above
    meta: dict[str, Any]  # as saved, after a round trip through JSON


# --- Restoring -----------------------------------------------------------------------------------

# 1. A workdir with checkpoints of its own resumes from the newest that can be read: restore_latest.
# 2. Else, if the experiment names one (initialize_from), its parameters are taken, and only these:
#    step 0, a new optimizer state, the data from the start: load_params.
# 3. Else training starts from fresh parameters.


def load_params(path: epath.PathLike, params: Any = None) -> Restored:
    """The parameters and meta of a checkpoint: a workdir, or a step inside its checkpoints.

    Args:
      path: a step is read itself or not at all; of a workdir, the newest step that can be read.
      params: tree of `jax.ShapeDtypeStruct` with shardings, cast to on the way; None restores
        parameters as saved, onto the first local device.

    Raises:
      UserError: nothing there, nothing readable, or parameters of other shapes.
    """
    directory, steps = locate(path)
    return _newest_readable(
        directory, steps, lambda step: _read(directory, step, params, None, groups=())
    )[0]


def load_model(path: epath.PathLike) -> tuple[ModelConfig, Any]:
    """Configuration (meta["model"]) and parameters of a checkpoint.

    Raises:
      UserError: as load_params; or the checkpoint does not say what model it is of.
    """
    restored = load_params(path)
    return model_of(path, restored.meta), restored.params


def model_of(path: epath.PathLike, meta: Mapping[str, Any]) -> ModelConfig:
    """The model that the meta of a checkpoint says it is of.

    Raises:
      UserError: it says none, or fields that are not known.
    """
    try:
        fields = dict(meta["model"])
        if fields["rope_scaling"] is not None:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        return ModelConfig(**fields)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: written by another version of fot_jax: its model configuration has "
            f"{meta.get('model')}"
        ) from error


def locate(path: epath.PathLike) -> tuple[epath.Path, list[int]]:
    """Where checkpoints are, and the complete steps meant by the path of a workdir or of a step.

    Raises:
      UserError: there is none.
    """
    path = path_of(path)
    if re.fullmatch("[0-9]{1,18}", path.name) and int(path.name) in complete_steps(path.parent):
        return path.parent, [int(path.name)]
    for directory in (path / "checkpoints", path):  # the latter where it is that folder itself
        if steps := complete_steps(directory):
            return directory, steps
    raise UserError(f"{path}: no checkpoint here: give a workdir or a step inside its checkpoints")


def complete_steps(directory: epath.PathLike) -> list[int]:
    """Steps whose checkpoints were written to the end, ascending."""
    directory = epath.Path(directory)
    steps = ocp.utils.checkpoint_steps(directory) if directory.is_dir() else []
    if 0 not in steps and _copied_unmarked(directory):
        steps.append(0)
    return sorted(steps)


def _copied_unmarked(directory: epath.Path) -> bool:
    """Whether step 0 is a conversion of fot_jax 0.1, without marks, copied into a bucket.

    Training saves no step 0, and none without lane groups. Whether the copy is whole is seen by its
    checksums.
    """
    if not in_bucket(directory):
        return False
    try:
        _, _, of_opt_state = items.read_meta(directory / "0", 0)
        return not of_opt_state and not items.read_data(directory / "0")
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # a newer format, too
        return False


class _Unreadable(Exception):
    """A checkpoint is damaged."""


def _newest_readable(
    directory: epath.Path, steps: list[int], read: Callable[[int], T]
) -> tuple[T, list[int]]:
    """What `read` makes of the newest step it can read, and the steps after it."""
    damaged: list[tuple[int, str]] = []
    for step in reversed(steps):
        try:
            return read(step), [step for step, _ in damaged]
        except _Unreadable as error:
            damaged.append((step, str(error)))
            if step != steps[0]:
                _warn(f"{directory / str(step)} is damaged ({error}): taking the checkpoint before")
    step, why = damaged[0]
    raise UserError(
        f"{directory}: of checkpoints {', '.join(map(str, steps))} none can be read "
        f"({step}: {why}): restore one from a copy, or start in another workdir"
    )


def _read(directory: epath.Path, step: int, params, opt_state, groups) -> Restored:
    """Reads one step; `params` None reads them as saved, `opt_state` None leaves it out."""
    folder = directory / str(step)
    meta, of_params, of_opt_state = _attempt("meta", lambda: items.read_meta(folder, step))
    if params is None:
        params = items.as_saved(of_params)
    else:
        check_same(folder, "parameter", of_params, params)
    if opt_state is not None:
        check_same(folder, "optimizer state", of_opt_state, opt_state)
    data = _attempt("data", lambda: items.read_data(folder, groups))
    params = _read_arrays(folder / "params", of_params, params)
    if opt_state is not None:
        opt_state = _read_arrays(folder / "opt_state", of_opt_state, opt_state)
    return Restored(step, params, opt_state, data, meta)


def _attempt(what: str, read: Callable[[], T]) -> T:
    """The value of `read` if no process failed; else _Unreadable on all of them alike."""
    value, failure, refusal = None, None, None
    try:
        value = read()
    except MemoryError:
        raise
    except UserError as error:
        refusal = error
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):  # the device's memory, not the files
            raise
        if why := _not_to_be_had(error):
            raise UserError(why) from error
        failure = f"{what}: {_reason(error)}"
    if not all_agree(failure is None and refusal is None):
        if refusal is not None:
            raise refusal
        raise _Unreadable(failure or f"{what}: another process cannot read it")
    return value


def _reason(error: Exception) -> str:
    """What a person needs of an error; of TensorStore's, which tell all their drivers, the end."""
    if str(error).startswith("Encountered error while reading") and error.__cause__ is not None:
        error = error.__cause__  # Orbax's own tells the array's whole specification
    line = re.split(r" \[[\w ]+(?:\[\d+\])?='", " ".join(str(error).split()))[0]
    files = list(re.finditer(r'local file "([^"]+)"', line))
    if not files:
        return f"{type(error).__name__}: {line[:150]}"
    said = line[files[-1].end() :].strip(": ")[:150]
    missing = "is missing" if "NOT_FOUND" in line else "cannot be read"
    return f"{epath.Path(files[-1][1]).name}: {said or missing}"


def _not_to_be_had(error: Exception) -> str | None:
    """Why a bucket does not give what is there, which may be whole."""
    if isinstance(error, OSError) and str(error.filename).startswith("gs://"):
        missing = isinstance(error, FileNotFoundError)
        return None if missing else f"{error.filename}: cannot be read: {error.strerror}"
    refused = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
    line = " ".join(str(error).split())[:300]
    return f"cannot be read: {line}" if line.startswith(refused) else None


def _warn(line: str) -> None:
    if jax.process_index() == 0:
        logging.warning("%s", line)


# --- Arrays --------------------------------------------------------------------------------------


def check_same(folder: epath.Path, kind: str, recorded: Mapping[str, Any], wanted: Any) -> None:
    """Checks that a checkpoint has the arrays of a tree.

    Raises:
      UserError: names the first that it has not, or has in another shape, or has too many.
    """
    named = leaves_by_path(wanted)
    for name, leaf in named.items():
        there = tuple(recorded[name]["shape"]) if name in recorded else "missing"
        if there != tuple(leaf.shape):
            raise UserError(
                f"{folder}: {kind} {name} is {there} in the checkpoint and {tuple(leaf.shape)} in "
                f"this experiment: use the configuration it was saved with, or another workdir"
            )
    for name in recorded:
        if name not in named:
            raise UserError(
                f"{folder}: {kind} {name} of the checkpoint is not part of this experiment: use "
                f"the configuration it was saved with, or another workdir"
            )


@functools.cache
def one_error_alone() -> None:
    """From now on, what Orbax raises is not printed as well, once by each of its threads.

    Of many arrays the first that fails is raised. The others go on failing for a while, in threads
    that find the event loop closed.
    """
    before = sys.unraisablehook

    def hook(unraisable):
        closed = str(unraisable.exc_value) == "Event loop is closed"
        if not closed and not inspect.iscoroutine(unraisable.object):
            before(unraisable)

    def of_a_thread(record) -> bool:
        orbax = record.exc_info and "orbax" in record.pathname
        return bool(orbax) or "exception was never retrieved" in record.getMessage()

    sys.unraisablehook = hook
    for name in ("absl", "asyncio"):
        python_logging.getLogger(name).addFilter(lambda record: not of_a_thread(record))


def _read_arrays(folder: epath.Path, recorded: Mapping[str, Any], wanted: Any) -> Any:
    """Reads the arrays of one item as saved, compares checksums, then casts to the wanted types."""
    leaves, structure = jax.tree.flatten(wanted)
    if not leaves:
        return wanted
    names = list(leaves_by_path(wanted))
    one_device = SingleDeviceSharding(jax.local_devices()[0])

    def as_recorded(name, leaf):
        sharding = getattr(leaf, "sharding", None) or one_device
        return jax.ShapeDtypeStruct(leaf.shape, recorded[name]["dtype"], sharding=sharding)

    target = jax.tree.unflatten(structure, map(as_recorded, names, leaves))
    handler = ocp.StandardCheckpointHandler()
    one_error_alone()
    arrays = _attempt(
        folder.name,
        lambda: handler.restore(absolute(folder), args=ocp.args.StandardRestore(target)),
    )
    arrays = jax.tree.leaves(arrays)
    for name, checksum in zip(names, array_checksums(arrays), strict=True):
        if checksum != recorded[name]["checksum"]:
            raise _Unreadable(f"{folder.name}: {name} is not what was saved: its checksum differs")
    cast = [
        a if a.dtype == leaf.dtype else a.astype(leaf.dtype)
        for a, leaf in zip(arrays, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, cast)


def _bytes_of_a_save(arrays: list[Any], data: items.SaveData) -> int:
    """At most, on a disk: compression may save nothing.

    What there is beside the arrays themselves was measured: 170 KB, and 1 KB for each array.
    """
    of_data = sum(map(len, data.files.values())) * jax.process_count()
    beside = 2**18 + 2**12 * len(arrays) + of_data
    return sum(x.size * x.dtype.itemsize for x in arrays) + beside


# --- Saving --------------------------------------------------------------------------------------


class Checkpointer:
    """The checkpoints of one run: saved in the background, old ones removed, the newest restored.

    All processes call the same methods in the same order.
    """

    def __init__(
        self, directory: epath.PathLike, keep_last: int = 2, keep_every: int | None = None
    ):
        """Touches no file yet.

        Args:
          directory: of this run's checkpoints alone.
          keep_last: how many of the newest stay.
          keep_every: steps whose multiples stay for ever; None: none do.
        """
        self.directory = absolute(directory)
        self._keep = keep_last, keep_every
        self._damaged: list[int] = []  # newer than what was restored
        self._needed = 0  # bytes of the last save
        self._saving: int | None = None  # the step that is being written
        self.failures = 0  # saves in a row that did not get there
        self._error: Exception = UserError(f"{self.directory}: another process cannot write here")

    def open(self) -> None:
        """Makes the directory and removes what unfinished saves left; else the first save does.

        Raises:
          UserError: the directory cannot be made or written to.
        """
        self._manager  # noqa: B018

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        one_error_alone()
        keep_last, keep_every = self._keep
        keep = [checkpoint_managers.LatestN(keep_last)]
        if keep_every is not None:
            keep.append(checkpoint_managers.EveryNSteps(keep_every))
        try:
            if _copied_unmarked(self.directory):
                (self.directory / "0" / FINISHED).write_text("")  # or Orbax would remove it
            # A save that fails in the background would be found out late, and end the run slowly.
            self.directory.mkdir(parents=True, exist_ok=True)
            trial = self.directory / f"trial-of-process-{jax.process_index()}"
            trial.write_text("")
            with google_errors(self.directory):
                list(ocp.path.step.standard_name_format().find_all(self.directory))  # may it look?
                unfinished = ocp.utils.tmp_checkpoints(self.directory)
            trial.unlink()
            for left in unfinished:
                _warn(f"{left.get()}: a save that never finished: removing it")
            with google_errors(self.directory):
                return ocp.CheckpointManager(
                    self.directory,
                    options=ocp.CheckpointManagerOptions(
                        preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
                        cleanup_tmp_directories=True,
                        async_options=ocp.options.AsyncOptions(timeout_secs=BARRIER_SECONDS),
                    ),
                )
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot keep checkpoints here ({error.strerror or error}): "
                f"{'mend that, or ' if in_bucket(self.directory) else ''}choose another workdir"
            ) from error

    def steps(self) -> list[int]:
        """Steps that are complete on disk, ascending."""
        return complete_steps(self.directory)

    def save(self, step: int, params: Any, opt_state: Any, data: items.Data, meta: Mapping) -> None:
        """Starts saving a step; the arrays may be donated or changed as soon as this returns.

        Waits for the save before it, if that is still going on. If that one failed, so be it: it is
        named in a warning, and this one takes its place. Saving a step that is already there does
        nothing.

        Args:
          data: state of the lane groups that this process owns.
          meta: anything JSON can hold; tuples come back as lists.

        Raises:
          UserError: no space left.
          Exception: the last MOST_FAILURES saves have failed; what the last of them met.
        """
        try:
            self.wait()
        except Exception as error:
            self._failed(error)
        if not all_agree(self.failures < MOST_FAILURES):
            raise self._error
        self._set_damaged_aside()
        if step in self._manager.all_steps():
            return
        state = items.SaveData.of(data)
        self._needed = _bytes_of_a_save(jax.tree.leaves((params, opt_state)), state)
        if not all_agree(self._needed <= self._free()):
            raise UserError(self._no_space(f"the checkpoint of step {step}"))
        arrays = {"params": items.describe(params), "opt_state": items.describe(opt_state)}
        args = {
            "params": ocp.args.StandardSave(params),
            "data": state,
            "meta": ocp.args.JsonSave(items.sealed_meta(step, meta, arrays)),
        }
        if arrays["opt_state"]:  # Orbax saves no empty item
            args["opt_state"] = ocp.args.StandardSave(opt_state)
        self._saving = step
        with self._disk_errors():
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def failed(self) -> bool:
        """Whether the save that was going on has turned out to fail, which a warning then says."""
        if self._saving is None or self._manager.is_saving_in_progress():
            return False
        try:
            self.wait()
        except Exception as error:
            self._failed(error)
            return True
        return False

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self._error = error
        line = " ".join(str(error).split())
        logging.warning("the checkpoint of step %d was not written: %s", self._saving, line)
        self._saving = None

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
          UserError: it did not get there for want of space, or of permission.
        """
        with self._disk_errors():
            self._manager.wait_until_finished()
        if self._saving is not None:
            self._saving, self.failures = None, 0

    def close(self) -> None:
        """Waits, then lets go of threads and files."""
        self.wait()
        self._manager.close()

    def restore_latest(
        self, params: Any, opt_state: Any, groups: Iterable[int] | None = None
    ) -> Restored | None:
        """The newest step that can be read; None where none was ever saved.

        A damaged checkpoint is named in a warning and the one before it taken; training then goes
        on from there, and the damaged one is renamed out of the way at the next save.

        Args:
          params: tree of `jax.ShapeDtypeStruct` with shardings, on any mesh; opt_state likewise.
          groups: the lane groups wanted, whichever process saved them; None for all.

        Raises:
          UserError: no checkpoint can be read, or one holds arrays of other shapes.
        """
        steps = self.steps()
        if not steps:
            return None
        groups = None if groups is None else tuple(groups)
        restored, self._damaged = _newest_readable(
            self.directory,
            steps,
            lambda step: _read(self.directory, step, params, opt_state, groups),
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
        """Makes one line of what the disk refuses; other errors pass as they are."""
        try:
            yield
        except Exception as error:
            self._manager.reload()  # forgets the step that did not get there
            if jax.process_index() == 0:  # what there is of it takes the room of the next try
                with contextlib.suppress(OSError):
                    for left in ocp.utils.tmp_checkpoints(self.directory):
                        left.get().rmtree(missing_ok=True)
            if any(sign in str(error) for sign in ("No space left", "ENOSPC", "quota exceeded")):
                raise UserError(self._no_space("a checkpoint")) from error
            if isinstance(error, PermissionError):
                raise UserError(
                    f"{self.directory}: not allowed to write a checkpoint: choose another workdir"
                ) from error
            raise

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

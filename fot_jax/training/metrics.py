"""What training reports: sums to means, speed, and where the numbers go.

Process 0 writes and speaks; on the others everything here that writes or prints does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from fot_jax.common.atomic import write_file
from fot_jax.common.bucket_files import AppendableFile
from fot_jax.common.errors import UserError
from fot_jax.common.paths import in_bucket

# --- Numbers -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sums over target tokens, on the host; add them up, then take means.

    Attributes:
      loss: nats.
      correct: tokens whose target was the most likely.
      weights: tokens.
    """

    loss: float = 0.0
    correct: float = 0.0
    weights: float = 0.0

    @classmethod
    def of(cls, sums: Any) -> Counts:
        """Fetches anything with these three attributes, e.g. step.Sums."""
        return cls(*(float(getattr(sums, field.name)) for field in dataclasses.fields(cls)))

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.loss + other.loss, self.correct + other.correct, self.weights + other.weights
        )

    def means(self) -> dict[str, float]:
        """Loss in nats a token, perplexity and accuracy; not numbers where there was no token."""
        if not self.weights:
            return {"loss": math.nan, "perplexity": math.nan, "accuracy": math.nan}
        loss = self.loss / self.weights
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"loss": loss, "perplexity": perplexity, "accuracy": self.correct / self.weights}


def matmul_rate(dtype: Any = "float32") -> float:
    """FLOP/s of plain square matrix products on the first device, the best of half a second."""
    product = jax.jit(jnp.matmul)
    best, size, stop = 0.0, 1024, time.perf_counter() + 0.5
    while True:
        x = jnp.full((size, size), 1 / size, dtype)
        product(x, x).block_until_ready()  # compiles
        while True:
            start = time.perf_counter()
            product(x, x).block_until_ready()
            end = time.perf_counter()
            best = max(best, 2 * size**3 / (end - start))
            if end > stop:
                return best
            if end - start < 0.02 and size < 16384:  # too small to fill the device
                size *= 2
                break


@functools.cache
def device_rate(dtype: Any) -> float:
    """`matmul_rate`, measured once."""
    return matmul_rate(dtype)


def when_ready(arrays: Any, clock: Callable[[], float]) -> Callable[[], float]:
    """A function that waits for arrays and says when they were there, by a clock.

    A step may have ended long before its report is fetched: a CPU computes it where it is called.
    """
    at = []

    def watch():
        try:
            jax.block_until_ready(arrays)
        except Exception:  # is raised where the arrays are fetched
            pass
        at.append(clock())

    watcher = threading.Thread(target=watch, daemon=True)  # a device that hangs holds up no exit
    watcher.start()

    def ended() -> float:
        watcher.join()
        return at[0]

    return ended


def utilisation(flops: float, seconds: float, rate: float) -> float:
    """Share of `rate` (FLOP/s) that doing `flops` in `seconds` is."""
    return flops / (seconds * rate)


# --- Where they go -------------------------------------------------------------------------------

_CLOCK = 0.2  # seconds; when a step ended is known to some hundredths, on a busy machine


class Metrics:
    """metrics.jsonl and TensorBoard events in the workdir, and the console.

    metrics.jsonl has one object a line: step, time (seconds since 1970), name -> number, null for
    what is not finite. A resumed run first drops the lines that it is to write again, so that no
    step stands there twice.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        first_step: int,
        steps: int,
        tokens_per_step: int,
        peak_flops: float | None = None,
        console: IO[str] | None = None,
        evaluates: bool = True,
    ):
        """Opens the files.

        Args:
          first_step: updates already done.
          steps: updates in all.
          tokens_per_step: new tokens of a step, over all processes.
          peak_flops: FLOP/s that utilisation is measured against, over all devices.
          console: where to speak; standard error if None. A bar on a terminal, lines elsewhere.
          evaluates: whether `first_step` is evaluated, and what that gives written, again.
        """
        self._steps, self._tokens_per_step, self._peak = steps, tokens_per_step, peak_flops
        self._untimed, self._stopped = 0.0, None  # seconds that do not count; since when
        self._ends = [(first_step, self.clock(), 0.0)]  # step, when it ended, FLOPs up to then
        self._speaks = jax.process_index() == 0
        if not self._speaks:
            return
        self._console = console or sys.stderr
        self._workdir = workdir = epath.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        _drop_lines(workdir / "metrics.jsonl", first_step, evaluates)
        now = time.time()
        events = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        kind = AppendableFile if in_bucket(workdir) else _open
        self._files = kind(workdir / "metrics.jsonl"), kind(workdir / events)
        self._lines, self._events = self._files[0], RecordWriter(self._files[1])
        _begin_events(self._events, now, first_step)
        self._bar = None
        if self._console.isatty():
            self._bar = tqdm(
                total=steps, initial=first_step, file=self._console, unit="step", dynamic_ncols=True
            )

    def clock(self) -> float:
        """Seconds, without what is `untimed`: this clock stands still meanwhile."""
        return (self._stopped or time.perf_counter()) - self._untimed

    def timed_from(self, step: int, ended: float, flops: float) -> None:
        """Leaves a step that was compiled, and those before it, out of the speed of later ones.

        Arguments as of `training`.
        """
        self._ends = [(step, ended, flops)]
        if self._speaks and self._bar is not None:
            self._bar.n = self._bar.last_print_n = self._bar.initial = step
            self._bar.unpause()

    def training(
        self,
        step: int,
        ended: float,
        values: Mapping[str, Any],
        flops: float | None = None,
        compiled: bool = False,
    ) -> None:
        """Writes and shows what training measured, with its speed since the last call's step.

        Where that was less than _CLOCK before, the mean since an earlier call's. Adds
        tokens_per_second, seconds_per_step and, where `flops` and a peak are known, utilisation.

        Args:
          step: updates done.
          ended: when the step ended, by `clock`.
          values: name -> number; loss, perplexity and d are shown where present.
          flops: model FLOPs of all steps from the run's first to this one.
          compiled: whether the step was, meanwhile, so that the time left cannot be told from it.
        """
        # Threads see steps end, and may be late where something else, a profile say, holds Python.
        ended = max(ended, self._ends[-1][1])
        while len(self._ends) > 1 and ended - self._ends[1][1] >= _CLOCK:
            del self._ends[0]
        last_step, last_time, last_flops = self._ends[0]
        self._ends.append((step, ended, flops or 0.0))
        steps = max(step - last_step, 1)
        seconds = max(ended - last_time, 1e-6) / steps
        speed = {
            "tokens_per_second": self._tokens_per_step / seconds,
            "seconds_per_step": seconds,
        }
        if flops is not None and self._peak is not None:
            speed["utilisation"] = utilisation((flops - last_flops) / steps, seconds, self._peak)
        self.write(step, {**values, **speed})
        if self._speaks:
            left = None if compiled else seconds * (self._steps - step)
            self._show(step, values, speed["tokens_per_second"], left)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes numbers of a step to the files alone.

        Raises:
          UserError: no space left, or the like.
        """
        if not self._speaks:
            return
        now = time.time()
        numbers = {name: np.asarray(x).item() for name, x in values.items()}
        clean = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        summary = [summary_pb2.Summary.Value(tag=k, simple_value=x) for k, x in numbers.items()]
        event = event_pb2.Event(
            wall_time=now, step=step, summary=summary_pb2.Summary(value=summary)
        )
        line = json.dumps({"step": step, "time": round(now, 3), **clean})
        try:
            self._lines.write(f"{line}\n".encode())
            self._events.write(event.SerializeToString())
            with self._kept_if_in_bucket():
                self._lines.flush()
                self._events.flush()
        except OSError as error:
            raise UserError(
                f"{self._workdir}: metrics of step {step} cannot be written ({error.strerror}): "
                f"make room, then run again to resume"
            ) from error

    def send(self) -> None:
        """Sends to a bucket what is not there yet: before a checkpoint, after whose step a resumed
        run goes on writing."""
        if self._speaks and in_bucket(self._workdir):
            with self._kept_if_in_bucket():
                self._files[0].send()
                self._files[1].send()

    @contextlib.contextmanager
    def _kept_if_in_bucket(self) -> Iterator[None]:
        """A bucket that fails for a while ends no run: what was not sent is sent later."""
        try:
            yield
        except OSError as error:
            if not in_bucket(self._workdir):
                raise
            logging.warning("metrics are not written yet: %s: %s", error.filename, error.strerror)

    def say(self, text: str) -> None:
        """Prints text without tearing the progress bar."""
        if self._speaks:
            with tqdm.external_write_mode(file=self._console):
                print(text, file=self._console, flush=True)

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """What happens inside, an evaluation or a save, does not count against the speed of steps.

        No step is going on meanwhile.
        """
        self._stopped = time.perf_counter()
        try:
            yield
        finally:
            self._untimed += time.perf_counter() - self._stopped
            self._stopped = None

    def close(self) -> None:
        if self._speaks:
            for file in (self._lines, self._events):
                try:
                    with self._kept_if_in_bucket():
                        file.close()
                except OSError as error:  # maybe while another is raised, of the same full disk
                    logging.warning("%s: the last metrics may be missing: %s", self._workdir, error)
            if self._bar is not None:
                self._bar.close()

    def _show(self, step: int, values: Mapping[str, Any], rate: float, left: float | None) -> None:
        """`left`: seconds; None: not known."""
        shown = {
            "loss": f"{float(values['loss']):.4f}" if "loss" in values else None,
            "perplexity": f"{float(values['perplexity']):.4g}" if "perplexity" in values else None,
            "tokens/s": f"{rate:,.0f}",
            "d": str(values["d"]) if "d" in values else None,
        }
        shown = {name: text for name, text in shown.items() if text is not None}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)  # the bar adds the time left itself
            self._bar.update(step - self._bar.n)
            return
        if left is not None:
            shown["ETA"] = str(datetime.timedelta(seconds=round(left)))
        line = "  ".join(f"{name} {text}" for name, text in shown.items())
        print(f"step {step}/{self._steps}  {line}", file=self._console, flush=True)


def _open(path: epath.Path) -> IO[bytes]:
    return path.open("ab")


def _drop_lines(path: epath.Path, first_step: int, evaluates: bool) -> None:
    """Takes out of metrics.jsonl what a resumed run is about to write again."""
    if path.exists():
        text = path.read_bytes().decode(errors="replace")
        lines = (line for line in text.splitlines() if _stays(line, first_step, evaluates))
        kept = "".join(f"{line}\n" for line in lines)
        if kept != text:
            write_file(path, kept)


def _stays(line: str, first_step: int, evaluates: bool) -> bool:
    try:
        values = json.loads(line)
        # What evaluations gave has no "loss".
        return 0 < values["step"] < first_step + ("loss" in values or not evaluates)
    except (ValueError, KeyError, TypeError, RecursionError):  # cut off when a run was killed
        return False


def _begin_events(events: RecordWriter, now: float, first_step: int) -> None:
    """A new TensorBoard event file; TensorBoard then forgets what older ones say of later steps."""
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    events.write(event_pb2.Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    events.write(
        event_pb2.Event(wall_time=now, step=first_step + 1, session_log=start).SerializeToString()
    )
    events.flush()

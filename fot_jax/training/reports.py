"""What steps report, taken in while the next one runs: history, skipped updates, metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax

from fot_jax.checkpoints.manager import Checkpointer
from fot_jax.common.errors import UserError
from fot_jax.common.trees import leaves_by_path
from fot_jax.data.prefetch import Prefetch
from fot_jax.training.history import History
from fot_jax.training.metrics import Counts, Metrics
from fot_jax.training.program import Program
from fot_jax.training.step import StepInfo


class Report(NamedTuple):
    """Of one step, which may still be running.

    Attributes:
      step: updates done after it.
      d: that the schedule gave, if there is one.
      info: on the devices.
      began: when the step was given to the devices, by Metrics.clock.
      ended: waits for the step, and says when it ended, by the same clock.
      compiled: whether it was, before it ran.
      more: further numbers for the metrics.
    """

    step: int
    d: int | None
    info: StepInfo
    began: float
    ended: Callable[[], float]
    compiled: bool
    more: dict[str, float]


class Reports:
    """Takes in the reports of steps, in order.

    Attributes:
      history: of all steps taken in; checkpoints keep it.
    """

    def __init__(
        self,
        history: History,
        metrics: Metrics,
        program: Program,
        batches: Prefetch,
        checkpointer: Checkpointer,
        learning_rate: optax.Schedule,
        log_every: int,
        steps: int,
        max_skipped: int,
    ):
        """The last three, and learning_rate, are arguments of `train`."""
        self.history = history
        self._metrics, self._program = metrics, program
        self._batches, self._waited = batches, 0.0
        self._checkpointer = checkpointer
        self._learning_rate = learning_rate
        self._log_every, self._steps, self._max_skipped = log_every, steps, max_skipped
        self._gradients = list(leaves_by_path(program.trained))
        self._ended, self._flops = -math.inf, 0.0  # of the last step; of all so far

    def finish(self, report: Report) -> None:
        """Waits for a step, and takes in its report.

        Raises:
          UserError: more than max_skipped updates in a row were not finite.
        """
        step, d, info = report.step, report.d, jax.device_get(report.info)
        began, self._ended = max(report.began, self._ended), report.ended()
        seconds = 0.0 if report.compiled else self._ended - began
        counts = Counts.of(info.sums)
        self.history = self.history.after(step, d, counts, bool(info.applied), seconds)
        self._flops += self._program.flops_of(d)
        if not info.applied:
            self._skipped(step, info)
        if step % self._log_every == 0 or step == self._steps:
            self._write(report, float(info.grad_norm))
        if report.compiled:
            self._metrics.timed_from(step, self._ended, self._flops)

    def _skipped(self, step: int, info: StepInfo) -> None:
        finite = np.isfinite(info.grad_squares)
        what = "the loss" if finite.all() else f"the gradient of {self._gradients[finite.argmin()]}"
        self._metrics.say(f"step {step}: {what} is not finite: update skipped")
        if self.history.skipped > self._max_skipped:
            raise UserError(
                f"step {step}: {what} is not finite, for more than {self._max_skipped} steps in a "
                f"row: stopped; {self._good_checkpoint(step - self.history.skipped)}: lower the "
                "learning rate or look at the data"
            )

    def _good_checkpoint(self, updated: int) -> str:
        """Says from where a run can go on whose last step that was not skipped is `updated`."""
        self._checkpointer.ended_well()
        kept = self._checkpointer.steps()
        good = [step for step in kept if step < updated]
        said = f"the last good checkpoint is {f'that of step {good[-1]}' if good else 'none'}"
        if good and kept[-1] >= updated:
            said += f" (remove those from {updated} on, which may have parameters that are broken)"
        return said

    def _write(self, report: Report, grad_norm: float) -> None:
        history = self.history
        updates = report.step - history.skipped_in_all - (not history.skipped)  # before this one
        values = {
            **Counts(*history.counts).means(),
            "learning_rate": float(self._learning_rate(updates)),
            "grad_norm": grad_norm,
            "skipped": history.skipped_in_all,
            "goodput": history.goodput(),
            "data_wait_seconds": self._batches.waited - self._waited,
        }
        if report.d is not None:
            values["d"] = report.d
        self._waited = self._batches.waited
        self.history = history.without_counts()
        self._metrics.training(
            step=report.step,
            ended=self._ended,
            values={**values, **report.more},
            flops=self._flops,
            compiled=report.compiled,
        )

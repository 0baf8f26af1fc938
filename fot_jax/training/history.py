"""What a run remembers of the steps it has done."""

from __future__ import annotations

import dataclasses
import math
import time

from fot_jax.training.metrics import Counts


@dataclasses.dataclass(frozen=True)
class History:
    """What the loop remembers of the steps so far; checkpoints keep it.

    Attributes:
      d: of the last step.
      accuracies: (step, accuracy) of the last two steps.
      counts: loss, correct, weights since metrics were last written, of losses that were finite.
      skipped: updates skipped in a row up to now.
      skipped_in_all: since step 1.
      started: when the run was started for the first time, in seconds since 1970.
      productive: seconds of the steps that led here, compiling not among them.
    """

    d: int | None = None
    accuracies: tuple[tuple[int, float], ...] = ()
    counts: tuple[float, float, float] = (0.0, 0.0, 0.0)
    skipped: int = 0
    skipped_in_all: int = 0
    started: float = dataclasses.field(default_factory=time.time)
    productive: float = 0.0

    def goodput(self) -> float:
        """Share of the time since the run was first started that its steps took.

        Setting up, compiling, evaluating, waiting after a preemption, and steps that were done and
        lost do not count as productive.
        """
        return self.productive / max(time.time() - self.started, 1e-9)

    def accuracy(self, step: int) -> float:
        """Of a step; 0 before the first."""
        return dict(map(tuple, self.accuracies)).get(step, 0.0)

    def after(
        self, step: int, d: int | None, counts: Counts, applied: bool, seconds: float
    ) -> History:
        """The history with one more step in it; `seconds` of it were productive."""
        accuracy = counts.correct / counts.weights if counts.weights else 0.0
        accuracies = (*self.accuracies, (step, accuracy))[-2:]
        total = Counts(*self.counts) + (counts if math.isfinite(counts.loss) else Counts())
        return dataclasses.replace(
            self,
            d=d,
            accuracies=accuracies,
            counts=dataclasses.astuple(total),
            skipped=0 if applied else self.skipped + 1,
            skipped_in_all=self.skipped_in_all + (not applied),
            productive=self.productive + seconds,
        )

    def without_counts(self) -> History:
        """The history after metrics were written."""
        return dataclasses.replace(self, counts=(0.0, 0.0, 0.0))

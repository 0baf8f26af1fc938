"""Schedules of the learning rate and of d (paper §5).

A schedule of the learning rate is a function of the number of updates done so far, as optax has
them; update n = 1, 2, … uses schedule(n - 1). A schedule of d also knows the d and the accuracy of
steps before.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import LARGEST_COUNT, LARGEST_SEED, UserError, check_range

# --- Learning rate -------------------------------------------------------------------------------


@configurable
def constant_rate(value: float, warmup_steps: int = 0) -> optax.Schedule:
    """`value`, after a linear warm-up over the first `warmup_steps` updates."""
    check_range("constant_rate", 0, value=value)
    check_range("constant_rate", 0, LARGEST_COUNT, warmup_steps=warmup_steps)
    return lambda count: value * _warmup(count, warmup_steps)


@configurable
def inverse_square_root(
    max_value: float, min_value: float, warmup_steps: int = 1000
) -> optax.Schedule:
    """Linear warm-up to max_value, then max_value · sqrt(warmup_steps / n), never below min_value.

    n counts updates from 1; the maximum is reached at n = warmup_steps.
    """
    _check_values("inverse_square_root", max_value, min_value)
    check_range("inverse_square_root", 1, LARGEST_COUNT, warmup_steps=warmup_steps)

    def schedule(count):
        n = jnp.maximum(count + 1, warmup_steps).astype(jnp.float32)
        decayed = jnp.maximum(max_value * jnp.sqrt(warmup_steps / n), min_value)
        return decayed * _warmup(count, warmup_steps)

    return schedule


@configurable
def cosine(max_value: float, min_value: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear warm-up to max_value, then half a cosine down to min_value at update `steps`."""
    _check_values("cosine", max_value, min_value)
    check_range("cosine", 0, LARGEST_COUNT, warmup_steps=warmup_steps, steps=steps)
    if steps <= warmup_steps:
        raise UserError(f"cosine: steps = {steps} must exceed warmup_steps = {warmup_steps}")

    def schedule(count):
        done = jnp.clip((count + 1 - warmup_steps) / (steps - warmup_steps), 0.0, 1.0)
        decayed = min_value + (max_value - min_value) * 0.5 * (1 + jnp.cos(math.pi * done))
        return decayed * _warmup(count, warmup_steps)

    return schedule


def _warmup(count, warmup_steps: int) -> jax.Array:
    return jnp.minimum((count + 1) / max(warmup_steps, 1), 1.0)


def _check_values(schedule: str, max_value: float, min_value: float) -> None:
    check_range(schedule, 0, max_value=max_value, min_value=min_value)
    if min_value > max_value:
        raise UserError(f"{schedule}: min_value = {min_value} exceeds max_value = {max_value}")


# --- d -------------------------------------------------------------------------------------------


class ScheduleOfD(Protocol):
    """How many contexts a crossbatch scheme gives to a row, step by step."""

    @property
    def values(self) -> tuple[int, ...]:
        """Every d that there may be: a program is compiled for each."""

    def at(self, step: int, last_d: int | None, accuracy: float) -> int:
        """d of `step`; `last_d` is d of the step before, `accuracy` that of two steps before."""


@configurable
@dataclasses.dataclass(frozen=True)
class SwitchAtStep:
    """d is values[0] before steps[0], then values[1] up to steps[1], and so on."""

    steps: tuple[int, ...] = (450_000,)
    values: tuple[int, ...] = (2, 64)

    def __post_init__(self):
        if len(self.values) != len(self.steps) + 1 or list(self.steps) != sorted(self.steps):
            raise UserError(
                f"SwitchAtStep: steps {tuple(self.steps)} must ascend and values "
                f"{tuple(self.values)} must be one more than steps"
            )

    def at(self, step: int, last_d: int | None, accuracy: float) -> int:
        return self.values[int(np.searchsorted(self.steps, step, side="right"))]


@configurable
@dataclasses.dataclass(frozen=True)
class SwitchAtAccuracy:
    """d is values[0] until the accuracy of a training step reaches `threshold`, then values[1]."""

    threshold: float = 0.98
    values: tuple[int, int] = (1, 128)

    def __post_init__(self):
        check_range("SwitchAtAccuracy", 0, 1, threshold=self.threshold)
        if len(self.values) != 2:
            raise UserError(
                f"SwitchAtAccuracy.values = {tuple(self.values)}: give two values of d, "
                "before and after the switch"
            )

    def at(self, step: int, last_d: int | None, accuracy: float) -> int:
        return self.values[last_d == self.values[1] or accuracy >= self.threshold]


@configurable
@dataclasses.dataclass(frozen=True)
class DrawnEachStep:
    """d is drawn anew at each step from `values`, as a function of seed and step alone."""

    values: tuple[int, ...] = (2, 128)
    seed: int = 0

    def __post_init__(self):
        check_range("DrawnEachStep", 0, LARGEST_SEED, seed=self.seed)
        if not self.values:
            raise UserError("DrawnEachStep.values is empty: give the values of d to draw from")

    def at(self, step: int, last_d: int | None, accuracy: float) -> int:
        return self.values[np.random.default_rng((self.seed, step)).integers(len(self.values))]

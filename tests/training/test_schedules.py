"""Schedules of the learning rate against their formulas, and of d."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot_jax.common.errors import UserError
from fot_jax.training.schedules import (
    DrawnEachStep,
    SwitchAtAccuracy,
    SwitchAtStep,
    constant_rate,
    cosine,
    inverse_square_root,
)

# --- Learning rate -------------------------------------------------------------------------------


def test_inverse_square_root_is_the_papers():
    # 184M: 0.01 -> 0.0005 over 500k steps, 1000 of warm-up (paper §5).
    rate = inverse_square_root(0.01, 0.0005, 1000)
    for update in (1, 500, 1000):
        assert float(rate(update - 1)) == pytest.approx(0.01 * update / 1000, rel=1e-6)
    for update in (1001, 4000, 100_000):
        expected = 0.01 * math.sqrt(1000 / update)
        assert float(rate(update - 1)) == pytest.approx(expected, rel=1e-6)
    assert float(rate(499_999)) == pytest.approx(0.0005, rel=1e-6)


def test_cosine_and_constant():
    rate = cosine(1.0, 0.1, warmup_steps=10, steps=110)
    assert float(rate(4)) == pytest.approx(0.5)
    assert float(rate(9)) == pytest.approx(1.0)
    for update in (11, 35, 60, 110):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (update - 10) / 100)) / 2
        assert float(rate(update - 1)) == pytest.approx(expected, rel=1e-5)
    assert float(rate(1000)) == pytest.approx(0.1)
    assert [float(constant_rate(0.3)(n)) for n in (0, 7)] == pytest.approx([0.3, 0.3])
    warmed = [float(constant_rate(0.4, 4)(n)) for n in (0, 1, 3, 9)]
    assert warmed == pytest.approx([0.1, 0.2, 0.4, 0.4])


def test_schedules_compile():
    constant = constant_rate(0.3, 5)
    schedules = constant, inverse_square_root(1, 0.1), cosine(1, 0, 2, 9)
    for schedule in schedules:
        np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(3)), schedule(3), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cosine(0.1, 0.2, 1, 9), "min_value = 0.2 exceeds max_value = 0.1"),
        (lambda: cosine(0.1, 0.0, 9, 9), "steps = 9 must exceed warmup_steps = 9"),
        (lambda: inverse_square_root(0.1, 0.0, 0), "warmup_steps = 0"),
        (lambda: constant_rate(float("nan")), "value = nan"),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


# --- d -------------------------------------------------------------------------------------------


def test_switch_at_step():
    schedule = SwitchAtStep((450_000,), (2, 64))
    steps = 0, 449_999, 450_000, 499_999
    assert [schedule.at(step, None, 0.0) for step in steps] == [2, 2, 64, 64]
    schedule = SwitchAtStep((10, 20), (1, 8, 64))
    assert [schedule.at(step, None, 0.0) for step in (9, 10, 19, 20)] == [1, 8, 8, 64]
    assert SwitchAtStep((), (5,)).at(123, None, 0.0) == 5


def test_switch_at_accuracy_is_for_good():
    schedule = SwitchAtAccuracy(0.98, (1, 128))
    d, history = None, []
    for step, accuracy in enumerate([np.nan, 0.5, 0.979, 0.98, 0.2, np.nan]):
        d = schedule.at(step, d, accuracy)
        history.append(d)
    assert history == [1, 1, 1, 128, 128, 128]


def test_drawn_each_step():
    """A function of seed and step alone, every value as often as any other."""
    schedule = DrawnEachStep((2, 16, 128), seed=3)
    drawn = [schedule.at(step, None, 0.0) for step in range(600)]
    assert drawn == [schedule.at(step, 128, 1.0) for step in range(600)]
    counts = collections.Counter(drawn)
    assert set(counts) == {2, 16, 128}
    assert all(150 < count < 250 for count in counts.values())
    pairs = collections.Counter(zip(drawn, drawn[1:], strict=False))
    assert len(pairs) == 9 and min(pairs.values()) > 35
    assert drawn != [DrawnEachStep((2, 16, 128), seed=4).at(step, None, 0.0) for step in range(600)]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SwitchAtStep((5,), (1,)), r"SwitchAtStep: steps \(5,\) must ascend and values"),
        (lambda: SwitchAtStep((9, 5), (1, 2, 3)), r"SwitchAtStep: steps \(9, 5\) must ascend"),
        (lambda: SwitchAtAccuracy(0.9, (1, 2, 3)), r"SwitchAtAccuracy\.values = \(1, 2, 3\): give"),
        (
            lambda: SwitchAtAccuracy(98.0),
            r"SwitchAtAccuracy\.threshold = 98\.0: give a number from",
        ),
        (lambda: DrawnEachStep(()), r"DrawnEachStep\.values is empty"),
    ],
)
def test_bad_schedules(make, message):
    with pytest.raises(UserError, match=message):
        make()

"""Products with kernels and adapters, and their gradients, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot_jax.model.linear import adapted_linear, linear

SCALE = np.float32(1.5)


def drawn(E, F, rank=4):
    """x, a kernel that bfloat16 holds exactly, a young adapter of it, and a gradient of y."""
    rng = np.random.default_rng(E)
    x, dy = rng.normal(size=(2, 600, E)), rng.normal(size=(2, 600, F))
    a, b = rng.normal(size=(E, rank)), rng.normal(size=(rank, F)) * 2.0**-12
    x, kernel, dy = (
        np.asarray(jnp.bfloat16(m), np.float32) for m in (x, rng.normal(size=(E, F)), dy)
    )
    return x, kernel, np.float32(a), np.float32(b), dy


def outer(x, y):
    return np.einsum("rte,rtf->ef", x, y)


def share_found(got, without, part):
    """How much of `part` there is in got - without: about 1 where rounding does not take sides."""
    return np.vdot(np.asarray(got, np.float64) - without, part) / np.vdot(part, part)


@pytest.mark.parametrize(("E", "F"), [(48, 160), (160, 48)], ids=["up", "down"])
@pytest.mark.parametrize(
    ("dtype", "error", "of_adapter"), [("float32", 2e-6, 1e-3), ("bfloat16", 0.03, 0.1)]
)
def test_products_and_gradients(E, F, dtype, error, of_adapter):
    x, kernel, a, b, dy = drawn(E, F)
    typed = jnp.asarray(x, dtype)
    y, gradient = jax.vjp(adapted_linear, typed, *map(jnp.asarray, (kernel, a, b, SCALE)))
    assert y.dtype == typed.dtype
    got = dict(
        zip(("x", "kernel", "a", "b", "scale"), gradient(jnp.asarray(dy, dtype)), strict=True)
    )

    x, kernel, a, b, dy = (np.float64(m) for m in (x, kernel, a, b, dy))
    want = {
        "x": dy @ (kernel + SCALE * a @ b).T,
        "kernel": outer(x, dy),
        "a": SCALE * outer(x, dy @ b.T),
        "b": SCALE * outer(x @ a, dy),
        "scale": np.vdot(x @ a @ b, dy),
    }
    for name, of_name in want.items():
        distance = np.abs(np.float64(got[name]) - of_name).max()
        assert distance <= error * np.abs(of_name).max(), name
    # What it adds is a thousandth of y: less than the rounding of one number of type bfloat16.
    assert share_found(y, x @ kernel, SCALE * x @ a @ b) == pytest.approx(1, abs=of_adapter)
    part = SCALE * dy @ (a @ b).T
    assert share_found(got["x"], dy @ kernel.T, part) == pytest.approx(1, abs=of_adapter)


def test_the_scale_of_an_adapter_is_as_in_merging():
    """In bfloat16 4 / 3 would be 0.2 % too large, of every token alike."""
    x, kernel, a, b, dy = (jnp.asarray(each, "bfloat16") for each in drawn(48, 160, rank=3))
    scale = np.float32(4 / 3)
    y, gradient = jax.vjp(adapted_linear, x, jnp.zeros_like(kernel), a, b, scale)
    of_x, _, of_a, of_b, _ = gradient(dy)
    x, a, b, dy = (np.float64(each) for each in (x, a, b, dy))
    for got, want in (
        (y, x @ a @ b),
        (of_x, dy @ b.T @ a.T),
        (of_a, outer(x, dy @ b.T)),
        (of_b, outer(x @ a, dy)),
    ):
        assert share_found(got, 0, 4 / 3 * want) == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("bfloat16", 0.01)])
def test_a_kernel_alone(dtype, error):
    x, kernel, _, _, dy = drawn(96, 32)
    y, gradient = jax.vjp(linear, jnp.asarray(x, dtype), kernel)
    got = y, *gradient(jnp.asarray(dy, dtype))
    assert [each.dtype for each in got] == [dtype, dtype, "float32"]
    x, kernel, dy = np.float64(x), np.float64(kernel), np.float64(dy)
    for each, want in zip(got, (x @ kernel, dy @ kernel.T, outer(x, dy)), strict=True):
        assert np.abs(np.float64(each) - want).max() <= error * np.abs(want).max()

"""Optimizers against torch and against unstacked layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from fot_jax.training import optimizers

LAYERS = 3


def small_params(seed=0, width=8, wide=12):
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    return {
        "embedding": draw(16, width),
        "layers": {
            # Layers of very different sizes: treating the stack as one tensor would show.
            "mlp": {"up": draw(LAYERS, width, wide) * jnp.array([0.01, 1.0, 30.0])[:, None, None]},
            "attention": {"log_scale": draw(LAYERS, 2)},
            "norm": {"scale": 1 + 0.1 * draw(LAYERS, width)},
        },
        "final_norm": {"scale": 1 + 0.1 * draw(width)},
    }


def gradients(params, step, scale=1.0):
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(
        lambda p: jnp.asarray(scale * rng.normal(size=p.shape), jnp.float32), params
    )


def run(optimizer, params, steps, make_gradients):
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(make_gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def unstacked(tree, layer):
    return jax.tree.map(lambda x: x[layer], tree)


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("gradient_scale", [0.01, 10.0])  # below the clipping norm, and above it
def test_adamw_is_torch_adamw_with_global_clipping(gradient_scale):
    params = small_params()
    decayed = {"embedding": True, "up": True}  # by last name of the path

    def rate(step):
        return 0.01 * (step + 1)

    leaves, treedef = jax.tree.flatten(params)
    names = [str(path[-1].key) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    tensors = [torch.nn.Parameter(torch.tensor(np.array(leaf))) for leaf in leaves]
    groups = [
        {"params": [t], "weight_decay": 0.1 if decayed.get(name) else 0.0}
        for name, t in zip(names, tensors, strict=True)
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        drawn = jax.tree.leaves(gradients(params, step, gradient_scale))
        for tensor, gradient in zip(tensors, drawn, strict=True):
            tensor.grad = torch.tensor(np.array(gradient))
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        for group in reference.param_groups:
            group["lr"] = rate(step)
        reference.step()

    optimizer = optimizers.adamw(rate, weight_decay=0.1)
    ours, _ = run(optimizer, params, 5, lambda step: gradients(params, step, gradient_scale))
    expected = jax.tree.unflatten(treedef, [t.detach().numpy() for t in tensors])
    assert_trees_close(ours, expected, rtol=2e-5, atol=1e-6)


def test_only_matrices_decay():
    params = small_params()
    optimizer = optimizers.adamw(0.5, weight_decay=0.1)
    zero = jax.tree.map(jnp.zeros_like, params)
    after, _ = run(optimizer, params, 1, lambda step: zero)
    ratio = jax.tree.map(lambda a, b: float((a / b).mean()), after, params)
    assert ratio["embedding"] == pytest.approx(0.95, rel=1e-4)
    assert ratio["layers"]["mlp"]["up"] == pytest.approx(0.95, rel=1e-4)
    assert ratio["layers"]["norm"]["scale"] == 1
    assert ratio["layers"]["attention"]["log_scale"] == 1
    assert ratio["final_norm"]["scale"] == 1


def test_temperatures_may_learn_faster():
    """And nothing else does."""
    params = small_params()
    plain, fast = (
        run(
            optimizers.adamw(0.01, temperature_rate=rate), params, 3, lambda s: gradients(params, s)
        )[0]
        for rate in (1.0, 7.0)
    )
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), (plain, fast), (params, params))
    of_plain, of_fast = (x["layers"]["attention"].pop("log_scale") for x in moved)
    np.testing.assert_allclose(of_fast, 7 * of_plain, rtol=1e-4)
    assert_trees_close(*moved, rtol=0)


@pytest.mark.parametrize("factor", [4, 128])  # matrices factored, and not
def test_adafactor_on_stacked_layers_is_adafactor_on_each_layer(factor):
    params = small_params()

    def rate(count):
        return 0.3 / (count + 1)

    def make(step):
        # One layer's gradient is huge, so that its update alone is clipped.
        drawn = gradients(params, step)
        return drawn | {"layers": jax.tree.map(lambda g: g.at[1].mul(50.0), drawn["layers"])}

    ours, _ = run(optimizers.adafactor(rate, min_dim_size_to_factor=factor), params, 4, make)
    alone = optax.adafactor(rate, min_dim_size_to_factor=factor, momentum=0.9)
    for layer in range(LAYERS):
        expected, _ = run(
            alone,
            unstacked(params["layers"], layer),
            4,
            lambda step, layer=layer: unstacked(make(step)["layers"], layer),
        )
        assert_trees_close(unstacked(ours["layers"], layer), expected, rtol=1e-5, atol=1e-7)
    expected, _ = run(alone, {"e": params["embedding"]}, 4, lambda s: {"e": make(s)["embedding"]})
    assert_trees_close(ours["embedding"], expected["e"], rtol=1e-5, atol=1e-7)


def test_first_adafactor_update_follows_the_paper():
    """Adafactor (arXiv 1804.04235), algorithms 4 and 5, written out for one matrix and step 1."""
    params = {"layers": {"w": jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, 9)))}}
    g = np.random.default_rng(2).normal(size=(6, 9)) * np.linspace(0.1, 3, 9)
    optimizer = optimizers.adafactor(0.02, min_dim_size_to_factor=2)
    updates, _ = optimizer.update(
        {"layers": {"w": jnp.asarray(g)[None]}}, optimizer.init(params), params
    )
    squared = g**2 + 1e-30  # the decay 1 - 1^-0.8 is 0 at the first step
    second = squared.sum(1, keepdims=True) * squared.sum(0, keepdims=True) / squared.sum()
    u = g / np.sqrt(second)
    u /= max(1.0, np.sqrt((u**2).mean()))
    size = max(1e-3, float(jnp.sqrt(jnp.square(params["layers"]["w"]).mean())))
    np.testing.assert_allclose(
        updates["layers"]["w"][0], -(1 - 0.9) * 0.02 * size * u, rtol=1e-4, atol=1e-7
    )


def test_adafactor_clips_the_norm_of_the_whole_gradient_when_asked():
    params = small_params()
    # What step 1 divides by decides how much step 2 counts: only clipping tells these apart.
    scales = [1000.0, 1.0]
    plain = optimizers.adafactor(0.1)
    clipped = optimizers.adafactor(0.1, clip_norm=1.0)

    def unit(step):
        drawn = gradients(params, step)
        return jax.tree.map(lambda g: g / optax.tree.norm(drawn), drawn)

    a, _ = run(clipped, params, 2, lambda step: gradients(params, step, scales[step]))
    b, _ = run(plain, params, 2, unit)
    c, _ = run(plain, params, 2, lambda step: gradients(params, step, scales[step]))
    assert_trees_close(a, b, rtol=1e-4, atol=1e-6)
    assert not np.allclose(a["embedding"], c["embedding"], rtol=1e-3)


@pytest.mark.parametrize("make", [optimizers.adamw, optimizers.adafactor])
def test_state_is_float32_for_bfloat16_parameters(make):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small_params())
    optimizer = make(1e-2)
    drawn = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients(params, 0))
    after, state = run(optimizer, params, 2, lambda step: drawn)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and all(x.dtype == jnp.float32 for x in floats)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(after))

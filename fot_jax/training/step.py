"""One training step, as pure functions: loss, gradient, update.

Letters: R rows, T tokens of a row, E model dim, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from fot_jax.model import cached_context, crossbatch, layout, schemes
from fot_jax.model.cached_context import Cached
from fot_jax.model.rope import times
from fot_jax.model.transformer import Transformer
from fot_jax.model.transformer import logits as logits_of
from fot_jax.training.partitioning import shardings

Batch = Mapping[str, jax.Array]  # inputs, targets, weights, segment_ids: each [R, T]


class TrainState(NamedTuple):
    """Everything that training changes."""

    step: jax.Array  # [] int32: updates tried so far
    params: Any
    opt_state: Any
    cached: Cached | None = None  # of the lanes, where the scheme is a CachedContext

    @property
    def beside(self) -> Any:
        """What a checkpoint keeps beside the parameters."""
        return self.opt_state if self.cached is None else (self.opt_state, self.cached)

    def restored(self, step: jax.Array, params: Any, beside: Any) -> TrainState:
        """The state that a checkpoint kept, in the structure of this one."""
        opt_state, cached = (beside, None) if self.cached is None else beside
        return TrainState(step, params, opt_state, cached)


class Sums(NamedTuple):
    """Sums over target tokens; a mean is a sum divided by `weights`."""

    loss: jax.Array  # nats
    z_loss: jax.Array
    correct: jax.Array
    weights: jax.Array


class StepInfo(NamedTuple):
    """What a training step reports; gradients are of what trains."""

    sums: Sums
    grad_norm: jax.Array  # [] before clipping
    grad_squares: jax.Array  # [leaves] squared norm of each gradient, in tree order
    applied: jax.Array  # [] bool: False when something was not finite and the update was skipped


# --- Loss ----------------------------------------------------------------------------------------

LOGITS_AT_ONCE = 2**26  # elements a device holds of [R, T, V]


def token_sums(
    model: Transformer,
    variables,
    hidden,
    targets,
    weights,
    z_loss: float = 0.0,
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[jax.Array, Sums]:
    """Cross-entropy of next tokens, in chunks along T so that [R, T, V] is never held whole.

    Args:
      variables: of the model, {"params": …}, and "trained" where a part of them is.
      hidden: [R, T, E]; targets: [R, T] int32; weights: [R, T] float32.
      z_loss: weight of the squared log normaliser.
      mesh: of devices, all of which share the rows.

    Returns:
      loss + z_loss times z_loss of the sums, differentiable; the sums, which are not.
    """
    R, T, _ = hidden.shape
    devices = 1 if mesh is None else mesh.size
    wanted = R * T * model.config.vocab_size / devices / LOGITS_AT_ONCE
    chunks = next(n for n in range(1, T + 1) if T % n == 0 and (n >= wanted or n == T))

    def of_chunk(head, hidden, targets, weights):
        logits = logits_of(model.config, head, hidden)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        at_target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        sums = Sums(
            loss=((log_z - at_target) * weights).sum(),
            z_loss=(jnp.square(log_z) * weights).sum(),
            correct=((at_target >= logits.max(-1)) * weights).sum(),
            weights=weights.sum(),
        )
        return sums.loss + z_loss * sums.z_loss, sums

    def chunked(x):
        return x.reshape(R, chunks, T // chunks, *x.shape[2:]).swapaxes(0, 1)

    head = model.apply(variables, method="head_parameters")
    parts = chunked(hidden), chunked(targets), chunked(weights)
    return _over_chunks(of_chunk, mesh, head, *parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _over_chunks(of_chunk, mesh, head, hidden, targets, weights):
    """Sums of what of_chunk(head, hidden, targets, weights) gives over chunks, on axis 0.

    Gradients are taken chunk by chunk, while its logits are there: later, these would have to be
    computed again. They are scaled afterwards, as they are linear in that of the result.
    """
    each = lax.map(lambda chunk: of_chunk(head, *chunk), (hidden, targets, weights))
    return jax.tree.map(lambda x: x.sum(0), each)


def _over_chunks_forward(of_chunk, mesh, head, hidden, targets, weights):
    gradient = jax.value_and_grad(of_chunk, argnums=(0, 1), has_aux=True)

    def one(d_head, chunk):
        value, (d_head_here, d_hidden) = gradient(head, *chunk)
        d_head = jax.tree.map(jnp.add, d_head, d_head_here)
        if mesh is not None:
            d_head = lax.with_sharding_constraint(d_head, shardings(d_head, mesh))
        return d_head, (value, d_hidden)

    zeros = jax.tree.map(jnp.zeros_like, head)
    d_head, (values, d_hidden) = lax.scan(one, zeros, (hidden, targets, weights))
    return jax.tree.map(lambda x: x.sum(0), values), (d_head, d_hidden)


def _over_chunks_backward(of_chunk, mesh, gradients, cotangents):
    scale, _ = cotangents
    d_head, d_hidden = jax.tree.map(lambda x: times(x, scale), gradients)
    return d_head, d_hidden, None, None


_over_chunks.defvjp(_over_chunks_forward, _over_chunks_backward)


def batch_sums(
    model: Transformer,
    variables,
    cached: Cached | None,
    batch: Batch,
    scheme,
    plan: crossbatch.Plan,
    z_loss: float = 0.0,
) -> tuple[jax.Array, Sums, Cached | None]:
    """`token_sums` of the output rows of a (micro)batch under a scheme; what is cached then."""
    out = model.apply(
        variables,
        batch["inputs"],
        batch["segment_ids"],
        plan,
        keep=scheme,
        cached=cached,
    )
    targets, weights = (schemes.output_rows(scheme, batch[x]) for x in ("targets", "weights"))
    sums = token_sums(model, variables, out.hidden, targets, weights, z_loss, plan.mesh)
    return *sums, out.cached


# --- Step ----------------------------------------------------------------------------------------


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    scheme: schemes.Scheme,
    plan: crossbatch.Plan,
    accumulation: int = 1,
    z_loss: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepInfo]]:
    """`train_step` compiled, (state, batch) -> (state, info); the state is donated."""
    step = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        scheme=scheme,
        plan=plan,
        accumulation=accumulation,
        z_loss=z_loss,
    )
    return jax.jit(step, donate_argnums=0)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    scheme: schemes.Scheme,
    plan: crossbatch.Plan,
    accumulation: int,
    z_loss: float,
) -> tuple[TrainState, StepInfo]:
    """One update of the parameters, or of `model.trained`, the part of them that trains.

    The objective is the mean over all target tokens of the batch, whatever the number of
    microbatches. An update whose loss or gradient is not finite is skipped: the state comes back
    with only its step counter moved.

    Args:
      scheme: which windows of a lane have a loss.
      plan: which contexts rows attend to, for one microbatch.
      accumulation: microbatches, each of whole crossbatch groups.
      z_loss: weight of the squared log normaliser in the loss.
    """

    trained = model.trained
    part = state.params if trained is None else trained.take(state.params)

    def objective(part, cached, batch, total_weight):
        both = {"params": state.params, "trained": part}
        variables = {"params": part} if trained is None else both
        value, *others = batch_sums(model, variables, cached, batch, scheme, plan, z_loss)
        return value / total_weight, tuple(others)

    weights = schemes.output_rows(scheme, batch["weights"])
    gradient = jax.grad(objective, has_aux=True)
    total = jnp.maximum(weights.sum(), 1.0)
    if accumulation == 1:
        grads, (sums, cached) = gradient(part, state.cached, batch, total)
    else:
        gradient = functools.partial(gradient, part)
        grads, sums, cached = _accumulate(gradient, state.cached, batch, total, accumulation, plan)
    squares = jnp.stack([jnp.square(g).sum() for g in jax.tree.leaves(grads)])
    finite = jnp.isfinite(squares.sum()) & jnp.isfinite(sums.loss)

    def update():
        updates, opt_state = optimizer.update(grads, state.opt_state, part)
        return optax.apply_updates(part, updates), opt_state

    new, opt_state = lax.cond(finite, update, lambda: (part, state.opt_state))
    params = new if trained is None else trained.put(state.params, new)
    cached = jax.tree.map(lambda new, old: jnp.where(finite, new, old), cached, state.cached)
    info = StepInfo(sums, jnp.sqrt(squares.sum()), squares, finite)
    after = TrainState(state.step + 1, params, opt_state, cached)
    if plan.mesh is not None:  # or the compiler may choose others, and the next step recompile
        after = lax.with_sharding_constraint(after, shardings(after, plan.mesh))
    return after, info


def _accumulate(gradient, cached: Cached | None, batch, total_weight, accumulation, plan):
    """Sums gradients over microbatches of whole crossbatch groups, one after the other."""

    def of_micro(cached, microbatch):
        grads, (sums, cached) = gradient(cached, microbatch, total_weight)
        return (grads, sums), cached

    def add(carry, micro):
        new, cached = of_micro(*micro)
        return jax.tree.map(jnp.add, carry, new), cached

    split = cached_context.split(cached, accumulation)
    micro = split, _microbatches(batch, accumulation, plan)
    shapes = jax.eval_shape(of_micro, *jax.tree.map(lambda x: x[0], micro))[0]
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, sums), cached = lax.scan(add, zero, micro)
    return grads, sums, cached_context.joined(cached)


def _microbatches(batch: Batch, accumulation: int, plan: crossbatch.Plan) -> Batch:
    """[R, T] -> [accumulation, R / accumulation, T] of every array, rows over the mesh."""

    def split(x):
        x = x.reshape(accumulation, x.shape[0] // accumulation, *x.shape[1:])
        if plan.mesh is None:
            return x
        spec = PartitionSpec(None, layout.ROW_AXES)
        return lax.with_sharding_constraint(x, NamedSharding(plan.mesh, spec))

    return jax.tree.map(split, dict(batch))


def make_positive_mass(model: Transformer, plan: crossbatch.Plan, accumulation: int = 1):
    """Compiled (params, batch) -> r_d of every memory layer, [memory layers] (paper §3.3).

    Measured on the first of `accumulation` microbatches; `plan` is for one of them.
    """

    def measure(params, batch: Batch):
        first = jax.tree.map(lambda x: x[0], _microbatches(batch, accumulation, plan))
        return model.apply(
            {"params": params},
            first["inputs"],
            first["segment_ids"],
            plan,
            measure_positive_mass=True,
        ).positive_mass

    return jax.jit(measure)

"""The training program of an experiment: its model and its compiled step, laid out on a mesh.

`make_program` is everything of an experiment that needs neither documents nor devices: `fot train`
runs it, `fot compile` compiles it for devices that are elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from fot_jax.common.errors import UserError
from fot_jax.common.trees import leaves_by_path
from fot_jax.data.lanes import FIELDS
from fot_jax.model import cached_context, crossbatch, schemes
from fot_jax.model.config import ModelConfig
from fot_jax.model.lora import Lora, split
from fot_jax.model.trained import Trained, select
from fot_jax.model.transformer import Transformer
from fot_jax.training import partitioning
from fot_jax.training.experiment import Compute, Data
from fot_jax.training.flops import Part, training_flops
from fot_jax.training.schedules import ScheduleOfD
from fot_jax.training.step import TrainState, make_positive_mass, make_train_step

MOST_ROWS = 2**20  # of a step; what hosts know of every row would not fit in their memory


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The training step of an experiment on a mesh.

    Attributes:
      mesh: the devices.
      transformer: the model.
      rows: of a step's batch, over all devices.
      tokens_per_step: new ones.
      init: key -> fresh state.
      state: shape, type and sharding of everything that training changes.
      batch: shape, type and sharding of everything that it reads.
      ds: the values that the crossbatch dimension takes; (None,) where nothing schedules it.
      crosses: whether lanes see each other's windows, as negatives.
      plan_of, step_of, positive_mass_of, flops_of: by that value: which contexts rows see, where
        they live; the jitted `step.train_step`, (state, batch) -> (state, info); the jitted
        (params, batch) -> r_d of each memory layer; model FLOPs of a step.
    """

    mesh: Mesh | AbstractMesh
    transformer: Transformer
    rows: int
    tokens_per_step: int
    init: Callable[[jax.Array], TrainState]
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    ds: tuple[int | None, ...]
    crosses: bool
    plan_of: Callable[[int | None], crossbatch.Plan]
    step_of: Callable[[int | None], Any]
    positive_mass_of: Callable[[int | None], Any]
    flops_of: Callable[[int | None], int]

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(x.size for x in jax.tree.leaves(self.state.params))

    def positive_mass(self, d: int | None, params: Any, batch: Any) -> dict[str, float]:
        """r_d of each memory layer (paper §3.3), by its name in the metrics."""
        mass = np.asarray(self.positive_mass_of(d)(params, batch))
        layers = zip(self.transformer.config.memory_layers, mass, strict=True)
        return {f"positive_mass/layer_{layer}": float(x) for layer, x in layers}

    @property
    def part(self) -> Trained:
        """What trains, be it everything."""
        model = self.transformer
        return model.trained or select(self.state.params, model.config, ("*",))

    @property
    def trained(self) -> Any:
        """Shapes and types of the parameters that train, as a tree."""
        return jax.eval_shape(self.part.take, self.state.params)

    def compiling(self, d: int | None) -> Callable[[], jax.stages.Compiled]:
        """Begins to compile the step for this d, `state` and `batch`, in a thread of its own.

        Returns:
          What waits for it, and gives it.
        """
        lowered = self.step_of(d).lower(self.state, self.batch)
        thread = ThreadPoolExecutor(1, "compile")
        compiled = thread.submit(lowered.compile)
        thread.shutdown(wait=False)
        return compiled.result

    def trace(self) -> str:
        """Traces a step without computing it, and describes it in a line."""
        first_d, window = self.ds[0], self.transformer.config.local_context
        jax.eval_shape(self.step_of(first_d), self.state, self.batch)
        part = ""
        if self.transformer.trained is not None:
            count = sum(x.size for x in jax.tree.leaves(self.trained))
            part = f" ({count:,} of them train)"
        return (
            f"{self.parameters:,} parameters{part}, mesh {dict(self.mesh.shape)}, {self.rows} rows "
            f"of {window} tokens ({self.tokens_per_step:,} new tokens a step), "
            f"{self.flops_of(first_d):.3g} FLOPs a step"
        )


def make_program(
    mesh: Mesh | AbstractMesh,
    model: ModelConfig,
    data: Data,
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
    learning_rate: optax.Schedule,
    scheme: schemes.Scheme,
    d: ScheduleOfD | None,
    compute: Compute,
    z_loss: float,
    trainable: Sequence[str] | None,
    lora: Lora | None,
) -> Program:
    """Lays an experiment out on a mesh; the other arguments are those of `train`.

    Raises:
      UserError: parts that do not fit each other, or do not divide over the mesh.
    """
    for name in ("num_heads", "num_kv_heads"):
        if getattr(model, name) % mesh.shape["tensor"]:
            raise UserError(
                f"model.{name} = {getattr(model, name)} does not divide over mesh axis tensor of "
                f"{mesh.shape['tensor']}: change MeshShape.tensor"
            )
    scheme.check_model(model)
    rows = data.lanes * scheme.windows
    if rows > MOST_ROWS:
        raise UserError(
            f"Data.lanes = {data.lanes} makes {rows} rows a step ({scheme.windows} a lane), more "
            f"than {MOST_ROWS}: lower it"
        )
    # Lanes that see no others are groups by themselves: microbatches may be of any of them.
    group_lanes = (data.group_lanes or data.lanes) if scheme.has_contexts else 1
    group_rows = group_lanes * scheme.windows
    by_d = {None: scheme} if d is None else {value: scheme.with_d(value) for value in d.values}
    # A d that does not fit shows now, not at step 450,000.
    tables = [each.contexts(group_rows) for each in by_d.values()]
    lane_pairs = (
        (row // scheme.windows, context.row // scheme.windows)
        for table in tables
        for row, of_row in enumerate(table)
        for context in of_row
    )

    @functools.cache
    def plan_of(d: int | None) -> crossbatch.Plan:
        return crossbatch.make_plan(
            by_d[d],
            _microbatch(rows, compute.accumulation),
            group_rows=group_rows,
            mesh=mesh,
            heads=model.num_heads,
            window=model.local_context,
        )

    plan_of(next(iter(by_d)))  # what does not divide shows before anything is written
    transformer = Transformer(model, jnp.dtype(compute.dtype), compute.remat, lora)

    def init_params(key) -> Any:
        tokens = jnp.zeros((1, model.local_context), jnp.int32)
        return transformer.init(key, tokens, tokens, crossbatch.Plan())["params"]

    trained = part = None
    if trainable is not None or lora is not None:
        shapes = jax.eval_shape(init_params, jax.random.key(0))
        trained = select(shapes, model, trainable or ())
        part = _part_of_flops(trained, shapes, model)
        transformer = transformer.clone(trained=trained)
    tx = optimizer(learning_rate)

    def init(key) -> TrainState:
        params = init_params(key)
        cached = None
        if scheme.cached_tokens:
            cached = cached_context.empty(model, scheme, rows, transformer.dtype)
        part = params if trained is None else trained.take(params)
        return TrainState(jnp.zeros([], jnp.int32), params, tx.init(part), cached)

    @functools.cache
    def step_of(d: int | None):
        return make_train_step(
            transformer,
            optimizer=tx,
            scheme=by_d[d],
            plan=plan_of(d),
            accumulation=compute.accumulation,
            z_loss=z_loss,
        )

    @functools.cache
    def positive_mass_of(d: int | None):
        return make_positive_mass(transformer, plan_of(d), compute.accumulation)

    abstract = jax.eval_shape(init, jax.random.key(0))
    return Program(
        mesh=mesh,
        transformer=transformer,
        rows=rows,
        tokens_per_step=data.lanes * scheme.advance * model.local_context,
        init=init,
        state=jax.tree.map(_placed, abstract, partitioning.shardings(abstract, mesh)),
        batch=_batch(rows, model.local_context, mesh),
        ds=tuple(by_d),
        crosses=any(lane != other for lane, other in lane_pairs),
        plan_of=plan_of,
        step_of=step_of,
        positive_mass_of=positive_mass_of,
        flops_of=functools.cache(lambda d: training_flops(model, by_d[d], rows, group_rows, part)),
    )


def _part_of_flops(trained: Trained, params: Any, model: ModelConfig) -> Part:
    paths = dict(trained.parameters)
    layers = [layers[0] for layers in paths.values() if layers is not None]
    adapters = leaves_by_path(split(params)[1]).values()
    return Part(
        lowest_layer=0 if "embedding" in paths else min(layers, default=model.num_layers),
        matrices=trained.matrices(params),
        adapters=sum(x.size for x in adapters if x.ndim == 3) // model.num_layers,
        head=("embedding" if model.tie_embeddings else "head") in paths,
    )


def _placed(x: jax.ShapeDtypeStruct, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _batch(rows: int, window: int, mesh) -> dict[str, jax.ShapeDtypeStruct]:
    by_rows = partitioning.rows(mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, window), dtype, sharding=by_rows)
        for name, dtype in FIELDS.items()
    }


def _microbatch(rows: int, accumulation: int) -> int:
    if rows % accumulation:
        raise UserError(
            f"{rows} rows do not divide into Compute.accumulation = {accumulation} microbatches: "
            "change it or Data.lanes"
        )
    return rows // accumulation

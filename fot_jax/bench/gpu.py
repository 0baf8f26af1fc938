"""`fot bench gpu`: training steps, and attention beside cuDNN's, on one NVIDIA GPU in bfloat16."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax.bench.memory import best_of, print_tables
from fot_jax.bench.train import measured
from fot_jax.common.errors import UserError
from fot_jax.model import crossbatch
from fot_jax.model.attention import gpu as kernels
from fot_jax.model.attention.engine import engine_of
from fot_jax.model.config import ModelConfig
from fot_jax.model.schemes import PreviousContext
from fot_jax.model.sizes import fot_184m, openllama_3b

MODELS = {
    "184M": fot_184m,
    "two layers of 3B": lambda **more: openllama_3b(num_layers=2, memory_layers=(1,), **more),
}
HEADS = ((16, 64), (32, 128))  # cuDNN's takes dimensions of multiples of 8, so not the 3B's 100


def gpu(
    as_json: bool = False,
    models: Mapping[str, Callable[..., ModelConfig]] = MODELS,
    heads: Sequence[tuple[int, int]] = HEADS,
    windows: Sequence[int] = (512, 2048),
    ds: Sequence[int] = (2, 64, 128),
) -> None:
    """Prints two tables; rows of tokens are those of as many lanes as the largest d.

    The first is of whole training steps (AdamW, remat "full") of each model, window and d: seconds
    (median), model FLOPs a second over the plain matmul rate of the same minute, and the compiler's
    temporaries, which d should not change.

    The second is of attention, forward and with its gradients, beside cuDNN's flash attention on
    the same arrays: that of windows to themselves, and, for each pair of windows of which one is
    the other's context, what contexts add; there beside cuDNN's without a causal mask.

    Args:
      models: by name; each is called with a local_context.
      heads: (heads, their dimension) of the attention.

    Raises:
      UserError: the first device has no such kernels.
    """
    if engine_of(None, min(windows)) is not kernels:
        device = jax.devices()[0].device_kind
        raise UserError(
            f"fot bench gpu needs an NVIDIA GPU, Ampere or later, and JAX finds {device}: "
            "pip install -e '.[gpu]' on a machine with one"
        )
    steps = [(name, window, d) for name in models for window in windows for d in ds]
    shapes = [(*each, window) for each in heads for window in windows]
    tables = {
        "training steps": lambda: [
            _step(name, models[name](local_context=window), d, max(ds)) for name, window, d in steps
        ],
        "attention": lambda: [row for shape in shapes for row in _attention(shape, ds)],
    }
    print_tables("gpu", tables, as_json)


def _step(name: str, c: ModelConfig, d: int, lanes: int) -> dict[str, Any]:
    row = {"model": name, "window": c.local_context, "d": d}
    scheme = PreviousContext(d=d)
    with _said_if_it_does_not_fit(row, "seconds_per_step"):
        row |= measured(c, scheme, lanes * scheme.windows, 5, "full", "bfloat16")
    return row


@contextlib.contextmanager
def _said_if_it_does_not_fit(row: dict[str, Any], column: str) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        row[column] = "out of memory"


def _attention(shape: tuple[int, int, int], ds: Sequence[int]) -> list[dict[str, Any]]:
    row = dict(zip(("heads", "dim", "window"), shape, strict=True))
    with _said_if_it_does_not_fit(row, "forward_us"):
        return _attention_of(*shape, ds)
    return [row]


def _attention_of(heads: int, dim: int, window: int, ds: Sequence[int]) -> list[dict[str, Any]]:
    lanes, windows = max(ds), PreviousContext().windows
    rows = lanes * windows
    rng = np.random.default_rng(0)
    shape = (rows, window, heads, dim)
    q, k, v = (jnp.asarray(rng.standard_normal(shape, np.float32), "bfloat16") for _ in range(3))
    segments = jnp.ones((rows, window), jnp.int32)

    def ours(d: int | None):
        scheme = PreviousContext(d=d or 1)
        plan = crossbatch.make_plan(scheme, rows, heads=heads, window=window)
        return lambda q, k, v: crossbatch.attention(q, k, v, segments, plan, k if d else None)

    def cudnn(is_causal: bool):
        implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
        how = {"is_causal": is_causal, "implementation": implementation, "scale": 1.0}
        return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **how)

    def row(contexts: int, ours: np.ndarray, cudnn: np.ndarray) -> dict[str, Any]:
        names = ("forward", "with_gradients")
        return {
            "heads": heads,
            "dim": dim,
            "window": window,
            "contexts": contexts,
            **{f"{name}_us": 1e6 * x for name, x in zip(names, ours, strict=True)},
            **{f"cudnn_{name}_us": 1e6 * x for name, x in zip(names, cudnn, strict=True)},
            **{f"times_{name}": x for name, x in zip(names, ours / cudnn, strict=True)},
        }

    local, causal, full = (_seconds(f, q, k, v) for f in (ours(None), cudnn(True), cudnn(False)))
    of_pairs = ((d, (_seconds(ours(d), q, k, v) - local) / (lanes * d)) for d in ds)
    return [row(0, local / rows, causal / rows), *(row(d, x, full / rows) for d, x in of_pairs)]


def _seconds(attend: Callable[..., jax.Array], *qkv: jax.Array) -> np.ndarray:
    """Of attention alone, and of it with the gradients of queries, keys and values: [2]."""

    def with_gradients(*qkv):
        out, vjp = jax.vjp(attend, *qkv)
        return vjp(out)

    programs = map(jax.jit, (attend, with_gradients))
    return np.array([best_of(lambda f=f: jax.block_until_ready(f(*qkv)), 5) for f in programs])

"""`fot bench train`: whole training steps, as ratios to the machine's own matmul rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fot_jax.bench.memory import print_tables, transformers_llama
from fot_jax.model import crossbatch, schemes
from fot_jax.model.config import ModelConfig
from fot_jax.model.sizes import smollm2_135m
from fot_jax.model.transformer import Transformer
from fot_jax.training import needs
from fot_jax.training.flops import training_flops
from fot_jax.training.metrics import matmul_rate
from fot_jax.training.step import TrainState, make_train_step

ROWS = 16
MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    mlp_dim=688,
    memory_layers=(2,),
    local_context=256,
)
REAL = smollm2_135m(memory_layers=(8, 12, 18))
REAL_SCHEME = schemes.Packed(pack=4, range=5)  # one lane: 4 rows


def train(as_json: bool = False, ranges: Sequence[int] = (1, 3, 7, 15), runs: int = 7) -> None:
    """Times whole training steps (AdamW, float32, all parameters) and prints two tables.

    The first is of a small model with crossbatch of each range. The second is of SmolLM2 135M's
    shape, 4 windows of 512 tokens, without remat and with that of dots; beside them a step of
    transformers' LLaMA of that shape on the same tokens, where it is installed.

    Both say seconds a step (median), model FLOPs a second over the plain float32 matmul rate of the
    same minute, and the compiler's temporaries. Model FLOPs count only the scores that the scheme
    asks for.
    """
    tables = {
        "crossbatch of each range": lambda: [
            {"range": reach, **measured(MODEL, schemes.Packed(pack=2, range=reach), ROWS, runs)}
            for reach in ranges
        ],
        "SmolLM2 135M, 4 windows of 512": lambda: _real(max(3, runs // 2)),
    }
    print_tables("train", tables, as_json)


def _real(runs: int) -> list[dict[str, Any]]:
    rows = [
        {"step": "crossbatch", "remat": remat, **measured(REAL, REAL_SCHEME, 4, runs, remat)}
        for remat in ("none", "dots")
    ]
    llama = transformers_llama(REAL)
    if llama is not None:
        flops = training_flops(REAL, schemes.NoCrossbatch(), 4, 4)
        step = _llama_step(llama, _tokens(REAL, 4))
        rows.append({"step": "transformers' LLaMA", "remat": "none", **_timed(step, flops, runs)})
    return rows


def measured(
    c: ModelConfig,
    scheme: schemes.Scheme,
    rows: int,
    runs: int,
    remat: str = "none",
    dtype: str = "float32",
) -> dict[str, Any]:
    """A step of ours: time, ratio to the matmul rate, temporaries."""
    model = Transformer(c, jnp.dtype(dtype), remat)
    plan = crossbatch.make_plan(scheme, rows, heads=c.num_heads, window=c.local_context)
    tokens = _tokens(c, rows)
    batch = {
        "inputs": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "weights": jnp.ones((rows, c.local_context)),
        "segment_ids": jnp.ones((rows, c.local_context), jnp.int32),
    }
    params = model.init(jax.random.key(0), batch["inputs"], batch["segment_ids"], plan)["params"]
    optimizer = optax.adamw(1e-3)
    state = TrainState(jnp.zeros([], jnp.int32), params, optimizer.init(params))
    step = make_train_step(model, optimizer, scheme, plan).lower(state, batch).compile()
    needs.prepare(step)

    def run():
        nonlocal state
        state, info = step(state, batch)
        jax.block_until_ready(info)

    row = _timed(run, training_flops(c, scheme, rows, rows), runs, dtype)
    return row | {"temporaries_mb": step.memory_analysis().temp_size_in_bytes / 1e6}


def _llama_step(model, tokens: np.ndarray) -> Callable[[], None]:
    import torch

    inputs = torch.as_tensor(tokens[:, :-1].astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run():
        optimizer.zero_grad(set_to_none=True)
        model(inputs, labels=inputs, use_cache=False).loss.backward()
        optimizer.step()

    return run


def _timed(
    run: Callable[[], None], flops: int, runs: int, dtype: str = "float32"
) -> dict[str, Any]:
    """Each run beside the matmul rate before and after it: those of shared machines vary."""
    run(), run()  # to warm up
    seconds, rates = [], [matmul_rate(dtype)]
    for _ in range(runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
        rates.append(matmul_rate(dtype))
    beside = (np.asarray(rates[1:]) + rates[:-1]) / 2
    return {
        "seconds_per_step": float(np.median(seconds)),
        "matmul_gflops": float(np.median(beside)) / 1e9,
        "model_gflop_per_step": flops / 1e9,
        "utilisation": float(np.median(flops / np.asarray(seconds) / beside)),
    }


def _tokens(c: ModelConfig, rows: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, c.vocab_size, (rows, c.local_context + 1)).astype(np.int32)

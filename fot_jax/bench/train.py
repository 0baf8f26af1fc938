"""`fot bench`: speed and memory as ratios to what the machine can do, measured in the same run."""

from __future__ import annotations

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fot_jax.model import crossbatch, schemes
from fot_jax.model.config import ModelConfig
from fot_jax.model.transformer import Transformer
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


def train(as_json: bool = False, ranges: tuple[int, ...] = (1, 3, 7, 15), runs: int = 7) -> None:
    """Times whole training steps (AdamW, float32) of a small model with crossbatch of each range.

    Prints seconds a step (median), model FLOPs a second over the plain float32 matmul rate of the
    same minute, and the compiler's temporaries. Model FLOPs count only the scores that the scheme
    asks for.
    """
    rows = []
    for reach in ranges:
        scheme = schemes.Packed(pack=2, range=reach)
        step, state, batch = _training_step(scheme)
        compiled = step.lower(state, batch).compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        rate = matmul_rate("float32")
        seconds = []
        for _ in range(runs + 2):  # the first two warm up
            start = time.perf_counter()
            state, info = compiled(state, batch)
            jax.block_until_ready(info)
            seconds.append(time.perf_counter() - start)
        rate = (rate + matmul_rate("float32")) / 2
        median = float(np.median(seconds[2:]))
        flops = training_flops(MODEL, scheme, ROWS, ROWS)
        rows.append(
            {
                "range": reach,
                "seconds_per_step": round(median, 4),
                "matmul_gflops": round(rate / 1e9, 1),
                "model_gflop_per_step": round(flops / 1e9, 2),
                "utilisation": round(flops / median / rate, 4),
                "temporaries_mb": round(temporaries / 1e6, 1),
            }
        )
    if as_json:
        print(json.dumps({"bench": "train", "device": jax.devices()[0].device_kind, "rows": rows}))
        return
    print("range  s/step  GFLOP/step  matmul GFLOP/s  utilisation  temporaries MB")
    for r in rows:
        print(
            f"{r['range']:5d} {r['seconds_per_step']:7.3f} {r['model_gflop_per_step']:11.1f} "
            f"{r['matmul_gflops']:15.0f} {r['utilisation']:12.2f} {r['temporaries_mb']:15.0f}"
        )


def _training_step(scheme):
    model = Transformer(MODEL)
    plan = crossbatch.make_plan(scheme, ROWS, heads=MODEL.num_heads, window=MODEL.local_context)
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (ROWS, MODEL.local_context + 1))
    batch = {
        "inputs": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "weights": jnp.ones((ROWS, MODEL.local_context)),
        "segment_ids": jnp.ones((ROWS, MODEL.local_context), jnp.int32),
    }
    params = model.init(jax.random.key(0), batch["inputs"], batch["segment_ids"], plan)["params"]
    optimizer = optax.adamw(1e-3)
    state = TrainState(jnp.zeros([], jnp.int32), params, optimizer.init(params))
    return make_train_step(model, optimizer, scheme, plan), state, batch

"""`fot bench memory`: reading and writing with a memory, as ratios to what the machine can do.

Everything is measured in one run: the model, plain matrix products, copies, and the peers (the same
shape of LLaMA in transformers, with full attention; a flat FAISS index) where they are installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax.inference.language_model import LanguageModel
from fot_jax.model import crossbatch, lookup
from fot_jax.model import memory as memories
from fot_jax.model.config import ModelConfig
from fot_jax.model.memory import LayerMemory
from fot_jax.model.transformer import Transformer
from fot_jax.training.flops import layer_parameters, reading_flops
from fot_jax.training.metrics import matmul_rate

MODEL = ModelConfig(
    vocab_size=1024,
    hidden_size=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    mlp_dim=1376,
    memory_layers=(2, 4, 6),
    local_context=512,
)
NEW_TOKENS = 128
TOGETHER = 8  # prompts that are also continued together


def memory(
    as_json: bool = False,
    prefill: Sequence[int] = (2048, 8192, 32768),
    sizes: Sequence[int] = (2**14, 2**17, 2**20),
    largest: int = 2**24,
    searched: Sequence[int] = (2**10, 2**14, 2**17, 2**20, 2**24),
) -> None:
    """Prints three tables: reading and writing, attention over a memory, the best keys of one.

    Args:
      prefill: tokens of the texts that are read; after each but the last, tokens are written.
      sizes: keys of the memories that are attended to, of 64 dimensions, shared out to 8 heads.
      searched: keys of the memories whose best keys are looked for, of one head of 64 dimensions.
      largest: keys of one more of these, of 4 heads of 32 dimensions in float16; 0 for none.
    """
    tables = {
        "read and write": lambda: _read_and_write(prefill),
        "attend to all": lambda: [_attend(size, n) for size in sizes for n in (1, 512)],
        "find the best keys": lambda: (
            [_search(size, n) for size in searched for n in (1, 512)]
            + ([_search(largest, 256, heads=4, dim=32, storage="float16")] if largest else [])
        ),
    }
    print_tables("memory", tables, as_json)


# --- A model -------------------------------------------------------------------------------------


def _read_and_write(lengths: Sequence[int]) -> list[dict[str, Any]]:
    tokens = jnp.zeros((1, 8), jnp.int32)
    init = jax.jit(functools.partial(Transformer(MODEL).init, plan=crossbatch.Plan()))
    params = init(jax.random.key(0), tokens, tokens)["params"]
    lm, short = (
        LanguageModel.of(Transformer(MODEL, dtype=dtype), params)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    llama = transformers_llama(MODEL)
    peer = None if llama is None else _Llama(llama)
    context = MODEL.local_context
    rows = []
    for length in lengths:
        text = np.random.default_rng(0).integers(0, MODEL.vocab_size, (1, length))
        rate = matmul_rate()
        seconds, in_bfloat16 = (
            best_of(lambda m=m, text=text: _arrays(m.read(text, last_context_length=context)))
            for m in (lm, short)
        )
        floor = reading_flops(MODEL, length) / (rate + matmul_rate()) * 2
        row = {
            "tokens": length,
            "read_s": seconds,
            "floor_s": floor,
            "times_floor": seconds / floor,
            "bfloat16_read_s": in_bfloat16,
            "llama_read_s": None if peer is None else best_of(lambda text=text: peer.read(text)),
        }
        if length < max(lengths):
            bandwidth = copy_bandwidth()
            per_token, in_bfloat16, together = (
                _seconds_per_token(
                    m.stream(read, NEW_TOKENS + 2, temperature=0, last_context_length=context // 2)
                )
                for m, read in ((lm, text), (short, text), (lm, text.repeat(TOGETHER, 0)))
            )
            floor = _bytes_per_token(length) / (bandwidth + copy_bandwidth()) * 2
            row |= {
                "tokens_per_s": 1 / per_token,
                "copy_gb_per_s": bandwidth / 1e9,
                "times_copy": per_token / floor,
                "bfloat16_tokens_per_s": 1 / in_bfloat16,
                f"tokens_per_s_of_{TOGETHER}": TOGETHER / together,
                "llama_tokens_per_s": None if peer is None else 1 / peer.seconds_per_token(text),
            }
        rows.append(row)
    return rows


def _bytes_per_token(length: int) -> float:
    """Parameters (with the head), memory and a window half full, read once, float32."""
    c = MODEL
    key_and_value = 2 * c.num_kv_heads * c.head_dim
    window = c.local_context // 2
    remembered = len(c.memory_layers) * (length - window) + c.num_layers * window
    head = c.hidden_size * c.vocab_size
    layers = c.num_layers * layer_parameters(c)
    return 4 * (layers + head + remembered * key_and_value)


def _arrays(state) -> None:
    jax.block_until_ready((state.cache, state.memory))


def _seconds_per_token(steps) -> float:
    next(steps)
    next(steps)
    start = time.perf_counter()
    count = sum(1 for _ in steps)
    return (time.perf_counter() - start) / count


# --- A memory ------------------------------------------------------------------------------------


def _attend(size: int, queries: int, heads: int = 8, dim: int = 64) -> dict[str, Any]:
    """Dense attention of one layer over a memory, float32."""
    rng = np.random.default_rng(0)
    layer = LayerMemory(*(_stored(rng, (1, heads, size // heads, dim)) for _ in range(2)))
    q = jnp.asarray(rng.normal(size=(1, heads, queries, dim)), jnp.float32)
    attend = jax.jit(functools.partial(lookup.attend, lookup.Dense()))
    visible = jnp.asarray([size // heads])
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    seconds = best_of(lambda: jax.block_until_ready(attend(q, layer, visible)))
    compute = 4 * size * queries * dim / rate
    copy = 2 * size * dim * 4 / bandwidth
    return {
        "heads": heads,
        "keys_a_head": size // heads,
        "queries": queries,
        "seconds": seconds,
        "times_matmul": seconds / compute,
        "times_copy": seconds / copy,
    }


def _search(
    size: int, queries: int, k: int = 32, heads: int = 1, dim: int = 64, storage="float32"
) -> dict[str, Any]:
    """The k best keys of every query, beside FAISS's flat index; of each head for its queries."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, heads, queries, dim)), jnp.float32)
    keys = _stored(rng, (1, heads, size, dim), storage)
    visible = jnp.asarray([size])
    search = jax.jit(lookup.TopK(k).search)
    times = 3 if size < 2**24 else 1
    rate = matmul_rate()
    seconds = best_of(lambda: jax.block_until_ready(search(q, keys, visible)), times)
    rate = (rate + matmul_rate()) / 2
    row = {
        "heads": heads,
        "keys_a_head": size,
        "dim": dim,
        "storage": storage,
        "queries": queries,
        "seconds": seconds,
        "times_matmul": seconds / (2 * size * heads * queries * dim / rate),
    }
    if storage == "float32":
        theirs = _faiss_seconds(np.asarray(keys.x[0, 0]), np.asarray(q[0, 0]), k, times)
        row |= {"faiss_s": theirs, "times_faster": theirs and theirs / seconds}
    return row


def _stored(rng, shape, storage: str = "float32") -> memories.Stored:
    """Random vectors, made a million at a time."""
    rows, heads, size, dim = shape
    array = np.empty(shape, storage)
    for head in range(heads):
        for start in range(0, size, 2**20):
            part = array[0, head, start : start + 2**20]
            part[...] = rng.standard_normal(part.shape, np.float32)
    return jax.block_until_ready(memories.Stored(jnp.asarray(array), None))


# --- The machine and the peers -------------------------------------------------------------------


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying 256 MB."""
    if jax.default_backend() != "cpu":
        on_device = jnp.ones(2**26)
        return 2 * on_device.nbytes / best_of(lambda: jnp.copy(on_device).block_until_ready(), 5)
    a = np.ones(2**26, np.float32)  # NumPy does it with all of the bandwidth, XLA does not
    b = np.empty_like(a)
    return 2 * a.nbytes / best_of(lambda: np.copyto(b, a), 5)


def cores() -> int:
    """That this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def best_of(run: Callable[[], Any], times: int = 3, warm: bool = True) -> float:
    """Seconds of the fastest of so many runs, after one to warm up where it is wanted."""
    if warm:
        run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _faiss_seconds(keys: np.ndarray, q: np.ndarray, k: int, times: int) -> float | None:
    if importlib.util.find_spec("faiss") is None:
        return None
    import faiss

    faiss.omp_set_num_threads(cores())
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys)
    return best_of(lambda: index.search(q, k), times)


def transformers_llama(c: ModelConfig):
    """transformers' LLaMA of a shape, with full attention (SDPA), on all cores; None: not there."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return None
    import torch
    import transformers

    torch.set_num_threads(cores())
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.mlp_dim,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        tie_word_embeddings=c.tie_embeddings,
        max_position_embeddings=2**20,
        attn_implementation="sdpa",
    )
    with contextlib.redirect_stdout(None):
        return transformers.LlamaForCausalLM(config)


class _Llama:
    """The same shape in PyTorch, with full attention over everything read."""

    def __init__(self, model):
        import torch

        self._torch, self._model = torch, model.eval()

    def read(self, text: np.ndarray):
        with self._torch.inference_mode():
            tokens = self._torch.as_tensor(text)
            return self._model(tokens, use_cache=True, logits_to_keep=1).past_key_values

    def seconds_per_token(self, text: np.ndarray, count: int = 32) -> float:
        cache = self.read(text)
        token = self._torch.zeros((1, 1), dtype=self._torch.long)
        with self._torch.inference_mode():
            for step in range(count + 2):
                if step == 2:
                    start = time.perf_counter()
                self._model(token, past_key_values=cache, use_cache=True)
        return (time.perf_counter() - start) / count


def print_tables(
    bench: str, tables: dict[str, Callable[[], list[dict[str, Any]]]], as_json: bool
) -> None:
    """Measures and prints one table after the other, or all as one JSON object."""
    results = {}
    for title, measure in tables.items():
        results[title] = measure()
        if not as_json:
            print(f"\n{title}")
            print_table(results[title])
    if as_json:
        device = jax.devices()[0].device_kind
        print(json.dumps({"bench": bench, "device": device, **results}))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints a line for each row, under the names of all columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def shown(value):
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else f"{value}"

    cells = [names] + [[shown(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))

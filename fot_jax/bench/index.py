"""`fot bench index`: the best keys of a memory by an index, beside exact search and FAISS's.

Keys lie around places, 64 at each, in random order, so that what a query looks for is spread over
all of memory; queries lie around places, too. What an index finds of a model's keys depends on the
model.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax.bench.memory import best_of, cores, print_table
from fot_jax.inference import segment_files
from fot_jax.inference.segment_files import TOKENS
from fot_jax.model import segments
from fot_jax.model.lookup import IndexedTopK, TopK
from fot_jax.model.memory import LayerMemory, Memory, Stored
from fot_jax.model.segments import Closed

DIM = 64
K = 32  # best keys
QUERIES = 256
OF_A_PLACE = 64  # keys
SPREAD = 0.5  # around a place, whose coordinates have deviation 1


def index(
    as_json: bool = False,
    sizes: Sequence[int] = (2**20,),
    visited: Sequence[int] = (256, 1_024, 4_096, 16_384),
    segment: int = TOKENS,
) -> None:
    """Prints how much is found of the 32 best keys of 256 queries, and how fast.

    A row has keys; recall; the error of what a query gets, relative to exact search, as a share of
    its length; seconds of a query alone, and of one of all; and seconds to make the index of all
    keys. FAISS's IVF visits as few of its clusters as give it the recall of the row before.

    Args:
      sizes: keys, of one head of 64 dimensions, in float32.
      visited: as IndexedTopK.visited.
      segment: keys of one.
    """
    rows = [row for size in sizes for row in _rows(size, visited, segment)]
    if as_json:
        device = jax.devices()[0].device_kind
        print(json.dumps({"bench": "index", "device": device, "rows": rows}))
    else:
        print_table(rows)


def _rows(size: int, visited: Sequence[int], segment: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    places = rng.standard_normal((size // OF_A_PLACE, DIM), np.float32)

    def around(n: int) -> np.ndarray:
        some = places[rng.integers(len(places), size=n)]
        return some + SPREAD * rng.standard_normal((n, DIM), np.float32)

    keys, values, q = around(size), rng.standard_normal((size, DIM), np.float32), around(QUERIES)
    closed, seconds = _closed(keys, values, segment)
    best = np.concatenate([np.sort(x @ keys.T, -1)[:, -K] for x in np.split(q, QUERIES // 8)])
    device_q, want = jnp.asarray(q[None, None]), None
    rows = []
    for lookup in (TopK(K), *(IndexedTopK(K, many) for many in visited)):

        def attend(q, lookup=lookup):
            return np.asarray(segments.attend(lookup, q, closed, None).attended())

        out = attend(device_q)
        want = out if want is None else want
        row = {"keys": size, "search": f"{lookup}", "recall": 1.0}
        if isinstance(lookup, IndexedTopK):
            row["recall"] = _recall(segments.search(lookup, device_q, closed)[0], best)
            row["index_s"] = seconds
        row["error"] = float(np.linalg.norm(out - want) / np.linalg.norm(want))
        rows.append(row | _times(attend, device_q))
    return rows + _faiss_rows(keys, q, best, [row["recall"] for row in rows[1:]])


def _closed(keys: np.ndarray, values: np.ndarray, segment: int) -> tuple[Closed, float]:
    """Memory of one head in segments, and the seconds that closing and merging them took."""
    k, v = (Stored(jnp.asarray(x[None, None]), None) for x in (keys, values))
    count = jnp.full(1, len(keys))
    began = time.perf_counter()
    closed = segment_files.segmented(
        Memory((LayerMemory(k, v),), count, count[0]), len(keys), segment
    )
    return closed.of_layers()[0], time.perf_counter() - began


def _recall(scores, best: np.ndarray) -> float:
    """The share of found scores [..., queries, K] that are among the best, whose last is `best`."""
    return float((np.asarray(scores).reshape(-1, K) >= best[:, None] - 1e-3).mean())


def _times(run: Callable[[Any], Any], q) -> dict[str, float]:
    ones = [q.take(np.array([i]), q.ndim - 2) for i in range(8)]
    alone = best_of(lambda: [run(one) for one in ones]) / 8
    return {"alone_s": alone, "of_all_s": best_of(lambda: run(q)) / QUERIES}


def _faiss_rows(keys, q, best, recalls: Sequence[float]) -> list[dict[str, Any]]:
    """IVF with 4 sqrt(keys) clusters, of whole vectors and of 8 bits a number."""
    if importlib.util.find_spec("faiss") is None:
        return []
    import faiss

    faiss.omp_set_num_threads(cores())
    rows = []
    for kind in ("Flat", "SQ8"):
        count = int(4 * len(keys) ** 0.5)
        name = f"IVF{count},{kind}"
        ivf = faiss.index_factory(DIM, name, faiss.METRIC_INNER_PRODUCT)
        began = time.perf_counter()
        ivf.train(keys[:: max(1, len(keys) // (64 * count))])
        ivf.add(keys)
        seconds, ivf.nprobe = time.perf_counter() - began, 1
        for wanted in recalls:
            too_few = 0
            while _recall_of(ivf, keys, q, best) < wanted and ivf.nprobe < count:
                too_few, ivf.nprobe = ivf.nprobe, min(2 * ivf.nprobe, count)
            enough = ivf.nprobe
            while enough - too_few > 1:
                ivf.nprobe = (enough + too_few) // 2
                if _recall_of(ivf, keys, q, best) < wanted:
                    too_few = ivf.nprobe
                else:
                    enough = ivf.nprobe
            ivf.nprobe = enough
            recall = _recall_of(ivf, keys, q, best)
            row = {"keys": len(keys), "search": f"FAISS {name}, {ivf.nprobe} visited"}
            row |= {"recall": recall, "index_s": seconds}
            rows.append(row | _times(lambda q, ivf=ivf: ivf.search(q, K), q))
    return rows


def _recall_of(ivf, keys, q, best) -> float:
    found = ivf.search(q, K)[1]
    scores = np.einsum("qd,qkd->qk", q, keys[found])
    return _recall(np.where(found < 0, -np.inf, scores), best)

"""Attention over a memory in segments: exactly, and by an index of its keys."""

import faiss
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fot_jax.model import clusters, memory, segments
from fot_jax.model.attention.partial_softmax import MASKED
from fot_jax.model.lookup import ApproximateTopK, Dense, IndexedTopK, TopK
from fot_jax.model.segments import Closed, Segment


def segment_of(k, v, slots, storage="float32"):
    """Of vectors [rows, K, n, D] in so many slots; the free ones are not zero."""
    widths = [(0, 0), (0, 0), (0, slots - k.shape[2]), (0, 0)]
    padded = (jnp.asarray(np.pad(x, widths, constant_values=9), jnp.float32) for x in (k, v))
    layer = memory.LayerMemory(*(memory.encode(x, storage) for x in padded))
    return Segment(layer, np.full(len(k), k.shape[2], np.int32))


def closed_of(each, slots):
    """Clustered segments of one row, and their index."""
    K, D = each[0].layer.k.x.shape[1], each[0].layer.k.dim
    index, done = clusters.no_index(K, D), []
    for layer, visible in each:
        layer, its = clusters.clustered(layer, visible[0])
        index = index.with_segment(its)
        done.append(Segment(layer, visible))
    return Closed(done, index)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "lookup", [Dense(), TopK(20), ApproximateTopK(20), IndexedTopK(20, 10_000)], ids=str
)
def test_segments_are_one_memory(lookup, rows):
    """Against the softmax in float64."""
    rng = np.random.default_rng(rows)
    B, K, N, D, counts = 2, 2, 6, 8, (256, 3, 200, 0, 11)
    q = rng.normal(size=(B, K, N, D))
    want_k, want_v = ([rng.normal(size=(1, K, n, D)) for n in counts] for _ in "kv")
    more_k, more_v = (np.repeat(x[-1], rows, 0) for x in (want_k, want_v))
    each = [segment_of(k, v, 256) for k, v in zip(want_k[:-1], want_v[:-1], strict=True)]
    opened = segment_of(more_k, more_v, 64)
    got = segments.attend(lookup, jnp.asarray(q, jnp.float32), closed_of(each, 256), opened)
    got = got.attended()
    for b, head, n in np.ndindex(B, K, N):
        k, v = (np.concatenate(x, 2)[0, head] for x in (want_k, want_v))
        scores = k @ q[b, head, n]
        best = np.argsort(-scores, kind="stable")[: getattr(lookup, "k", len(k))]
        weights = np.exp(scores[best] - scores.max())
        np.testing.assert_allclose(got[b, head, n], weights @ v[best] / weights.sum(), atol=1e-5)


# --- By the index --------------------------------------------------------------------------------


@settings(max_examples=8)
@given(
    storage=st.sampled_from(memory.STORAGE),
    counts=st.lists(st.integers(0, 1024), min_size=1, max_size=3),
    visited=st.sampled_from([10, 100, 600, 10_000]),
    rows=st.integers(1, 2),
    in_groups=st.booleans(),
    distinct=st.sampled_from([None, 3]),
    seed=st.integers(0, 2**16),
)
@example("float32", [0], 10, 1, True, None, 0)
def test_the_best_keys_of_the_nearest_clusters_are_found(
    storage, counts, visited, rows, in_groups, distinct, seed
):
    """Against NumPy in float64, from groups, clusters and keys as they are stored."""
    with pytest.MonkeyPatch.context() as patch:
        if in_groups:  # so many that most are not visited
            patch.setattr(segments, "MANY", 0)
            patch.setattr(clusters, "OF_GROUP", 16)
            patch.setattr(clusters, "SLOTS", 8)
        # Programs for one number of slots have one of clusters in them.
        slots = 1024 << in_groups
        check_search(storage, counts, visited, rows, in_groups, distinct, seed, slots)


def check_search(storage, counts, visited, rows, in_groups, distinct, seed, slots):
    rng = np.random.default_rng(seed)
    K, N, D, k = 2, 3, 8, 10
    keys_of = [rng.normal(size=(2, 1, K, n, D)) for n in counts]
    if distinct:  # keys of each head, as of a text of few tokens: most clusters are empty
        few = rng.normal(size=(1, K, distinct, D))
        for x, n in zip(keys_of, counts, strict=True):
            x[0] = few[:, :, rng.integers(distinct, size=n)]
    each = [segment_of(*x, slots, storage) for x in keys_of]
    closed = closed_of(each, slots)
    q = jnp.asarray(rng.normal(size=(rows, K, N, D)), jnp.float32)
    scores, found_slots = map(np.asarray, segments.search(IndexedTopK(k, visited), q, closed))
    keys = np.stack(
        [np.asarray(memory.decode(s.layer.k, jnp.float32), float)[0] for s in closed.segments]
    )
    of_clusters, of_groups, reaches = closed.index
    starts = np.cumsum([0] + [x.x.shape[2] for x in reaches])  # numbers of clusters
    some = 8 + 4 * visited // clusters.SLOTS
    for row, head, n in np.ndindex(rows, K, N):
        query = np.asarray(q[row, head, n], np.float64)

        def best(level, among, head=head, query=query):
            """The best `some` of those clusters `among` some of a level that are not empty."""
            among = among[level.size[head, among] > 0]
            reaches = np.asarray(level.reaches.x, np.float64)[0, head, among]
            while len(query) < reaches.shape[1]:  # once for clusters, twice for groups of them
                query = np.append(query, np.linalg.norm(query))
            scores = reaches @ query
            return among[np.argsort(-scores, kind="stable")][:some]

        def visit(level, ids, starts, head=head):
            """The numbers of the first vectors of clusters, where those of segments begin so."""
            first = starts[level.segment[ids]] + level.first[head, ids]
            each = [np.arange(a, a + n) for a, n in zip(first, level.size[head, ids], strict=True)]
            return np.concatenate([*each, np.zeros(0, int)])[:visited]

        among = np.arange(len(of_clusters.segment))
        if in_groups:
            among = visit(of_groups, best(of_groups, np.arange(len(of_groups.segment))), starts)
            assert (of_clusters.size[head, among] > 0).all()
        to_visit = visit(of_clusters, best(of_clusters, among), slots * np.arange(len(counts)))
        all_scores = keys[:, head].reshape(-1, D) @ query
        want = np.sort(all_scores[to_visit])[::-1][:k]
        found = scores[row, head, n] > MASKED / 2
        assert found.sum() == len(want)
        np.testing.assert_allclose(scores[row, head, n, found], want, atol=1e-4)
        assert len(set(found_slots[row, head, n, found])) == len(want)
        np.testing.assert_allclose(all_scores[found_slots[row, head, n, found]], want, atol=1e-4)


def test_wide_clusters_are_visited_for_the_best_keys_that_they_may_have():
    """More of these are found than in the clusters with the best centres."""
    rng = np.random.default_rng(0)
    places = rng.normal(size=(64, 16))
    widths = rng.choice([0.1, 0.6], size=(64, 1))
    at = rng.integers(64, size=8_192)
    keys = places[at] + widths[at] * rng.normal(size=(8_192, 16))
    closed = closed_of([segment_of(keys[None, None], keys[None, None], 8_192)], 8_192)
    q = rng.normal(size=(200, 16)).astype(np.float32)
    scores, _ = segments.search(IndexedTopK(10, 512), jnp.asarray(q[None, None]), closed)
    exact = q @ np.asarray(closed.segments[0].layer.k.x)[0, 0].T
    best = np.sort(exact)[:, -10:]
    level = closed.index.clusters
    first, size = level.first[0], level.size[0]
    centres = np.asarray(level.reaches.x)[0, 0, : len(first), :-1]
    of_centres = 0
    for query, scores_of_keys, worst in zip(q, exact, best[:, 0], strict=True):
        order = np.argsort(-(centres @ query))
        order = order[size[order] > 0]
        runs = zip(first[order], size[order], strict=True)
        visited = np.concatenate([np.arange(a, a + n) for a, n in runs])[:512]
        of_centres += (scores_of_keys[visited] >= worst - 1e-5).sum()
    found = (scores[0, 0] >= best[:, :1] - 1e-5).sum()
    assert best.size - found < 0.8 * (best.size - of_centres)


def around_places(rng, shape, dim):
    """Vectors around 400 places, more than there are clusters."""
    return rng.normal(size=(400, dim))[rng.integers(400, size=shape)] + 0.3 * rng.normal(
        size=(*shape, dim)
    )


def check_clusters(keys, centres, deviations, starts):
    """That each key is in the cluster closest to it; the sum of squared distances."""
    assert starts[0] == 0 and starts[-1] == len(keys) and (np.diff(starts) >= 0).all()
    distances = np.square(keys[:, None] - np.asarray(centres, float)).sum(-1)
    own = distances[np.arange(len(keys)), np.repeat(np.arange(len(starts) - 1), np.diff(starts))]
    np.testing.assert_allclose(own, distances.min(-1), atol=1e-4)
    check_deviations(own / keys.shape[1], deviations, starts)
    return own.sum()


def check_deviations(squares, deviations, starts):
    """Against squared deviations [n] of keys in the order of their clusters."""
    for deviation, of_cluster in zip(deviations, np.split(squares, starts[1:-1]), strict=True):
        want = np.sqrt(of_cluster.mean()) if len(of_cluster) else 0
        np.testing.assert_allclose(deviation, want, rtol=1e-3, atol=1e-3)


def tightness(keys, count):
    """The same of FAISS's k-means over all keys."""
    theirs = faiss.Kmeans(keys.shape[1], count, niter=clusters.ROUNDS, seed=1)
    theirs.train(np.ascontiguousarray(keys, np.float32))
    return theirs.obj[-1]


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("tokens", [0, 1, 3_000, 4_096])
def test_clusters_hold_every_key_and_are_nearly_as_tight_as_those_of_faiss(tokens, window):
    """Also where the first token of every window has a key far from the others."""
    rng = np.random.default_rng(tokens)
    k = around_places(rng, (1, 2, tokens), 16)
    if window is not None:
        k[:, :, ::window] = 30 + rng.normal(size=k[:, :, ::window].shape)
    layer, visible = segment_of(k, 2 * k, 4_096)
    layer, found = clusters.clustered(layer, visible[0])
    got_k, got_v = (np.asarray(x.x)[:, :, :tokens] for x in layer)
    np.testing.assert_array_equal(got_v, 2 * got_k)
    np.testing.assert_array_equal(np.sort(got_k, axis=2), np.sort(k, axis=2).astype(np.float32))
    for keys, *of_head in zip(got_k[0], *(np.asarray(x)[0] for x in found), strict=True):
        distance = check_clusters(keys, *of_head)
        if tokens > 1_000:
            assert distance < 1.1 * tightness(keys, len(of_head[0]))


@pytest.mark.parametrize("compared", [clusters.COMPARED, 32], ids=["all", "some"])
def test_clusters_of_merged_segments(compared, monkeypatch):
    """As those of one: with few centres to compare a key with, not always the closest."""
    monkeypatch.setattr(clusters, "COMPARED", compared)
    monkeypatch.setattr(clusters, "FEW", 8)
    rng, counts = np.random.default_rng(0), [4_096, 3_000, 4_000, 1]
    k = around_places(rng, (1, 2, sum(counts)), 16)
    parts = np.split(k, np.cumsum(counts)[:-1], axis=2)
    done = [clusters.clustered(segment_of(x, x, 4_096).layer, x.shape[2]) for x in parts]
    keys, each = [layer.k for layer, _ in done], [its for _, its in done]
    orders, merged = clusters.merged(keys, each, counts)
    for head, order in enumerate(orders):
        together = np.concatenate(
            [np.asarray(x.x)[0, head, :n] for x, n in zip(keys, counts, strict=True)]
        )
        assert sorted(order) == list(range(sum(counts)))
        its = np.unique(merged.starts[0, head])
        centres, deviations = (x[0, head, : len(its) - 1] for x in merged[:2])
        if compared > 32:
            distance = check_clusters(together[order], centres, deviations, its)
        else:
            own = np.repeat(centres, np.diff(its), axis=0)
            squares = np.square(together[order] - own)
            check_deviations(squares.mean(-1), deviations, its)
            distance = squares.sum()
        assert distance < 1.15 * tightness(together, len(centres))

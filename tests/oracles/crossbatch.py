"""Crossbatch from the paper and not from the code: which rows a row sees, and one softmax over all
that they hold, every score written out in NumPy float64."""

import numpy as np

from fot_jax.model.schemes import NoCrossbatch, Packed, PackedTable, PreviousContext


def visible_rows(scheme, row, group):
    """[(row, own document only)] of one row within its group, by the rules of the paper."""
    if isinstance(scheme, PreviousContext):
        lane, place = divmod(row, scheme.w + 1)
        if place < scheme.w:
            return []
        lanes = group // (scheme.w + 1)
        own = [(lane * (scheme.w + 1) + p, True) for p in range(scheme.w)]
        others = [(lane + j) % lanes for j in range(1, scheme.d)]
        return own + [(o * (scheme.w + 1) + scheme.w - 1, False) for o in others]
    if isinstance(scheme, Packed):
        n = scheme.range + 1
        step = int(np.ceil(n / max(scheme.pack - 1, 1)))
        in_all = min((row % scheme.pack) * step + 1, n)
        return [(row - j, False) for j in range(1, in_all) if row - j >= 0]
    if isinstance(scheme, PackedTable):
        k = len(scheme.table)
        positives, negatives = scheme.table[row % k]
        first = row // k * k
        return [(row - j, False) for j in range(1, positives + 1)] + [
            (first - j, False) for j in range(1, negatives + 1) if first - j >= 0
        ]
    if isinstance(scheme, NoCrossbatch):
        return []
    raise NotImplementedError(f"the rule of {type(scheme).__name__}: write it above")


def visibility(scheme, rows, group, segments):
    """[R, T, 2, R, T]: does query (row, t) see (local or context key) (row, s)?"""
    T = segments.shape[1]
    seen = np.zeros((rows, T, 2, rows, T), bool)
    for r in range(rows):
        for t in range(T):
            for s in range(t + 1):
                seen[r, t, 0, r, s] = segments[r, t] == segments[r, s]
        start = r // group * group
        for other, own_only in visible_rows(scheme, r - start, group):
            for s in range(T):
                real = segments[start + other, s] > 0
                same = segments[start + other, s] == segments[r, :]
                seen[r, :, 1, start + other, s] = real & (same if own_only else True)
    return seen


def brute_force(q, k, k_context, v, d_out, seen):
    """Output and gradients of one softmax over everything visible, float64."""
    q, k, k_context, v, d_out = (np.asarray(x, np.float64) for x in (q, k, k_context, v, d_out))
    groups = q.shape[2] // k.shape[2]
    keys = np.repeat(np.stack([k, k_context]), groups, axis=3)  # [2, R, S, H, D]
    values = np.repeat(np.stack([v, v]), groups, axis=3)
    scores = np.einsum("rthd,cushd->rthcus", q, keys)
    scores = np.where(seen[:, :, None], scores, -np.inf)
    p = np.exp(scores - scores.max((3, 4, 5), keepdims=True))
    p /= p.sum((3, 4, 5), keepdims=True)
    out = np.einsum("rthcus,cushd->rthd", p, values)
    dp = np.einsum("rthd,cushd->rthcus", d_out, values)
    ds = p * (dp - (p * dp).sum((3, 4, 5), keepdims=True))
    dq = np.einsum("rthcus,cushd->rthd", ds, keys)

    def kv_heads(x):
        return x.reshape(*x.shape[:-2], -1, groups, x.shape[-1]).sum(-2)

    dk = kv_heads(np.einsum("rthcus,rthd->cushd", ds, q))
    dv = kv_heads(np.einsum("rthcus,rthd->cushd", p, d_out))
    return out, (dq, dk[0], dk[1], dv.sum(0)), p

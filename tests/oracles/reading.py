"""How a trained model reads, slowly: first it is written down where each token stands, then the
whole text goes through the layers at once, in NumPy float64. Independent of fot_jax."""

import numpy as np


def places(feeds, context, last):
    """(window, place in it) of every token of texts that are read one after the other.

    Args:
      feeds: lengths of the texts; a generated token is a text of one.
      context: most tokens of a window.
      last: tokens of a text that come in a window of their own, at most.
    """
    window, used, found = 0, 0, []
    for n in feeds:
        rest = n - min(n, last)
        pieces = []
        while rest > 0:
            pieces.append(min(context, rest))
            rest -= pieces[-1]
        pieces.append(min(n, last))
        continues = used > 0
        for i, piece in enumerate(pieces):
            if used + piece > context if continues else i > 0:
                window, used = window + 1, 0
            found += [(window, used + j) for j in range(piece)]
            used += piece
    return np.array(found)


def visibility(where, valid=None):
    """[2, N, N]: which tokens each token sees in its window, and which in memory."""
    window, place = where.T
    local = (window[:, None] == window) & (place[:, None] >= place)
    memory = window[:, None] > window
    seen = np.stack([local, memory])
    return seen if valid is None else seen & (np.asarray(valid) > 0)


def logits(c, params, tokens, where, seen):
    """[N, V] of one text: tokens [N], where [N, 2] from `places`, seen [2, N, N]."""
    flat = {}

    def walk(tree, path=()):
        for name, x in tree.items():
            if isinstance(x, dict):
                walk(x, (*path, name))
            else:
                flat["/".join((*path, name))] = np.asarray(x, np.float64)

    walk(params)
    N, half = len(tokens), c.head_dim // 2
    angle = where[:, 1, None] * c.rope_theta ** (-np.arange(half) / half)
    turn = np.exp(1j * angle)[:, None]  # dimension i turns together with i + D/2

    def rotated(x):
        z = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([z.real, z.imag], -1)

    def norm(x, name, layer=slice(None)):
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon)
        x = x * flat[f"{name}/scale"][layer]
        return x + flat[f"{name}/bias"][layer] if c.norm == "layernorm" else x

    x = flat["embedding"][tokens]
    for layer in range(c.num_layers):
        remembers = layer in c.memory_layers
        h = norm(x, "layers/attention_norm", layer)
        q, k, v = (
            (h @ flat[f"layers/attention/{name}"][layer]).reshape(N, -1, c.head_dim)
            for name in ("query", "key", "value")
        )
        if c.qk_norm:
            q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
            q = q * np.exp(flat["layers/attention/log_scale"][layer])[:, None]
        else:
            q = q / np.sqrt(c.head_dim)
        if remembers:
            in_memory = seen[1].sum(1)[:, None, None]
            q = q * (1 + c.memory_scaling * np.log1p(in_memory / c.local_context))
        k_memory = k
        if c.memory_positions or not remembers:
            q, k = rotated(q), rotated(k)
        attended = np.zeros((N, c.num_heads, c.head_dim))
        for head in range(c.num_heads):
            of = head * c.num_kv_heads // c.num_heads
            weights = np.exp(q[:, head] @ k[:, of].T) * seen[0]
            if remembers:
                in_memory = np.exp(q[:, head] @ k_memory[:, of].T) * seen[1]
                weights = np.concatenate([weights, in_memory], 1)
            total = weights.sum(1, keepdims=True)
            values = np.concatenate([v[:, of]] * (2 if remembers else 1))
            attended[:, head] = weights / np.where(total, total, 1) @ values
        x = x + attended.reshape(N, -1) @ flat["layers/attention/out"][layer]
        h = norm(x, "layers/mlp_norm", layer)
        up = h @ flat["layers/mlp/up"][layer]
        if c.mlp == "swiglu":
            gate = h @ flat["layers/mlp/gate"][layer]
            inner = gate / (1 + np.exp(-gate)) * up
        else:  # GELU in its tanh form
            inner = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + inner @ flat["layers/mlp/down"][layer]
    return norm(x, "final_norm") @ (flat["embedding"].T if c.tie_embeddings else flat["head"])


def read(c, params, tokens, feeds, last, valid=None):
    """[N, V] of a text [N] that is read in pieces of the given lengths."""
    where = places(feeds, c.local_context, last)
    return logits(c, params, np.asarray(tokens), where, visibility(where, valid))

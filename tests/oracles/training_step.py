"""The objective of a training step in PyTorch, float64: every query attends to what it sees.

For test_step.py, which wants its gradient, and test_flops.py, which counts its products.
"""

import jax
import numpy as np
import torch
import torch.nn.functional as F

from fot_jax.model.schemes import PreviousContext
from oracles.crossbatch import visibility, visible_rows


def objective(c, scheme, params, batch, group_rows, z_loss=0.0, detached=False):
    """(What is minimised, sums over the output rows' tokens) of a whole batch.

    `detached`: no gradients reach the contexts.
    """
    tokens, segments, targets, weights = (
        np.asarray(batch[name]) for name in ("inputs", "segment_ids", "targets", "weights")
    )
    kept = output_rows(scheme, len(tokens))
    targets, weights = torch.tensor(targets[kept]).long(), torch.tensor(weights[kept]).double()
    logits = of_rows(c, scheme, params, tokens, segments, group_rows, detached)
    log_z = logits.exp().sum(-1).log()
    at_target = logits.gather(-1, targets[..., None])[..., 0]
    sums = {
        "loss": ((log_z - at_target) * weights).sum(),
        "z_loss": (log_z**2 * weights).sum(),
        "correct": ((logits.argmax(-1) == targets) * weights).sum(),
        "weights": weights.sum(),
    }
    return (sums["loss"] + z_loss * sums["z_loss"]) / sums["weights"], sums


def gradient(c, scheme, params, batch, group_rows, z_loss=0.0, detached=False):
    """(Gradient of the objective as a tree of NumPy arrays, the sums)."""
    leaves, tree = jax.tree.flatten(params)
    leaves = [torch.tensor(np.array(x)).double().requires_grad_() for x in leaves]
    params = jax.tree.unflatten(tree, leaves)
    loss, sums = objective(c, scheme, params, batch, group_rows, z_loss, detached)
    loss.backward()
    return jax.tree.unflatten(tree, [x.grad.numpy() for x in leaves]), jax.tree.map(
        torch.Tensor.item, sums
    )


def output_rows(scheme, rows):
    """The rows whose loss counts: scheme A takes it on each lane's last window (paper §3.2)."""
    if isinstance(scheme, PreviousContext):
        return np.arange(scheme.w, rows, scheme.w + 1)
    return np.arange(rows)


def of_rows(c, scheme, params, tokens, segments, group_rows, detached):
    """Logits [output rows, T, V]. Other rows end after the last memory layer, which needs them."""
    rows, T = tokens.shape
    seen = visibility(scheme, rows, group_rows, segments)
    kept = output_rows(scheme, rows)
    alive = np.arange(rows) if c.memory_layers else kept
    x = params["embedding"][tokens[alive]]
    for layer in range(c.num_layers):
        w = jax.tree.map(lambda a, layer=layer: a[layer], params["layers"])
        remembers = layer in c.memory_layers
        h = norm(c, w["attention_norm"], x)
        q, k, v = (
            (h @ w["attention"][name]).reshape(len(alive), T, -1, c.head_dim)
            for name in ("query", "key", "value")
        )
        if c.qk_norm:
            q, k = (a / a.norm(dim=-1, keepdim=True) for a in (q, k))
            q = q * w["attention"]["log_scale"].exp()[:, None]
        else:
            q = q / np.sqrt(c.head_dim)
        if remembers:
            seen_rows = [visible_rows(scheme, row % group_rows, group_rows) for row in alive]
            tokens = torch.tensor([len(rows) * T for rows in seen_rows]).double()
            factor = 1 + c.memory_scaling * (tokens / c.local_context).log1p()
            q = q * factor[:, None, None, None]
        positions = c.memory_positions or not remembers
        q, k_local = (turn(a, c.rope_theta) if positions else a for a in (q, k))
        shared = c.num_heads // c.num_kv_heads
        k_context, v_context = (a.detach() if detached else a for a in (k, v))
        keys = torch.stack([k_local, k_context]).repeat_interleave(shared, 3)
        values = torch.stack([v, v_context]).repeat_interleave(shared, 3)
        attended = []
        for i, row in enumerate(alive):
            for t in range(T):
                kind, other, at = np.nonzero(seen[row, t, : 1 + remembers])
                visible = (kind, np.searchsorted(alive, other), at)
                scores = q[i, t][:, None] @ keys[visible].permute(1, 2, 0)  # [H, 1, keys]
                attended.append(scores.softmax(-1) @ values[visible].transpose(0, 1))
        x = x + torch.stack(attended).reshape(len(alive), T, -1) @ w["attention"]["out"]
        h = norm(c, w["mlp_norm"], x)
        up = h @ w["mlp"]["up"]
        if c.mlp == "swiglu":
            inner = F.silu(h @ w["mlp"]["gate"]) * up
        else:
            inner = F.gelu(up, approximate="tanh")
        x = x + inner @ w["mlp"]["down"]
        if c.memory_layers and layer == max(c.memory_layers):
            x, alive = x[kept], kept
    x = norm(c, params["final_norm"], x)
    return x @ (params["embedding"].T if c.tie_embeddings else params["head"])


def norm(c, w, x):
    if c.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / ((x**2).mean(-1, keepdim=True) + c.norm_epsilon).sqrt()
    return x * w["scale"] + w.get("bias", 0.0)


def turn(x, theta):
    """Rotary positions: dimension i turns together with i + D/2, by t / theta^(2i/D)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1]).double()[:, None, None]
    angles = angles / theta ** (torch.arange(half).double() / half)
    (a, b), cos, sin = x.split(half, -1), angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

"""Model FLOPs: the matrix products that the method asks for, whatever the program computes."""

from __future__ import annotations

from fot_jax.model.config import ModelConfig
from fot_jax.model.schemes import Scheme


def training_flops(c: ModelConfig, scheme: Scheme, rows: int, group_rows: int) -> int:
    """FLOPs of one training step: forward plus twice that for the gradient, no recomputation.

    Scores count for visible blocks only: the causal half of each local window, and each context
    that the scheme gives to a row, or all that is cached, also where few keys are looked up. Rows
    that nobody needs after the last memory layer stop there.

    Args:
      rows: rows of the whole batch, in crossbatch groups of `group_rows`.
    """
    T, kernels = c.local_context, layer_parameters(c)
    per_score = 4 * c.num_heads * c.head_dim  # q k and p v, two FLOPs each
    row_of_a_layer = 2 * kernels * T + per_score * T * (T + 1) // 2

    kept = rows * len(range(scheme.windows)[scheme.output_place()]) // scheme.windows
    layers_of_all = c.memory_layers[-1] + 1 if c.memory_layers else 0
    contexts = sum(len(of_row) for of_row in scheme.contexts(group_rows)) * (rows // group_rows)
    beyond = contexts * T + rows * scheme.cached_tokens
    forward = row_of_a_layer * (rows * layers_of_all + kept * (c.num_layers - layers_of_all))
    forward += len(c.memory_layers) * per_score * T * beyond
    forward += kept * 2 * c.hidden_size * c.vocab_size * T
    return 3 * forward


def reading_flops(c: ModelConfig, tokens: int) -> int:
    """FLOPs of reading a text in whole windows, everything kept in memory, no logits."""
    per_score = 4 * c.num_heads * c.head_dim
    starts = range(0, tokens, c.local_context)
    windows = [min(c.local_context, tokens - start) for start in starts]
    local = sum(n * (n + 1) // 2 for n in windows)
    beyond = sum(n * start for n, start in zip(windows, starts, strict=True))
    scores = c.num_layers * local + len(c.memory_layers) * beyond
    return 2 * c.num_layers * layer_parameters(c) * tokens + per_score * scores


def layer_parameters(c: ModelConfig) -> int:
    """Elements of a layer's matrices."""
    attention = 2 * c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads)
    return attention + c.hidden_size * c.mlp_dim * (3 if c.mlp == "swiglu" else 2)

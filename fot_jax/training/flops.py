"""Model FLOPs: the matrix products that the method asks for, whatever the program computes."""

from __future__ import annotations

from typing import NamedTuple

from fot_jax.model.config import ModelConfig
from fot_jax.model.schemes import Scheme


class Part(NamedTuple):
    """What trains, where that is not everything.

    Attributes:
      lowest_layer: below it nothing does, and no gradient is needed.
      matrices: elements of each layer's that train, adapters included.
      adapters: elements of each layer's adapters. Added to its kernels they cost nothing there;
        their own gradients ask for a product of each beside those of the kernels.
      head: the matrix of the logits trains.
    """

    lowest_layer: int
    matrices: list[int]
    adapters: int
    head: bool


def training_flops(
    c: ModelConfig, scheme: Scheme, rows: int, group_rows: int, part: Part | None = None
) -> int:
    """FLOPs of one training step, no recomputation: forward plus twice that for the gradient.

    Of the gradient, half is that of activations, needed down to the lowest layer that trains, and
    half that of the matrices, needed of those that train.

    Scores count for visible blocks only: the causal half of each local window, and each context
    that the scheme gives to a row, or all that is cached, also where few keys are looked up. Rows
    that nobody needs after the last memory layer stop there.

    Args:
      rows: rows of the whole batch, in crossbatch groups of `group_rows`.
      part: of the parameters that trains; None: all.
    """
    T, kernels = c.local_context, layer_parameters(c)
    if part is None:
        part = Part(0, [kernels] * c.num_layers, 0, True)
    per_score = 4 * c.num_heads * c.head_dim  # q k and p v, two FLOPs each
    kept = rows * len(range(scheme.windows)[scheme.output_place()]) // scheme.windows
    layers_of_all = c.memory_layers[-1] + 1 if c.memory_layers else 0
    contexts = sum(len(of_row) for of_row in scheme.contexts(group_rows)) * (rows // group_rows)
    beyond = contexts * T + rows * scheme.cached_tokens
    total = kept * 2 * c.hidden_size * c.vocab_size * T * (2 + part.head)
    for layer in range(c.num_layers):
        tokens = T * (rows if layer < layers_of_all else kept)
        products = 2 * kernels * tokens
        scores = per_score * tokens * (T + 1) // 2
        scores += per_score * T * beyond * (layer in c.memory_layers)
        of_activations = products + 2 * part.adapters * tokens + 2 * scores
        of_activations *= layer >= part.lowest_layer
        total += products + scores + of_activations + 2 * part.matrices[layer] * tokens
    return total


def reading_flops(c: ModelConfig, tokens: int) -> int:
    """FLOPs of reading a text in whole windows, everything kept in memory, no logits.

    The last window stays, and takes all layers. Of the others memory alone is left: that takes the
    layers below the last memory layer, and its keys and values.
    """
    per_score = 4 * c.num_heads * c.head_dim
    below = max(c.memory_layers, default=0)
    keys_values = 2 * c.hidden_size * c.num_kv_heads * c.head_dim * bool(c.memory_layers)
    total = 0
    for start in range(0, tokens, c.local_context):
        n = min(c.local_context, tokens - start)
        stays = start + n == tokens
        layers = c.num_layers if stays else below
        products = layers * layer_parameters(c) + (0 if stays else keys_values)
        beyond = start * sum(layer < layers for layer in c.memory_layers)
        total += 2 * products * n + per_score * (layers * n * (n + 1) // 2 + n * beyond)
    return total


def layer_parameters(c: ModelConfig) -> int:
    """Elements of a layer's matrices."""
    attention = 2 * c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads)
    return attention + c.hidden_size * c.mlp_dim * (3 if c.mlp == "swiglu" else 2)

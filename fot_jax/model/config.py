"""What determines a model: its shapes, its function, and how rotary positions are scaled."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError, check_range

# Beyond what anyone trains, and far below where shapes and tables of positions are too large to be
# made at all.
_LARGEST = {
    "vocab_size": 2**27,
    "hidden_size": 2**20,
    "num_layers": 2**14,
    "num_heads": 2**14,
    "num_kv_heads": 2**14,
    "head_dim": 2**14,
    "mlp_dim": 2**22,
    "local_context": 2**22,
}
ROPE_SCALINGS = ("llama3", "linear", "dynamic", "yarn")


@configurable
@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed so that a model reads further than it was first trained.

    Attributes:
      factor: how much further.
      low_freq_factor, high_freq_factor: of "llama3".
      original_max_position: tokens that the model was trained on before ("llama3", "yarn"), or
        beyond which "dynamic" would change anything.
      kind: as config.json names it.
        "llama3" (LLaMA 3.1 and later): wavelengths above original_max_position / low_freq_factor
        grow by `factor`, those below original_max_position / high_freq_factor stay, those between
        are interpolated.
        "linear": all wavelengths grow by `factor`.
        "dynamic": none do within original_max_position tokens, and windows are no longer.
        "yarn" (arXiv 2309.00071): frequencies that turn beta_fast times or more within
        original_max_position stay, those that turn beta_slow times or less shrink by `factor`;
        queries and keys grow by attention_factor.
      beta_fast, beta_slow, attention_factor: of "yarn"; the last None: 0.1 ln(factor) + 1.
      truncate: of "yarn": between which dimensions it interpolates is rounded to whole ones.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    kind: str = "llama3"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in ROPE_SCALINGS:
            raise UserError(
                f"RopeScaling.kind = {self.kind!r}: choose one of {', '.join(ROPE_SCALINGS)}"
            )
        longest = {"original_max_position": self.original_max_position}
        check_range("RopeScaling", 1, factor=self.factor, **longest)
        betas = {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
        check_range("RopeScaling", 1e-6, 1e6, **betas, attention_factor=self.attention_factor)
        if self.kind == "yarn" and self.beta_fast < self.beta_slow:
            raise UserError(
                f"RopeScaling.beta_fast = {self.beta_fast} is below RopeScaling.beta_slow = "
                f"{self.beta_slow}: exchange them"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise UserError(
                f"RopeScaling.low_freq_factor = {self.low_freq_factor} must be above 0 and below "
                f"RopeScaling.high_freq_factor = {self.high_freq_factor}"
            )

    @property
    def score_factor(self) -> float:
        """What rotated queries times rotated keys are multiplied by, beside the frequencies."""
        if self.kind != "yarn":
            return 1.0
        attention_factor = self.attention_factor
        if attention_factor is None:
            attention_factor = 0.1 * math.log(self.factor) + 1
        return attention_factor**2


@configurable
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the parameters and the function of a model.

    Checkpoints record every field, memories all but the last two. Those of before a new one get its
    default: give it the value that they were trained with.

    `local_context` is the window that positions are trained for. How a long text is read where
    nobody says otherwise is part of it as it is of LongLLaMA's config.json: the last two fields.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    memory_layers: tuple[int, ...]
    local_context: int
    norm: str = "rmsnorm"  # or "layernorm"
    norm_epsilon: float = 1e-6
    mlp: str = "swiglu"  # or "gelu"
    qk_norm: bool = False  # L2-normalise q and k per head, with a learned temperature
    memory_positions: bool = True  # rotary on local q and k of memory layers
    # Keys of memory stand where they were, a window before; else all at the window's first place.
    memory_before: bool = False
    # Memory layers merge memory and window through a learned gate per head; else in one softmax.
    memory_gate: bool = False
    # Queries of memory layers that see n tokens of memory are 1 + memory_scaling * ln(1 + n /
    # local_context) times as long, so that attention among more keys stays as sharp (as in layers
    # without positions of Llama 4; Scalable-Softmax, arXiv 2501.19399). 0: they are not.
    memory_scaling: float = 0.0
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    # Tokens of a text that stay in the window at its end; None: LongLLaMA's 1,024. (At most all.)
    last_context_length: int | None = None
    # float32, bfloat16, float16, int8 or int4; None: the type that the model computes in.
    memory_dtype: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "memory_layers", tuple(sorted(set(self.memory_layers))))
        for name, most in _LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise UserError(f"model.{name} = {value!r}: give a whole number from 1 to {most:,}")
        check_range("model", 1, 1e18, rope_theta=self.rope_theta)
        check_range("model", 0, 1, norm_epsilon=self.norm_epsilon)
        check_range("model", 0, 10, memory_scaling=self.memory_scaling)
        last = {"last_context_length": self.last_context_length}
        check_range("model", 1, 2**31 - 1, whole=True, **last)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads = {self.num_heads} is not a multiple of model.num_kv_heads = "
                f"{self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim = {self.head_dim} is odd: rotary needs an even one")
        if self.memory_before and not self.memory_positions:
            raise UserError(
                "model.memory_before gives keys of memory positions, model.memory_positions = "
                "False takes them away: change one of them"
            )
        scaling = self.rope_scaling
        if scaling is not None:
            if scaling.kind == "yarn" and self.rope_theta == 1:
                raise UserError(
                    'model.rope_theta = 1: RopeScaling.kind = "yarn" needs a larger one'
                )
            if scaling.kind == "dynamic" and self.local_context > scaling.original_max_position:
                raise UserError(
                    f"model.local_context = {self.local_context}: where it is longer than "
                    f"{scaling.original_max_position}, dynamic scaling would turn every token by "
                    "how long the text is: give at most that"
                )
        for layer in self.memory_layers:
            if not 0 <= layer < self.num_layers:
                raise UserError(
                    f"model.memory_layers has {layer}, but layers are numbered 0 … "
                    f"{self.num_layers - 1}"
                )
        for field, allowed in (
            ("norm", ("rmsnorm", "layernorm")),
            ("mlp", ("swiglu", "gelu")),
            ("memory_dtype", (None, "float32", "bfloat16", "float16", "int8", "int4")),
        ):
            if getattr(self, field) not in allowed:
                names = ", ".join(map(str, allowed))
                raise UserError(f"model.{field} = {getattr(self, field)!r}: choose one of {names}")

    def differences(self, other: ModelConfig) -> dict[str, tuple[Any, Any]]:
        """Fields that two models do not share, with both values, but for rounding to float32.

        Files of other programs have, say, 9.99999975e-06 where 1e-5 was meant.
        """
        names = [field.name for field in dataclasses.fields(self)]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: pair for name, pair in pairs.items() if not _same(*pair)}


def _same(a: Any, b: Any) -> bool:
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return all(map(_same, dataclasses.astuple(a), dataclasses.astuple(b)))
    if isinstance(a, float) and isinstance(b, float):
        return np.float32(a) == np.float32(b)
    return a == b

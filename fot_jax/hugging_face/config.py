"""config.json and ModelConfig, one from the other.

Read: what LLaMA-architecture models have, of transformers 4 and 5, with LongLLaMA's fields for
memory where they are there. Written: a LLaMA's own, with the same fields beside them, which plain
LLaMA code passes over; of the paper's family, which no LLaMA code can run, model_type "fot".
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from absl import logging
from etils import epath

from fot_jax.common import formats
from fot_jax.common.errors import UserError
from fot_jax.common.paths import is_file, path_of
from fot_jax.model.config import ROPE_SCALINGS, ModelConfig, RopeScaling

CONFIG = "config.json"
# Model types, and max_position_embeddings of files that leave it out.
_LONGEST = {"llama": 2048, "mistral": 4096 * 32, "longllama": 2048, "fot": 2048}
MODEL_TYPES = tuple(_LONGEST)
_MEM_DTYPES = ("float32", "bfloat16", "float16")  # of memory in PyTorch
# Architectures of these model types with another head, or none.
_NOT_CAUSAL = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def is_directory(path: epath.PathLike) -> bool:
    """Whether a path is a directory as `transformers` writes them."""
    return (path_of(path) / CONFIG).exists()


# --- Reading -------------------------------------------------------------------------------------


def read(
    directory: epath.PathLike,
    memory_layers: Sequence[int] | None = None,
    local_context: int | None = None,
    window: int | None = None,
) -> ModelConfig:
    """The model of a Hugging Face directory.

    Args:
      directory: on this machine, or in a bucket.
      memory_layers: None: mem_layers of config.json, or none.
      local_context: None: that of config.json, or max_position_embeddings or, where rope scaling
        of LLaMA 3 stretches another, that.
      window: tokens that texts are read in, where it is another than local_context.

    Raises:
      UserError: no config.json, or of a model that is no LLaMA; a field is missing or of no use.
    """
    fields = Fields(directory)
    formats.CONVERTED.check(fields.path, fields.values)
    try:
        config = _read(fields)
    except UserError as error:
        place = "" if str(error).startswith(str(fields.path)) else f"{fields.path}: "
        raise UserError(f"{place}{error}") from error
    if memory_layers is not None:
        config = dataclasses.replace(config, memory_layers=tuple(memory_layers))
    if local_context is not None:
        config = dataclasses.replace(config, local_context=local_context)
    _check_sliding_window(fields, config, window)
    return config


def _check_sliding_window(fields: Fields, config: ModelConfig, window: int | None) -> None:
    if fields.values["model_type"] != "mistral":
        return  # LLaMA code passes the field over
    name = "sliding_window"
    # The default of its configuration class, for files that leave it out.
    sliding = fields.values.get(name, 4096)
    seen = window or config.local_context
    if sliding is not None and fields.number(name, 4096) < seen:
        remedy = "set local_context to" if window else "fot convert from-hf --local_context"
        raise UserError(
            f"{fields.path}: {name} = {sliding} is shorter than the window of {seen} tokens, and "
            f"layers that see less than the window are not supported: {remedy} {sliding}, or less"
        )


class Fields:
    """What config.json says (or another file like it), checked as it is asked for."""

    def __init__(self, directory: epath.PathLike, name: str = CONFIG):
        self.path = epath.Path(directory) / name
        if not is_file(self.path):
            what = f"no {name}" if path_of(directory).exists() else "does not exist"
            raise UserError(f"{directory}: {what}: give a Hugging Face model directory")
        try:
            self.values = json.loads(self.path.read_text())
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise UserError(f"{self.path}: not JSON ({error}): restore it from a copy") from error
        if not isinstance(self.values, dict):
            raise UserError(f"{self.path}: not a JSON object: restore it from a copy")

    def number(self, name: str, default: float | None = None, kind: type = int, within=None):
        """A field that is a number, above 0; of an object in it where `within` is its name."""
        values = self.values if within is None else self.values[within]
        value = values.get(name, default)
        value = default if value is None else value
        where = f"{self.path}: {name if within is None else f'{within}.{name}'}"
        if value is None:
            raise UserError(f"{where} is missing: add it")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < 2**63:
            raise UserError(f"{where} = {json.dumps(value)}: give a number above 0")
        if kind is int and value != int(value):
            raise UserError(f"{where} = {json.dumps(value)}: give a whole number")
        return kind(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.path}: {name} = {json.dumps(value)}: give true or false")
        return value

    def marks(self) -> dict[str, int | list[int] | None]:
        """The tokens that begin and end a document, as far as they are told."""
        found = {}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if name in self.values:
                value = found[name] = self.values[name]
                each = value if isinstance(value, list) else [value]
                if value is not None and not all(type(one) is int for one in each):
                    raise UserError(f"{self.path}: {name} = {json.dumps(value)}: give a token id")
        return found

    def memory(self) -> dict[str, Any]:
        """How LongLLaMA's code reads a long text; of a directory without memory, nothing."""
        found: dict[str, Any] = {}
        if self.values.get("last_context_length") is not None:
            found["last_context_length"] = self.number("last_context_length")
        if self.values.get("mem_layers"):
            spelled = (*_MEM_DTYPES, *(f"torch.{name}" for name in _MEM_DTYPES))
            named = self.only("mem_dtype", spelled, "bfloat16")
            found["memory_dtype"] = named.removeprefix("torch.")
            if (k := self.values.get("mem_topk")) is not None:
                logging.warning(
                    "%s: mem_topk = %s holds in PyTorch: fot generate takes --k", self.path, k
                )
            if self.values.get("mem_scaling"):
                found["memory_scaling"] = self.number("mem_scaling", kind=float)
        return found

    def only(self, name: str, allowed: Sequence[Any], default: Any, within=None):
        """A field that has one of a few values; of an object in it where `within` is its name."""
        value = (self.values if within is None else self.values[within]).get(name, default)
        name = name if within is None else f"{within}.{name}"
        if not any(
            value is each or type(value) is type(each) and value == each for each in allowed
        ):
            raise UserError(
                f"{self.path}: {name} = {json.dumps(value)} is not supported: have "
                f"{', '.join(map(json.dumps, allowed))}"
            )
        return value


def _read(fields: Fields) -> ModelConfig:
    model_type = fields.only("model_type", MODEL_TYPES, None)
    names = fields.values.get("architectures")
    for name in names if isinstance(names, list) else [names]:
        if str(name).endswith(_NOT_CAUSAL):
            raise UserError(
                f"{fields.path}: architectures has {name}, which is no language model: give the "
                "directory of a LlamaForCausalLM"
            )
    for name in ("attention_bias", "mlp_bias"):
        fields.only(name, (False, None), False)
    fields.only("is_causal", (True, None), None)  # transformers 5 honours it: of embedding models
    fields.only("partial_rotary_factor", (1, 1.0, None), None)
    fields.only("transformers_weights", (None,), None)  # files of other names
    if fields.values.get("quantization_config"):
        raise UserError(
            f"{fields.path}: quantization_config: quantized weights are not supported: give the "
            "model that they were made from"
        )
    if model_type == "fot":
        family = {
            "norm": fields.only("norm", ("rmsnorm", "layernorm"), "rmsnorm"),
            "mlp": fields.only("mlp", ("swiglu", "gelu"), "swiglu"),
            "qk_norm": fields.flag("qk_norm", False),
        }
    else:
        fields.only("hidden_act", ("silu", "swish"), "silu")
        family = {}
    heads, hidden = fields.number("num_attention_heads"), fields.number("hidden_size")
    if fields.values.get("head_dim") is None and hidden % heads:
        raise UserError(
            f"{fields.path}: hidden_size = {hidden} is not a multiple of num_attention_heads = "
            f"{heads}: add head_dim"
        )
    # Of its configuration class, too, for files that leave it out; null is as many as heads.
    eight = model_type == "mistral" and "num_key_value_heads" not in fields.values
    kv_heads = 8 if eight else heads
    longest = fields.number("max_position_embeddings", _LONGEST[model_type])
    theta, scaling = rope(fields, longest)
    # LLaMA 3.1 is LLaMA 3 beyond the window that scaling stretches. The others are trained in, or
    # work from the first token on, and max_position_embeddings is their window in transformers.
    stretched = scaling is not None and scaling.kind == "llama3"
    window = scaling.original_max_position if stretched else longest
    return ModelConfig(
        vocab_size=fields.number("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.number("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.number("num_key_value_heads", kv_heads),
        head_dim=fields.number("head_dim", hidden // heads),
        mlp_dim=fields.number("intermediate_size"),
        memory_layers=tuple(_memory_layers(fields)),
        local_context=fields.number("local_context", window),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6, float),
        memory_positions=fields.flag("mem_positionals", True),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
        **fields.memory(),
        **family,
    )


def _memory_layers(fields: Fields) -> list[int]:
    layers = fields.values.get("mem_layers") or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise UserError(f"{fields.path}: mem_layers = {layers}: give a list of numbers of layers")
    return layers


def rope(fields: Fields, longest: int) -> tuple[float, RopeScaling | None]:
    """The base of rotary positions, and their scaling, as transformers 5 makes them of config.json.

    Args:
      longest: max_position_embeddings.
    """
    # transformers 4 had rope_theta and rope_scaling, 5 has one object, rope_parameters, and takes
    # the older one where it finds both.
    name = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    scaling = fields.values.get(name)
    if scaling is not None and not isinstance(scaling, dict):
        raise UserError(f"{fields.path}: {name} = {json.dumps(scaling)}: give an object")
    if not scaling:
        return fields.number("rope_theta", 10_000.0, float), None

    def number(field: str, default: float | None = None, kind: type = float):
        return fields.number(field, default, kind, within=name)

    given = scaling.get("rope_theta") is not None
    theta = number("rope_theta") if given else fields.number("rope_theta", 10_000.0, float)
    fields.only("partial_rotary_factor", (1, 1.0, None), None, within=name)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ROPE_SCALINGS:
        raise UserError(
            f"{fields.path}: {name} of type {json.dumps(kind)} is not supported: have default, "
            f"{', '.join(ROPE_SCALINGS)}"
        )
    if kind == "linear":
        return theta, RopeScaling(number("factor"), kind=kind)
    if kind == "dynamic":
        return theta, RopeScaling(number("factor"), original_max_position=longest, kind=kind)
    original = "original_max_position_embeddings"  # beside the object, or else in it
    if fields.values.get(original) is not None:
        first = fields.number(original)
    else:
        first = number(original, longest, int)
    if kind == "llama3":
        factors = (number(f) for f in ("factor", "low_freq_factor", "high_freq_factor"))
        return theta, RopeScaling(*factors, first)
    factor = number("factor", longest / first)
    attention_factor = None
    if scaling.get("attention_factor") is not None:
        attention_factor = number("attention_factor")
    elif scaling.get("mscale") and scaling.get("mscale_all_dim"):
        scales = (number(f) * 0.1 * math.log(max(factor, 1)) + 1 for f in _MSCALES)
        attention_factor = next(scales) / next(scales)
    return theta, RopeScaling(
        factor,
        original_max_position=first,
        kind=kind,
        beta_fast=number("beta_fast", 32.0) if scaling.get("beta_fast") else 32.0,
        beta_slow=number("beta_slow", 1.0) if scaling.get("beta_slow") else 1.0,
        attention_factor=attention_factor,
        truncate=fields.only("truncate", (True, False, None), True, within=name) or False,
    )


_MSCALES = ("mscale", "mscale_all_dim")


# --- Writing -------------------------------------------------------------------------------------


def is_llama(c: ModelConfig) -> bool:
    """Whether the model without its memory is a LLaMA."""
    return c.norm == "rmsnorm" and c.mlp == "swiglu" and not c.qk_norm and c.memory_positions


def needs_our_code(c: ModelConfig) -> bool:
    """Whether LLaMA code leaves something of the model out."""
    return bool(c.memory_layers) or not is_llama(c)


def _model_type(c: ModelConfig) -> str:
    if not is_llama(c):
        return "fot"
    # LlamaConfig of transformers 5 refuses such a shape, and MistralConfig does not: without a
    # sliding window both compute the same.
    return "mistral" if c.hidden_size % c.num_heads else "llama"


def content(c: ModelConfig, dtype: str, marks: dict[str, int | None]) -> dict[str, Any]:
    """What to write as config.json.

    Args:
      dtype: of the tensors.
      marks: bos_token_id, eos_token_id, pad_token_id, as far as they are known.

    Raises:
      UserError: a model that our PyTorch code has not: a baseline of the paper.
    """
    for name in ("memory_gate", "memory_before"):
        if getattr(c, name):
            raise UserError(f"model.{name} = True: there is no PyTorch code for such models")
    kind = _model_type(c)
    longest, scaling = _written(c)
    values = {
        **formats.CONVERTED.number,
        "architectures": [f"{kind.title()}ForCausalLM"],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max(longest, c.local_context),
        "initializer_range": 0.02,
        "rms_norm_eps": c.norm_epsilon,
        "rope_theta": float(c.rope_theta),
        "rope_scaling": scaling,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": c.tie_embeddings,
        "use_cache": True,
        **marks,
        "torch_dtype": dtype,
    }
    if values["max_position_embeddings"] != c.local_context or scaling is not None:
        values["local_context"] = c.local_context
    if kind == "mistral":
        values["sliding_window"] = None  # left out, there would be one
    if kind == "fot":
        del values["hidden_act"], values["attention_bias"], values["mlp_bias"]
        values |= {"norm": c.norm, "mlp": c.mlp, "qk_norm": c.qk_norm}
        if scaling is None:  # or AutoTokenizer warns, which takes any name for an attribute
            del values["rope_scaling"]
    if needs_our_code(c):
        ours = "Fot" if kind == "fot" else f"Fot{kind.title()}"
        values |= {
            "auto_map": {
                "AutoConfig": f"configuration_fot.{ours}Config",
                "AutoModelForCausalLM": f"modeling_fot.{ours}ForCausalLM",
            },
            "mem_layers": list(c.memory_layers),
            "mem_positionals": c.memory_positions,
        }
    if c.memory_layers:
        mem_dtype = c.memory_dtype or dtype
        if mem_dtype not in _MEM_DTYPES:
            logging.warning("model.memory_dtype = %r: PyTorch keeps memory in %s", mem_dtype, dtype)
            mem_dtype = dtype
        values |= {
            "mem_dtype": mem_dtype,
            "last_context_length": c.last_context_length or min(1024, c.local_context),
        }
        if c.memory_scaling:
            values["mem_scaling"] = c.memory_scaling
    return values


def _written(c: ModelConfig) -> tuple[int, dict[str, Any] | None]:
    """max_position_embeddings, and rope_scaling as transformers 4 and 5 read it."""
    s = c.rope_scaling
    if s is None:
        return c.local_context, None
    values: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind == "linear":
        return c.local_context, values
    if s.kind == "dynamic":
        return s.original_max_position, values
    values["original_max_position_embeddings"] = s.original_max_position
    if s.kind == "llama3":
        names = ["low_freq_factor", "high_freq_factor"]
    else:
        names = ["beta_fast", "beta_slow", "truncate"]
        names += ["attention_factor"] if s.attention_factor is not None else []
    values |= {name: getattr(s, name) for name in names}
    return int(s.factor * s.original_max_position), values

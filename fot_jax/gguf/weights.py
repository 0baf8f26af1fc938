"""The parameters of a .gguf file of the LLaMA family, as ours, and its settings as config.json has
them (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Matrices are dequantized when they are asked for, one at a time. llama.cpp rotates neighbouring
dimensions where transformers, and we, rotate two halves, so the rows of queries' and keys' matrices
stand in another order.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, quants

from fot_jax.common.errors import UserError
from fot_jax.common.paths import in_bucket, is_file
from fot_jax.hugging_face.tensors import Tensor, of_model
from fot_jax.model.config import ModelConfig

SUFFIX = ".gguf"
_ARCHITECTURE = "llama"  # Mistral's files, too, say so
_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROPE_FACTORS = "rope_freqs.weight"
_KINDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
_LISTS = {str: "texts", int: "whole numbers", float: "numbers"}


class File:
    """A .gguf file: its settings, and where its tensors are.

    Attributes:
      path: of the file, of several that belong together the first.
      settings: key -> value, as of the file.
      tensors: name -> tensor, of all files.
    """

    def __init__(self, path: epath.PathLike):
        """Reads the header.

        Raises:
          UserError: damaged, a part is missing, or not a model of the LLaMA family.
        """
        self.path = epath.Path(path)
        if in_bucket(self.path):
            raise UserError(f"{path}: a .gguf file is mapped into memory: copy it to this machine")
        if not is_file(self.path):
            raise UserError(f"{path}: no such file")
        parts = [_opened(each) for each in _parts(self.path)]
        self.settings = parts[0][0]
        self.tensors: dict[str, ReaderTensor] = {}
        for number, (settings, tensors) in enumerate(parts):
            if settings.get("split.no", number) != number:
                raise UserError(f"{path}: part {number + 1} of it is another part by its settings")
            for each in tensors:
                if each.name in self.tensors:
                    raise UserError(f"{path}: its parts have two tensors {each.name}: get it again")
                self.tensors[each.name] = each
        self._check_kind(len(parts))

    def setting(self, name: str, kind: type, default: Any = None, many: bool = False) -> Any:
        """A setting of a kind, or a list of such; the default where the file does not have it.

        Raises:
          UserError: it is of another kind.
        """
        value = self.settings.get(name)
        if value is None:
            return default
        if isinstance(value, list) != many or not all(
            _is_of(kind, x) for x in (value if many else [value])
        ):
            said = f"a list of {_LISTS[kind]}" if many else _KINDS[kind]
            raise UserError(
                f"{self.path}: {name} = {reprlib.repr(value)}, not {said}: get the file again"
            )
        return value

    def number(self, name: str, default: float | None = None, kind: type = int) -> Any:
        """A setting that is a number above 0; `name` without the architecture before it."""
        name = f"{_ARCHITECTURE}.{name}"
        value = self.settings.get(name, default)
        if isinstance(value, list):
            raise UserError(
                f"{self.path}: {name} differs from layer to layer, which is not supported"
            )
        whole = "whole " if kind is int else ""
        if not _is_of(float, value) or not 0 < value < 2**63 or (whole and value != int(value)):
            said = "is missing" if value is None else f"= {value!r}, not a {whole}number above 0"
            raise UserError(f"{self.path}: {name} {said}: convert the model to GGUF again")
        # Settings are float32: the shortest decimal that is this one, which is what was written.
        return float(str(np.float32(value))) if kind is float else kind(value)

    def _check_kind(self, parts: int) -> None:
        name = "general.architecture"
        if (architecture := self.setting(name, str)) != _ARCHITECTURE:
            raise UserError(
                f"{self.path}: {name} = {architecture!r} is not supported: have "
                f"{_ARCHITECTURE!r}, as files of LLaMA and Mistral models say"
            )
        if (kind := self.setting("general.type", str, "model")) != "model":
            raise UserError(f"{self.path}: holds no model, but a part of one ({kind})")
        count = self.setting("split.count", int) or 1
        if count != parts:
            raise UserError(
                f"{self.path}: is the first of {count} files, and is named as if there were "
                f"{parts}: give all of them their own names"
            )
        tensors = self.setting("split.tensors.count", int)
        if tensors not in (None, len(self.tensors)):
            raise UserError(
                f"{self.path}: its parts have {len(self.tensors)} tensors, {tensors} by its "
                "settings: get it again"
            )
        for setting in ("expert_count", "attention.scale", "logit_scale"):
            value = self.setting(f"{_ARCHITECTURE}.{setting}", float)
            if value:
                raise UserError(
                    f"{self.path}: {_ARCHITECTURE}.{setting} = {value} is not supported"
                )


def _is_of(kind: type, value: Any) -> bool:
    """Whole numbers are numbers, too; what is true or false is none."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _parts(path: epath.Path) -> list[epath.Path]:
    """Large models are cut into MODEL-00001-of-00003.gguf and so on."""
    cut = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.gguf", path.name)
    if cut is None or int(cut[3]) == 0:
        return [path]
    if int(cut[2]) != 1:
        first = f"{cut[1]}00001-of-{cut[3]}{SUFFIX}"
        raise UserError(f"{path}: is not the first of its files: give {first}")
    names = (f"{cut[1]}{i + 1:05d}-of-{cut[3]}{SUFFIX}" for i in range(int(cut[3])))
    parts = [path.parent / name for name in names]
    for part in parts:
        if not is_file(part):
            raise UserError(f"{part}: missing, though {path.name} is one of {int(cut[3])} files")
    return parts


def _opened(path: epath.Path) -> tuple[dict[str, Any], list[ReaderTensor]]:
    """The settings and tensors of one file."""
    try:
        reader = GGUFReader(path)
        fields = {k: field for k, field in reader.fields.items() if not k.startswith("GGUF.")}
        settings = {k: field.contents() for k, field in fields.items()}
    except Exception as error:  # the library raises many kinds where a file is damaged
        with path.open("rb") as content:
            start = content.read(11)
        if start == b"version htt":  # https://git-lfs.github.com/spec/v1
            raise UserError(
                f"{path}: a pointer of Git LFS, not the file: run git lfs pull there"
            ) from error
        raise UserError(f"{path}: damaged, or no .gguf file: get it again") from error
    if reader.byte_order == "S":  # of which the library swaps the bytes of plain numbers alone
        raise UserError(
            f"{path}: of a machine with the other byte order: convert it with gguf-convert-endian"
        )
    return settings, reader.tensors


# --- Settings ------------------------------------------------------------------------------------


def config_of(file: File) -> dict[str, Any]:
    """What config.json would say of the model, but for its tokens.

    Raises:
      UserError: a setting is missing, of no use, or not supported.
    """
    number = file.number
    hidden, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if number(name, head_dim) != head_dim:
            raise UserError(
                f"{file.path}: {_ARCHITECTURE}.{name} = {number(name)}, but heads of {head_dim} "
                "dimensions: not supported"
            )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{file.path}: has no matrix token_embd.weight: get it again")
    theta = number("rope.freq_base", 10_000.0, float)
    context = number("context_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon", kind=float),
        "max_position_embeddings": context,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, theta, head_dim),
    }


def _rope_scaling(file: File, theta: float, head_dim: int) -> dict[str, Any] | None:
    """rope_scaling as config.json has it; of Llama 3, from the factors that it was made into."""
    setting, factor = f"{_ARCHITECTURE}.rope.scaling.type", "rope.scaling.factor"
    kind = file.setting(setting, str)
    if f"{_ARCHITECTURE}.{factor}" not in file.settings:
        factor = "rope.scale_linear"  # of files of 2023
    if kind is None:  # then it is linear
        scaled = file.setting(f"{_ARCHITECTURE}.{factor}", float, 0.0) not in (0.0, 1.0)
        kind = "linear" if scaled else "none"
    if _ROPE_FACTORS in file.tensors:
        if kind != "none":
            raise UserError(f"{file.path}: {setting} = {kind!r} beside {_ROPE_FACTORS}")
        factors = np.array(file.tensors[_ROPE_FACTORS].data, np.float64)
        return _llama3_scaling(file.path, theta, head_dim, factors)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"{file.path}: {setting} = {kind!r} is not supported: have linear, yarn")
    scaling = {"rope_type": kind, "factor": file.number(factor, kind=float)}
    if kind == "yarn":
        name = "rope.scaling.original_context_length"
        scaling["original_max_position_embeddings"] = file.number(name)
        for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if f"{_ARCHITECTURE}.rope.scaling.{theirs}" in file.settings:
                scaling[ours] = file.number(f"rope.scaling.{theirs}", kind=float)
        neutral = {"attn_factor": 1, "yarn_attn_factor": 1, "yarn_ext_factor": 1}
        for other, of_none in {**neutral, "yarn_log_multiplier": 0}.items():
            name = f"{_ARCHITECTURE}.rope.scaling.{other}"
            if (value := file.setting(name, float, of_none)) != of_none:
                raise UserError(f"{file.path}: {name} = {value} is not supported")
    return scaling


def _llama3_scaling(
    path: epath.Path, theta: float, head_dim: int, factors: np.ndarray
) -> dict[str, Any] | None:
    """The scaling of Llama 3 that divides frequencies by these factors.

    A frequency of wavelength w is divided by 1 where w < n / high, by `factor` where w > n / low,
    and between them by 1 / ((1 - s) / factor + s), where s = (n / w - low) / (high - low). The
    factors tell n / low and n / high; Llama's own have low = 1.
    """
    if factors.shape != (head_dim // 2,):
        raise UserError(f"{path}: {_ROPE_FACTORS} is not of half a head's dimensions")
    factor = float(factors.max())
    if np.allclose(factors, 1, rtol=1e-6):
        return None
    turns = theta ** (-np.arange(head_dim // 2) / (head_dim // 2)) / (2 * np.pi)  # 1 / w
    between = (factors > 1 + 1e-5) & (factors < factor * (1 - 1e-5))  # they were float32
    if between.sum() >= 2:
        s = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, intercept = np.polyfit(turns[between], s, 1)  # n / (high - low), -low / (high - low)
        for low in (1.0, 2.0, 4.0):  # the first with a whole number of tokens
            scaling = {
                "rope_type": "llama3",
                "factor": float(f"{factor:.6g}"),
                "low_freq_factor": low,
                "high_freq_factor": _rounded(low * (1 - 1 / intercept)),
                "original_max_position_embeddings": round(-low * slope / intercept),
            }
            if np.allclose(_llama3_factors(turns, scaling), factors, rtol=1e-4):
                return scaling
    raise UserError(
        f"{path}: the factors in {_ROPE_FACTORS} are not those of Llama 3's rope scaling: not "
        "supported"
    )


def _rounded(x: float) -> float:
    """A whole number, if it is one but for rounding."""
    return float(round(x)) if abs(x - round(x)) < 2e-5 * abs(x) else float(x)


def _llama3_factors(turns: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    factor, low, high = (scaling[f"{x}factor"] for x in ("", "low_freq_", "high_freq_"))
    s = (scaling["original_max_position_embeddings"] * turns - low) / (high - low)
    return 1 / ((1 - np.clip(s, 0, 1)) / factor + np.clip(s, 0, 1))


# --- Parameters ----------------------------------------------------------------------------------


class Reader:
    """The parameters of a .gguf file, as ours, read when they are asked for.

    Attributes:
      config: of the model.
      arrays: our parameters by path: (shape, dtype); what is quantized is float32.
    """

    def __init__(self, file: File, config: ModelConfig):
        """Looks at the names, shapes and types of the tensors.

        Raises:
          UserError: they are not those of the model, or quantized in a way that is not read.
        """
        self.config, self._file = config, file
        self._tensors: dict[tuple[str, int | None], Tensor] = {}
        self.arrays: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        names = {_ROPE_FACTORS}
        for each in of_model(config):
            name = _name(each)
            names.add(name)
            self._check(name, each.shape)
            self._tensors[each.path, each.layer] = each
            shape = each.shape[::-1] if each.transposed else each.shape
            shape = shape if each.layer is None else (config.num_layers, *shape)
            dtype = _PLAIN.get(file.tensors[name].tensor_type, np.dtype(np.float32))
            before = self.arrays.get(each.path, (shape, dtype))[1]
            self.arrays[each.path] = shape, dtype if dtype == before else np.dtype(np.float32)
        for name in file.tensors:
            if name not in names:
                raise UserError(
                    f"{file.path}: tensor {name} is none of a LLaMA: the architecture is not "
                    "supported"
                )

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter of ours, of one layer if it is of a layer."""
        tensor = self._tensors[path, layer]
        name = _name(tensor)
        found = self._file.tensors[name]
        if found.tensor_type == GGMLQuantizationType.BF16:
            x = found.data.view(ml_dtypes.bfloat16)
        elif found.tensor_type in _PLAIN:
            x = found.data
        else:
            x = quants.dequantize(found.data, found.tensor_type)
        x = x.reshape(tensor.shape).astype(self.arrays[path][1], copy=False)
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            halves = x.reshape(-1, self.config.head_dim // 2, 2, x.shape[-1])
            x = halves.swapaxes(1, 2).reshape(tensor.shape)
        return np.ascontiguousarray(x.T if tensor.transposed else x)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        path, tensor = self._file.path, self._file.tensors.get(name)
        if tensor is None:
            raise UserError(f"{path}: has no tensor {name}: get it again")
        if tensor.tensor_type not in _PLAIN and tensor.tensor_type.name not in _QUANTIZED:
            have = ", ".join([kind.name for kind in _PLAIN] + [*_QUANTIZED])
            raise UserError(f"{path}: {name} is of type {tensor.tensor_type.name}: have {have}")
        there = tuple(int(size) for size in tensor.shape[::-1])
        if there != shape:
            raise UserError(
                f"{path}: {name} is {list(there)}, but {list(shape)} by the file's settings"
            )


def _name(tensor: Tensor) -> str:
    """llama.cpp's name of a tensor, by that of transformers."""
    name = tensor.name.removesuffix(".weight")
    if tensor.layer is None:
        return f"{_NAMES[name]}.weight"
    name = name.removeprefix(f"model.layers.{tensor.layer}.")
    return f"blk.{tensor.layer}.{_NAMES[name]}.weight"

"""Adapter directories of PEFT: what they call adapters, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from fot_jax.hugging_face import tensors
from fot_jax.model.config import ModelConfig
from fot_jax.model.lora import KERNELS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def kernels(adapters: Mapping[str, Any]) -> list[str]:
    """Names of the kernels that have adapters."""
    return [name for name in KERNELS if name in adapters]


def write(directory: epath.Path, c: ModelConfig, adapters: Mapping[str, Any]) -> None:
    """Writes adapters for the directory that `fot convert to-hf` makes of the model.

    Args:
      directory: exists.
      adapters: of model/lora.py, NumPy arrays.
    """
    theirs = {(x.path, x.layer): x.name.removesuffix(".weight") for x in tensors.of_model(c)}
    arrays, modules = {}, set()
    for name in kernels(adapters):
        for layer in range(c.num_layers):
            module = theirs[f"layers/{KERNELS[name]}/{name}", layer]
            modules.add(module.split(".")[-1])
            for ours, their in (("a", "lora_A"), ("b", "lora_B")):
                array = np.ascontiguousarray(adapters[name][ours][layer].T)
                arrays[f"base_model.model.{module}.{their}.weight"] = array
    rank = adapters[kernels(adapters)[0]]["a"].shape[-1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": round(float(adapters["scale"][0]) * rank, 6),
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "bias": "none",
        "inference_mode": True,
    }
    # Not save_file: of a full disk that raises an error of its own.
    (directory / WEIGHTS).write_bytes(safetensors.numpy.save(arrays, {"format": "pt"}))
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

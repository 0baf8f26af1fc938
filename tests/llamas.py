"""Small random models in every form, with the files that transformers makes of them."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

from fot_jax.hugging_face import tensors

SHAPES = {
    "multi-head": {},
    "4 to 1": {"num_key_value_heads": 2},
    "8 to 1, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama 3": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "max_position_embeddings": 96,  # as of Llama 3.1, not factor x original
    },
    "head_dim": {"head_dim": 12, "rms_norm_eps": 1e-3, "tie_word_embeddings": True},
}


def randomise(model, seed=0):
    """Values with which every parameter matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            noise = torch.randn(x.shape, generator=generator)
            x.copy_(1 + 0.3 * noise if "norm" in name else noise * x.shape[-1] ** -0.5)
    return model.eval()


def make(kind="llama", seed=0, **config):
    """A random model of 3 layers in windows of 16 tokens."""
    Config, Model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    }[kind]
    values = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "max_position_embeddings": 16,
        **config,
    }
    return randomise(Model(Config(**values)), seed)


def save(directory, kind="llama", dtype=torch.float32, shards="5GB", **config):
    """The same, saved. Returns what was saved, in float32."""
    model = make(kind, **config).to(dtype)
    model.save_pretrained(directory, max_shard_size=shards)
    # (Read again: types of rotary angles were changed, too.)
    return type(model).from_pretrained(directory, dtype=torch.float32).eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def contents(directory):
    """Every tensor in the files of a directory, as bytes, with shape and type."""
    return {
        name: (x.dtype.name, x.shape, x.tobytes())
        for file in sorted(Path(directory).glob("*.safetensors"))
        for name, x in load(file).items()
    }


def load(file):
    """The tensors of a file, by the library's own reader."""
    import safetensors.numpy

    return safetensors.numpy.load_file(file)


def edit(directory, **fields):
    """Changes fields of config.json; None takes one away."""
    path = Path(directory) / "config.json"
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: x for k, x in values.items() if x is not None}))


def random_tokens(rows, length, vocabulary=61, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, (rows, length), np.int32)


def names_of(config):
    return [each.name for each in tensors.of_model(config)]

"""What a directory of transformers has beside weights, from a .gguf file."""

from __future__ import annotations

import json
from typing import Any

import huggingface_hub
from etils import epath

from fot_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer
from fot_jax.gguf import tokenizer, weights
from fot_jax.gguf.weights import File
from fot_jax.hugging_face import model_card, tokenizers
from fot_jax.hugging_face.config import CONFIG


def write(file: File, directory: epath.Path) -> HuggingFaceTokenizer:
    """Writes config.json, the tokenizer's files, where generation ends, and a card.

    Returns:
      The tokenizer.

    Raises:
      UserError: the model, or its tokenizer, is not of a kind that is known here.
    """
    config = weights.config_of(file)
    vocabulary = tokenizer.vocabulary_of(file)
    ends, special = vocabulary.ends, tokenizer.special_tokens_of(file)
    marks: dict[str, Any] = {
        "bos_token_id": vocabulary.bos,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
    }
    if "pad_token" in special:
        marks["pad_token_id"], _ = special["pad_token"]
    for name, content in ((CONFIG, {**config, **marks}), (tokenizers.GENERATION, marks)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    if said := _said_of(file):
        huggingface_hub.metadata_save(directory / model_card.CARD, said)
    names = {role: name for role, (_, name) in special.items()}
    tokenizers.write(vocabulary, directory, {"pad_token": vocabulary.eos_token, **names})
    if (template := tokenizer.chat_template_of(file)) is not None:
        (directory / "chat_template.jinja").write_text(template)
    return vocabulary


def _said_of(file: File) -> dict[str, Any]:
    """Name, licence and languages of the model, as model cards call them."""
    names = {"name": "model_name", "license": "license", "languages": "language"}
    names |= {"license.name": "license_name", "license.link": "license_link"}
    said = {card: file.settings.get(f"general.{name}") for name, card in names.items()}
    return {card: x for card, x in said.items() if x and isinstance(x, str | list)}

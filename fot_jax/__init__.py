"""Focused Transformer training in JAX: transformers that read from memories longer than anything
they saw in training.

"Paper" in this package is Tworkowski et al., "Focused Transformer: Contrastive Training for Context
Scaling", 2023 (arXiv 2307.03170).

Importing this package loads nothing heavy; `fot_jax.LanguageModel` loads JAX when first used.
"""

import os
from typing import Any

# Buckets are read and written through gcsfs (buckets.py); else epath would take TensorFlow.
os.environ["EPATH_USE_TF"] = "0"

__version__ = "0.1.0"
__all__ = ["LanguageModel"]


def __getattr__(name: str) -> Any:
    if name == "LanguageModel":
        from fot_jax.inference.language_model import LanguageModel

        return LanguageModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

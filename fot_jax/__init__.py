"""Focused Transformer training in JAX: transformers that read from memories longer than anything
they saw in training.

"Paper" in this package is Tworkowski et al., "Focused Transformer: Contrastive Training for Context
Scaling", 2023 (arXiv 2307.03170).

Importing this package loads nothing heavy: what it offers is imported when it is first used.
"""

import importlib
import os
from typing import Any

# Buckets are read and written through gcsfs (common/bucket_filesystem.py), or epath would take
# TensorFlow.
os.environ["EPATH_USE_TF"] = "0"

__version__ = "0.2.0"

_MODULES = {  # all of the public API, and where it is
    "LanguageModel": "fot_jax.inference.language_model",
    "MemoryConfig": "fot_jax.inference.state",
    "Dense": "fot_jax.model.lookup",
    "TopK": "fot_jax.model.lookup",
    "ApproximateTopK": "fot_jax.model.lookup",
    "IndexedTopK": "fot_jax.model.lookup",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]

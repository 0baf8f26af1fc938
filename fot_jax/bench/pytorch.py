"""`fot bench pytorch`: our modelling file for transformers beside its own LLaMA of the same shape.

The LLaMA has full attention (SDPA) over everything read. Each of the two reads each text in a
process of its own, whose memory is measured, as Linux tells it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fot_jax.bench.memory import MODEL, best_of, cores, print_table
from fot_jax.common.errors import UserError

NEW_TOKENS = 64


def pytorch(as_json: bool = False, lengths: Sequence[int] = (2048, 8192, 32768)) -> None:
    """Prints seconds to read, tokens written a second and megabytes, and their ratios.

    Raises:
      UserError: torch or transformers are not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        raise UserError("torch and transformers are needed: pip install 'fot_jax[torch]'")
    rows = []
    for length in lengths:
        ours, llama = (_in_a_process(kind, length) for kind in ("fot", "llama"))
        rows.append(
            {
                "tokens": length,
                **ours,
                **{f"llama_{name}": value for name, value in llama.items()},
                "times_faster_read": llama["read_s"] / ours["read_s"],
                "times_faster_write": ours["tokens_per_s"] / llama["tokens_per_s"],
                "share_of_mb": ours["mb"] / llama["mb"],
            }
        )
    if as_json:
        print(json.dumps({"bench": "pytorch", "rows": rows}))
    else:
        print_table(rows)


def _in_a_process(kind: str, length: int) -> dict[str, float]:
    argv = [sys.executable, "-m", "fot_jax.bench.pytorch", kind, str(length)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# --- In that process -----------------------------------------------------------------------------


def _measure(kind: str, length: int) -> dict[str, float]:
    """Seconds to read, tokens written a second after it, megabytes that both took."""
    import torch

    torch.set_num_threads(cores())
    model = _model(kind)
    text = torch.as_tensor(np.random.default_rng(0).integers(0, MODEL.vocab_size, (1, length)))

    def read(tokens) -> Any:
        how = {"last_context_length": MODEL.local_context // 2} if kind == "fot" else {}
        return model(tokens, use_cache=True, logits_to_keep=1, **how).past_key_values

    with torch.inference_mode():
        read(text[:, :64])
        before = _resident(reset=True)
        seconds = best_of(lambda: read(text), 3 if length <= 8192 else 1, warm=False)
        cache = read(text)
        token = text[:, :1]
        for step in range(NEW_TOKENS + 2):
            if step == 2:
                start = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
        per_token = (time.perf_counter() - start) / NEW_TOKENS
        taken = _resident() - before
    return {"read_s": seconds, "tokens_per_s": 1 / per_token, "mb": taken / 1e6}


def _resident(reset: bool = False) -> int:
    """The most bytes of memory that this process has held since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _model(kind: str):
    import transformers

    from fot_jax.hugging_face import config as configs

    values = configs.content(MODEL, "float32", {})
    if kind == "fot":
        from fot_jax.pytorch.configuration_fot import FotLlamaConfig
        from fot_jax.pytorch.modeling_fot import FotLlamaForCausalLM

        return FotLlamaForCausalLM(FotLlamaConfig(**values)).eval()
    values = {**values, "max_position_embeddings": 2**20, "attn_implementation": "sdpa"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]))))

"""The model card of a converted checkpoint: README.md, as Hugging Face's pages show it."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import huggingface_hub
from etils import epath

from fot_jax import __version__
from fot_jax.hugging_face.config import is_llama, needs_our_code
from fot_jax.model.config import ModelConfig

CARD = "README.md"
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
_OF_THE_BASE = ("license", "license_name", "license_link", "language")
_OF_A_STEP = ("step", "time", "seconds")

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = AutoModelForCausalLM.from_pretrained({name}{trust})
```
"""


def write(
    directory: epath.Path,
    name: str,
    c: ModelConfig,
    parameters: int,
    base: epath.Path | None,
    workdir: epath.Path | None,
    step: int | None,
) -> None:
    """Writes the card, and the licences that came with the model that training started from.

    Args:
      directory: exists.
      name: of the model.
      parameters: their number.
      base: files that came with that model, its own card among them; None: none.
      workdir, step: of the run, and how far it was; None: no run.
    """
    said = _metadata(directory, base)
    kept = {key: said[key] for key in _OF_THE_BASE if key in said}
    metadata = {**kept, "library_name": "transformers", "pipeline_tag": "text-generation"}
    if c.memory_layers:
        metadata["tags"] = ["focused-transformer", "long-context"]
    rows = [] if workdir is None else [x for x in _metrics(workdir) if x["step"] <= step]
    text = "\n\n".join(
        part.strip()
        for part in (
            f"# {' '.join(name.split())}",
            _model(c, parameters),
            _USE.format(
                name=json.dumps(name, ensure_ascii=False),
                trust=", trust_remote_code=True" * needs_our_code(c),
            ),
            _training(workdir, rows),
            _results(rows),
            _licence(said, base),
        )
        if part
    )
    (directory / CARD).write_text(text + "\n")
    huggingface_hub.metadata_save(directory / CARD, metadata)
    for file in LICENSES if base is not None else ():
        if (base / file).exists():
            (base / file).copy(directory / file)


def _metadata(directory: epath.Path, base: epath.Path | None) -> dict[str, Any]:
    """What the card of the base model begins with, texts and lists of them.

    Nothing where there is no card to read. It is copied into the directory, to be read there.
    """
    if base is None or not (base / CARD).exists():
        return {}
    (base / CARD).copy(directory / CARD)
    try:
        said = huggingface_hub.metadata_load(directory / CARD) or {}
    except Exception:  # whatever YAML says of what somebody wrote there
        return {}
    finally:
        (directory / CARD).unlink()
    return {key: x for key, x in said.items() if isinstance(x, str) or _texts(x)}


def _texts(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(each, str) for each in x)


def _model(c: ModelConfig, parameters: int) -> str:
    family = "LLaMA" if (c.norm, c.mlp, c.qk_norm) == ("rmsnorm", "swiglu", False) else "decoder"
    shape = (
        f"A {family} of {parameters / 1e6:,.0f}M parameters ({c.num_layers} layers, width "
        f"{c.hidden_size})"
    )
    if not c.memory_layers:
        return f"{shape}, without memory."
    layers = ", ".join(map(str, c.memory_layers))
    without = "; without, it is the model without its memory" if is_llama(c) else ""
    return (
        f"{shape} that reads from a memory of keys and values in layers {layers}: a Focused "
        "Transformer ([arXiv 2307.03170](https://arxiv.org/abs/2307.03170)). With "
        "`trust_remote_code=True` it reads texts of any length, in windows of "
        f"{c.local_context} tokens{without}."
    )


def _training(workdir: epath.Path | None, rows: list[dict[str, Any]]) -> str:
    if workdir is None or not (workdir / "config.gin").exists():
        return ""
    steps = [row["step"] for row in rows if "loss" in row]
    last = f", to step {steps[-1]:,}" if steps else ""
    settings = _text(workdir / "config.gin").strip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", settings)), default=0))
    return (
        f"## Training\n\nWith fot_jax {__version__}{last}, from this experiment file:\n\n"
        f"<details><summary>config.gin</summary>\n\n{fence}\n{settings}\n{fence}\n\n</details>"
    )


def _results(rows: list[dict[str, Any]]) -> str:
    """The newest of every number that evaluations gave."""
    evaluated = [row for row in rows if "loss" not in row]
    newest = {name: (x, row["step"]) for row in evaluated for name, x in row.items()}
    lines = [
        f"| {name} | {value:.4g} | {step:,} |"
        for name, (value, step) in newest.items()
        if name not in _OF_A_STEP and isinstance(value, int | float)
    ]
    if not lines:
        return ""
    return "## Evaluation\n\n| | | step |\n|---|---|---|\n" + "\n".join(lines)


def _metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for what a kill cut off."""
    path = workdir / "metrics.jsonl"
    rows = []
    for line in _text(path).splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def _text(path: epath.Path) -> str:
    return path.read_bytes().decode(errors="replace")


def _licence(said: dict[str, Any], base: epath.Path | None) -> str:
    if base is None:
        return ""
    named = said.get("model_name")
    model = " ".join(named.split()) if isinstance(named, str) else ""
    derives = f"Parameters derive from {model or 'the model that training started from'}"
    if not (licence := said.get("license")):
        return (
            f"## Licence\n\n{derives}, which says nothing of its licence here: look at where it "
            "came from, and state it above."
        )
    several = licence if isinstance(licence, list) else [licence]
    other = said.get("license_name")  # what "other" stands for
    if isinstance(other, str):
        several = [other if each == "other" else each for each in several]
    return f"## Licence\n\n{derives}, whose licence is {', '.join(several)}."

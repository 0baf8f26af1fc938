"""The model card of a converted checkpoint: README.md, as Hugging Face's pages show it."""

from __future__ import annotations

import json
from typing import Any

import huggingface_hub
from etils import epath

from fot_jax import __version__
from fot_jax.hugging_face.config import needs_our_code
from fot_jax.model.config import ModelConfig

CARD = "README.md"
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
_OF_THE_BASE = ("license", "license_name", "license_link", "language")
_OF_A_STEP = ("step", "time", "seconds")

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
```
"""


def write(
    directory: epath.Path,
    name: str,
    c: ModelConfig,
    parameters: int,
    base: epath.Path | None,
    workdir: epath.Path | None,
) -> None:
    """Writes the card, and the licences that came with the model that training started from.

    Args:
      directory: exists.
      name: of the model.
      parameters: their number.
      base: files that came with that model, its own card among them; None: none.
      workdir: of the run; None: no run.
    """
    said = _metadata(base)
    kept = {key: said[key] for key in _OF_THE_BASE if key in said}
    metadata = {**kept, "library_name": "transformers", "pipeline_tag": "text-generation"}
    if c.memory_layers:
        metadata["tags"] = ["focused-transformer", "long-context"]
    text = "\n\n".join(
        part.strip()
        for part in (
            f"# {name}",
            _model(c, parameters),
            _USE.format(name=name, trust=", trust_remote_code=True" * needs_our_code(c)),
            _training(workdir),
            _results(workdir),
            _licence(said, base),
        )
        if part
    )
    (directory / CARD).write_text(text + "\n")
    huggingface_hub.metadata_save(directory / CARD, metadata)
    for file in LICENSES if base is not None else ():
        if (base / file).exists():
            (base / file).copy(directory / file)


def _metadata(base: epath.Path | None) -> dict[str, Any]:
    """What the card of the base model begins with; nothing where there is no card to read."""
    if base is None or not (base / CARD).exists():
        return {}
    try:
        return huggingface_hub.ModelCard((base / CARD).read_text()).data.to_dict()
    except Exception:  # whatever YAML says of what somebody wrote there
        return {}


def _model(c: ModelConfig, parameters: int) -> str:
    family = "LLaMA" if (c.norm, c.mlp, c.qk_norm) == ("rmsnorm", "swiglu", False) else "decoder"
    shape = (
        f"A {family} of {parameters / 1e6:,.0f}M parameters ({c.num_layers} layers, width "
        f"{c.hidden_size})"
    )
    if not c.memory_layers:
        return f"{shape}, without memory."
    layers = ", ".join(map(str, c.memory_layers))
    return (
        f"{shape} that reads from a memory of keys and values in layers {layers}: a Focused "
        "Transformer ([arXiv 2307.03170](https://arxiv.org/abs/2307.03170)). With "
        "`trust_remote_code=True` it reads texts of any length, in windows of "
        f"{c.local_context} tokens; without, it is the model without its memory."
    )


def _training(workdir: epath.Path | None) -> str:
    if workdir is None or not (workdir / "config.gin").exists():
        return ""
    steps = [row for row in _metrics(workdir) if "loss" in row]
    last = f", to step {steps[-1]['step']:,}" if steps else ""
    settings = (workdir / "config.gin").read_text().strip()
    return (
        f"## Training\n\nWith fot_jax {__version__}{last}, from this experiment file:\n\n"
        f"<details><summary>config.gin</summary>\n\n```\n{settings}\n```\n\n</details>"
    )


def _results(workdir: epath.Path | None) -> str:
    """The newest of every number that evaluations gave."""
    rows = [] if workdir is None else [row for row in _metrics(workdir) if "loss" not in row]
    newest = {name: (x, row["step"]) for row in rows for name, x in row.items()}
    lines = [
        f"| {name} | {value:.4g} | {step:,} |"
        for name, (value, step) in newest.items()
        if name not in _OF_A_STEP and isinstance(value, int | float)
    ]
    if not lines:
        return ""
    return "## Evaluation\n\n| | | step |\n|---|---|---|\n" + "\n".join(lines)


def _metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else ()
    return [json.loads(line) for line in lines]


def _licence(said: dict[str, Any], base: epath.Path | None) -> str:
    model = said.get("model_name") or "the model that training started from"
    if base is None:
        return ""
    if "license" not in said:
        return (
            f"## Licence\n\nParameters derive from {model}, which says nothing of its licence "
            "here: look at where it came from, and state it above."
        )
    return f"## Licence\n\nParameters derive from {model}, whose licence is {said['license']}."

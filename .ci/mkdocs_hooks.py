"""What mkdocs.yml cannot say: a page of the API reference for every room, and links out of docs/.

Rooms are the folders of fot_jax/. A page has the docstrings of all their modules, so that a new
module needs no line anywhere.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.parent.name for path in (ROOT / "fot_jax").glob("*/__init__.py"))
NOT_OURS_TO_IMPORT = {"modeling_fot", "configuration_fot"}  # ship with converted models


def _modules(room: str) -> list[str]:
    files = sorted((ROOT / "fot_jax" / room).rglob("*.py"))
    files = [file for file in files if file.stem not in ("__init__", *NOT_OURS_TO_IMPORT)]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]


def on_config(config):
    rooms = [{room: f"reference/{room}.md"} for room in ROOMS]
    config.nav.append({"API reference": [{"fot_jax": "reference/fot_jax.md"}, *rooms]})
    return config


def on_files(files, config):
    top = ["fot_jax", *(f"fot_jax.{name}" for name in ("train", "convert", "gin_files", "cli"))]
    pages = {"fot_jax": top, **{room: _modules(room) for room in ROOMS}}
    for name, modules in pages.items():
        text = f"# {name}\n\n" + "\n".join(f"::: {module}\n" for module in modules)
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Files of the repository that are no pages are named, as the site does not have them."""
    return re.sub(r"\[([^]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", markdown)

"""CONTRIBUTING.md: its recipes work as they are written."""

import json
import re
import shutil
import subprocess
import sys

import pages
import pytest
import runs


@pytest.mark.slow
def test_recipes_work_as_written(tmp_path):
    """In a copy of the package, followed to the letter; then the commands that use them.

    Of these the last uses all of them, and runs; the one before is traced, with a tokenizer that is
    there at once.
    """
    for name in ("fot_jax", "experiments"):
        shutil.copytree(pages.ROOT / name, tmp_path / name)
    shutil.copy(pages.ROOT / "pyproject.toml", tmp_path)
    recipes = pages.blocks("CONTRIBUTING.md", "python")
    for recipe in recipes:
        first, code = recipe.split("\n", 1)
        path = tmp_path / re.search(r"fot_jax/\S+\.py", first)[0]
        assert path.exists() == first.startswith("# at the end of")
        with path.open("a") as file:
            file.write(f"\n\n{code}" if path.stat().st_size else code)
    subprocess.run(["ruff", "check", "--quiet", "fot_jax"], cwd=tmp_path, check=True)
    subprocess.run(["ruff", "format", "--quiet", "--check", "fot_jax"], cwd=tmp_path, check=True)
    assert len(recipes) == 5

    first, last = (each[1:] for each in pages.commands("CONTRIBUTING.md") if each[0] == "fot")
    traced = [*first, "--dry_run", *runs.bind("Text.tokenizer = @Bytes()")]
    for command in (traced, last):
        ran = subprocess.run(
            [sys.executable, "-m", "fot_jax", *command],
            cwd=tmp_path,
            env={**runs.with_devices(1), "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
    workdir = tmp_path / last[last.index("--workdir") + 1]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    (accuracy,) = (x["my_next_tokens/accuracy"] for x in lines if "my_next_tokens/accuracy" in x)
    assert 0 <= accuracy <= 1

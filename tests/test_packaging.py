"""What is declared is what is imported, and importing costs nothing."""

import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fot_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fot_jax"


@pytest.fixture(scope="module")
def declared():
    """Name of every distribution in setup.cfg -> requirement, without those of accelerators; and
    of those that are always installed."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    lines = of_all = [*config["options"]["install_requires"].splitlines()]
    for extra in ("torch", "lm_eval", "dev", "docs", "test"):
        lines = [*lines, *extras[extra].splitlines()]
    requirements = [
        [Requirement(line) for line in some if line and not line.startswith("#")]
        for some in (lines, of_all)
    ]
    return [{canonicalize_name(r.name): r for r in some} for some in requirements]


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, fot_jax; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "fot_jax" in loaded
    assert not {"jax", "numpy", "tensorflow", "seqio", "torch", "flax"} & set(loaded)


def test_the_public_api_is_offered_by_the_package():
    names = ("LanguageModel", "MemoryConfig", "Dense", "TopK", "ApproximateTopK", "IndexedTopK")
    offered = {name: getattr(fot_jax, name) for name in names}
    assert list(offered) == fot_jax.__all__ and offered.keys() <= set(dir(fot_jax))
    for name, what in offered.items():
        assert what.__name__ == name and what.__doc__


def test_unknown_attributes_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fot_jax.nonsense  # noqa: B018


def test_every_folder_of_modules_is_a_package():
    """find: installs only folders with an __init__.py."""
    for module in PACKAGE.rglob("*.py"):
        assert (module.parent / "__init__.py").exists(), module


def test_every_import_is_declared(declared):
    """What a module imports as it is imported is always there, but for torch where it is for it."""
    distributions, (every, of_all) = importlib.metadata.packages_distributions(), declared
    for module in PACKAGE.rglob("*.py"):
        tree = ast.parse(module.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                top = name.split(".")[0]
                if top == "fot_jax" or top in sys.stdlib_module_names:
                    continue
                # That of an extra which is not installed has the module's name.
                known = {canonicalize_name(d) for d in distributions.get(top, [top])}
                at_once = node in tree.body and module.parent.name != "pytorch"
                there = of_all if at_once else every
                assert known & there.keys(), f"{module}: {name} is not in setup.cfg, or of an extra"


def test_rooms_import_each_other_in_one_direction():
    """Rooms: the folders and files that stand in fot_jax/. Down the list of the page."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = re.findall(r"\[(\w+)(?:\.py|/)\]\(\.\./fot_jax/", page)
    upwards = set()
    for module in PACKAGE.rglob("*.py"):
        room = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fot_jax":
                of_top = node.module == "fot_jax"
                names = [a.name for a in node.names] if of_top else [node.module.split(".")[1]]
                above = rooms[: rooms.index(room)] if room in rooms else []
                upwards |= {(room, name) for name in names if name in above}
    assert {"cli", "train", "model", "common"} <= set(rooms) and not upwards


def test_constraints_name_one_version_of_everything_declared(declared):
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "+" not in specifier.version and pin.url is None
        versions[canonicalize_name(pin.name)] = specifier.version
    for name, requirement in declared[0].items():
        if name != "fot-jax":
            assert requirement.specifier.contains(versions[name]), (name, versions[name])

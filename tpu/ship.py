"""The code of a run as one archive, named by its content: the same code, the same name."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from fot_jax.common.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
PARTS = (
    "fot_jax",
    "experiments",
    "tpu",
    ".ci/constraints.txt",
    "setup.cfg",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


@dataclasses.dataclass(frozen=True)
class Code:
    """What is shipped.

    Attributes:
      digest: of names, modes and contents; not of times.
      archive: a tar.gz of it.
      experiments: where in it the experiment files are.
      settings: a digest of all that is in experiments/.
    """

    digest: str
    archive: bytes
    experiments: tuple[str, ...]
    settings: str

    @property
    def path(self) -> Path:
        """Where `save` puts the archive on this machine."""
        return Path(tempfile.gettempdir()) / f"fot-{os.getuid()}-{self.digest}.tar.gz"

    def save(self) -> None:
        """Writes the archive, for scp to take: whole, while others may be taking it.

        Commands started side by side ship the same code: each has a partial file of its own, where
        that of `common.atomic.write_file` has one name.
        """
        half = self.path.with_suffix(f".{os.getpid()}")
        half.write_bytes(self.archive)
        half.replace(self.path)


def pack(experiments: list[str]) -> Code:
    """Packs the code of this repository with experiment files, which may come from elsewhere.

    Raises:
      UserError: an experiment from elsewhere has the name of another file in experiments/, or one
        that it includes cannot be packed beside it.
    """
    files = {name: REPOSITORY / name for name in _names()}
    places = []
    for experiment in experiments:
        path = Path(experiment).resolve()
        if path.is_relative_to(REPOSITORY):
            name = path.relative_to(REPOSITORY).as_posix()
            files[name] = path
        else:
            name = _add_from_elsewhere(files, path, path.name)
        places.append(name)
    content = {
        name: (_mode(path), path.read_bytes()) for name, path in files.items() if path.is_file()
    }
    settings = {name: x for name, x in content.items() if name.startswith("experiments/")}
    return Code(_digest(content), _archive(content), tuple(places), _digest(settings))


def _names() -> list[str]:
    """Files of PARTS: what git knows or would take up; without git, all but caches."""
    if (REPOSITORY / ".git").exists() and shutil.which("git"):
        git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PARTS]
        listed = subprocess.run(git, cwd=REPOSITORY, capture_output=True)
        if listed.returncode:
            said = os.fsdecode(listed.stderr).strip().splitlines() or ["it says nothing"]
            raise UserError(f"{REPOSITORY}: git does not list its files: {said[0]}")
        return [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    paths = [
        path for part in PARTS for path in (REPOSITORY / part, *(REPOSITORY / part).rglob("*"))
    ]
    names = [path.relative_to(REPOSITORY).as_posix() for path in paths if path.is_file()]
    return [name for name in names if not re.search(r"__pycache__|\.egg-info|\.\w+_cache", name)]


def _add_from_elsewhere(files: dict[str, Path], path: Path, relative: str) -> str:
    """Adds an experiment file, and what it includes, under experiments/; returns its name there."""
    name = f"experiments/{relative}"
    there = files.get(name)
    if there not in (None, path) and there.read_bytes() != path.read_bytes():
        raise UserError(f"{path}: there is another {name} in the repository: rename one of them")
    if there == path:
        return name
    files[name] = path
    for included in re.findall(r"^include\s+['\"](.+?)['\"]", path.read_text(), re.MULTILINE):
        beside = (path.parent / included).resolve()
        if not beside.is_file() or beside.is_relative_to(REPOSITORY):
            continue  # found from the repository's root, there as here
        relative_there = os.path.normpath(Path(relative).parent / included)
        if relative_there.startswith(("..", "/")):
            raise UserError(f"{path}: includes {included}: put it beside it, or below")
        _add_from_elsewhere(files, beside, relative_there)
    return name


def _mode(path: Path) -> int:
    return 0o755 if path.stat().st_mode & 0o100 else 0o644


def _digest(content: dict[str, tuple[int, bytes]]) -> str:
    total = hashlib.sha256()
    for name, (mode, data) in sorted(content.items()):
        total.update(f"{len(os.fsencode(name))} {mode} {len(data)} ".encode())
        total.update(os.fsencode(name) + data)
    return total.hexdigest()[:16]


def _archive(content: dict[str, tuple[int, bytes]]) -> bytes:
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, (mode, data) in sorted(content.items()):
            member = tarfile.TarInfo(name)
            member.mode, member.size = mode, len(data)
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()

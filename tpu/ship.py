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
      settings: a digest of all that is in experiments/, of experiment files and what they include.
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
    chosen: list[str] = []
    places = []
    for experiment in experiments:
        path = Path(experiment).resolve()
        name = _in_repository(path) or f"experiments/{path.name}"
        _add(files, chosen, [(path, name)])
        places.append(name)
    content = {
        name: (_mode(path), path.read_bytes()) for name, path in files.items() if path.is_file()
    }
    settings = {
        name: x for name, x in content.items() if name.startswith("experiments/") or name in chosen
    }
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


def _in_repository(path: Path) -> str | None:
    """Its name there, which it has in the archive, too; None of a file from elsewhere."""
    return path.relative_to(REPOSITORY).as_posix() if path.is_relative_to(REPOSITORY) else None


def _add(files: dict[str, Path], chosen: list[str], reading: list[tuple[Path, str]]) -> None:
    """Adds an experiment file, and what it includes.

    Args:
      chosen: names of those that have been added.
      reading: the file and its name in the archive, after the one that includes it, and so on.
    """
    path, name = reading[-1]
    if name in chosen and files[name] == path:
        return
    there = files.get(name)
    if there not in (None, path) and there.read_bytes() != path.read_bytes():
        raise UserError(f"{path}: there is another {name} in the repository: rename one of them")
    files[name] = path
    chosen.append(name)
    for included in re.findall(r"^include\s+['\"](.+?)['\"]", path.read_text(), re.MULTILINE):
        _add(files, chosen, [*reading, _included(included, reading)])


def _included(included: str, reading: list[tuple[Path, str]]) -> tuple[Path, str]:
    """What an include finds there, where the repository is the current directory, and its name."""
    path, _ = reading[-1]
    in_root, beside = ((each / included).resolve() for each in (REPOSITORY, path.parent))
    if in_root.is_file() and (name := _in_repository(in_root)):
        if beside.is_file() and beside.read_bytes() != in_root.read_bytes():
            raise UserError(
                f"{path}: include {included!r} may be {in_root} or {beside}: rename one of them"
            )
        return in_root, name
    for including, name in reversed(reading):
        found = (including.parent / included).resolve()
        if found.is_file():
            relative = os.path.normpath(Path(name).parent / included)
            if _in_repository(found) not in (None, relative) or relative.startswith(("..", "/")):
                break
            if not _in_repository(found) and not relative.startswith("experiments/"):
                break
            return found, relative
    raise UserError(f"{path}: includes {included}: put it beside it, or below")


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

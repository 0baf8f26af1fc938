"""A fake Google Cloud in a directory, and `python -m tpu` against it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import power

import tpu.__main__
from tpu import process, ship
from tpu.local import free_port

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]

EXPERIMENT = """
train.steps = 5
train.compute = @Compute()
Compute.topology = "v4-16"
"""

# Makes what `uv venv` and `uv pip install` are asked for, out of this Python.
UV = f"""#!/bin/sh
echo "$@" >> "$FAKE_GCLOUD/uv.log"
case $1 in
  venv) mkdir -p "$4/bin"; printf '#!/bin/sh\\nexec {sys.executable} "$@"\\n' > "$4/bin/python"
        chmod +x "$4/bin/python" ;;
  pip) if test -e "$FAKE_GCLOUD/no_space"; then echo "error: no space left"; exit 1; fi ;;
esac
"""


def copy_repository(to):
    """The repository, with stubs for what runs on workers."""
    for part in ("fot_jax", "experiments", "tpu"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / part, to / part, ignore=ignored)
    (to / ".ci").mkdir()
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", ".ci/constraints.txt"):
        shutil.copyfile(REPOSITORY / file, to / file)
    shutil.copyfile(HERE / "stub_training.py", to / "fot_jax" / "__main__.py")
    return to


class Cloud:
    """The fake cloud, what has become of it, and commands of the user's machine."""

    def __init__(self, directory, repository):
        self.directory, self.repository = directory, repository
        self.bin = directory / "bin"
        self.bin.mkdir(parents=True)
        fake = f'#!/bin/sh\nexec {sys.executable} {HERE / "fake_gcloud.py"} "$@"\n'
        for name, text in (("gcloud", fake), ("uv", UV)):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        (directory / "addresses").write_text(f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}")
        self.experiment = directory / "tiny.gin"
        self.experiment.write_text(EXPERIMENT)
        self.plan()
        self.train(steps=5)

    def plan(self, *lives, **more):
        lives = lives or (["ACTIVE"],)
        (self.directory / "plan.json").write_text(
            json.dumps({"lives": lives, "workers": 2, "failure": "no more capacity", **more})
        )

    def train(self, **plan):
        (self.directory / "training.json").write_text(json.dumps(plan))

    def _environment(self):
        environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
        return environment | {"FAKE_GCLOUD": str(self.directory)}

    def start(self, *argv):
        """`python -m tpu` as a process."""
        return subprocess.Popen(
            [sys.executable, "-m", "tpu", *map(str, argv)],
            cwd=self.repository,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def tpu(self, *argv, **environment):
        """The same in this process, to its end: (exit code, stdout, stderr)."""
        terminated = signal.getsignal(signal.SIGTERM)
        try:
            with (
                mock.patch.dict(os.environ, self._environment() | environment, clear=True),
                mock.patch.object(ship, "REPOSITORY", self.repository),
                mock.patch.object(process, "PAUSE", 0.05),
                contextlib.chdir(self.repository),
                _written() as (out, err),
            ):
                try:
                    code = tpu.__main__.main([*map(str, argv)])
                except SystemExit as exit:
                    code = exit.code
        finally:
            signal.signal(signal.SIGTERM, terminated)
        return code, *map(_content, (out, err))

    def works(self, *argv):
        """The same, where all must be well; returns stdout."""
        code, out, err = self.tpu(*argv)
        assert code == 0, out + err
        return out

    def calls(self, verb=None):
        """Command lines that gcloud was given, those of a verb."""
        path = self.directory / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [argv for argv in map(json.loads, lines) if verb is None or verb in argv[:5]]

    def starts(self, worker):
        """How often, and with what, training was started on a worker."""
        path = self.directory / f"starts-{worker}.jsonl"
        return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []

    def checkpoints(self):
        directory = self.directory / "buckets" / "bucket" / "run" / "checkpoints"
        return sorted(int(each.name) for each in directory.glob("*"))

    def home(self, worker):
        return self.directory / "pod" / "pod" / str(worker)

    def end(self):
        """Ends what goes on on workers."""
        power.off(self.directory)


@contextlib.contextmanager
def _written():
    """Files of what this process and those that it starts write to stdout and stderr."""
    kept = [os.dup(fd) for fd in (1, 2)]
    files = [tempfile.TemporaryFile("w+") for _ in kept]
    try:
        for fd, file in zip((1, 2), files, strict=True):
            os.dup2(file.fileno(), fd)
        with contextlib.redirect_stdout(files[0]), contextlib.redirect_stderr(files[1]):
            yield files
    finally:
        for fd, before, file in zip((1, 2), kept, files, strict=True):
            file.flush()
            os.dup2(before, fd)
            os.close(before)


def _content(file):
    with file:
        file.seek(0)
        return file.read()


POD = ("--name", "pod", "--zone", "us-central2-b", "--project", "project")
WORKDIR = ("--workdir", "gs://bucket/run")

"""What has been done of a run, kept in its workdir, so that nothing is done twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figure import Run

from fot_jax.common.atomic import write_file


@dataclasses.dataclass
class Record:
    """Of one run.

    Attributes:
      file: in its workdir.
      settings: files, bindings and start that it was made with.
      contents: a digest of the files and of what they include, without comments.
      done: verbs of `fot`.
      seconds: spent, those of commands that were stopped among them (of killed ones they are lost).
    """

    file: Path
    settings: dict[str, Any]
    contents: str
    done: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def of(cls, run: Run, workdir: Path) -> Record:
        """What the workdir says, or nothing yet; ends the program if it may be another run."""
        file = workdir / "progress.json"
        settings = {"files": [*run.files], "bindings": [*run.bindings], "start": run.start}
        anew, contents = f"to make it anew, remove {workdir}", _digest_of(run.files)
        if not file.exists():
            if (workdir / "checkpoints").exists():
                sys.exit(f"{workdir}: no {file.name} says what it was made with: {anew}")
            return cls(file, settings, contents)
        content = read_object(file, anew, settings=dict, done=list, seconds=(int, float))
        if not content["done"] and not (workdir / "checkpoints").exists():
            return cls(file, settings, contents)  # its first command was refused, say
        if content["settings"] != settings:
            sys.exit(
                f"{workdir} was made with other settings ({file}): give the same --gin, or other "
                f"--workdirs; {anew}"
            )
        made_of = content.get("contents", contents)  # older records do not say it
        if made_of != contents:
            print(f"{workdir}: experiment files were others when it was made: {anew}", flush=True)
        return cls(file, settings, made_of, content["done"], content["seconds"])

    def carry_out(self, verb: str, command: Sequence[str]) -> int:
        """Runs a command of `fot`; its exit code."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._save()  # the settings, whatever happens
        began, code = time.time(), 1
        try:
            code = fot(command)
        finally:
            self.seconds += time.time() - began
            if code == 0:
                self.done.append(verb)
            self._save()
        return code

    def _save(self) -> None:
        names = ("settings", "contents", "done", "seconds")
        content = {name: getattr(self, name) for name in names}
        write_file(self.file, json.dumps(content, indent=1) + "\n")


def _digest_of(files: Sequence[str]) -> str:
    total, left = hashlib.sha256(), [Path(__file__).parent / file for file in files]
    while left:
        file = left.pop()
        text = re.sub(r"^\s*(#.*)?\n", "", file.read_text(), flags=re.MULTILINE)
        total.update(text.encode())
        left += [file.parent / name for name in re.findall(r"^include ['\"](.+)['\"]", text, re.M)]
    return total.hexdigest()


def read_object(file: Path, anew: str, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """A JSON file with an object of these fields; ends the program with a line if it is none."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"{file}: cannot be read ({error}): {anew}")
    for name, kind in fields.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            sys.exit(f"{file}: has no {name}: {anew}")
    return content


def fot(command: Sequence[str]) -> int:
    """`fot` with these words; a signal to stop is passed on to it, and it saves what it has.

    Returns:
      Its exit code; 128 and the signal's number, if there was one.
    """
    asked, process = [], None

    def pass_on(signum, frame):
        asked.append(signum)
        if process is not None:
            process.send_signal(signum if signum == signal.SIGINT else signal.SIGTERM)

    stops = [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        stops.append(signal.SIGHUP)
    before = {each: signal.signal(each, pass_on) for each in stops}
    try:
        # In a session of its own: a ^C reaches this program alone, and `fot` once.
        argv = [sys.executable, "-m", "fot_jax", *command]
        process = subprocess.Popen(argv, start_new_session=True)
        if asked:  # before there was anyone to pass it on to
            process.terminate()
        code = process.wait()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    return 128 + asked[0] if asked else code

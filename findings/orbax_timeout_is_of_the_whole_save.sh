#!/usr/bin/env bash
# orbax-checkpoint: AsyncOptions(timeout_secs=...) reads like the patience of the barriers in which
# processes wait for each other, and one that lowers it, to hear soon of a process that failed, bounds the
# whole write in the background with it, on a single process too: a save that takes longer to write fails
# with a TimeoutError when the time is over, and leaves no step. So it has to grow with the size of the
# checkpoint (40 GB at 100 MB/s take 400 s) and not with the processes.
#
# orbax-checkpoint 0.12.8, jax 0.10.2, one process; a write of 4 s.
# Seen: timeout_secs=2: TimeoutError, steps []; timeout_secs=60: saved, steps [1]
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv venv && source venv/bin/activate
pip install --quiet orbax-checkpoint==0.12.8 jax==0.10.2
cat >test.py <<'EOF'
import asyncio
from pathlib import Path

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_args, future


class Slow(ocp.AsyncCheckpointHandler):
    """As of a disk that is slow."""

    async def async_save(self, directory, args):
        async def write():
            await asyncio.sleep(4)
            (directory / "x").write_text("x")

        return [future.CommitFutureAwaitingContractedSignals(write(), name="slow")]

    def save(self, directory, args):
        raise NotImplementedError

    def restore(self, directory, args=None):
        raise NotImplementedError


@checkpoint_args.register_with_handler(Slow, for_save=True, for_restore=True)
class SlowSave(ocp.args.CheckpointArgs):
    pass


said = []
for seconds in (2, 60):
    options = ocp.CheckpointManagerOptions(
        async_options=ocp.options.AsyncOptions(timeout_secs=seconds)
    )
    manager = ocp.CheckpointManager(Path(f"run{seconds}").absolute(), options=options)
    try:
        manager.save(1, args=ocp.args.Composite(item=SlowSave()))
        manager.wait_until_finished()
        what = "saved"
    except TimeoutError as error:
        what = type(error).__name__
    steps = sorted(int(p.name) for p in Path(f"run{seconds}").iterdir() if p.name.isdigit())
    said.append(f"timeout_secs={seconds}: {what}, steps {steps}")
print("; ".join(said))
assert said == [
    "timeout_secs=2: TimeoutError, steps []",
    "timeout_secs=60: saved, steps [1]",
]
EOF
JAX_PLATFORMS=cpu python test.py 2>/dev/null

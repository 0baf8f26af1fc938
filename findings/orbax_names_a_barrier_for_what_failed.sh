#!/usr/bin/env bash
# orbax-checkpoint over several processes: when finishing a save fails on one of them (say, storage
# answers 503 once), that one does not raise what failed, but the time-out of a barrier of Orbax's own,
# as all the others do, after AsyncOptions.timeout_secs (600 by default) in which everybody waits.
# What failed is in the exception's __context__, on the process where it did; code that looks at the
# type of the error, or logs str(error), is told of DEADLINE_EXCEEDED and of a key that no user knows.
# The next save works. With one process, the OSError itself is raised, at once.
#
# orbax-checkpoint 0.12.8, jax 0.10.2, two processes on one machine (gloo).
# Seen (process, what it raises, what that was raised about):
# 0 JaxRuntimeError DEADLINE_EXCEEDED | OSError; 1 JaxRuntimeError DEADLINE_EXCEEDED | TimeoutError
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv venv && source venv/bin/activate
pip install --quiet jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8 numpy==2.4.6
cat >save.py <<'EOF'
import socket
import subprocess
import sys
import tempfile


def process(number, port, directory):
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), "x")
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.make_array_from_callback((8,), whole, np.ones(8, np.float32).__getitem__)
    finalize, left = ocp.StandardCheckpointHandler.finalize, [True]

    def fails_once(self, directory):
        if left and left.pop():
            raise OSError("503")
        finalize(self, directory)

    ocp.StandardCheckpointHandler.finalize = fails_once
    options = ocp.CheckpointManagerOptions(async_options=ocp.options.AsyncOptions(timeout_secs=20))
    manager = ocp.CheckpointManager(directory, options=options)
    try:
        manager.save(1, args=ocp.args.StandardSave({"x": x}))
        manager.wait_until_finished()
    except Exception as error:
        about = type(error.__context__).__name__
        print(number, type(error).__name__, str(error)[:17], "|", about)
    manager.save(2, args=ocp.args.StandardSave({"x": x}))
    manager.wait_until_finished()
    assert manager.all_steps() == [2]


if len(sys.argv) > 1:
    process(int(sys.argv[1]), *sys.argv[2:])
else:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port = some.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        both = [
            subprocess.Popen(
                [sys.executable, __file__, str(i), str(port), directory],
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        said = [one.communicate(timeout=180)[0].splitlines() for one in both]
    print("; ".join(line for lines in said for line in lines if "|" in line))
EOF
export JAX_PLATFORMS=cpu
seen="$(python save.py 2>/dev/null)"
echo "$seen"
[ "$seen" = "0 JaxRuntimeError DEADLINE_EXCEEDED | OSError; 1 JaxRuntimeError DEADLINE_EXCEEDED | TimeoutError" ]

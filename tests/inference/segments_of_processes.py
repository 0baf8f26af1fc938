"""One of several processes that read a text into a memory in segments, which they spread.

Started by test_spread_segments.py: python segments_of_processes.py DIRECTORY WHAT [FILES]

WHAT: "all" memories, or "few". The last process is killed before it has written so many files,
where given.
"""

import os
import signal
import sys
from pathlib import Path

from fot_jax.training import cluster

cluster.HEARTBEAT_SECONDS = 20  # in which one finds the other gone
cluster.join()

import dataclasses  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import test_spread_segments as test  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from readers import model_of  # noqa: E402

from fot_jax.common.errors import UserError  # noqa: E402
from fot_jax.inference import segment_files  # noqa: E402
from fot_jax.model import clusters  # noqa: E402

LAST = jax.process_index() == jax.process_count() - 1


def over_all(lm):
    """A model as LanguageModel.load has it, on a device of each process."""
    mesh = Mesh(np.asarray(jax.devices()), ("memory",))
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(lambda x: jax.device_put(np.asarray(x), whole), lm.params)
    return dataclasses.replace(lm, params=params, mesh=mesh)


def killed_before(files):
    """Kills this process before it has written so many."""
    write, written = os.fsync, 0

    def fsync(file):
        nonlocal written
        written += 1
        if written == files:
            os.kill(os.getpid(), signal.SIGKILL)
        write(file)

    os.fsync = fsync


def main(directory, what, files=None):
    segment_files.TOKENS, clusters.FEW, clusters.COMPARED = test.SEGMENT, 2, 2
    if files is not None and LAST:
        killed_before(int(files))
    lm = over_all(model_of(test.MODEL))
    for number, config in enumerate(test.memories(directory, what == "few")):
        got = dict(test.read(lm, config))
        if jax.process_index() == 0:
            np.savez(Path(directory) / f"{number}.npz", **got)
    if what == "all":
        message = "is saved in files as it is read, or not at all: give the"
        with pytest.raises(UserError, match=message):
            lm.save_memory(lm.read(test.MORE), f"{directory}/in_ram")


if __name__ == "__main__":
    main(*sys.argv[1:])

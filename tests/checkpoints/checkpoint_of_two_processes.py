"""One of two processes of a run that saves, resumes, and passes over a damaged checkpoint.

Started by test_manager.py: python checkpoint_of_two_processes.py DIRECTORY
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fot_jax.checkpoints import items, manager
from fot_jax.checkpoints.manager import Checkpointer
from fot_jax.training import cluster


def whole(step):
    return np.random.default_rng(step).normal(size=(8, 64)).astype(np.float32)


def main(directory):
    cluster.join()
    process = jax.process_index()
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()), "x"), PartitionSpec("x"))
    store = Checkpointer(directory)
    for step in (1, 2):
        array = jax.make_array_from_callback((8, 64), sharding, whole(step).__getitem__)
        data = {g: {"place": np.array(10 * step + g)} for g in (process, process + 2)}
        store.save(step, {"w": array}, {}, data, {"step was": step})
    store.wait()
    if process == 0:  # the second half of the newest arrays is lost
        for path in Path(directory, "2", "params").rglob("d/*"):
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
    multihost_utils.sync_global_devices("damaged")
    target = {"w": jax.ShapeDtypeStruct((8, 64), np.float32, sharding=sharding)}
    others = (1 - process, 3 - process)  # groups that the other process wrote
    restored = store.restore_latest(target, {}, others)
    assert restored.step == 1 and restored.meta == {"step was": 1}
    assert {g: int(s["place"]) for g, s in restored.data.items()} == {g: 10 + g for g in others}
    for shard in restored.params["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, whole(1)[shard.index])
    data = {process: {"place": np.array(7)}}
    store.save(2, restored.params, {}, data, {})
    store.close()
    assert store.steps() == [1, 2]
    save_that_fails_once(directory, restored.params, data)


def save_that_fails_once(directory, params, data):
    """On one process; both make it again, once the other has waited in vain."""
    manager.BARRIER_SECONDS = 10
    finalize, left = items.DataHandler.finalize, [None]

    def fail_first(self, directory):
        if left:
            left.pop()
            raise RuntimeError("the bucket sang")
        finalize(self, directory)

    items.DataHandler.finalize = fail_first
    store, tries = Checkpointer(directory), 0
    store.save(3, params, {}, data, {})
    limit = time.monotonic() + 60
    while not store.failed():  # as a run asks after each step
        assert time.monotonic() < limit
        time.sleep(0.1)
    multihost_utils.sync_global_devices("noticed")
    store.save(3, params, {}, data, {})
    while not store.saved():
        tries += 1
        store.save(3, params, {}, data, {})
    store.close()
    assert tries < manager.MAX_FAILURES - 1 and store.steps()[-1] == 3


if __name__ == "__main__":
    main(sys.argv[1])

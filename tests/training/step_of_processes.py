"""One of four processes with two devices each that compute gradients together.

Started by test_step.py: python step_of_processes.py DIRECTORY
"""

import sys
from pathlib import Path

from fot_jax.training import cluster

cluster.join()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import test_step  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402

from fot_jax.common.trees import leaves_by_path  # noqa: E402
from fot_jax.model import crossbatch  # noqa: E402
from fot_jax.model.transformer import Transformer  # noqa: E402
from fot_jax.training import partitioning  # noqa: E402
from fot_jax.training.partitioning import MeshShape  # noqa: E402
from fot_jax.training.step import TrainState, make_train_step  # noqa: E402


def main(directory):
    config, mesh = test_step.SMALL, MeshShape().make()
    assert mesh.size == 8 and jax.process_count() == 4
    for number, (scheme, lanes, group_lanes, accumulation) in enumerate(test_step.ACROSS_PROCESSES):
        plan = crossbatch.make_plan(
            scheme,
            lanes * scheme.windows // accumulation,
            group_rows=group_lanes * scheme.windows,
            mesh=mesh,
            heads=config.num_heads,
            window=test_step.T,
        )
        assert plan.group_devices > 2  # more than a process has
        params = test_step.random_params(config)
        state = TrainState(np.int32(7), params, test_step.SGD.init(params))
        batch = test_step.make_batch(config, scheme, lanes)
        step = make_train_step(Transformer(config), test_step.SGD, scheme, plan, accumulation)
        after, info = step(
            jax.device_put(state, partitioning.shardings(state, mesh)),
            jax.device_put(batch, partitioning.rows(mesh)),
        )
        trace = multihost_utils.process_allgather(after.opt_state[0].trace, tiled=True)
        if jax.process_index() == 0:
            path = Path(directory) / f"{number}.npz"
            np.savez(path, loss=info.sums.loss, **leaves_by_path(trace))
    cluster.finish()


if __name__ == "__main__":
    main(sys.argv[1])

#!/usr/bin/env bash
# A checkpoint that is renamed to be kept out of the way, `mv run/12 run/diverged_12`, is no step any
# more for a CheckpointManager, but is still step 12 for orbax.checkpoint.utils.checkpoint_steps: it
# takes whatever follows the last "_" of a name, if that is a number, of any directory on a disk. Code
# that asks the one which steps there are, and opens `run/12` or asks the other, finds none.
#
# orbax-checkpoint 0.12.8, jax 0.10.2.
# Seen: [8] [8, 12]
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv venv && source venv/bin/activate
pip install --quiet orbax-checkpoint==0.12.8 jax==0.10.2
cat >test.py <<'EOF'
import os
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp

run = Path("run").absolute()
with ocp.CheckpointManager(run) as manager:
    for step in (8, 12):
        manager.save(step, args=ocp.args.StandardSave({"x": jnp.ones(3)}))
os.rename(run / "12", run / "diverged_12")
with ocp.CheckpointManager(run) as manager:
    managed = sorted(manager.all_steps())
listed = sorted(ocp.utils.checkpoint_steps(run))
print(managed, listed)
assert (managed, listed) == ([8], [8, 12])
EOF
JAX_PLATFORMS=cpu python test.py 2>/dev/null

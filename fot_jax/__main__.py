"""`python -m fot_jax` is `fot`."""

from fot_jax.cli import run

run()

"""fot_jax."""

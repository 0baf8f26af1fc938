"""Runs on Cloud TPU, and rehearsals of them: `python -m tpu VERB` (README.md beside this file)."""

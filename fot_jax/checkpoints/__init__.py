"""Checkpoints: written whole or not at all, and read from a run or from `transformers`."""

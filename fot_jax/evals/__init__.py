"""Evaluations: one file for each, a frozen dataclass that follows `evaluate.Eval`.

`evaluate.run_evals` runs them, prints their tables and draws their plots, for `fot evaluate` and
during training. CONTRIBUTING.md says how to add one.
"""

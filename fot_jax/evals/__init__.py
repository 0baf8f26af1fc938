"""Evaluations: one file for each, a frozen dataclass that follows `evaluate.Eval`.

`evaluate.evaluate` (`fot evaluate`) and training/evaluations.py run them, print their tables and
draw their plots. CONTRIBUTING.md says how to add one.
"""

"""The mark of what experiment files may name, set where a thing is defined.

The library imports no gin: this only leaves a mark, which fot_jax/gin_files.py looks for.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

_MARK = "__configurable__"


def configurable(thing: Callable | None = None, *, flags: tuple[str, ...] = ()) -> Callable:
    """Marks a class or function as one that experiment files may name; it is otherwise unchanged.

    Its arguments are what experiment files can set. Their annotations are checked when it is
    called, so each of them needs one.

        @configurable
        @dataclasses.dataclass(frozen=True)
        class MyEvaluation: ...

    Args:
      thing: a class or function of a module in one of the folders `gin_files.ROOMS`.
      flags: arguments that the command line gives and that experiment files may not set.
    """

    def mark(thing: Callable) -> Callable:
        setattr(thing, _MARK, flags)
        return thing

    return mark if thing is None else mark(thing)


def configurables_of(module: types.ModuleType) -> dict[Callable, tuple[str, ...]]:
    """What a module defines and marks, in the order of its definitions, and the `flags` of each."""
    defined = (thing for thing in vars(module).values() if _is_defined_in(thing, module))
    return {thing: vars(thing)[_MARK] for thing in defined if _MARK in vars(thing)}


def _is_defined_in(thing: Any, module: types.ModuleType) -> bool:
    is_definition = isinstance(thing, (type, types.FunctionType))
    return is_definition and thing.__module__ == module.__name__

"""Bindings of a command line that would change nothing: a mistyped name, or of what is not used."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from fot_jax.common.errors import UserError

VERBS = ("train", "evaluate", "compile_experiment", "Data")  # what `fot` calls
MACRO = "gin.macro"
_UNSET = "%gin.REQUIRED"  # what is left to whoever runs the file


Reached = dict[str, set[tuple[str, ...]]]  # by selector, the scopes in which it is called


def check(bindings: list[str], before: Reached) -> None:
    """Raises UserError for the first of some bindings, all loaded, that changes nothing.

    As no verb of `fot` uses what it is of, or as other scopes have the last word. Of files this is
    not asked: one that others include may well hold what only some of them use.

    Args:
      before: what verbs reached before the bindings were loaded: settings of what one of them
        leaves out, evaluations, say, are for the experiment nevertheless.
    """
    import gin

    reached = before | reached_now()
    for selector, scopes in before.items():
        reached[selector] = reached[selector] | scopes
    macros = {"/".join(scope) for scope in reached.get(MACRO, ())}
    scopes = {part for each in reached.values() for scope in each for part in scope} - macros
    for binding in bindings:
        for scope, name, parameter in _bound(gin, binding):
            if parameter is None:
                if name not in macros:
                    what = f"nothing in this experiment uses the name {name}"
                    raise UserError(f"--gin {binding!r}: {what}{_like(name, macros)}")
                continue
            selector = gin.config._REGISTRY.get_match(name).selector
            what = f"nothing in this experiment uses @{name}"
            if selector not in reached:
                raise UserError(
                    f"--gin {binding!r}: {what}: name it where it belongs, in another --gin, or "
                    "leave this one out"
                )
            parts = tuple(scope.split("/")) if scope else ()
            through = [each for each in reached[selector] if each[: len(parts)] == parts]
            if not through:
                what = f"nothing in this experiment uses @{scope}/{name}"
                raise UserError(f"--gin {binding!r}: {what}{_like(parts[-1], scopes)}")
            last = {_settings(gin, each, selector)[parameter][0] for each in through}
            given = gin.config._CONFIG[scope, selector][parameter]
            if scope not in last and str(given) != _UNSET:
                own = (f"{each}/{selector.split('.')[-1]}.{parameter}" for each in sorted(last))
                what = f"overridden by {' and '.join(own)}"
                raise UserError(f"--gin {binding!r}: {what}: set what overrides it")


def _like(name: str, names: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(names - {name}), 1)
    return f": did you mean {close[0]}?" if close else ": correct it, or leave it out"


def reached_now() -> Reached:
    """What the verbs reach in what is loaded."""
    import gin

    reached: Reached = {}
    left: list[tuple[tuple[str, ...], str]] = [((), f"fot_jax.{verb}") for verb in VERBS]
    while left:
        scope, selector = left.pop()
        if scope in reached.setdefault(selector, set()):
            continue
        reached[selector].add(scope)
        for _, value in _settings(gin, scope, selector).values():
            for reference in gin.config.iterate_references(value):
                # A scope of its own takes the place of the one that it is called in.
                own, other = reference.config_key
                left.append((tuple(own.split("/")) if own else scope, other))
    return reached


def _settings(gin, scope: tuple[str, ...], selector: str) -> dict[str, tuple[str, Any]]:
    """Parameter -> the scope whose setting of it holds in `scope`, and the setting."""
    found: dict[str, tuple[str, Any]] = {}
    for n in range(len(scope) + 1):
        outer = "/".join(scope[:n])
        for parameter, value in gin.config._CONFIG.get((outer, selector), {}).items():
            if parameter not in found or str(value) != _UNSET:
                found[parameter] = outer, value
    return found


def _bound(gin, binding: str) -> Iterator[tuple[str, str, str | None]]:
    """Scope, name and parameter of each line of a binding; a macro has no parameter."""
    parser = gin.config_parser.ConfigParser(binding, gin.config.ParserDelegate())
    for statement in parser:
        if isinstance(statement, gin.config_parser.BindingStatement):
            scope, name, parameter = statement[:3]
            if parameter:
                yield scope, name, parameter
            else:
                yield "", f"{scope}/{name}" if scope else name, None

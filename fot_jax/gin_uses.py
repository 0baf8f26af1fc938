"""Bindings of a command line that would change nothing: a mistyped name, or of what is not used."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from fot_jax.common.errors import UserError

VERBS = ("train", "evaluate", "compile_experiment", "Data")  # what `fot` calls
MACRO = "gin.macro"


def check(bindings: list[str]) -> None:
    """Raises UserError for the first of some bindings, all loaded, that no verb of `fot` uses.

    Of files this is not asked: one that others include may well hold what only some of them use.
    """
    import gin

    used, macros, scopes = _used(gin)
    for binding in bindings:
        for scope, name, parameter in _bound(gin, binding):
            if parameter is None:
                if name not in macros:
                    what = f"nothing in this experiment uses the name {name}"
                    raise UserError(f"--gin {binding!r}: {what}{_like(name, macros)}")
                continue
            selector = gin.config._REGISTRY.get_match(name).selector
            what = f"nothing in this experiment uses @{name}"
            if selector not in used:
                raise UserError(
                    f"--gin {binding!r}: {what}: name it where it belongs, in another --gin, or "
                    "leave this one out"
                )
            if unknown := [each for each in scope.split("/") if each and each not in scopes]:
                what = f"nothing in this experiment uses @{unknown[0]}/{name}"
                raise UserError(f"--gin {binding!r}: {what}{_like(unknown[0], scopes)}")


def _like(name: str, names: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(names), 1)
    return f": did you mean {close[0]}?" if close else ": correct it, or leave it out"


def _used(gin) -> tuple[set[str], set[str], set[str]]:
    """Selectors and macros that the verbs reach, and scopes that are named on the way."""
    used: set[str] = set()
    macros: set[str] = set()
    scopes: set[str] = set()
    left = [("", f"fot_jax.{verb}") for verb in VERBS]
    while left:
        name, one = left.pop()
        known, key = (macros, name) if one == MACRO else (used, one)
        if key in known:
            continue
        known.add(key)
        for (scope, selector), parameters in gin.config._CONFIG.items():
            if selector == one and (one != MACRO or scope == name):
                for reference in gin.config.iterate_references(parameters):
                    left.append(reference.config_key)
                    if reference.config_key[1] != MACRO:
                        scopes.update(reference.scopes)
    return used, macros, scopes


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

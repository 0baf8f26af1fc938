"""Bindings of a command line that would change nothing: a mistyped name, or of what is not used."""

from __future__ import annotations

import collections
import difflib
from collections.abc import Iterator

from fot_jax.common.errors import UserError

VERBS = ("train", "evaluate", "compile_experiment", "Data")  # what `fot` calls
MACRO = "gin.macro"
_UNSET = "%gin.REQUIRED"  # what is left to whoever runs the file


def check(bindings: list[str]) -> None:
    """Raises UserError for the first of some bindings, all loaded, that no verb of `fot` uses.

    Of files this is not asked: one that others include may well hold what only some of them use.
    """
    import gin

    used, macros, references = _used(gin)
    scopes = {scope for through in references.values() for each in through for scope in each}
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
            if not scope and (own := _all_with_own(gin, references[selector], selector, parameter)):
                what = f"overridden by {' and '.join(own)}"
                raise UserError(f"--gin {binding!r}: {what}: set what overrides it")


def _all_with_own(gin, through: set[tuple[str, ...]], selector: str, parameter: str) -> list[str]:
    """The bindings of a parameter in the scopes that it is reached through; [] if one has none."""
    found = []
    for scopes in sorted(through):
        parts = ["/".join(scopes[:n]) for n in range(len(scopes), 0, -1)]
        bound = {part: gin.config._CONFIG.get((part, selector), {}) for part in parts}
        own = [part for part in parts if str(bound[part].get(parameter, _UNSET)) != _UNSET]
        if not own:
            return []
        found.append(f"{own[0]}/{selector.split('.')[-1]}.{parameter}")
    return found


def _like(name: str, names: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(names), 1)
    return f": did you mean {close[0]}?" if close else ": correct it, or leave it out"


def _used(gin) -> tuple[set[str], set[str], dict[str, set[tuple[str, ...]]]]:
    """Selectors and macros that the verbs reach; by selector, the scopes it is referred to in."""
    used: set[str] = set()
    macros: set[str] = set()
    references: dict[str, set[tuple[str, ...]]] = collections.defaultdict(set)
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
                        references[reference.config_key[1]].add(tuple(reference.scopes))
    return used, macros, references


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

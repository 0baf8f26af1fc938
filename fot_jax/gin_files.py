"""Experiment files: which names they may use, their errors in one line, the types of values.

The only module, with gin_uses.py and cli.py, that imports gin: the library is used without it. What
experiment files may name is marked where it is defined: @configurable, of common/configurable.py.
"""

from __future__ import annotations

import collections.abc
import contextlib
import difflib
import filecmp
import functools
import importlib
import inspect
import io
import logging
import math
import os
import pkgutil
import re
import tokenize
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fot_jax import gin_uses
from fot_jax.common.configurable import configurables_of
from fot_jax.common.errors import LARGEST_COUNT, UserError
from fot_jax.common.paths import in_bucket

ROOMS = ("training", "data", "evals", "model", "tpu_compile")  # folders with what files may name


def load(files: list[str], bindings: list[str]) -> None:
    """Registers what experiment files may name, then parses files and bindings, in order.

    Raises:
      UserError: a file that is not there, gin that does not parse, a name nobody knows, or, of
        bindings, one that changes nothing.
    """
    import gin

    gin.clear_config()
    _register(gin)
    gin.config._FILE_READERS[:] = [_reader()]  # in place of open() with any encoding, and one start
    logging.disable(logging.ERROR)  # gin logs every place where it looks for an include in vain
    try:
        for file in files:
            if in_bucket(file):
                raise UserError(
                    f"{file}: experiment files are read on this machine: get a copy with gcloud "
                    f"storage cp {file} ., and give that"
                )
            if not Path(file).is_file():
                what = (
                    f"{file} is a directory"
                    if Path(file).is_dir()
                    else f"no experiment file {file}"
                )
                raise UserError(f"{what}: give the path of a .gin file")
            with gin_errors(place=file):
                gin.parse_config_file(_normal(file))
        reached = gin_uses.reached_now()
        for binding in bindings:
            with gin_errors(place=f"--gin {binding!r}"):
                _check_text(binding, f"--gin {binding!r}")
                gin.parse_config(binding)
    finally:
        logging.disable(logging.NOTSET)
    if files:
        gin_uses.check(bindings, reached)


def _reader() -> tuple[Callable, Callable]:
    """How gin opens files that are included, and whether they are there.

    Paths start where the command was given, as gin has it, or at the including file.
    """
    reading: list[str] = []  # a file, the one that it includes, and so on

    def find(name: str) -> str | None:
        starts = [os.getcwd(), *map(os.path.dirname, reversed(reading))]
        paths = [_normal(os.path.join(start, name)) for start in starts]
        if reading and all(map(os.path.isfile, paths[:2])):
            here, beside = paths[:2]
            if not filecmp.cmp(here, beside, shallow=False):
                raise UserError(
                    f"{_shown_path(reading[-1])}: include {name!r} may be {here} or {beside}: "
                    "give the whole path"
                )
            del paths[0]  # so that what it includes is looked for where the including file is
        return next(filter(os.path.isfile, paths), None)

    @contextlib.contextmanager
    def opened(name: str) -> Iterator[io.StringIO]:
        path = find(name)
        if path in reading:
            circle = map(_shown_path, [*reading[reading.index(path) :], path])
            raise UserError(f"{' -> '.join(circle)}: these files include each other in a circle")
        text = _text_of(path)
        _check_text(text, _shown_path(path))
        file = io.StringIO(text)
        file.name = path
        reading.append(path)
        try:
            yield file
        except (tokenize.TokenError, TypeError, RecursionError) as error:
            line = text[: file.tell()].count("\n")
            if isinstance(error, tokenize.TokenError):
                line = min(line, error.args[1][0])  # where the quotation begins
            message = _gin_message(error, f"{_shown_path(path)}:{line}")
            raise UserError(message) from None
        except IndentationError as error:
            error.filename = path
            raise
        finally:
            reading.pop()

    return opened, lambda name: find(name) is not None


def _text_of(path: str) -> str:
    """The text of a file: line ends as "\n", without a byte order mark at the beginning."""
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{_shown_path(path)}:{line}: not a text in UTF-8: save the file as one"
        ) from error
    return io.StringIO(text, newline=None).read()


def _check_text(text: str, place: str) -> None:
    """Refuses what gin reads as something else than it says.

    Its dynamic registration, which T5X uses: names would be those of modules. A minus before a
    name, which it leaves out.
    """

    def at(number: int) -> str:
        return place if "\n" not in text and place.startswith("--gin") else f"{place}:{number}"

    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*(from|import)\s+__gin__\b", line):
            raise UserError(
                f"{at(number)}: {line.strip()}: leave that line out, imports of modules too, and "
                "write names without a module: train.steps = 10"
            )
    before = ""
    with contextlib.suppress(tokenize.TokenError, SyntaxError):  # gin says where
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if before == "-" and token.string in ("%", "@"):
                raise UserError(
                    f"{at(token.start[0])}: -{token.string} is not for gin: give what it names the "
                    "minus"
                )
            if token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT):
                before = token.string


def _normal(path: str) -> str:
    """From the root, without "..": a link before one is followed first, as systems do."""
    return os.path.realpath(path) if ".." in Path(path).parts else os.path.abspath(path)


def _shown_path(path: str) -> str:
    return os.path.relpath(path)


def value_of(name: str) -> Any:
    """What loaded experiment files bind to a name, "Compute.topology"; None where nothing."""
    import gin

    try:
        return gin.query_parameter(name)
    except ValueError:
        return None


def settings_text() -> str:
    """The settings of all that was called, as a file, each in the scope that it was set in.

    gin itself writes what a scope inherits, defaults too, into the scope, where it would win over
    what another file, or a command line, sets later.
    """
    import gin

    found: dict[tuple[str, str], dict[str, Any]] = {}
    for (scope, selector), parameters in gin.config._OPERATIVE_CONFIG.items():
        inner = scope.split("/") if scope else []
        scopes = ["/".join(inner[:n]) for n in range(len(inner), 0, -1)]
        for name, value in parameters.items():
            of = (each for each in scopes if name in gin.config._CONFIG.get((each, selector), {}))
            found.setdefault((next(of, ""), selector), {})[name] = value
    return gin.config._config_str(found)


def without_documents() -> None:
    """Puts a stand-in for Data.source: loaded experiment files need no corpus and no tokenizer."""
    import gin

    from fot_jax.data.documents import DocumentSource

    names = (name for name in vars(DocumentSource) if name[0] != "_")
    gin.bind_parameter("Data.source", types.SimpleNamespace(**dict.fromkeys(names)))


def copy_bindings(source: str, target: str) -> None:
    """Binds parameters of one function to what experiment files bind those of another to.

    Args:
      source, target: names of functions; parameters that both have are copied, but for those that
        are bound for the target itself.
    """
    import gin

    bound = gin.config._CONFIG.get(("", f"fot_jax.{target}"), {})
    for parameter in set(_parameters_of(source)) & set(_parameters_of(target)) - bound.keys():
        if (value := value_of(f"{source}.{parameter}")) is not None:
            gin.bind_parameter(f"{target}.{parameter}", value)


def _register(gin) -> None:
    """Gives gin what is marked @configurable: in train.py, and in all files of ROOMS."""
    for module in _modules():
        for thing, flags in configurables_of(module).items():
            name = thing.__name__
            known = gin.config._REGISTRY.get(f"fot_jax.{name}")
            if known is None or known.wrapped.__wrapped__ is not thing:  # gin refuses a second one
                gin.external_configurable(_checked(thing), name, module="fot_jax", denylist=flags)


def _modules() -> Iterator[types.ModuleType]:
    yield importlib.import_module("fot_jax.train")
    for room in ROOMS:
        package = importlib.import_module(f"fot_jax.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield importlib.import_module(module.name)


def _registered() -> dict[str, Callable]:
    """What experiment files may name."""
    import gin

    registry = gin.config._REGISTRY.items()
    ours = ((selector.split(".")[-1], it) for selector, it in registry if it.module == "fot_jax")
    return {name: inspect.unwrap(it.wrapped) for name, it in ours}


@contextlib.contextmanager
def gin_errors(place: str | None = None) -> Iterator[None]:
    """Turns gin's errors about an experiment file, or what else `place` names, into one line."""
    try:
        yield
    except Exception as error:
        original = error
        while original.__context__ and "ExceptionProxy" in type(original).__init__.__qualname__:
            original = original.__context__  # gin raises a copy, with lines of its own
        if isinstance(original, UserError) or isinstance(original, OSError) and original.errno:
            raise original from None
        line = _gin_message(error, place)
        if line is None:
            raise
        raise UserError(line) from None


def _gin_message(error: Exception, file: str | None) -> str | None:
    if file and isinstance(error, RecursionError):  # which cannot even be shown
        return f"{file}: brackets are nested too deeply"
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    where = re.search(r'In file "([^"]+)", line (\d+)', text)
    place = f" ({os.path.relpath(where[1])}:{where[2]})" if where else f" ({file})" if file else ""
    unknown = re.search(r"No configurable matching (?:reference )?'@?(?:.*/)?([^'()]+)", text)
    if unknown:
        return f"unknown name {unknown[1]!r}{place}{_nearest(unknown[1], list(_registered()))}"
    parameter = re.search(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", text)
    if parameter:
        near = _nearest(parameter[2], _parameters_of(parameter[1]))
        return f"{parameter[1]} has no parameter {parameter[2]!r}{place}{near}"
    flag = re.search(r"Configurable '(?:.*\.)?([^']+)' has denylisted kwarg '([^']+)'", text)
    if flag:
        return f"{flag[1]}.{flag[2]} is not for experiment files{place}: see fot {flag[1]} --help"
    if isinstance(error, RecursionError) and (circle := _circle()):
        return f"{' -> '.join(circle)}: refers back to itself: give one of them a value of its own"
    if isinstance(error, ImportError) and file:
        return f"{text.splitlines()[0]}{place}: install it, or correct the import"
    macro = re.search(r"In call to configurable 'macro' .* in scope '([^']+)'", text)
    if macro:
        return f"%{macro[1]} has no value: set {macro[1]} = ... in the experiment file"
    missing = re.search(r"(\w+)(?:\.__init__)?\(\) missing .* arguments?: '(\w+)'", first)
    if missing:
        # Optimizers are called by `train`, with the learning rate.
        bare = missing[2] == "learning_rate" and missing[1] != "train"
        name = ".".join(missing.groups())
        name = {"evaluate.source": "Data.source"}.get(name, name)  # what training is given
        name = {"evaluate.evaluation": "train.evaluation"}.get(name, name)
        remedy = f"write @{missing[1]} without ()" if bare else f"set {name}"
        return f"{missing[1]} needs {missing[2]}: {remedy}{'' if bare else ' = ...'}"
    if isinstance(error, SyntaxError):
        at = f"{os.path.relpath(error.filename)}:{error.lineno}" if error.filename else file
        of_value = re.search("Failed to parse|Unable to parse value|Expected newline", error.msg)
        if of_value and (line := _with_quotes((error.text or "").strip())):
            return f"{at}: text takes quotes: {line if error.filename else f'--gin {line!r}'}"
        what = re.sub(r"(malformed node or string|invalid syntax).*\s+Failed", "Failed", error.msg)
        what = " ".join(what.rstrip(".").split())
        if what.startswith("Failed to parse token"):
            remedy = (
                'a value is a number, text in "quotes", @NAME or @NAME(), or (a, tuple) of them'
            )
        else:
            remedy = "a line is NAME = VALUE, or include 'FILE.gin'"
        return f"{at}: {what}: {remedy}"
    if isinstance(error, tokenize.TokenError):
        return f"{file}: a bracket or quote is not closed up to the end ({error.args[0]})"
    if isinstance(error, OSError) and "Unable to open file" in text:
        name = re.search(r"Unable to open file: (.*)\. Searched", text)[1]
        return f"no file {name} to include{place}: paths are relative to the experiment file"
    if file and isinstance(error, TypeError):
        return f"{file}: {first}{place if where else ''}: give another value"
    return None


_QUOTES = "\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb"  # as pages have them


def _with_quotes(line: str) -> str | None:
    """A line as it was meant whose value is text without quotes; None for another one."""
    found = re.fullmatch(
        r"([\w./]+)\s*=\s*([^\s'\"@%()\[\]{},#][^'\"@()\[\]{},#]*?)\s*(#.*)?", line
    )
    if not found:
        return None
    *owner, parameter = found[1].split("/")[-1].split(".")  # without one: a macro
    thing = _registered().get(owner[-1]) if owner else None
    if owner and not (thing and _fits("", _hints(thing).get(parameter, int))):
        return None
    return f'{found[1]} = "{found[2].strip(_QUOTES)}"'


def _hints(thing: Callable) -> dict[str, Any]:
    """The annotations of what can be given to a function or class."""
    return typing.get_type_hints(thing.__init__ if inspect.isclass(thing) else thing)


def _circle() -> list[str] | None:
    """Names of configurables or macros, each of which has the next one in a value of its own."""
    import gin

    refers: dict[str, list[str]] = {}
    for (scope, selector), values in gin.config._CONFIG.items():
        name = f"%{scope}" if selector == "gin.macro" else f"@{selector.split('.')[-1]}"
        for reference in gin.config.iterate_references(values):
            refers.setdefault(name, []).append(repr(reference).split("(")[0])
    paths = [[name] for name in refers]
    while paths:
        path = paths.pop()
        for name in refers.get(path[-1], ()):
            if name == path[0]:
                return [*path, name]
            if name not in path:
                paths.append([*path, name])
    return None


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ": see the files in experiments/"


def _parameters_of(name: str) -> list[str]:
    import gin

    wrapped = gin.config._REGISTRY.get_match(name).wrapped
    return list(inspect.signature(wrapped).parameters)


# --- Values --------------------------------------------------------------------------------------


def _checked(thing: Callable) -> Callable:
    """The same, but arguments that do not fit the annotations are a UserError that names them."""
    signature = inspect.signature(thing)
    hints = _hints(thing)
    kinds = {each.kind: name for name, each in signature.parameters.items()}
    overrides = kinds.get(inspect.Parameter.VAR_KEYWORD)  # fields of what it gives
    if overrides is not None:
        hints = _hints(hints["return"]) | hints

    def checked(parameter: str, value: Any) -> Any:
        import gin

        name = f"{thing.__name__}.{parameter}"
        if value is gin.REQUIRED:
            scope = gin.config.current_scope_str()
            name = f"{scope}/{name}" if scope else name
            raise UserError(f"{name} is not set: add --gin '{name} = ...', or set it in a file")
        if parameter in hints and not _fits(value, hints[parameter]):
            raise UserError(f"{name} = {_shown(value)}: give {_wanted(hints[parameter])}")
        return _as_number(value, hints.get(parameter))

    @functools.wraps(thing, updated=())  # not with the members of a class
    def call(*args, **kwargs):
        given = signature.bind_partial(*args, **kwargs)
        given.arguments |= {
            name: {each: checked(each, x) for each, x in value.items()}
            if name == overrides
            else checked(name, value)
            for name, value in given.arguments.items()
        }
        return thing(*given.args, **given.kwargs)

    call.__signature__ = signature
    call.gives = thing if inspect.isclass(thing) else hints.get("return")
    return call


def _as_number(value: Any, hint: Any) -> Any:
    """A whole number that is too large for programs as a float, where a float is asked for."""
    options = typing.get_args(hint) or (hint,)
    too_large = type(value) is int and abs(value) > LARGEST_COUNT
    if not (too_large and float in options and int not in options):
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _fits(value: Any, hint: Any) -> bool:
    """Whether the value of a parameter is what its annotation asks for."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if hint in (int, float):
        number = int if hint is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool)
    if hint in (str, bool, type(None)):
        return isinstance(value, hint)
    if kind in (tuple, collections.abc.Sequence):
        if not isinstance(value, (tuple, list)):
            return False
        if kind is tuple and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(_fits, value, inner))
        return all(_fits(each, inner[0]) for each in value)
    if kind is collections.abc.Callable:
        return callable(value) and getattr(value, "gives", inner[1]) == inner[1]
    if getattr(hint, "_is_protocol", False):
        return _follows(value, hint)
    return hint is Any or isinstance(value, hint)


def _follows(value: Any, protocol: type) -> bool:
    """Whether an object, or a class, has all that a protocol names; nothing is evaluated."""
    absent = object()
    names = {name for name in (*vars(protocol), *protocol.__annotations__) if name[0] != "_"}
    return all(inspect.getattr_static(value, name, absent) is not absent for name in names)


def _shown(value: Any) -> str:
    if inspect.isfunction(value):  # @Name, not called
        return f"@{value.__name__}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_shown, value))}{',' if len(value) == 1 else ''})"
    return f"@{type(value).__name__}()" if type(value).__name__ in _registered() else repr(value)


def _wanted(hint: Any) -> str:
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return _either(list(filter(None, dict.fromkeys(map(_wanted, inner)))))
    if kind is tuple and inner[-1] is not Ellipsis:
        return f"({', '.join(map(_wanted, inner))})"
    if kind in (tuple, collections.abc.Sequence):
        return f"a tuple, each of it {_wanted(inner[0])}"
    plain = {int: "a whole number", float: "a number", str: 'a text in "quotes"'}
    plain |= {bool: "True or False", type(None): "None"}
    if hint in plain:
        return plain[hint]
    names = [f"@{name}()" for name, thing in _registered().items() if _gives(thing, hint)]
    if kind is collections.abc.Callable:  # or the name of a function itself
        names += [f"@{name}" for name, thing in _registered().items() if _gives(thing, inner[1])]
    return _either(names)


def _either(names: list[str]) -> str:
    """ "a, b or c"."""
    *others, last = names or [""]
    return f"{', '.join(others)} or {last}" if others else last


def _gives(thing: Callable, hint: Any) -> bool:
    """Whether a call of what is registered gives what a type or protocol asks for."""
    if not inspect.isclass(thing):
        return typing.get_type_hints(thing).get("return") == hint
    if getattr(hint, "_is_protocol", False):
        return _follows(thing, hint)
    return inspect.isclass(hint) and issubclass(thing, hint)

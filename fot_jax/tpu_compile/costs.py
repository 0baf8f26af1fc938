"""What a compiled training step costs: products, memory traffic and messages between devices.

XLA's own cost analysis counts the body of a loop once. Here loops count as often as they run: a
loop whose bound depends on the device (crossbatch's lists of pairs) says how often at most in the
name of its scope (attention.LOOP_SCOPE), which survives compilation.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jax.interpreters.partial_eval import dce_jaxpr

from fot_jax.model.attention.partial_softmax import LOOP_SCOPE

# --- Products, from the traced program -----------------------------------------------------------

_LOOP_SCOPE = re.compile(LOOP_SCOPE.format(r"(\d+)"))


def product_flops(jaxpr: Any, devices: int = 1) -> int:
    """FLOPs of all matrix products of a jaxpr, over all devices, recomputation included.

    Products that no output needs, such as gradients of what does not train, are not counted: the
    compiler leaves them out.

    Args:
      devices: what runs inside of a shard_map runs on each of them.
    """
    needed, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return _product_flops(needed, devices)


def _product_flops(jaxpr: Any, devices: int) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            total += _dot_flops(eqn)
            continue
        if eqn.primitive.name == "pallas_call":
            total += eqn.params["cost_estimate"].flops
            continue
        inner = [_product_flops(each, devices) for each in _jaxprs_in(eqn.params)]
        if eqn.primitive.name == "cond":
            total += max(inner)
        elif eqn.primitive.name == "scan":
            total += eqn.params["length"] * sum(inner)
        elif eqn.primitive.name == "while":
            total += _most_times(str(eqn.source_info.name_stack)) * sum(inner)
        elif eqn.primitive.name == "shard_map":
            total += devices * sum(inner)
        else:
            total += sum(inner)
    return total


def _dot_flops(eqn) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracting)
    return 2 * depth * math.prod(eqn.outvars[0].aval.shape)


def _jaxprs_in(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            each = getattr(each, "jaxpr", each)  # a closed one
            if hasattr(each, "eqns"):
                yield each


def _most_times(scope: str) -> int:
    found = _LOOP_SCOPE.findall(scope)
    return int(found[-1]) if found else 1


# --- Traffic, from the compiled program ----------------------------------------------------------


class Traffic(NamedTuple):
    """Of one device in one step.

    Attributes:
      messages: bytes that it sends, by kind of collective.
      counts: how many collectives, by kind.
      memory: bytes read from and written to its main memory, where every operand of an operation
        is read and every result written once.
    """

    messages: dict[str, int]
    counts: dict[str, int]
    memory: int


def traffic(hlo: str) -> Traffic:
    """Reads the text of a compiled program (`compiled.as_text()`)."""
    program = _Program(hlo)
    messages: collections.Counter = collections.Counter()
    counts: collections.Counter = collections.Counter()
    memory = 0
    for computation, times in program.executed():
        found: dict[str, tuple[str, int]] = {}
        for op in computation.ops.values():
            memory += times * program.memory_bytes(computation, op)
            for which, kind, size in program.collectives(computation, op):
                found.setdefault(which, (kind, size))
        for kind, size in found.values():
            messages[kind] += times * size
            counts[kind] += times
    return Traffic(dict(messages), dict(counts), memory)


class _Op(NamedTuple):
    name: str
    code: str  # fusion, all-gather, …
    type: str  # of the result
    operands: tuple[str, ...]
    rest: str  # attributes


class _Computation(NamedTuple):
    name: str
    ops: dict[str, _Op]
    root: str


COLLECTIVES = {
    "all-gather": lambda before, after, n: after * (n - 1) // n,
    "reduce-scatter": lambda before, after, n: before * (n - 1) // n,
    "all-reduce": lambda before, after, n: 2 * before * (n - 1) // n,
    "all-to-all": lambda before, after, n: before * (n - 1) // n,
    "collective-permute": lambda before, after, n: after,
}

# What moves nothing, or has its traffic counted elsewhere.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all "
    "partition-id replica-id iota copy-done async-done async-update opt-barrier".split()
)
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_BYTES |= {f"{sign}{bits}": max(1, bits // 8) for sign in "su" for bits in (2, 4, 8, 16, 32, 64)}


def _size(type_: str, everywhere: bool = False) -> int:
    """Bytes of a type, or of all parts of a tuple's; what is placed in faster memory is free."""
    total = 0
    for kind, shape, layout in _SHAPE.findall(type_):
        if kind in _BYTES and (everywhere or "S(" not in layout):
            total += _BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n)
    return total


class _Program:
    """The text of a compiled program, read."""

    def __init__(self, hlo: str):
        self.computations: dict[str, _Computation] = {}
        self.entry = ""
        ops: dict[str, _Op] = {}
        name = root = ""
        for line in hlo.splitlines():
            if line[:1] not in (" ", "}", "") and line.endswith("{") and " -> " in line:
                header = line.removeprefix("ENTRY ")
                name, ops = header.split(" ")[0].lstrip("%"), {}
                if header != line:
                    self.entry = name
            elif line.startswith("}"):
                self.computations[name] = _Computation(name, ops, root)
            elif " = " in line and (op := _read_op(line)):
                ops[op.name] = op
                if line.lstrip().startswith("ROOT "):
                    root = op.name

    def executed(self) -> Iterator[tuple[_Computation, int]]:
        """Computations whose operations run one by one, and how often each of them does."""
        waiting = [(self.entry, 1)]
        while waiting:
            name, times = waiting.pop()
            computation = self.computations[name]
            yield computation, times
            for op in computation.ops.values():
                if op.code == "while":
                    body, condition = _attribute(op, "body"), _attribute(op, "condition")
                    waiting.append((body, times * self._times(op, condition)))
                elif op.code == "conditional":
                    waiting.append((self._longest(_called(op)), times))
                elif op.code == "call":
                    waiting += [(called, times) for called in _called(op)]

    def _times(self, op: _Op, condition: str) -> int:
        """How often a loop runs, at most."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', op.rest)
        if known:
            return int(known[1])
        ops = self.computations[condition].ops
        compared = ops[self.computations[condition].root]
        for operand in compared.operands:
            if operand in ops and ops[operand].code == "constant" and compared.code == "compare":
                return int(re.match(r"\d+", ops[operand].rest)[0])
        return _most_times(op.rest)

    def _longest(self, names: list[str]) -> str:
        return max(names, key=lambda name: len(self.computations[name].ops))

    def collectives(self, computation: _Computation, op: _Op) -> Iterator[tuple[str, str, int]]:
        """Collectives that an operation is or has fused into it: (which, kind, bytes)."""
        kind = op.code.removesuffix("-start")
        if kind in COLLECTIVES:
            before = sum(self._operand_sizes(computation, op, everywhere=True))
            after = _size(op.type, everywhere=True) - (before if op.code != kind else 0)
            yield op.name, kind, COLLECTIVES[kind](before, max(after, 0), _group_size(op.rest))
        if op.code not in ("fusion", "async-start"):
            return
        for called in map(self.computations.get, _called(op)):
            for inner in called.ops.values() if called else ():
                for name, kind, size in self.collectives(called, inner):
                    # One that goes on during several fusions is in each of them.
                    channel = re.search(r"channel_id=\d+", inner.rest)
                    which = channel[0] if channel else name
                    # XLA's TPU backend writes a reduce-scatter as a fusion of this name.
                    scatters = kind == "all-reduce" and "all-reduce-scatter" in called.name
                    if scatters:
                        kind, size = "reduce-scatter", size // 2
                    yield which, kind, size

    def memory_bytes(self, computation: _Computation, op: _Op) -> int:
        """Traffic of one operation with the device's main memory."""
        if op.code in _FREE or op.code.endswith("-done"):
            return 0
        operands = self._operand_sizes(computation, op)
        result = _size(op.type)
        if op.code in ("dynamic-slice", "slice", "gather"):
            return 2 * result
        if op.code == "dynamic-update-slice":
            return 2 * operands[1]
        if op.code in ("copy-start", "slice-start"):
            to, source, *_ = _SHAPE.findall(op.type)
            if op.code == "slice-start":
                to, source = source, to
            moved = _size("{}[{}]{}".format(*to), everywhere=True)
            return moved * sum("S(" not in layout for *_, layout in (to, source))
        if op.code == "custom-call" and (told := re.search(r'bytes_accessed":"(\d+)"', op.rest)):
            return int(told[1]) + result  # a kernel knows how often it reads its operands
        if op.code == "fusion" and (called := _called(op)):
            return self._fused_bytes(self.computations[called[0]], operands, result)
        return sum(operands) + result

    def _fused_bytes(self, fused: _Computation, operands: list[int], result: int) -> int:
        """A fusion reads only those parts of its operands that it slices, and writes likewise."""
        users: dict[str, list[_Op]] = {}
        for op in fused.ops.values():
            for operand in op.operands:
                users.setdefault(operand, []).append(op)

        def read(name: str, whole: int) -> int:
            part = 0
            for user in users.get(name, ()):
                if user.code == "bitcast":
                    part += read(user.name, whole)
                elif user.code in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                    part += _size(user.type, everywhere=True)
                elif user.code == "dynamic-update-slice" and user.operands[0] == name:
                    pass
                else:
                    return whole
            return min(part, whole)

        total = 0
        for op in fused.ops.values():
            if op.code == "parameter":
                number = int(re.match(r"\d+", op.rest)[0])
                if number < len(operands):
                    total += read(op.name, operands[number])
        updates = [op for op in fused.ops.values() if op.code == "dynamic-update-slice"]
        if updates:
            sizes = [fused.ops[op.operands[1]].type for op in updates]
            return total + min(result, sum(_size(each, everywhere=True) for each in sizes))
        return total + result

    def _operand_sizes(self, computation, op: _Op, everywhere: bool = False) -> list[int]:
        types = (computation.ops[name].type for name in op.operands if name in computation.ops)
        return [_size(each, everywhere) for each in types]


def _read_op(line: str) -> _Op | None:
    """One operation: NAME = TYPE CODE(OPERANDS), ATTRIBUTES."""
    name, text = line.split(" = ", 1)
    name = name.split()[-1].lstrip("%")
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    type_, text = text[:end], text[end:].lstrip()
    found = re.match(r"([\w\-]+)\(", text)
    if not found:
        return None
    close = _closing(text, found.end() - 1)
    inside = text[found.end() : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    # What a constant or parameter has in its brackets is a value.
    rest = text[close + 1 :] if operands else inside + text[close + 1 :]
    return _Op(name, found[1], type_, operands, rest)


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    raise ValueError(f"a bracket does not close: {text[:80]}")


def _attribute(op: _Op, name: str) -> str:
    return re.search(rf"\b{name}=%?([\w.\-]+)", op.rest)[1]


def _called(op: _Op) -> list[str]:
    several = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
    if several:
        return [name.strip().lstrip("%") for name in several[1].split(",")]
    one = r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    return re.findall(one, op.rest)


def _group_size(rest: str) -> int:
    """Devices that take part in one of a collective's groups."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", rest)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest)
    if tiled:
        return int(tiled[2])
    listed = re.search(r"replica_groups=\{\{([^}]*)\}", rest)
    return listed[1].count(",") + 1 if listed else 1

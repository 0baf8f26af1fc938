"""Crossbatch schemes: which contexts each row of a batch attends to (paper §3.2).

A scheme is a subclass of Scheme. It gives, for every row of a crossbatch group, the rows it attends
to: as positives, earlier windows of its own document, and as negatives, windows of others.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError, check_range
from fot_jax.model.attention.partial_softmax import ANY_DOCUMENT, SAME_DOCUMENT
from fot_jax.model.lookup import Dense, IndexedTopK, Lookup


class Context(NamedTuple):
    """One additional context of a row."""

    row: int  # its row in the group
    positive: bool  # of the same document, as far as the scheme knows: r_d is measured by it
    sees: int = ANY_DOCUMENT  # SAME_DOCUMENT hides the keys of other documents in it


class Scheme:
    """What memory layers attend to in training: by default, nothing beyond the local context.

    A new scheme is a frozen dataclass that inherits from this class, is marked @configurable, and
    overrides what differs.

    Attributes:
      windows: rows that a lane gives each step: consecutive windows of its document.
      advance: windows that a lane moves on per step.
      has_contexts: whether rows attend to other rows of the batch.
      cached_tokens: how many earlier tokens of a lane memory layers keep from step to step, and
        attend to without gradients; 0: none.
    """

    windows: int = 1
    advance: int = 1
    has_contexts: bool = True
    cached_tokens: int = 0

    def contexts(self, rows: int) -> list[list[Context]]:
        """For each of `rows` rows of a group, the contexts its memory layers attend to.

        Rows are numbered lane by lane, `windows` each. A row may attend to earlier windows of its
        own lane and to any of other lanes, to none twice; crossbatch.make_plan checks it.

        Raises:
          UserError: a group of so few rows does not have them.
        """
        return [[] for _ in range(rows)]

    def output_place(self) -> slice:
        """The windows of a lane, by place, that the loss is taken on."""
        return slice(0, self.windows)

    def with_d(self, d: int) -> Scheme:
        """The scheme with another number of contexts: what the schedule train.d sets.

        Raises:
          UserError: the scheme has no such number.
        """
        raise UserError(
            f"the scheme {type(self).__name__} has no d (asked for d={d}): drop train.d"
        )

    def check_model(self, model: Any) -> None:
        """Raises UserError where the scheme does not fit a model (a config.ModelConfig)."""
        if model.memory_gate:
            raise UserError(
                f"model.memory_gate = True needs the scheme CachedContext: {type(self).__name__} "
                "has contexts and window in one softmax"
            )
        if self.has_contexts and not model.memory_layers:
            raise UserError(
                f"the scheme {type(self).__name__} is for memory layers, and the model has none: "
                "name some in model.memory_layers, or set train.scheme = @NoCrossbatch()"
            )
        if self.has_contexts and model.memory_before:
            raise UserError(
                "model.memory_before puts memory into the window before, of which "
                f"{type(self).__name__} may show several at once: use CachedContext, or set it to "
                "False"
            )


@configurable
@dataclasses.dataclass(frozen=True)
class NoCrossbatch(Scheme):
    """Plain transformer: a lane gives one window a step, and no row sees another one."""

    has_contexts = False


@configurable
@dataclasses.dataclass(frozen=True)
class PreviousContext(Scheme):
    """Scheme A: the previous context of this document and of d - 1 others (paper §3.2).

    A lane gives its last `w` windows and its current one. The current window of lane i attends to
    the w previous windows of lane i (positives; keys of another document in them are hidden) and
    to the last previous window of lanes i+1 … i+d-1, modulo the group (negatives). With two lanes,
    w = 1 and d = 2, rows 0 and 2 are the previous windows, 1 and 3 the current ones: row 1 attends
    to row 0 (positive) and row 2 (negative), row 3 to row 2 and row 0.

    Lanes move on by `advance` windows: 1, so that every window is the current one once; or w + 1
    where only every (w+1)-th window has a loss, as the questions of the dictionary lookup.
    """

    d: int = 1
    w: int = 1
    advance: int = 1

    def __post_init__(self):
        check_range("PreviousContext", 1, **dataclasses.asdict(self))
        if self.advance > self.w + 1:
            raise UserError(
                f"PreviousContext.advance = {self.advance} skips windows: give at most w + 1 = "
                f"{self.w + 1}"
            )

    @property
    def windows(self) -> int:
        return self.w + 1

    def contexts(self, rows: int) -> list[list[Context]]:
        lanes = rows // self.windows
        if self.d > lanes:
            raise UserError(
                f"PreviousContext.d = {self.d} is larger than the crossbatch group of {lanes} "
                "lanes: lower d, or raise Data.lanes (and Data.group_lanes)"
            )
        table = []
        for lane in range(lanes):
            own = [
                Context(lane * self.windows + place, True, SAME_DOCUMENT) for place in range(self.w)
            ]
            others = ((lane + j) % lanes for j in range(1, self.d))
            negatives = [Context(other * self.windows + self.w - 1, False) for other in others]
            table += [[] for _ in range(self.w)] + [own + negatives]
        return table

    def output_place(self) -> slice:
        return slice(self.w, self.windows)

    def with_d(self, d: int) -> PreviousContext:
        return dataclasses.replace(self, d=d)


@configurable
@dataclasses.dataclass(frozen=True)
class Packed(Scheme):
    """Scheme B, stepping rule: `pack` consecutive windows of a lane in a step (paper §4).

    The row at place r of its pack attends to min(r * step + 1, n) contexts, its own among them,
    with n = range + 1 and step = ceil(n / (pack - 1)): the earlier windows of its document and,
    beyond those, the rows of the documents before it. Never around the group's start.
    """

    pack: int = 4
    range: int = 3

    def __post_init__(self):
        check_range("Packed", 1, pack=self.pack)
        check_range("Packed", 0, range=self.range)

    @property
    def windows(self) -> int:
        return self.pack

    @property
    def advance(self) -> int:
        return self.pack

    def contexts(self, rows: int) -> list[list[Context]]:
        n = self.range + 1
        step = -(-n // max(self.pack - 1, 1))
        table = []
        for row in range(rows):
            place = row % self.pack
            reach = min(min(place * step + 1, n) - 1, row)
            table.append([Context(row - j, j <= place) for j in range(1, reach + 1)])
        return table

    def with_d(self, d: int) -> Packed:
        return dataclasses.replace(self, range=d)


@configurable
@dataclasses.dataclass(frozen=True)
class PackedTable(Scheme):
    """Scheme B, fixed table: (positives, negatives) for every place in the pack (paper §4).

    LongLLaMA 3B: ((0, 0), (1, 1), (2, 1), (3, 0)); 7B: ((0, 0), (1, 2), (2, 5), (3, 4)). Positives
    are the nearest earlier windows of the pack, negatives the nearest rows before the pack.
    """

    table: tuple[tuple[int, int], ...] = ((0, 0), (1, 1), (2, 1), (3, 0))

    def __post_init__(self):
        object.__setattr__(self, "table", tuple(tuple(pair) for pair in self.table))
        if not self.table:
            raise UserError("PackedTable.table = (): give a pair for each place of a pack")
        for place, (positives, negatives) in enumerate(self.table):
            if not 0 <= positives <= place or negatives < 0:
                raise UserError(
                    f"PackedTable.table[{place}] = {(positives, negatives)}: place {place} of a "
                    f"pack has {place} earlier windows; positives must be 0 … {place}, "
                    "negatives 0 or more"
                )

    @property
    def windows(self) -> int:
        return len(self.table)

    @property
    def advance(self) -> int:
        return len(self.table)

    def contexts(self, rows: int) -> list[list[Context]]:
        table = []
        for row in range(rows):
            place = row % self.windows
            start = row - place
            positives, negatives = self.table[place]
            table.append(
                [Context(row - j, True) for j in range(1, positives + 1)]
                + [Context(start - j, False) for j in range(1, min(negatives, start) + 1)]
            )
        return table

    def with_d(self, d: int) -> PackedTable:
        raise UserError(f"PackedTable has no d (asked for d={d}): use Packed, or drop train.d")


@configurable
@dataclasses.dataclass(frozen=True)
class CachedContext(Scheme):
    """Not crossbatch: a row sees what memory layers have cached of its lane, without gradients.

    A Transformer-XL has `memory_layers` = all of them, `tokens` = the local context, and
    ModelConfig.memory_before; a Memorizing Transformer one memory layer, many tokens, TopK(k), and
    ModelConfig.memory_gate (paper §5, and the works it compares with). See model/cached_context.py.

    Attributes:
      tokens: kept of a lane, a multiple of the local context.
      lookup: Dense() attends to all of them, TopK(k) to the best k of each query and head.
      multi_doc: whether the cache is kept when a document ends, and seen by the next one.
    """

    tokens: int
    lookup: Lookup = Dense()
    multi_doc: bool = False

    has_contexts = False

    def __post_init__(self):
        check_range("CachedContext", 1, 2**30, tokens=self.tokens)
        if isinstance(self.lookup, IndexedTopK):
            raise UserError(
                f"CachedContext.lookup = {self.lookup}: what is cached in training has no index: "
                "choose TopK or Dense"
            )
        self.lookup.check(self.tokens)

    @property
    def cached_tokens(self) -> int:
        return self.tokens

    def check_model(self, model: Any) -> None:
        window = model.local_context
        if not model.memory_layers:
            raise UserError("the scheme CachedContext needs memory layers: set model.memory_layers")
        if self.tokens % window or model.memory_before and self.tokens > window:
            wanted = "the same (model.memory_before)" if model.memory_before else "a multiple of it"
            raise UserError(
                f"CachedContext.tokens = {self.tokens} for a local context of {window}: give "
                f"{wanted}"
            )


def checked_contexts(scheme: Scheme, rows: int) -> list[list[Context]]:
    """The contexts of a group of rows, as the scheme gives them.

    Raises:
      UserError: it names rows that are not there, or shows what is predicted.
    """
    name, of_group = type(scheme).__name__, scheme.contexts(rows)
    if len(of_group) != rows:
        raise UserError(f"{name}.contexts({rows}) has {len(of_group)} rows: give a list for each")
    for row, of_row in enumerate(of_group):
        others = [context.row for context in of_row]
        lane = row // scheme.windows
        for other in others:
            if not 0 <= other < rows:
                raise UserError(
                    f"{name}: row {row} attends to row {other}, of rows 0 to {rows - 1}"
                )
            if other == row or other > row and other // scheme.windows == lane:
                raise UserError(
                    f"{name}: row {row} attends to row {other} of its own lane, which holds what "
                    "it predicts: give earlier windows"
                )
        if len(set(others)) < len(others):
            raise UserError(f"{name}: row {row} attends to a row twice: {others}")
    return of_group


def output_rows(scheme: Scheme, x: jax.Array) -> jax.Array:
    """Of an array of rows, those with a loss: [lanes * windows, ...] -> [lanes * n, ...]."""
    by_lane = x.reshape(-1, scheme.windows, *x.shape[1:])[:, scheme.output_place()]
    return by_lane.reshape(-1, *x.shape[1:])

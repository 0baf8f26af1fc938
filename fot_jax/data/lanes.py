"""Lanes: documents to batches, one document after another in each row (paper §3.2).

Lane r of a batch reads one document from its start to its end, then the next. A step takes
`windows` consecutive windows of every lane and then moves on by `advance` windows, so what a scheme
calls previous and current contexts of a document stand in consecutive rows.

Lanes are divided into a fixed number of groups; group g reads shard g of the document stream, and
a host reads the groups that it has rows of. So the batches do not depend on how many hosts there
are, and neither does the state: per group its place in the stream, per lane what is left of its
document.

Letters: R rows (lanes * windows), T tokens of a window, W windows, N tokens of a document.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from fot_jax.common.errors import UserError
from fot_jax.data.documents import START, Document, DocumentSource, Position

FIELDS = {
    "inputs": np.int32,
    "targets": np.int32,  # the token that follows each input in its document
    "weights": np.float32,  # of the loss on each target
    # The document of each input: 1, 2, … along a lane, whatever the step; 0 for padding.
    "segment_ids": np.int32,
}
SHORT_DOCUMENTS = 1000  # in a row, from the first on: a group refuses to go on after so many


class _Lane(NamedTuple):
    """One lane between two steps. Arrays are shared and never written to."""

    left: Document  # of the document being read, from the next input on
    number: int  # of that document in this lane
    history: dict[str, np.ndarray]  # windows that the next step shows again, each [W, T]


class Snapshot(NamedTuple):
    """A group between two steps, without copying anything."""

    position: Position
    lanes: tuple[_Lane, ...]


class Lanes:
    """An endless iterator over batches {inputs, targets, weights, segment_ids}, each [R, T].

    R covers the lanes of the owned groups, lane by lane, the windows of a lane in consecutive rows.
    """

    def __init__(
        self,
        source: DocumentSource,
        *,
        lanes: int,
        window: int,
        windows: int = 1,
        advance: int = 1,
        groups: int = 1,
        owned: Iterable[int] | None = None,
        seed: int = 0,
        documents_apart: bool = False,
        negatives: bool = False,
        vocab_size: int | None = None,
    ):
        """Opens no file yet.

        Args:
          lanes: of all groups together, a multiple of `groups`.
          window: tokens of a row, T.
          windows, advance: rows of a lane in a step, and how many of them the next step moves on
            by; the scheme's.
          groups: lane groups; the shards of the document stream.
          owned: the groups that this host reads; None for all.
          seed: of the order of documents.
          documents_apart: documents begin where new windows of a step do; what a document leaves of
            them is padding.
          negatives: whether lanes see each other's windows: of a document that two of them read at
            once one would see what it is to predict, which is warned of.
          vocab_size: of the model, whose tokens documents have; None: any.
        """
        self._source, self._window, self._seed = source, window, seed
        self._windows, self._advance, self._groups = windows, advance, groups
        self._apart, self._vocab_size = documents_apart, vocab_size
        self._lanes, self._watched = lanes, negatives and lanes > 1
        owned = range(groups) if owned is None else sorted(owned)
        shape = (windows - advance, window)
        lane = _Lane(
            Document(np.zeros(0, np.int32), np.zeros(0, np.float32)),
            number=0,
            history={name: np.zeros(shape, dtype) for name, dtype in FIELDS.items()},
        )
        start = Snapshot(START, (lane,) * (lanes // groups))
        self._snapshots = dict.fromkeys(owned, start)
        self._streams: dict[int, Iterator[tuple[Position, Document]]] = {}
        self._longest = dict.fromkeys(owned, 0)
        self._drawn = dict.fromkeys(owned, 0)
        # Lane of a group -> CRC and tokens of its documents in a step.
        self._read: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def __iter__(self) -> Lanes:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        blocks = []
        for group in self._snapshots:
            lanes = []
            for i, lane in enumerate(self._snapshots[group].lanes):
                lane, block = self._advance_lane(group, i, lane)
                lanes.append(lane)
                blocks.append(block)
            self._snapshots[group] = self._snapshots[group]._replace(lanes=tuple(lanes))
        if self._watched:
            self._watch()
        return {name: np.concatenate([block[name] for block in blocks]) for name in FIELDS}

    def _advance_lane(self, group: int, i: int, lane: _Lane) -> tuple[_Lane, dict[str, np.ndarray]]:
        """Lane i of a group after a step, and what it shows in this one: each [windows, T]."""
        new = {name: np.zeros(self._advance * self._window, t) for name, t in FIELDS.items()}
        (tokens, weights), number = lane.left, lane.number
        at = 0
        goes_on = len(tokens) > 1 or self._windows > self._advance  # the document before
        read = self._read[group, i] = self._read.get((group, i), [])[-1:] if goes_on else []
        while at < self._advance * self._window:
            if len(tokens) < 2:  # the last token of a document is only ever a target
                if self._apart and at > 0:
                    break
                tokens, weights = self._next_document(group)
                if self._watched:
                    read.append((zlib.crc32(np.ascontiguousarray(tokens)), len(tokens)))
                number += 1
            n = min(len(tokens) - 1, self._advance * self._window - at)
            new["inputs"][at : at + n] = tokens[:n]
            new["targets"][at : at + n] = tokens[1 : n + 1]
            new["weights"][at : at + n] = weights[1 : n + 1]
            new["segment_ids"][at : at + n] = number
            tokens, weights, at = tokens[n:], weights[n:], at + n
        shown = {
            name: np.concatenate([lane.history[name], x.reshape(-1, self._window)])
            for name, x in new.items()
        }
        history = {name: x[self._advance :] for name, x in shown.items()}
        return _Lane(Document(tokens, weights), number, history), shown

    def _next_document(self, group: int) -> Document:
        if group not in self._streams:
            position = self._snapshots[group].position
            self._streams[group] = self._source.stream(group, self._groups, self._seed, position)
        position, document = next(self._streams[group])
        self._snapshots[group] = self._snapshots[group]._replace(position=position)
        if self._vocab_size is not None and (last := document.tokens.max()) >= self._vocab_size:
            raise UserError(
                f"a document has token {last}, and the model a vocabulary of {self._vocab_size}: "
                "leave what was added to the tokenizer out of the texts"
            )
        self._drawn[group] += 1
        self._longest[group] = max(self._longest[group], len(document.tokens))
        if (
            self._windows > 1
            and self._drawn[group] == SHORT_DOCUMENTS
            and self._longest[group] <= self._window
        ):
            raise UserError(
                f"the first {SHORT_DOCUMENTS} documents have at most {self._longest[group]} "
                f"tokens: none is longer than a window of {self._window}, so memory layers would "
                "never see an earlier part of their own document: set min_document_length, or a "
                "smaller model.local_context"
            )
        return document

    def _watch(self) -> None:
        """Warns once if two lanes had one document in a step; other hosts' lanes are not seen."""
        lane_of: dict[tuple[int, int], tuple[int, int]] = {}
        for lane, documents in self._read.items():
            for document in documents:
                if lane_of.setdefault(document, lane) != lane and self._watched:
                    self._watched = False
                    logging.warning(
                        "two lanes read the same document of %d tokens at once: one may see in the "
                        "other, as a negative, what it is to predict. There are few training "
                        "documents, or some are there twice: lower Data.lanes (%d), set "
                        "Text.piece_tokens, or remove repetitions",
                        *(document[1], self._lanes),
                    )

    # --- State -----------------------------------------------------------------------------------

    def snapshot(self) -> dict[int, Snapshot]:
        """Where the owned groups are; cheap. `state_of` makes arrays of it."""
        return dict(self._snapshots)

    def restore(self, state: Mapping[int, Mapping[str, np.ndarray]]) -> None:
        """Goes on from the state of the owned groups, whoever saved it.

        Raises:
          UserError: it was saved with other lanes, lane groups, windows or scheme, or of other
            documents.
        """
        restored = {}
        for group, snapshot in self._snapshots.items():
            if group not in state:
                raise UserError(
                    f"the checkpoint has no lane group {group}: Data.lane_groups was smaller when "
                    "it was saved: set it to what it was"
                )
            arrays = state[group]
            shape = (len(snapshot.lanes), self._windows - self._advance, self._window)
            here = (*shape, self._groups, self._seed)
            there = (*arrays["inputs"].shape, int(arrays["groups"]), int(arrays["seed"]))
            if here != there:
                raise UserError(
                    "the checkpoint's data was saved with (lanes of a group, windows kept, tokens "
                    f"of a window, lane groups, seed) = {there}, this experiment has {here}: use "
                    "the same Data, scheme and local_context, or another workdir"
                )
            if "settings" in arrays and not restored:  # fot_jax 0.1 saved none
                self._check_settings(json.loads(arrays["settings"].tobytes()))
            ends = np.cumsum(arrays["left"])
            lanes = []
            for i, (end, n) in enumerate(zip(ends, arrays["left"], strict=True)):
                left = slice(end - n, end)
                lanes.append(
                    _Lane(
                        Document(arrays["left_tokens"][left], arrays["left_weights"][left]),
                        int(arrays["number"][i]),
                        {name: arrays[name][i] for name in FIELDS},
                    )
                )
            restored[group] = Snapshot(tuple(arrays["position"].tolist()), tuple(lanes))
        self._snapshots, self._streams = restored, {}
        self._drawn = dict.fromkeys(restored, SHORT_DOCUMENTS)  # so many were no reason to stop

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What batches depend on beside the layout: name -> what JSON can hold."""
        settings = {
            "Data.documents_apart": self._apart,
            "windows of a step": self._windows,
            **self._source.settings(),
        }
        return json.loads(json.dumps(settings, default=repr))

    def _check_settings(self, before: Mapping[str, Any]) -> None:
        for name, value in before.items():
            now = self.settings.get(name)
            if value == now or json.dumps(value) == json.dumps(now):  # the second for NaN
                continue
            said = (
                f"the checkpoint's data was saved with {name} = {value}, this experiment has {now}"
            )
            if not name.endswith(("path", "files")):
                raise UserError(f"{said}: use the same, or another workdir")
            logging.warning("%s: reading goes on at the same place in what is there", said)

    def state_of(self, snapshots: Mapping[int, Snapshot]) -> dict[int, dict[str, np.ndarray]]:
        """Arrays of a snapshot of these lanes: what checkpoints hold and `restore` takes."""
        return {group: self._arrays(snapshot) for group, snapshot in snapshots.items()}

    def _arrays(self, snapshot: Snapshot) -> dict[str, np.ndarray]:
        position, lanes = snapshot
        return {
            "position": np.asarray(position, np.int64),
            "groups": np.asarray(self._groups, np.int64),
            "seed": np.asarray(self._seed, np.int64),
            "settings": np.frombuffer(json.dumps(self.settings).encode(), np.uint8),
            "left": np.asarray([len(lane.left.tokens) for lane in lanes], np.int64),
            "left_tokens": np.concatenate([lane.left.tokens for lane in lanes]),
            "left_weights": np.concatenate([lane.left.weights for lane in lanes]),
            "number": np.asarray([lane.number for lane in lanes], np.int64),
            **{name: np.stack([lane.history[name] for lane in lanes]) for name in FIELDS},
        }

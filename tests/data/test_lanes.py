"""Lanes and Prefetch against a simulation that moves one token at a time."""

import dataclasses
import io
import threading
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fot_jax.common.errors import UserError
from fot_jax.data import lanes as lanes_module
from fot_jax.data.documents import Document
from fot_jax.data.lanes import FIELDS, Lanes
from fot_jax.data.prefetch import Prefetch

# --- Documents whose every token says where it is from -------------------------------------------


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Documents of random lengths: the token at `offset` of document `id` is 1000 id + offset + 1.

    Attributes:
      shortest, longest: tokens of a document.
      per_epoch: documents of a shard in an epoch.
      fails_at: document of a shard, counted over epochs, that cannot be read.
    """

    shortest: int = 2
    longest: int = 20
    per_epoch: int = 3
    fails_at: int | None = None

    def settings(self):
        return {"longest": self.longest, "corpus files": [self.per_epoch]}

    def document(self, shard, shards, seed, epoch, index) -> Document:
        number = (epoch * self.per_epoch + index) * shards + shard + 1
        rng = np.random.default_rng((seed, number))
        tokens = 1000 * number + 1 + np.arange(rng.integers(self.shortest, int(self.longest) + 1))
        weights = rng.choice([0.0, 0.25, 1.0], len(tokens))
        return Document(tokens.astype(np.int32), weights.astype(np.float32))

    def stream(self, shard, shards, seed, position=(0, 0)):
        epoch, taken = position
        while True:
            for index in range(taken, self.per_epoch):
                if epoch * self.per_epoch + index == self.fails_at:
                    raise UserError(f"document {self.fails_at} cannot be read")
                yield (epoch, index + 1), self.document(shard, shards, seed, epoch, index)
            epoch, taken = epoch + 1, 0


class Layout(NamedTuple):
    windows: int
    advance: int
    window: int
    groups: int
    per_group: int  # lanes
    seed: int
    apart: bool = False

    def open(self, source, owned=None, **changes) -> Lanes:
        layout = self._replace(**changes)
        return Lanes(
            source,
            lanes=layout.groups * layout.per_group,
            window=layout.window,
            windows=layout.windows,
            advance=layout.advance,
            groups=layout.groups,
            owned=owned,
            seed=layout.seed,
            documents_apart=layout.apart,
        )


# Plain, scheme A with w of 1 and 2, packed, and windows that only partly repeat.
SCHEMES = [(1, 1), (2, 1), (3, 1), (2, 2), (4, 4), (3, 2)]

sources = st.builds(
    lambda shortest, more, per_epoch: Numbered(shortest, shortest + more, per_epoch),
    st.integers(2, 6),
    st.integers(0, 30),
    st.integers(1, 4),
)
layouts = st.builds(
    lambda scheme, *rest: Layout(*scheme, *rest),
    st.sampled_from(SCHEMES),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 3),
)
few = settings(max_examples=60, deadline=None)


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert list(batch) == list(other) == list(FIELDS)
        for name, dtype in FIELDS.items():
            assert batch[name].dtype == other[name].dtype == dtype
            np.testing.assert_array_equal(batch[name], other[name], name)


# --- The oracle: every lane token by token, from the docstrings and not from the code ------------


def simulate(source, layout, steps):
    """The batches of all groups. Within a group and a step lanes take new documents in order."""
    size = layout.advance * layout.window  # new inputs of a lane in a step
    batches = [{name: [] for name in FIELDS} for _ in range(steps)]
    for group in range(layout.groups):
        stream = source.stream(group, layout.groups, layout.seed)
        read = [[] for _ in range(layout.per_group)]  # (input, target, weight, document) so far
        rest = [[] for _ in range(layout.per_group)]  # tokens of the document being read
        count = [0] * layout.per_group
        for batch in batches:
            for lane in range(layout.per_group):
                for place in range(size):
                    if len(rest[lane]) < 2 and layout.apart and place > 0:
                        read[lane] += [(0, 0, 0, 0)] * (size - place)
                        break
                    if len(rest[lane]) < 2:
                        _, document = next(stream)
                        rest[lane] = list(zip(document.tokens, document.weights, strict=True))
                        count[lane] += 1
                    (token, _), (target, weight) = rest[lane][:2]
                    rest[lane] = rest[lane][1:]
                    read[lane].append((token, target, weight, count[lane]))
                shown = read[lane][-layout.windows * layout.window :]
                shown = [(0, 0, 0, 0)] * (layout.windows * layout.window - len(shown)) + shown
                columns = [list(column) for column in zip(*shown, strict=True)]
                for name, column in zip(FIELDS, columns, strict=True):
                    batch[name].append(np.reshape(column, (-1, layout.window)))
    return [
        {name: np.concatenate(batch[name]).astype(dtype) for name, dtype in FIELDS.items()}
        for batch in batches
    ]


@few
@given(sources, layouts, st.integers(1, 6), st.booleans())
def test_batches_are_those_of_the_simulation(source, layout, steps, apart):
    layout = layout._replace(apart=apart)
    assert_same(take(layout.open(source), steps), simulate(source, layout, steps))


def test_documents_apart():
    """Of 6, 7 and 3 inputs in packs of two windows of 4: rows hold one document, from its start."""
    lengths = iter([7, 8, 4] * 2)

    class Source(Numbered):
        def document(self, *where):
            tokens, weights = super().document(*where)
            n = next(lengths)
            return Document(tokens[:n], weights[:n])

    lanes = Layout(2, 2, 4, 1, 1, 0, apart=True).open(Source(20, 20))
    segments = [batch["segment_ids"].tolist() for batch in take(lanes, 3)]
    assert segments == [
        [[1, 1, 1, 1], [1, 1, 0, 0]],
        [[2, 2, 2, 2], [2, 2, 2, 0]],
        [[3, 3, 3, 0], [0, 0, 0, 0]],
    ]


# --- What must hold whatever the order of documents ----------------------------------------------


def by_lane(batch, layout):
    """Each field [lanes, windows, T]."""
    return {name: x.reshape(-1, layout.windows, layout.window) for name, x in batch.items()}


@few
@given(sources, layouts, st.integers(1, 6))
def test_lanes_read_whole_documents_each_once(source, layout, steps):
    batches = take(layout.open(source), steps)
    new = [by_lane(batch, layout)["inputs"][:, -layout.advance :] for batch in batches]
    lanes = np.stack(new, axis=1).reshape(layout.groups * layout.per_group, -1)
    read = {}  # tokens by document; a document is in one lane only, without a gap
    for lane in lanes:
        documents, offsets = np.divmod(lane - 1, 1000)
        starts = np.flatnonzero(np.diff(documents, prepend=0))
        for start, end in zip(starts, [*starts[1:], len(lane)], strict=True):
            assert documents[start] not in read
            assert (offsets[start:end] == np.arange(end - start)).all()
            read[documents[start]] = (end - start, end == len(lane))
    for number, (length, cut_off) in read.items():
        index, shard = divmod(number - 1, layout.groups)
        where = divmod(index, source.per_epoch)
        document = source.document(shard, layout.groups, layout.seed, *where)
        if cut_off:
            assert length <= len(document.tokens) - 1
        else:
            assert length == len(document.tokens) - 1
    for group in range(layout.groups):  # nothing of a shard is left out
        taken = sorted((n - 1) // layout.groups for n in read if (n - 1) % layout.groups == group)
        assert taken == list(range(len(taken)))


@few
@given(sources, layouts, st.integers(1, 6))
def test_fields_are_aligned_and_segments_consistent(source, layout, steps):
    numbers = {}  # of documents in their lane, the same in every step
    for step, batch in enumerate(take(layout.open(source), steps)):
        assert all(x.shape == batch["inputs"].shape for x in batch.values())
        padding = batch["segment_ids"] == 0
        assert (batch["inputs"] == 0)[padding].all() and (batch["targets"] == 0)[padding].all()
        assert (batch["weights"] == 0)[padding].all()
        assert (batch["targets"] == batch["inputs"] + 1)[~padding].all()
        of_lanes = (by_lane(batch, layout)[name] for name in ("inputs", "segment_ids"))
        for lane, (inputs, segments) in enumerate(zip(*of_lanes, strict=True)):
            missing = max(0, layout.windows - layout.advance * (step + 1))
            assert (segments[:missing] == 0).all() and (segments[missing:] > 0).all()
            segments = segments[missing:].ravel()
            documents = inputs[missing:].ravel() // 1000
            assert step > 0 or segments[0] == 1
            assert set(np.diff(segments)) <= {0, 1}
            for segment, document in zip(segments, documents, strict=True):
                assert numbers.setdefault((lane, segment), document) == document
    assert len(set(numbers.values())) == len(numbers)


@few
@given(sources, layouts, st.integers(2, 6))
def test_windows_that_stay_are_shown_again(source, layout, steps):
    kept = layout.windows - layout.advance
    batches = [by_lane(batch, layout) for batch in take(layout.open(source), steps)]
    for before, after in zip(batches, batches[1:], strict=False):
        for name in FIELDS:
            np.testing.assert_array_equal(after[name][:, :kept], before[name][:, layout.advance :])


# --- Hosts and state -----------------------------------------------------------------------------

GROUPS = 4
owners = st.sampled_from(  # the groups of each host
    [[range(4)], [(1, 0), (2, 3)], [(0,), (1, 2, 3)], [(0,), (1,), (2,), (3,)]]
)
four_groups = layouts.map(lambda layout: layout._replace(groups=GROUPS))


def open_hosts(source, layout, owners):
    return [layout.open(source, owned) for owned in owners]


def take_of_hosts(hosts, n):
    steps = zip(*(take(host, n) for host in hosts), strict=True)
    return [{name: np.concatenate([b[name] for b in step]) for name in FIELDS} for step in steps]


def through_a_file(state):
    """A state after np.savez and np.load, one file a group."""
    read = {}
    for group, arrays in state.items():
        file = io.BytesIO()
        np.savez(file, **arrays)
        file.seek(0)
        with np.load(file, allow_pickle=False) as loaded:
            read[group] = dict(loaded)
    return read


def saved_by(hosts):
    state = {}
    for host in hosts:
        state |= through_a_file(host.state_of(host.snapshot()))
    return state


@few
@given(sources, four_groups, owners)
def test_any_number_of_hosts_reads_the_same(source, layout, owners):
    together = take_of_hosts(open_hosts(source, layout, owners), 4)
    assert_same(together, take(layout.open(source), 4))


def test_a_host_opens_only_the_shards_it_owns():
    opened = []

    class Watched(Numbered):
        def stream(self, shard, shards, seed, position=(0, 0)):
            opened.append((shard, shards))
            return super().stream(shard, shards, seed, position)

    lanes = Layout(2, 1, 4, GROUPS, 2, 0).open(Watched(), owned=(3, 1))
    assert opened == []
    take(lanes, 5)
    assert sorted(opened) == [(1, GROUPS), (3, GROUPS)]


@few
@given(sources, four_groups, owners, owners, st.integers(0, 5))
def test_a_state_goes_on_with_any_hosts(source, layout, saving, going_on, step):
    hosts = open_hosts(source, layout, saving)
    take_of_hosts(hosts, step)
    state = saved_by(hosts)
    expected = take_of_hosts(hosts, 4)
    others = open_hosts(source, layout, going_on)
    for other in others:
        other.restore(state)
    for group, arrays in saved_by(others).items():
        assert arrays.keys() == state[group].keys()
        for name, x in arrays.items():
            np.testing.assert_array_equal(x, state[group][name], name)
    assert_same(take_of_hosts(others, 4), expected)
    for other in others:  # lanes that have gone on can be put back
        other.restore(state)
    assert_same(take_of_hosts(others, 4), expected)


def test_a_snapshot_stays_what_it_was():
    lanes = Layout(3, 1, 4, GROUPS, 2, 0).open(Numbered())
    take(lanes, 3)
    snapshot = lanes.snapshot()
    before = through_a_file(lanes.state_of(snapshot))
    batches = take(lanes, 6)
    for batch in batches:
        for x in batch.values():
            x[...] = -1  # a batch belongs to whoever asked for it
    after = lanes.state_of(snapshot)
    for group, arrays in before.items():
        for name, x in arrays.items():
            np.testing.assert_array_equal(x, after[group][name], name)


def test_the_seed_changes_the_order():
    first, second = (Layout(1, 1, 8, 1, 2, seed).open(Numbered()) for seed in (0, 1))
    assert any((next(first)["inputs"] != next(second)["inputs"]).any() for _ in range(3))


# --- Prefetching ---------------------------------------------------------------------------------

LAYOUT = Layout(2, 1, 4, 2, 2, 0)


def within_seconds(call, seconds=10):
    """Fails instead of hanging."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive()


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_gives_the_placed_batches_and_the_state_after_each(depth):
    source = Numbered()
    expected = take(LAYOUT.open(source), 12)
    lanes = LAYOUT.open(source)
    prefetch = Prefetch(lanes, lambda batch: ("placed", batch), depth)
    got = take(iter(prefetch), 8)
    prefetch.close()
    assert all(mark == "placed" for (mark, _), _ in got)
    assert_same([batch for (_, batch), _ in got], expected[:8])
    for n, (_, snapshot) in enumerate(got, start=1):
        resumed = LAYOUT.open(source)
        resumed.restore(lanes.state_of(snapshot))
        assert_same(take(resumed, 4), expected[n : n + 4])


@pytest.mark.parametrize("owned", [None, (1,)])
def test_an_error_is_raised_where_its_batch_would_have_been(owned):
    source = Numbered(fails_at=7)
    plain, good = LAYOUT.open(source, owned), []
    with pytest.raises(UserError, match="document 7 cannot be read"):
        while True:
            good.append(next(plain))
    assert len(good) > 3  # more than the queue holds
    prefetch = Prefetch(LAYOUT.open(source, owned), lambda batch: batch)
    assert_same([batch for batch, _ in take(prefetch, len(good))], good)
    with pytest.raises(UserError, match="document 7 cannot be read"):
        next(prefetch)
    within_seconds(prefetch.close)


def test_an_error_in_placing_is_raised_too():
    def place(batch):
        raise RuntimeError("no such device")

    prefetch = Prefetch(LAYOUT.open(Numbered()), place)
    with pytest.raises(RuntimeError, match="no such device"):
        next(prefetch)
    within_seconds(prefetch.close)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_close_stops_the_thread_when_the_queue_is_full(taken):
    full = threading.Semaphore(0)

    def place(batch):
        full.release()
        return batch

    source = Numbered()
    lanes = LAYOUT.open(source)
    prefetch = Prefetch(lanes, place, depth=2)
    take(prefetch, taken)
    for _ in range(taken + 3):  # two in the queue and one that waits for room
        assert full.acquire(timeout=10)
    within_seconds(prefetch.close)
    assert prefetch_threads() == []
    # Nothing reads the lanes any more: they go on after the batches that were made ahead.
    assert_same(take(lanes, 2), take(LAYOUT.open(source), taken + 5)[-2:])


def test_no_more_batches_are_made_than_there_are_to_be():
    prefetch = Prefetch(LAYOUT.open(Numbered()), lambda batch: batch, count=3)
    assert [len(list(prefetch)) for _ in range(2)] == [3, 0]
    within_seconds(prefetch.close)


def test_closing_twice_and_after_an_error_does_no_harm():
    prefetch = Prefetch(LAYOUT.open(Numbered(fails_at=0)), lambda batch: batch)
    within_seconds(prefetch.close)
    within_seconds(prefetch.close)
    assert prefetch_threads() == []


def test_waiting_is_counted():
    go_on = threading.Event()

    def place(batch):
        go_on.wait(10)
        return batch

    prefetch = Prefetch(LAYOUT.open(Numbered()), place)
    assert prefetch.waited == 0.0
    threading.Timer(0.2, go_on.set).start()
    next(prefetch)
    prefetch.close()
    assert 0.1 < prefetch.waited < 10


# --- Errors --------------------------------------------------------------------------------------


def message_of(call, *args):
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tokens_that_the_model_has_not():
    last = int(Numbered().document(0, 1, 0, 0, 0).tokens.max())
    message = message_of(take, Lanes(Numbered(), lanes=1, window=4, vocab_size=last), 1)
    assert message.startswith(f"a document has token {last}, and the model a vocabulary of {last}:")
    take(Lanes(Numbered(), lanes=1, window=1, vocab_size=last + 1), 1)


@pytest.mark.parametrize(
    "per_epoch, lanes, longest, windows, warned",
    [(1, 2, 20, 1, 1), (3, 3, 20, 1, 1), (300, 3, 20, 1, 0), (3, 2, 9, 2, 0)],
)
def test_a_document_in_two_lanes_at_once(caplog, per_epoch, lanes, longest, windows, warned):
    """It would be a negative of itself. The last: one lane's comes next in the other's place."""

    class Again(Numbered):
        def document(self, shard, shards, seed, epoch, index):
            return super().document(shard, shards, seed, 0, index)

    for negatives in (False, True):
        source = Again(shortest=9, longest=longest, per_epoch=per_epoch)
        layout = {"lanes": lanes, "window": 4, "windows": windows, "advance": windows}
        take(Lanes(source, **layout, negatives=negatives), 40)
        assert caplog.text.count("two lanes read the same document") == warned * negatives


def test_documents_that_all_fit_one_window(monkeypatch):
    monkeypatch.setattr(lanes_module, "SHORT_DOCUMENTS", 20)
    short = Numbered(shortest=2, longest=8, per_epoch=50)
    message = message_of(take, LAYOUT.open(short, window=8), 100)
    assert "20 documents have at most 8 tokens" in message and "window of 8" in message
    assert "min_document_length" in message and "model.local_context" in message
    take(LAYOUT.open(short, window=8, windows=1), 100)  # without memory they are no problem
    take(LAYOUT.open(Numbered(2, 9), window=8), 100)
    monkeypatch.setattr(lanes_module, "SHORT_DOCUMENTS", 9999)
    long = LAYOUT.open(short, window=8)
    take(long, 1)
    monkeypatch.setattr(lanes_module, "SHORT_DOCUMENTS", 20)
    resumed = LAYOUT.open(short, window=8)
    resumed.restore(long.state_of(long.snapshot()))
    take(resumed, 100)  # what came before the checkpoint may have been longer


@pytest.mark.parametrize(
    "change, here",
    [
        ({"per_group": 3}, (3, 2, 4, 2, 0)),
        ({"windows": 4}, (2, 3, 4, 2, 0)),
        ({"advance": 2}, (2, 1, 4, 2, 0)),
        ({"window": 5}, (2, 2, 5, 2, 0)),
        ({"groups": 1}, (2, 2, 4, 1, 0)),
        ({"groups": 3}, (2, 2, 4, 3, 0)),
        ({"seed": 1}, (2, 2, 4, 2, 1)),
    ],
)
def test_a_state_of_another_layout_is_refused(change, here):
    layout = Layout(windows=3, advance=1, window=4, groups=2, per_group=2, seed=0)
    saving = layout.open(Numbered())
    take(saving, 2)
    state = saving.state_of(saving.snapshot())
    message = message_of(layout.open(Numbered(), **change).restore, state)
    assert f"= (2, 2, 4, 2, 0), this experiment has {here}" in message


def test_a_state_of_other_documents_is_refused(caplog):
    layout = Layout(windows=3, advance=1, window=4, groups=2, per_group=2, seed=0)
    saving = layout.open(Numbered())
    take(saving, 2)
    state = through_a_file(saving.state_of(saving.snapshot()))
    for opened, said in (
        (layout.open(Numbered(longest=21)), "longest = 20, this experiment has 21"),
        (layout.open(Numbered(), apart=True), "Data.documents_apart = False, this experiment has"),
        (layout.open(Numbered(), windows=4, advance=2), "windows of a step = 3, this experiment "),
    ):
        message = message_of(opened.restore, state)
        assert f"the checkpoint's data was saved with {said}" in message
    layout.open(Numbered(longest=20.0)).restore(state)  # the same number
    layout.open(Numbered(per_epoch=4)).restore(state)
    assert caplog.text.count("corpus files = [3], this experiment has [4]: reading goes on") == 1
    for arrays in state.values():  # fot_jax 0.1 did not save them
        del arrays["settings"]
    layout.open(Numbered(longest=21)).restore(state)


def test_a_state_without_a_group_is_refused():
    layout = Layout(2, 1, 4, 2, 2, 0)
    saving = layout.open(Numbered())
    state = saving.state_of(saving.snapshot())
    more = layout.open(Numbered(), owned=(2,), groups=3)
    message = message_of(more.restore, state)
    assert "no lane group 2" in message and "Data.lane_groups was smaller" in message

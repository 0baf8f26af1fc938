"""LanguageModel: reading with a memory and writing on, against the rules in NumPy float64."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from fot_jax.errors import UserError
from fot_jax.generate import LanguageModel
from fot_jax.model.lookup import ApproximateTopK, TopK
from fot_jax.model.transformer import Transformer
from fot_jax.reading import MemoryConfig

sys.path.append(str(Path(__file__).parent / "model"))
import rules
from test_transformer import LLAMA, PAPER, random_params

C = 64  # local context
MODELS = {
    "llama": LLAMA,
    "llama without positions in memory layers": dataclasses.replace(LLAMA, memory_positions=False),
    "paper": PAPER,
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


@functools.cache
def config_of(name, **changes):
    return dataclasses.replace(MODELS[name], memory_layers=(0, 2), local_context=C, **changes)


@functools.cache
def model_of(name, **changes):
    config = config_of(name, **changes)
    return LanguageModel.of(Transformer(config), random_params(config))


def by_rules(name, tokens, feeds, last=C, valid=None):
    config = config_of(name)
    return rules.read(config, random_params(config), tokens, feeds, last, valid)


def random_text(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, LLAMA.vocab_size, (rows, length), dtype=np.int32)


def nats_of(logits, targets):
    log_z = np.log(np.exp(logits).sum(-1))
    return log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


# --- Windows -------------------------------------------------------------------------------------


@EVERY_MODEL
@pytest.mark.parametrize("last", [32, 64])
@pytest.mark.parametrize("length", [32, 33, 64, 65, 96, 118, 128, 150, 300])
def test_logits_of_any_length(name, length, last):
    text = random_text(2, length, seed=length)
    got = model_of(name).logits(text, last_context_length=last)
    for row in range(2):
        want = by_rules(name, text[row], [length], last)
        np.testing.assert_allclose(got[row], want, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(list(MODELS)),
    st.lists(st.sampled_from([1, 5, 18, 31, 50, 64, 70, 130]), min_size=2, max_size=5),
    st.sampled_from([7, 32, 64]),
)
def test_text_read_in_segments(name, feeds, last):
    """The window that one segment leaves is what the next one joins, where it fits."""
    text = random_text(1, sum(feeds), seed=sum(feeds))
    lm = model_of(name)
    state = lm.read(text[:, : feeds[0]], last_context_length=last)
    got, start = [], feeds[0]
    for length in feeds[1:]:
        segment = text[:, start : start + length]
        got.append(lm.logits(segment, last_context_length=last, state=state)[0])
        start += length
    want = by_rules(name, text[0], feeds, last)[feeds[0] :]
    np.testing.assert_allclose(np.concatenate(got), want, atol=1e-4)


@EVERY_MODEL
@pytest.mark.parametrize("length", [40, 150, 300])
def test_left_padding(name, length):
    """Positions are those in the padded window; padding is seen by nobody, here or in memory."""
    text = random_text(3, length, seed=1)
    mask = np.arange(length) >= np.array([0, 17, length - 9])[:, None]
    lm = model_of(name)
    got = lm.logits(text, mask=mask, last_context_length=32)
    other = np.where(mask, text, (text + 7) % LLAMA.vocab_size)
    same = lm.logits(other, mask=mask, last_context_length=32)
    for row in range(3):
        want = by_rules(name, text[row], [length], 32, mask[row])
        np.testing.assert_allclose(got[row, mask[row]], want[mask[row]], atol=1e-4)
    np.testing.assert_array_equal(same[mask], got[mask])


@EVERY_MODEL
def test_scores_are_those_of_the_logits(name):
    text = random_text(2, 211)
    lm = model_of(name)
    scores = lm.score(text, last_context_length=32)
    assert scores.nats.shape == scores.correct.shape == (2, 210)
    for row in range(2):
        want = by_rules(name, text[row, :-1], [210], 32)
        np.testing.assert_allclose(scores.nats[row], nats_of(want, text[row, 1:]), atol=1e-4)
        np.testing.assert_array_equal(scores.correct[row], want.argmax(-1) == text[row, 1:])


# --- Memory --------------------------------------------------------------------------------------


def reach(where, tokens):
    """Which tokens each token sees, if memory keeps the last so many of earlier windows."""
    seen = rules.visibility(where)
    first = np.searchsorted(where[:, 0], where[:, 0])  # of its window
    seen[1] &= np.arange(len(where)) >= first[:, None] - tokens
    return seen


@EVERY_MODEL
@pytest.mark.parametrize("size", [0, 1, 40, 64, 100, 1000])
def test_a_ring_forgets_the_oldest_tokens(name, size):
    text = random_text(1, 330)
    scores = model_of(name).score(text, memory=MemoryConfig(size))
    where = rules.places([329], C, C)
    config = config_of(name)
    want = rules.logits(config, random_params(config), text[0, :-1], where, reach(where, size))
    np.testing.assert_allclose(scores.nats[0], nats_of(want, text[0, 1:]), atol=1e-4)


def test_memory_is_of_consequence():
    text = random_text(1, 330)
    lm = model_of("llama")
    nats = [lm.score(text, memory=MemoryConfig(size)).nats for size in (0, 100, None)]
    assert np.abs(nats[0] - nats[1]).max() > 1e-2 and np.abs(nats[1] - nats[2]).max() > 1e-2


@pytest.mark.parametrize("storage, error", [("bfloat16", 0.05), ("float16", 0.01), ("int8", 0.3)])
def test_stored_in_fewer_bits(storage, error):
    text = random_text(1, 330)
    exact, rounded = (
        model_of("llama").logits(text, memory=MemoryConfig(storage=each))
        for each in ("float32", storage)
    )
    assert 1e-5 < np.abs(exact - rounded).max() < error


@pytest.mark.parametrize("lookup", [TopK, ApproximateTopK])
def test_the_best_keys_alone(lookup):
    """All of them is dense attention; fewer is something else."""
    text = random_text(2, 330)
    lm = model_of("paper")
    dense, few, all_of_them = (
        lm.logits(text, memory=memory)
        for memory in (
            MemoryConfig(),
            MemoryConfig(lookup=lookup(4)),
            MemoryConfig(lookup=lookup(400)),
        )
    )
    np.testing.assert_allclose(all_of_them, dense, atol=1e-4)
    assert np.abs(few - dense).max() > 1e-2


@pytest.mark.parametrize("lookup", [None, TopK(10)], ids=["dense", "top k"])
def test_sharded_memory_gives_the_same(lookup):
    """Over eight devices; while reading and while writing."""
    config = config_of("llama")
    single = model_of("llama")
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("memory",))
    sharded = dataclasses.replace(single, mesh=mesh)
    memory = MemoryConfig() if lookup is None else MemoryConfig(lookup=lookup)
    text = random_text(2, 700)
    a, b = (lm.logits(text, memory=memory) for lm in (single, sharded))
    np.testing.assert_allclose(a, b, atol=1e-4)
    state = sharded.read(text, memory=memory)
    assert len(state.memory.layers[0].k.x.sharding.device_set) == 8
    new = [
        lm.generate(text, 100, temperature=0, memory=memory, last_context_length=32)
        for lm in (single, sharded)
    ]
    assert new[0] == new[1] and config.local_context < 100


def test_documents_share_a_memory():
    """Each sees what all of them have left behind (multi-doc)."""
    text = random_text(2, 3 * C)
    got = model_of("llama").logits(text, memory=MemoryConfig(shared=True))
    config = config_of("llama")
    window = np.repeat(np.arange(3), C)
    both = np.concatenate([window, window])
    row = np.repeat([0, 1], 3 * C)
    local = (both[:, None] == both) & (row[:, None] == row)
    place = np.tile(np.arange(C), 6)
    seen = np.stack([local & (place[:, None] >= place), both[:, None] > both])
    where = np.stack([both, place], 1)
    want = rules.logits(config, random_params(config), text.reshape(-1), where, seen)
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-4)


@EVERY_MODEL
def test_a_state_is_asked_several_things_side_by_side(name):
    """As if each were asked alone."""
    lm, text = model_of(name), random_text(1, 2 * C + 20)[0]
    prompts = [each[: 5 + 30 * i] for i, each in enumerate(random_text(3, C, seed=1))]
    state = lm.read(text, last_context_length=C)
    together = lm.generate(prompts, 30, temperature=0, state=state.repeated(3))
    alone = [lm.generate(each, 30, temperature=0, state=state.copy()) for each in prompts]
    assert together == alone and len({tuple(new) for new in alone}) == 3
    for bad in (lm.read(random_text(2, 9)), lm.read(text, memory=MemoryConfig(shared=True))):
        with pytest.raises(UserError, match="only a state of one row, with a memory of its own"):
            bad.repeated(2)


@EVERY_MODEL
def test_windows_are_remembered_as_if_each_were_the_only_one(name):
    """Three side by side in two rows, then one more; then two texts see all of them."""
    lm, windows, texts = model_of(name), random_text(4, 40), random_text(2, C, seed=1)
    state = lm.remember(windows[:3], rows=2)
    state = lm.remember(windows[3:], state=state)
    got = lm.logits(texts, last_context_length=C, state=state)

    window = np.concatenate([np.repeat(np.arange(4), 40), np.repeat([4, 5], C)])
    place = np.concatenate([np.tile(np.arange(40), 4), np.tile(np.arange(C), 2)])
    local = (window[:, None] == window) & (place[:, None] >= place)
    seen = np.stack([local, (window[:, None] >= 4) & (window < 4)])
    config, tokens = config_of(name), np.concatenate([windows.reshape(-1), texts.reshape(-1)])
    want = rules.logits(config, random_params(config), tokens, np.stack([window, place], 1), seen)
    np.testing.assert_allclose(got.reshape(2 * C, -1), want[-2 * C :], atol=1e-4)


def test_what_was_in_the_window_is_remembered_too():
    """Texts, then windows: these come after those in memory, and do not see them."""
    lm, windows, texts = model_of("llama"), random_text(3, 40), random_text(2, C, seed=1)
    memory = MemoryConfig(2 * C + 40, shared=True)  # a ring: two windows overwrite what is oldest
    state = lm.remember(windows[:1], rows=2, memory=memory)
    lm.read(texts, last_context_length=C, state=state)
    assert state.stored == 40
    lm.remember(windows[1:], state=state)
    assert state.stored == 40 + 2 * C + 80 and not state.places.any()
    assert state.memory.visible == 2 * C + 40


@pytest.mark.parametrize(
    ("windows", "options", "message"),
    [
        (random_text(1, C + 1), {}, f"windows of {C + 1} tokens for a model with a local context"),
        (random_text(1, C), {"memory": MemoryConfig()}, "set MemoryConfig.shared"),
        (np.zeros(C, int), {}, "tokens of shape"),
        (random_text(3, C), {"rows": 0}, "remember.rows = 0"),
        (random_text(3, C), {"memory": MemoryConfig(C, False, shared=True)}, "is full before"),
    ],
)
def test_windows_that_cannot_be_remembered(windows, options, message):
    with pytest.raises(UserError, match=message):
        model_of("llama").remember(windows, **options)


# --- Writing -------------------------------------------------------------------------------------


@EVERY_MODEL
@pytest.mark.parametrize("length, last", [(1, 64), (63, 64), (64, 64), (65, 32), (150, 32)])
def test_greedy_tokens_are_the_most_likely_ones(name, length, last):
    """A hundred of them, while the window overflows twice."""
    prompt = random_text(1, length, seed=length)[0]
    new = model_of(name).generate(prompt, 100, temperature=0, last_context_length=last)
    text = np.concatenate([prompt, new])
    feeds = [length] + [1] * 99
    assert rules.places(feeds, C, last)[-1, 0] - rules.places([length], C, last)[-1, 0] >= 1
    want = by_rules(name, text[:-1], feeds, last)[length - 1 :]
    np.testing.assert_array_equal(want.argmax(-1), new)


@EVERY_MODEL
def test_greedy_tokens_of_a_padded_batch(name):
    text = random_text(3, 90, seed=2)
    mask = np.arange(90) >= np.array([0, 17, 81])[:, None]
    new = model_of(name).generate(text, 100, temperature=0, mask=mask, last_context_length=32)
    for row in range(3):
        whole = np.concatenate([text[row], new[row]])
        valid = np.concatenate([mask[row], np.ones(100)])[:-1]
        want = by_rules(name, whole[:-1], [90] + [1] * 99, 32, valid)[89:]
        np.testing.assert_array_equal(want.argmax(-1), new[row])


@EVERY_MODEL
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_batch_is_written_as_each_prompt_alone(name, temperature):
    """Prompts of any lengths, whose windows overflow at different steps."""
    lm = model_of(name)
    prompts = [random_text(1, n, seed=n)[0].tolist() for n in (1, 30, 63, 150, 200)]
    options = dict(temperature=temperature, top_p=0.9, last_context_length=40)
    together = lm.generate(prompts, 80, seed=5, **options)
    for row, prompt in enumerate(prompts):
        assert lm.generate(prompt, 80, seed=5 + row, **options) == together[row]
    assert len({tuple(new) for new in together}) == len(prompts)


def test_reading_then_writing_is_writing():
    lm = model_of("llama")
    text = random_text(1, 170)[0].tolist()
    state = lm.read(text[:100])
    # 100 tokens leave 64 in the window, so that the others start another one, as 36 + 64 + 70.
    again = state.copy()
    new = lm.generate(text[100:], 70, temperature=0, state=state)
    whole = np.concatenate([text, new])
    want = by_rules("llama", whole[:-1], [100, 70] + [1] * 69)[169:]
    np.testing.assert_array_equal(want.argmax(-1), new)
    assert lm.generate(text[100:], 70, temperature=0, state=again) == new


def test_draws_follow_the_distribution():
    """At several temperatures, and cut off at top_p."""
    lm = model_of("llama")
    prompt = random_text(1, C + 4)[0].tolist()
    want = by_rules("llama", prompt, [C + 4])[-1]
    for temperature, top_p in ((0.5, 1.0), (1.5, 1.0), (1.0, 0.6)):
        drawn = lm.generate([prompt] * 400, 1, temperature=temperature, top_p=top_p)
        p = np.exp(want / temperature) / np.exp(want / temperature).sum()
        order = np.argsort(-p)
        fewest = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1]
        p = np.where(np.isin(np.arange(len(p)), fewest), p, 0) / p[fewest].sum()
        frequency = np.bincount(np.ravel(drawn), minlength=len(p)) / 400
        assert np.abs(frequency - p).max() < 5 * (p.max() * (1 - p.max()) / 400) ** 0.5
        assert not frequency[p == 0].any()
        assert p.max() > 3 / len(p)  # not just noise


def test_temperature_next_to_nothing_is_nothing():
    lm = model_of("llama")
    prompt = random_text(1, 20)[0].tolist()
    greedy = lm.generate(prompt, 20, temperature=0)
    for temperature in (1e-9, 1e-30, 1e-40, 1e-300):
        assert lm.generate(prompt, 20, temperature=temperature) == greedy
    assert len(set(lm.generate(prompt, 60, temperature=1e300))) > 30  # any token


def test_seeds_repeat():
    lm = model_of("llama")
    prompt = random_text(1, 20)[0].tolist()
    draw = functools.partial(lm.generate, prompt, 12)
    assert draw(seed=3) == draw(seed=3) != draw(seed=4)
    assert lm.generate([prompt] * 2, 12, seed=[4, 3]) == [draw(seed=4), draw(seed=3)]
    assert draw(seed=3) != draw(seed=3 + 2**32)


def test_stop_tokens_end_a_row():
    lm = model_of("llama")
    prompts = [random_text(1, n, seed=n)[0].tolist() for n in (20, 30)]
    whole = lm.generate(prompts, 40, temperature=0)
    stop = whole[0][7]
    cut = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert lm.generate(prompts, 40, temperature=0, stop=[stop]) == cut
    assert len(cut[0]) <= 7
    steps = list(lm.stream(prompts, 40, temperature=0, stop=range(LLAMA.vocab_size)))
    assert steps == [[None, None]]  # and nothing after that


def test_what_a_state_holds_after_writing():
    """Prompt and new tokens, without stop tokens; read on, it is as if all had been one text."""
    lm = model_of("llama")
    prompts = [random_text(1, n, seed=n)[0].tolist() for n in (20, 100)]
    whole = lm.generate(prompts, 60, temperature=0)
    stop = whole[0][7]
    for stops, count in (((stop,), 60), ((), 60), ((), 1)):
        state = lm.read(np.zeros((2, 1), int))
        new = lm.generate(prompts, count, temperature=0, stop=stops, state=state)
        more = random_text(2, 10, seed=3)
        got = lm.logits(more, state=state.copy())
        for row in range(2):
            last = [] if len(new[row]) < count else [1]
            text = [0, *prompts[row], *new[row][: len(new[row]) - len(last)], *more[row]]
            feeds = [1, len(prompts[row]), *[1] * (len(new[row]) - len(last)), 10]
            want = by_rules("llama", text, feeds)[-10:]
            np.testing.assert_allclose(got[row], want, atol=1e-4)


def test_rows_that_have_ended_leave_nothing_in_a_shared_memory():
    lm = model_of("llama")
    prompts = [random_text(1, n, seed=seed)[0].tolist() for n, seed in ((60, 60), (50, 61))]
    shared = MemoryConfig(shared=True)
    state = lm.read(np.zeros((2, 1), int), memory=shared)
    whole = lm.generate(prompts, 150, temperature=0, state=state)
    stop = next(token for token in whole[0] if token not in whole[1])
    state = lm.read(np.zeros((2, 1), int), memory=shared)
    new = lm.generate(prompts, 150, temperature=0, stop=[stop], state=state)
    assert abs(len(new[0]) - len(new[1])) > C  # one goes on for more than a window
    lengths = [len(row) - (len(row) == 150) for row in new]
    read = np.array([1 + 60, 1 + 50]) + lengths
    held = (read - state.places).sum()
    assert state.memory.appended.tolist() == state.stored.tolist() == [held]
    assert (state.places == (read - 1) % C + 1).all()
    np.testing.assert_array_equal(state.cache.length, state.places)
    assert state.cache.valid.sum(1).tolist() == state.held.tolist()


def test_a_copy_shares_memory_until_one_of_them_adds_to_it():
    lm = model_of("llama")
    text = random_text(1, 300)
    state = lm.read(text, last_context_length=20)
    copies = [state.copy() for _ in range(2)]
    layer = state.memory.layers[0].k.x
    assert all(each.memory.layers[0].k.x is layer for each in copies)
    short, long = random_text(1, 30, seed=1), random_text(1, 200, seed=2)
    want = lm.logits(long, state=lm.read(text, last_context_length=20))
    lm.logits(short, state=copies[0])  # fits into the window
    assert copies[0].memory.layers[0].k.x is layer
    for each in (copies[1], state):
        np.testing.assert_array_equal(lm.logits(long, state=each), want)
    again = lm.logits(long, state=copies[0])
    assert np.isfinite(again).all()


@EVERY_MODEL
def test_bfloat16_is_close(name):
    config = config_of(name)
    lm = LanguageModel.of(Transformer(config, dtype=jnp.bfloat16), random_params(config))
    text = random_text(2, 300)
    state = lm.read(text)
    assert state.memory.storage == "bfloat16"
    got, want = (model.logits(text, last_context_length=32) for model in (lm, model_of(name)))
    assert got.dtype == np.float32
    error = np.abs(got - want)
    assert 1e-4 < error.mean() < 0.05 * want.std() and error.max() < want.std()


@EVERY_MODEL
def test_parameters_on_a_training_mesh_give_the_same(name):
    """Wherever they are sharded: reading, scoring and writing."""
    config = config_of(name)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))

    def spread(x):
        axes = [("fsdp" if n % 4 == 0 else None) for n in x.shape[:-1]]
        axes = [axis if axes.index(axis) == i else None for i, axis in enumerate(axes)]
        axes.append("tensor" if x.shape[-1] % 2 == 0 else None)
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    params = jax.tree.map(spread, random_params(config))
    lm = LanguageModel.of(Transformer(config), params)
    assert lm.mesh is mesh
    text, one = random_text(2, 200), model_of(name)
    np.testing.assert_allclose(lm.logits(text), one.logits(text), atol=1e-4)
    np.testing.assert_allclose(lm.score(text).nats, one.score(text).nats, atol=1e-4)
    assert lm.generate(text, 70, temperature=0) == one.generate(text, 70, temperature=0)


def test_generates_without_memory():
    """Of size 0, or in a model without memory layers: the window alone."""
    prompt = random_text(1, 2 * C + 3)[0].tolist()
    config = config_of("llama")
    new = model_of("llama").generate(prompt, 70, temperature=0, memory=MemoryConfig(0))
    where = rules.places([len(prompt)] + [1] * 69, C, C)
    text = np.concatenate([prompt, new])[:-1]
    want = rules.logits(config, random_params(config), text, where, reach(where, 0))
    np.testing.assert_array_equal(want[len(prompt) - 1 :].argmax(-1), new)
    plain = dataclasses.replace(config, memory_layers=())
    lm = LanguageModel.of(Transformer(plain), random_params(config))
    assert lm.generate(prompt, 70, temperature=0) == new
    assert lm.generate(prompt, 0) == []


# --- Programs ------------------------------------------------------------------------------------


def test_a_token_needs_no_compilation_and_no_copy_of_memory():
    from fot_jax.model import inference, sampling

    lm = model_of("llama")
    prompt = random_text(1, 4500)[0].tolist()
    state = lm.read(prompt)
    lm.generate([1], 2, state=state.copy())
    compiled = sampling.next_token._cache_size(), inference.move._cache_size()
    lm.generate([1], 200, state=state.copy())
    assert (sampling.next_token._cache_size(), inference.move._cache_size()) == compiled
    args = inference.read.lower(
        *(lm.config, state.config.lookup, None, lm.params, state.cache, state.memory),
        *(np.ones((1, 1), np.int32), np.ones((1, 1), bool), np.ones(1, np.int32)),
    )
    temporaries = args.compile().memory_analysis().temp_size_in_bytes
    assert temporaries < state.memory.layers[0].k.x.nbytes / 2


def test_asking_for_a_billion_tokens_takes_no_memory_before_they_come():
    lm = model_of("llama")
    state = lm.read(random_text(1, 100))
    steps = lm.stream([[1]], 10**9, state=state, temperature=0)
    tokens = [next(steps) for _ in range(10)]
    assert len(tokens) == 10 and state.memory.slots < 10_000
    for _ in range(4_500):  # beyond the room that there was
        next(steps)
    assert state.memory.appended[0] > 4_500 and state.memory.slots < 20_000


def test_growing_memory_compiles_few_programs():
    """A text fed bit by bit."""
    from fot_jax.model import inference

    lm = model_of("llama")
    text = random_text(1, 6000, seed=9)
    before = inference.read._cache_size()
    state = lm.read(text[:, :16])
    for start in range(16, 6000, 16):
        lm.read(text[:, start : start + 16], state=state)
    assert inference.read._cache_size() - before < 16
    whole = lm.logits(text[:, :64], state=state)
    assert np.isfinite(whole).all()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_reading_takes_is_the_memory_and_a_constant():
    """Peak resident memory of processes that score texts of two lengths."""
    program = """if True:
        import sys
        import jax, numpy as np
        from fot_jax.generate import LanguageModel
        from fot_jax.model import crossbatch
        from fot_jax.model.transformer import ModelConfig, Transformer
        from fot_jax.reading import MemoryConfig
        model = Transformer(ModelConfig(64, 64, 2, 4, 4, 64, 64, (1,), 512))
        tokens = np.zeros((1, 8), np.int32)
        params = model.init(jax.random.key(0), tokens, tokens, crossbatch.Plan())["params"]
        lm, length = LanguageModel.of(model, params), int(sys.argv[1])
        text = np.arange(length)[None] % 64
        lm.score(text[:, :2000])
        state = lm.read(text[:, :600], memory=MemoryConfig())
        lm.score(text, state=state)
        status = open("/proc/self/status").read()
        peak = int(status.split("VmHWM:")[1].split()[0])  # ru_maxrss would have the parent's
        print(peak * 1024, state.memory.nbytes)
    """
    peaks = {}
    for length in (10_000, 100_000):
        environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        argv = [sys.executable, "-c", program, str(length)]
        ran = subprocess.run(argv, capture_output=True, text=True, env=environment, check=True)
        peaks[length] = [int(word) for word in ran.stdout.split()]
    (short, of_short), (long, of_long) = peaks.values()
    added = of_long - of_short
    assert added > 88_000 * 2048  # 4 heads x 64 x keys and values x 4 bytes
    assert abs(long - short - added) < 0.25 * added  # compiling alone differs by tens of MB


# --- Bad input -----------------------------------------------------------------------------------


def test_bad_text():
    lm = model_of("llama")
    with pytest.raises(UserError, match="the prompt is empty: give at least one token"):
        lm.generate([], 1)
    with pytest.raises(UserError, match="the prompt is empty: give at least one token"):
        lm.generate([[1], []], 1)
    with pytest.raises(UserError, match="the text is empty: give at least one token"):
        lm.logits(np.zeros((1, 0), np.int32))
    with pytest.raises(UserError, match="one token alone has no score: give at least two"):
        lm.score([[1]])
    outside = "token {} is outside the model's vocabulary of 61: the text was tokenized for another"
    for token in (61, -1):
        for ask in (lm.logits, lm.score, lm.read):
            with pytest.raises(UserError, match=outside.format(token)):
                ask([[1, token, 1]])
        with pytest.raises(UserError, match=outside.format(token)):
            lm.generate([1, token], 1)
    with pytest.raises(UserError, match=r"tokens of shape \(1, 2\) and type float64: give whole"):
        lm.logits([[0.5, 1.0]])
    with pytest.raises(UserError, match=r"a prompt of shape \(2,\) and type float64: give whole"):
        lm.generate([0.5, 1.0], 1)
    generate = functools.partial(lm.generate, max_new_tokens=1)
    cube = np.ones((1, 1, 1), int)
    for bad, asked in (
        ([[1, 2], [3]], (lm.logits, lm.read, lm.score)),
        ("ab", (lm.logits, lm.read, generate)),
        ([[1], [2, [3]]], (lm.logits, lm.read, generate)),
        ([None], (lm.logits, lm.read, generate)),
        ([[2**70]], (lm.logits, lm.read, generate)),
        (cube, (lm.logits, lm.read, generate)),
    ):
        for ask in asked:
            with pytest.raises(UserError, match="give whole numbers|rows of different lengths"):
                ask(bad)
    with pytest.raises(UserError, match="prompts of different lengths with a mask: pad them"):
        lm.generate([[1, 2], []], 1, mask=np.ones((2, 2)))
    with pytest.raises(UserError, match=r"a mask of shape \(1, 3\) for tokens of shape \(1, 2\)"):
        lm.logits([[1, 2]], mask=[[1, 1, 1]])


def test_bad_numbers():
    lm = model_of("llama")
    for options, message in (
        (dict(last_context_length=65), "last_context_length = 65: give 1 to 64, the local context"),
        (dict(last_context_length=0), "last_context_length = 0: give 1 to 64, the local context"),
        (dict(temperature=-1), "generate.temperature = -1: give 0 or more"),
        (dict(top_p=1.5), "generate.top_p = 1.5: give a number from 0 to 1"),
        (dict(seed=-1), "generate.seed = -1: give a number from 0"),
        (dict(seed=[1, 2]), "2 seeds for 1 prompts: give one for each"),
        (dict(seed=1.5), "generate.seed = 1.5: give a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            lm.generate([1], 1, **options)
    with pytest.raises(UserError, match="generate.max_new_tokens = -1: give 0 or more"):
        lm.generate([1], -1)


def test_bad_memory():
    lm = model_of("llama")
    text = random_text(1, 200)
    message = "the memory of 100 tokens is full before the end of the text, which needs 136: raise"
    with pytest.raises(UserError, match=message):
        lm.read(text, memory=MemoryConfig(100, ring=False))
    lm.read(text, memory=MemoryConfig(136, ring=False))
    with pytest.raises(UserError, match="which needs 200"):  # while writing, but said before
        lm.generate(text[0], 60, memory=MemoryConfig(136, ring=False))
    with pytest.raises(UserError, match="TopK.k = 9 is larger than the memory of 8 tokens"):
        MemoryConfig(8, lookup=TopK(9))
    with pytest.raises(UserError, match="MemoryConfig.storage = 'int4': choose one of float32"):
        MemoryConfig(storage="int4")
    with pytest.raises(UserError, match="MemoryConfig.size = -1: give a number from 0"):
        MemoryConfig(-1)
    with pytest.raises(UserError, match="MemoryConfig.size = 1.5: give a whole number"):
        MemoryConfig(1.5)
    with pytest.raises(UserError, match="a state has a memory of its own, which cannot be changed"):
        lm.read(text, state=lm.read(text), memory=MemoryConfig(5))
    padded = np.arange(200) >= 64  # padding takes no slot
    lm.read(text, mask=padded[None], memory=MemoryConfig(72, ring=False))
    with pytest.raises(UserError, match="which needs 72"):
        lm.read(text, mask=padded[None], memory=MemoryConfig(71, ring=False))
    plain = dataclasses.replace(lm, config=dataclasses.replace(lm.config, memory_layers=()))
    with pytest.raises(UserError, match="a memory of 100 tokens for a model without memory layers"):
        plain.read(text, memory=MemoryConfig(100))
    for other in (dict(local_context=32), dict(memory_layers=(0,)), dict(memory_layers=())):
        another = dataclasses.replace(lm, config=dataclasses.replace(lm.config, **other))
        with pytest.raises(UserError, match="a state of another model, or on other devices: read"):
            another.read(text, state=lm.read(text))
    with pytest.raises(UserError, match="2 documents for a state of 1: give as many"):
        lm.read(random_text(2, 5), state=lm.read(text))

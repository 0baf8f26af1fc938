"""LanguageModel reads text of any length, with a memory, as the rules in NumPy float64 say."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from oracles import reading as rules
from readers import (
    EVERY_MODEL,
    MODELS,
    C,
    by_rules,
    config_of,
    model_of,
    nats_of,
    random_text,
    reach,
)
from tiny import LLAMA, random_params

from fot_jax.common.errors import UserError
from fot_jax.inference import forward
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import MemoryConfig
from fot_jax.model.lookup import ApproximateTopK, TopK
from fot_jax.model.transformer import Transformer

# --- Windows -------------------------------------------------------------------------------------


LENGTHS = [(length, last) for length in (32, 33, 64, 65, 96, 280) for last in (32, 64)]


@pytest.mark.parametrize(
    "name, length, last",
    [
        *(("llama", *each) for each in (*LENGTHS, (118, 64), (128, 64))),
        *((name, *each) for name in [*MODELS][1:] for each in ((33, 32), (118, 64), (280, 32))),
    ],
)
def test_logits_of_any_length(name, length, last):
    text = random_text(2, length, seed=length)
    got = model_of(name).logits(text, last_context_length=last)
    for row in range(2):
        want = by_rules(name, text[row], [length], last)
        np.testing.assert_allclose(got[row], want, atol=1e-4)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(list(MODELS)),
    st.lists(
        st.tuples(st.sampled_from([1, 5, 18, 31, 50, 64, 70, 130]), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([1, 31, 130]),
    st.sampled_from([7, 32, 64]),
)
def test_text_read_in_segments(name, feeds, length, last):
    """The window that one segment leaves is what the next one joins, where it fits.

    Whether somebody looks at a segment (its logits) makes no difference to the next.
    """
    feeds = [*feeds, (length, True)]
    lengths = [length for length, _ in feeds]
    text = random_text(1, sum(lengths), seed=sum(lengths))
    lm, state, start = model_of(name), None, 0
    want = by_rules(name, text[0], lengths, last)
    for length, looks in feeds:
        segment, place = text[:, start : start + length], slice(start, start + length)
        start += length
        if looks and state is not None:
            got = lm.logits(segment, last_context_length=last, state=state)[0]
            np.testing.assert_allclose(got, want[place], atol=1e-4)
        else:
            state = lm.read(segment, last_context_length=last, state=state)


@pytest.mark.parametrize("name, length", [("llama", 40), *((name, 280) for name in MODELS)])
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


@pytest.mark.parametrize(
    "name, size",
    [
        *(("llama", size) for size in (0, 1, 40, 64, 100, 1000)),
        *(("llama without positions in memory layers", size) for size in (0, 100)),
        ("paper", 100),
    ],
)
def test_a_ring_forgets_the_oldest_tokens(name, size):
    text = random_text(1, 320)
    scores = model_of(name).score(text, memory=MemoryConfig(size))
    where = rules.places([319], C, C)
    config = config_of(name)
    want = rules.logits(config, random_params(config), text[0, :-1], where, reach(where, size))
    np.testing.assert_allclose(scores.nats[0], nats_of(want, text[0, 1:]), atol=1e-4)


def test_memory_is_of_consequence():
    text = random_text(1, 320)
    lm = model_of("llama")
    nats = [lm.score(text, memory=MemoryConfig(size)).nats for size in (0, 100, None)]
    assert np.abs(nats[0] - nats[1]).max() > 1e-2 and np.abs(nats[1] - nats[2]).max() > 1e-2


@pytest.mark.parametrize(
    "storage, error", [("bfloat16", 0.05), ("float16", 0.01), ("int8", 0.3), ("int4", 2)]
)
def test_stored_in_fewer_bits(storage, error):
    text = random_text(1, 320)
    exact, rounded = (
        model_of("llama").logits(text, memory=MemoryConfig(storage=each))
        for each in ("float32", storage)
    )
    assert 1e-5 < np.abs(exact - rounded).max() < error


@pytest.mark.parametrize("lookup", [TopK, ApproximateTopK])
def test_the_best_keys_alone(lookup):
    """All of them is dense attention; fewer is something else."""
    text = random_text(2, 320)
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
    single = model_of("llama")
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("memory",))
    sharded = dataclasses.replace(single, mesh=mesh)
    memory = MemoryConfig() if lookup is None else MemoryConfig(lookup=lookup)
    text = random_text(2, 4 * C)  # so that writing begins with a full window
    a, b = (lm.logits(text, memory=memory) for lm in (single, sharded))
    np.testing.assert_allclose(a, b, atol=1e-4)
    state = sharded.read(text, memory=memory)
    assert len(state.memory.layers[0].k.x.sharding.device_set) == 8
    new = [lm.generate(text, 40, temperature=0, memory=memory) for lm in (single, sharded)]
    assert new[0] == new[1]


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


@pytest.mark.parametrize("name", ["llama", "paper"])  # memory has keys of its own, or the window's
def test_a_state_is_asked_several_things_side_by_side(name):
    """As if each were asked alone."""
    lm, text = model_of(name), random_text(1, 3 * C - 10)[0]
    prompts = [each[: 5 + 30 * i] for i, each in enumerate(random_text(3, C, seed=1))]
    state = lm.read(text, last_context_length=C)
    together = lm.generate(prompts, 30, temperature=0, state=state.repeated(3))
    alone = [lm.generate(each, 30, temperature=0, state=state.copy()) for each in prompts]
    assert together == alone and len({tuple(new) for new in alone}) == 3


def test_which_states_are_asked_several_things():
    lm, text, prompts = model_of("llama"), random_text(1, 3 * C - 10)[0], random_text(3, C, seed=1)
    ring = lm.read(text, memory=MemoryConfig(C))
    assert lm.generate(prompts, 2, temperature=0, state=ring.repeated(3))
    assert lm.generate(prompts[0], 2, temperature=0, state=ring)  # which has its memory yet
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


def test_reading_that_was_interrupted_goes_on():
    """After a piece shorter than the window, which is not read on in."""
    lm, windows, text, last = model_of("llama"), random_text(2, C), random_text(1, C + 20 + 7), 7
    want = lm.logits(text, last_context_length=last, state=lm.remember(windows))[:, -last:]
    read = []

    def interrupt(tokens):
        read.append(tokens)
        if len(read) == 2:
            raise KeyboardInterrupt

    state = lm.remember(windows)
    with pytest.raises(KeyboardInterrupt):
        lm.read(text, last_context_length=last, state=state, progress=interrupt)
    assert read == [C, 20]
    got = lm.logits(text[:, -last:], last_context_length=last, state=state)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_what_nobody_looks_at_is_read_by_the_layers_that_memory_takes(name):
    """FLOPs of the compiled program, by those of whole layers."""
    lm = model_of(name)
    c, state = lm.config, lm.read(random_text(1, 2 * C))
    piece = {"tokens": np.zeros((1, C), np.int32), "valid": np.ones((1, C), bool)}
    piece |= {"params": lm.params, "cache": state.cache, "memory": state.memory}

    def flops(for_memory):
        lowered = forward.run.lower(
            c, TopK(8), None, **piece, advance=np.full(1, C, np.int32), for_memory=for_memory
        )
        return lowered.compile().cost_analysis()["flops"]

    share = (max(c.memory_layers, default=-1) + 1) / c.num_layers
    assert flops(True) < share * flops(False)


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


def test_a_short_window_stands_right_before_the_next():
    """Of a Transformer-XL, all of whose layers see the window before: as in a wider window."""
    config = dataclasses.replace(
        LLAMA, memory_layers=(0, 1, 2), memory_before=True, local_context=C
    )
    wide = dataclasses.replace(config, memory_layers=(), memory_before=False, local_context=2 * C)
    lm, wide = (LanguageModel.of(Transformer(c), random_params(config)) for c in (config, wide))
    text = random_text(2, C + 20)
    want = wide.logits(text, last_context_length=2 * C)
    np.testing.assert_allclose(lm.logits(text, last_context_length=C), want, atol=1e-4)
    # And so in a memory that rows share, of which the second is padding here.
    mask, shared = np.ones_like(text), MemoryConfig(shared=True)
    mask[1] = 0
    got = lm.logits(text, mask=mask, last_context_length=C, memory=shared)
    np.testing.assert_allclose(got[0], want[0], atol=1e-4)
    # After a whole window, too, the short one alone is the window before: 20 tokens and 20 more.
    state = lm.read(text, last_context_length=20)
    lm.read(text, state=state, last_context_length=C)
    assert state.memory.visible.tolist() == [40, 40]
    for rows in (1, 2, 3):  # but those that are no text together stay, however many at a time
        state = lm.remember(text[:1, :C].reshape(4, -1), rows=rows, memory=shared)
        assert state.memory.visible.tolist() == [C]


# --- Numbers and devices -------------------------------------------------------------------------


@EVERY_MODEL
def test_bfloat16_is_close(name):
    config = config_of(name)
    lm = LanguageModel.of(Transformer(config, dtype=jnp.bfloat16), random_params(config))
    text = random_text(2, 300)
    assert lm.read(text[:, :9]).memory.storage == "bfloat16"
    got, want = (model.logits(text) for model in (lm, model_of(name)))
    assert got.dtype == np.float32
    error = np.abs(got - want)
    assert 1e-4 < error.mean() < 0.05 * want.std() and error.max() < want.std()


@pytest.mark.parametrize("name", ["llama", "paper"])
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
    text, one = random_text(2, 4 * C), model_of(name)  # writing begins with a full window
    np.testing.assert_allclose(lm.logits(text), one.logits(text), atol=1e-4)
    np.testing.assert_allclose(lm.score(text).nats, one.score(text).nats, atol=1e-4)
    assert lm.generate(text, 40, temperature=0) == one.generate(text, 40, temperature=0)


# --- Programs ------------------------------------------------------------------------------------


def test_growing_memory_compiles_few_programs():
    """A text fed bit by bit."""
    lm = model_of("llama")
    text = random_text(1, 3000, seed=9)
    before = forward.run._cache_size()
    state = lm.read(text[:, :16])
    for start in range(16, 3000, 16):
        lm.read(text[:, start : start + 16], state=state)
    assert forward.run._cache_size() - before < 12
    whole = lm.logits(text[:, :64], state=state)
    assert np.isfinite(whole).all()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_reading_takes_is_the_memory_and_a_constant():
    """Peak resident memory of processes that score texts of two lengths."""
    program = """if True:
        import sys
        import jax, numpy as np
        from fot_jax.inference.language_model import LanguageModel
        from fot_jax.model import crossbatch
        from fot_jax.model.config import ModelConfig
        from fot_jax.model.transformer import Transformer
        from fot_jax.inference.state import MemoryConfig
        model = Transformer(ModelConfig(64, 64, 2, 8, 8, 512, 64, (1,), 512))
        tokens = np.zeros((1, 8), np.int32)
        params = model.init(jax.random.key(0), tokens, tokens, crossbatch.Plan())["params"]
        lm, length = LanguageModel.of(model, params), int(sys.argv[1])
        text = np.arange(length)[None] % 64
        lm.score(text[:, :1000])
        state = lm.read(text[:, :600], memory=MemoryConfig())
        lm.score(text, state=state)
        status = open("/proc/self/status").read()
        peak = int(status.split("VmHWM:")[1].split()[0])  # ru_maxrss would have the parent's
        print(peak * 1024, state.memory.nbytes)
    """
    peaks = {}
    for length in (1_900, 7_000):
        environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        argv = [sys.executable, "-c", program, str(length)]
        ran = subprocess.run(argv, capture_output=True, text=True, env=environment, check=True)
        peaks[length] = [int(word) for word in ran.stdout.split()]
    (short, of_short), (long, of_long) = peaks.values()
    added = of_long - of_short
    assert added > 5_000 * 32_768  # 8 heads x 512 x keys and values x 4 bytes
    assert abs(long - short - added) < 0.25 * added  # compiling alone differs by tens of MB


# --- Bad input -----------------------------------------------------------------------------------


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
    with pytest.raises(UserError, match="MemoryConfig.storage = 'int2': choose one of float32"):
        MemoryConfig(storage="int2")
    with pytest.raises(UserError, match="MemoryConfig.size = -1: give a number from 0"):
        MemoryConfig(-1)
    assert type(MemoryConfig(np.int64(32)).size) is int  # which memory.json has to hold
    for size in (1.5, 1e6, float("inf")):
        with pytest.raises(UserError, match="MemoryConfig.size = .*: give a whole number"):
            MemoryConfig(size)
    with pytest.raises(UserError, match="a state has a memory of its own, which cannot be changed"):
        lm.read(text, state=lm.read(text), memory=MemoryConfig(5))
    padded = np.arange(200) >= 64  # padding takes no slot
    lm.read(text, mask=padded[None], memory=MemoryConfig(72, ring=False))
    with pytest.raises(UserError, match="which needs 72"):
        lm.read(text, mask=padded[None], memory=MemoryConfig(71, ring=False))
    plain = dataclasses.replace(lm, config=dataclasses.replace(lm.config, memory_layers=()))
    for memory, said in (
        (MemoryConfig(100), "of 100 tokens"),
        (MemoryConfig(lookup=TopK(9)), "with TopK(k=9)"),
        (MemoryConfig(storage="int8"), "of int8"),
    ):
        message = f"a memory {re.escape(said)} for a model without memory layers"
        with pytest.raises(UserError, match=message):
            plain.read(text, memory=memory)
    for other in (dict(local_context=32), dict(memory_layers=(0,)), dict(memory_layers=())):
        another = dataclasses.replace(lm, config=dataclasses.replace(lm.config, **other))
        with pytest.raises(UserError, match="a state of another model, or on other devices: read"):
            another.read(text, state=lm.read(text))
        with pytest.raises(UserError, match="a state of another model, or on other devices: read"):
            another.remember(text[:, :5], state=lm.remember(text[:, :C]))
    params = jax.tree.map(lambda x: x + 1, lm.params)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("memory",))
    on_two = dataclasses.replace(
        lm,
        mesh=mesh,
        params=jax.device_put(lm.params, jax.NamedSharding(mesh, jax.sharding.PartitionSpec())),
    )
    for another in (dataclasses.replace(lm, params=params), on_two):  # of the same configuration
        state = another.read(text[:, :C])
        with pytest.raises(UserError, match="a state of another model, or on other devices"):
            lm.read(text, state=state)
        with pytest.raises(UserError, match="a state of another model, or on other devices"):
            lm.save_memory(state, "x")
    same = dataclasses.replace(lm, params=jax.tree.map(jnp.copy, lm.params))
    lm.read(text, state=same.read(text[:, :C]))
    with pytest.raises(UserError, match="2 documents for a state of 1: give as many"):
        lm.read(random_text(2, 5), state=lm.read(text))

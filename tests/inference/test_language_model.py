"""LanguageModel writes on, token by token, as the rules in NumPy float64 say."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import reading as rules
from readers import EVERY_MODEL, MODELS, C, by_rules, config_of, model_of, random_text, reach
from tiny import LLAMA, random_params

from fot_jax.common.errors import UserError
from fot_jax.inference import prefill
from fot_jax.inference import state as inference_state
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import MemoryConfig
from fot_jax.model.lora import KERNELS, Lora, joined
from fot_jax.model.transformer import Transformer

# --- Writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, length, last",
    [
        *(("llama", *each) for each in ((1, 64), (63, 64), (64, 64), (65, 32), (150, 32))),
        *((name, *each) for name in [*MODELS][1:] for each in ((64, 64), (150, 32))),
    ],
)
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
    new = model_of(name).generate(text, 70, temperature=0, mask=mask, last_context_length=32)
    for row in range(3):
        whole = np.concatenate([text[row], new[row]])
        valid = np.concatenate([mask[row], np.ones(70)])[:-1]
        want = by_rules(name, whole[:-1], [90] + [1] * 69, 32, valid)[89:]
        np.testing.assert_array_equal(want.argmax(-1), new[row])


@pytest.mark.parametrize(
    "name, temperature",
    [("llama", 0), ("llama without positions in memory layers", 1.0)],
)
def test_a_batch_is_written_as_each_prompt_alone(name, temperature):
    """Prompts of any lengths, whose windows overflow at different steps."""
    lm = model_of(name)
    prompts = [random_text(1, n, seed=n)[0].tolist() for n in (1, 30, 140, 210)]
    options = dict(temperature=temperature, top_p=0.9, last_context_length=40)
    together = lm.generate(prompts, 70, seed=5, **options)
    for row, prompt in enumerate(prompts):
        assert lm.generate(prompt, 70, seed=5 + row, **options) == together[row]
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


def test_text_ends_at_any_end_of_the_vocabulary():
    prompt = random_text(1, 20)[0].tolist()
    whole = model_of("llama").generate(prompt, 40, temperature=0)
    vocabulary = types.SimpleNamespace(
        **{"ends": (whole[12], whole[7]), "before": (1,), "after": (2,)},
        encode=lambda text: [len(text)],
        decode=list,
    )
    lm = dataclasses.replace(model_of("llama"), vocabulary=vocabulary)
    first = min(map(whole.index, vocabulary.ends))
    assert lm.generate(prompt, 40, temperature=0) == whole[:first]
    assert lm.generate(prompt, 40, temperature=0, stop=()) == whole
    assert lm.encode("abc") == [1, 3, 2] and lm.decode((4, 5)) == [4, 5]
    assert lm.encode("abc", continues=True) == [3]
    for call in (lambda: model_of("llama").encode("a"), lambda: model_of("llama").decode([1])):
        with pytest.raises(UserError, match="the checkpoint has no tokenizer: give tokens"):
            call()


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
    assert len(set(lm.generate(prompt, 60, temperature=1e38))) > 30  # any token


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


def test_until_ends_a_row_after_the_token():
    lm = model_of("llama")
    prompts = [random_text(1, n, seed=n)[0].tolist() for n in (20, 30)]
    whole = lm.generate(prompts, 40, temperature=0)
    seen = []

    def until(new):
        seen.append(list(new))
        return len(new) == (5 if new == whole[0][: len(new)] else 9)

    steps = list(lm.stream(prompts, 40, temperature=0, until=until))
    ended = [*whole[0][:5], *[None] * 4], whole[1][:9]
    assert steps == [list(pair) for pair in zip(*ended, strict=True)]
    assert len(seen) == 5 + 9
    state = lm.read(np.zeros((2, 1), int))
    new = lm.generate(prompts, 40, temperature=0, until=lambda row: len(row) == 5, state=state)
    more = random_text(2, 10, seed=3)
    got = lm.logits(more, state=state)
    for row in range(2):
        text = [0, *prompts[row], *new[row][:4], *more[row]]
        feeds = [1, len(prompts[row]), *[1] * 4, 10]
        np.testing.assert_allclose(got[row], by_rules("llama", text, feeds)[-10:], atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (None, 0.6), (8, 0.7), (1, 0.5), (99, 1.0)])
def test_tokens_are_drawn_among_those_of_transformers(top_k, top_p):
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    lm, count = model_of("llama"), 1000
    prompt = random_text(1, 20)[0].tolist()
    scores = torch.tensor(lm.logits([prompt])[:, -1])
    warpers = [TemperatureLogitsWarper(0.8), TopPLogitsWarper(top_p)]
    if top_k is not None:
        warpers.insert(1, TopKLogitsWarper(top_k))
    for warper in warpers:
        scores = warper(None, scores)
    want = scores.softmax(-1)[0].numpy()
    draw = functools.partial(lm.generate, max_new_tokens=1, temperature=0.8, seed=range(count))
    drawn = draw([prompt] * count, top_k=top_k, top_p=top_p)
    found = np.bincount([token for (token,) in drawn], minlength=len(want)) / count
    assert (found[want == 0] == 0).all()
    np.testing.assert_allclose(found, want, atol=5 * (0.25 / count) ** 0.5)


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
    assert lm.generate(prompt, 70, temperature=0, last_context_length=C) == new
    assert lm.generate(prompt, 0) == []


def test_a_model_without_memory_sees_all_that_fits(monkeypatch):
    """Beside what it writes; models with memory keep fewer tokens in the window."""
    monkeypatch.setattr(inference_state, "LAST_CONTEXT", 20)
    config = config_of("llama")
    plain = dataclasses.replace(config, memory_layers=())
    lm = LanguageModel.of(Transformer(plain), random_params(config))
    prompt = random_text(1, C - 8)[0].tolist()
    new = lm.generate(prompt, 8, temperature=0)
    where = rules.places([len(prompt) + 7], C, C)
    text = np.concatenate([prompt, new])[:-1]
    want = rules.logits(config, random_params(config), text, where, reach(where, 0))
    np.testing.assert_array_equal(want[len(prompt) - 1 :].argmax(-1), new)
    np.testing.assert_allclose(lm.logits([prompt])[0], want[: len(prompt)], atol=1e-4)
    # Read alone, it leaves half of the window to what comes.
    state = lm.read([prompt])
    assert state.places == [C // 2]
    assert lm.generate(new[:1], 7, temperature=0, state=state.copy()) == lm.generate(
        [*prompt[-C // 2 :], new[0]], 7, temperature=0
    )


def test_a_young_adapter_in_bfloat16():
    """Added to kernels as large as these, what it has learned would be rounded away."""
    config, text = config_of("llama"), random_text(32, C)
    params = jax.tree.map(
        lambda x: np.sign(x) * np.float32(3 / 16) if x.ndim == 3 else x, random_params(config)
    )
    adapters = Lora(8, 8.0).init(jax.random.key(0), params["layers"])
    rng = np.random.default_rng(0)
    for name in KERNELS:
        b = adapters[name]["b"]
        adapters[name]["b"] = np.float32(rng.normal(size=b.shape) * 2.0**-12)

    def of_adapters(dtype):
        model = Transformer(config, dtype=dtype)
        with_, without = (
            LanguageModel.of(model, each).logits(text)
            for each in (joined(params, adapters), params)
        )
        return with_ - without

    got, want = of_adapters(jnp.bfloat16), of_adapters(jnp.float32)
    assert np.vdot(got, want) / np.vdot(want, want) == pytest.approx(1, abs=0.2)


# --- Programs ------------------------------------------------------------------------------------


def test_a_token_needs_no_compilation_and_no_copy_of_memory():
    from fot_jax.inference import decode, forward

    lm = model_of("llama")
    prompt = random_text(1, 4500)[0].tolist()
    state = lm.read(prompt)
    lm.generate([1], 2, state=state.copy())
    compiled = decode.next_token._cache_size(), forward.evict._cache_size()
    lm.generate([1], 70, state=state.copy())  # while the window overflows
    assert (decode.next_token._cache_size(), forward.evict._cache_size()) == compiled
    args = forward.run.lower(
        c=lm.config,
        lookup=state.config.lookup,
        mesh=None,
        params=lm.params,
        cache=state.cache,
        memory=state.memory,
        tokens=np.ones((1, 1), np.int32),
        valid=np.ones((1, 1), bool),
        advance=np.ones(1, np.int32),
    )
    temporaries = args.compile().memory_analysis().temp_size_in_bytes
    # Scores of all slots, and what is made of them, take half as much: keys have 8 dimensions here.
    assert temporaries < state.memory.layers[0].k.x.nbytes


def test_asking_for_a_billion_tokens_takes_no_memory_before_they_come(monkeypatch):
    monkeypatch.setattr(prefill, "ROOM", 256)
    lm = model_of("llama")
    state = lm.read(random_text(1, 100))
    steps = lm.stream([[1]], 10**9, state=state, temperature=0)
    tokens = [next(steps) for _ in range(10)]
    assert len(tokens) == 10 and state.memory.slots < 1_000
    for _ in range(300):  # beyond the room that there was
        next(steps)
    assert state.memory.appended[0] > 300 and state.memory.slots < 2_000


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
        (
            dict(last_context_length=65),
            "last_context_length = 65: give a whole number from 1 to 64",
        ),
        (dict(last_context_length=0), "last_context_length = 0: give a whole number from 1 to 64"),
        (dict(last_context_length=20.0), "last_context_length = 20.0: give a whole number"),
        (dict(temperature=-1), "generate.temperature = -1: give 0 or more"),
        (dict(top_k=0), "generate.top_k = 0: give 1 or more"),
        (dict(top_p=1.5), "generate.top_p = 1.5: give a number from 0 to 1"),
        (dict(seed=-1), "generate.seed = -1: give a number from 0"),
        (dict(seed=[1, 2]), "2 seeds for 1 prompts: give one for each"),
        (dict(seed=1.5), "generate.seed = 1.5: give a whole number"),
        (dict(top_k=math.inf), "generate.top_k = inf: give a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            lm.generate([1], 1, **options)
    with pytest.raises(UserError, match="generate.max_new_tokens = -1: give a number from 0"):
        lm.generate([1], -1)

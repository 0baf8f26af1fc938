"""Our modelling files for transformers, against JAX and against the rules in NumPy float64."""

import copy
import dataclasses
import functools
import json
import os
import subprocess
import sys

import llamas
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import reading as rules
from tiny import LLAMA, PAPER, random_params
from torch._subclasses.fake_tensor import FakeTensorMode

from fot_jax import convert
from fot_jax.checkpoints import stream
from fot_jax.common.trees import leaves_by_path
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import MemoryConfig
from fot_jax.model.config import RopeScaling
from fot_jax.model.lookup import TopK
from fot_jax.model.transformer import Transformer
from fot_jax.pytorch import modeling_fot
from fot_jax.pytorch.configuration_fot import FotConfig, FotLlamaConfig
from fot_jax.pytorch.modeling_fot import (
    FotCache,
    FotForCausalLM,
    FotLlamaForCausalLM,
)

pytestmark = pytest.mark.torch

C = 32  # local context
V = LLAMA.vocab_size
MODELS = {
    "llama": LLAMA,
    "llama 3": dataclasses.replace(
        LLAMA,
        memory_scaling=0.3,
        num_kv_heads=1,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16),
        tie_embeddings=True,
    ),
    "llama, yarn": dataclasses.replace(
        LLAMA, head_dim=16, rope_scaling=RopeScaling(4.0, original_max_position=16, kind="yarn")
    ),
    "llama without positions in memory layers": dataclasses.replace(
        LLAMA, memory_positions=False, num_kv_heads=4
    ),
    "paper": PAPER,
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


@functools.cache
def config_of(name):
    return dataclasses.replace(MODELS[name], memory_layers=(0, 2), local_context=C)


@functools.cache
def ours(name):
    return LanguageModel.of(Transformer(config_of(name)), random_params(config_of(name)))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The directory of a model, converted once."""

    @functools.cache
    def of(name):
        return convert_to(tmp_path_factory.mktemp("converted"), config_of(name))

    return of


def convert_to(directory, config):
    arrays = {
        path: stream.StreamedArray(
            shape=x.shape,
            dtype=x.dtype,
            sliced=path.startswith("layers/"),
            read=lambda i, x=x: x if i is None else x[i],
        )
        for path, x in leaves_by_path(random_params(config)).items()
    }
    stream.save(directory / "run", config, arrays)
    convert.to_hugging_face(directory / "run", directory / "out")
    return directory / "out"


@pytest.fixture(scope="module")
def load(converted):
    def of(name, **changes):
        return type_of(name).from_pretrained(converted(name), **changes)

    return functools.cache(of)


def type_of(name):
    llama = name.startswith("llama") and "without" not in name
    return FotLlamaForCausalLM if llama else FotForCausalLM


def random_text(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, V, (rows, length), np.int32)


def logits(model, tokens, mask=None, **how):
    mask = None if mask is None else torch.tensor(mask.astype(int))
    return model(torch.tensor(tokens), attention_mask=mask, **how).logits.numpy()


# --- The same as JAX -----------------------------------------------------------------------------


def expected(name, text, last, mask=None):
    """Logits by the rules or, as these have no scaled positions, of JAX."""
    config = config_of(name)
    if config.rope_scaling is not None:
        return ours(name).logits(text, mask=mask, last_context_length=last)
    params, masks = random_params(config), [None] * len(text) if mask is None else mask
    return np.stack(
        [
            rules.read(config, params, row, [len(row)], last, valid)
            for row, valid in zip(text, masks, strict=True)
        ]
    )


@EVERY_MODEL
@pytest.mark.parametrize("last", [7, 32])
@pytest.mark.parametrize("length", [1, C, 2 * C - 5, 2 * C, 7 * C + 3])
def test_logits_of_any_length(load, name, length, last):
    text = random_text(2, length, seed=length)
    got = logits(load(name), text, last_context_length=last)
    np.testing.assert_allclose(got, expected(name, text, last), atol=1e-4)


@pytest.mark.parametrize(
    "name, storage", [("llama", "float16"), ("llama 3", "bfloat16"), ("paper", "bfloat16")]
)
def test_memory_of_another_type(load, name, storage):
    text = random_text(2, 7 * C)
    got = logits(load(name, mem_dtype=storage), text)
    want = ours(name).logits(text, memory=MemoryConfig(storage=storage))
    exact = ours(name).logits(text)
    # A value that is rounded the other way makes more of a difference than float32 does.
    assert np.abs(got - want).max() < 0.2 * np.abs(want - exact).max() < 0.1


@EVERY_MODEL
@pytest.mark.parametrize("length", [20, 150])
def test_left_padding(load, name, length):
    text = random_text(3, length, seed=1)
    mask = np.arange(length) >= np.array([0, 17, length - 9])[:, None]
    got = logits(load(name), text, mask, last_context_length=16)
    want = expected(name, text, 16, mask)
    np.testing.assert_allclose(got[mask], want[mask], atol=1e-4)
    other = np.where(mask, text, (text + 7) % V)
    np.testing.assert_array_equal(
        logits(load(name), other, mask, last_context_length=16)[mask], got[mask]
    )


@pytest.mark.parametrize(
    ("name", "k", "scores"),
    [
        *((name, 8, scores) for name in MODELS for scores in (2**26, 5000)),
        ("llama", 1, 2**26),
        ("paper", 1000, 2**26),
    ],
)
def test_the_best_keys_of_memory(load, name, k, scores, monkeypatch):
    monkeypatch.setattr(modeling_fot, "SCORES", scores)  # held at a time
    text = random_text(2, 150)
    mask = np.arange(150) >= np.array([0, 70])[:, None]
    got = logits(load(name, mem_topk=k), text, mask)
    memory = MemoryConfig(lookup=TopK(k))
    want = ours(name).logits(text, mask=mask, memory=memory)
    np.testing.assert_allclose(got[mask], want[mask], atol=1e-4)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(list(MODELS)),
    st.lists(st.sampled_from([1, 5, 18, 25, 32, 70]), min_size=2, max_size=5),
    st.sampled_from([7, 16, 32]),
)
def test_text_read_in_segments(load, name, feeds, last):
    text = random_text(2, sum(feeds), seed=sum(feeds))
    cache, got = FotCache(load(name).config), []
    state = ours(name).read(text[:, : feeds[0]], last_context_length=last)
    want = [ours(name).logits(text[:, : feeds[0]], last_context_length=last)]
    for start, length in zip(np.cumsum([0, *feeds]), feeds, strict=False):
        segment = text[:, start : start + length]
        got.append(logits(load(name), segment, last_context_length=last, past_key_values=cache))
        if start:
            want.append(ours(name).logits(segment, last_context_length=last, state=state))
    np.testing.assert_allclose(np.concatenate(got, 1), np.concatenate(want, 1), atol=1e-4)
    assert cache.get_seq_length() == sum(feeds)


@pytest.mark.parametrize(
    ("name", "length", "padded"),
    [*((name, 90, True) for name in MODELS), ("llama", 5, False), ("paper", 5, False)],
)
def test_the_most_likely_continuation(load, name, length, padded):
    text = random_text(2, length, seed=3)
    mask = np.arange(length) >= np.array([0, 3 * padded])[:, None]
    got = load(name).generate(
        torch.tensor(text),
        attention_mask=torch.tensor(mask.astype(int)),
        max_new_tokens=50,
        do_sample=False,
        last_context_length=16,
        eos_token_id=None,
        pad_token_id=0,
    )
    want = ours(name).generate(text, 50, temperature=0, mask=mask, last_context_length=16)
    assert got[:, length:].tolist() == want


def test_in_bfloat16(load):
    text = random_text(2, 5 * C)
    exact = logits(load("llama"), text)
    model = copy.deepcopy(load("llama")).to(torch.bfloat16)
    got = model(torch.tensor(text)).logits
    assert got.dtype == torch.bfloat16
    in_jax = LanguageModel.of(
        Transformer(config_of("llama"), dtype="bfloat16"), random_params(config_of("llama"))
    ).logits(text)
    error = np.abs(got.float().numpy() - exact).mean()
    assert error < 1.5 * np.abs(in_jax - exact).mean() < 0.2


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("first", [True, False])
def test_autocast_begins_or_ends_while_a_text_is_read(load, storage, first):
    """What was read in one type is read on in the other."""
    model, text = load("llama", mem_dtype=storage), torch.tensor(random_text(2, 150))
    exact = model(text[:, :80], last_context_length=16).past_key_values
    cache = FotCache(model.config)
    for start, stop in ((0, 80), (80, 90), (90, 150)):  # the second joins the first in the window
        with torch.autocast("cpu", torch.bfloat16, enabled=first == (start == 0)):
            got = model(text[:, start:stop], past_key_values=cache, last_context_length=16).logits
        if start:
            want = model(text[:, start:stop], past_key_values=exact, last_context_length=16).logits
            assert (got.float() - want).abs().mean() < 0.1


# --- What transformers does with it --------------------------------------------------------------


def test_rows_of_a_cache_are_repeated_and_chosen(load):
    model, books, more = load("paper"), random_text(2, 75), random_text(3, 9, seed=5)
    cache = FotCache(model.config)
    logits(model, books, past_key_values=cache)
    cache.batch_repeat_interleave(2)  # 0, 0, 1, 1
    cache.batch_select_indices(torch.tensor([1, 3, 2]))
    got = logits(model, more, past_key_values=cache)
    for row, book in enumerate((0, 1, 1)):
        alone = FotCache(model.config)
        logits(model, books[[book]], past_key_values=alone)
        want = logits(model, more[[row]], past_key_values=alone)
        np.testing.assert_allclose(got[[row]], want, atol=1e-4)


def test_a_book_is_read_once_and_asked_many_times(load):
    model = load("llama")
    book, questions = random_text(1, 200), random_text(2, 9, seed=5)
    cache = FotCache(model.config)
    model(torch.tensor(book), past_key_values=cache, logits_to_keep=1)
    assert repr(cache) == "FotCache(168 tokens in memory, 32 in the window)"
    for question in questions:
        tokens = np.concatenate((book[0], question))[None]
        how = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        whole = torch.tensor(tokens)
        how["attention_mask"] = torch.ones_like(whole)  # or tokens like pad_token_id are masked
        got = model.generate(whole, past_key_values=copy.deepcopy(cache), **how)
        state = ours("llama").read(book)
        want = ours("llama").generate(question[None], 50, temperature=0, state=state)
        assert got[0, tokens.shape[1] :].tolist() == want[0]
    assert cache.get_seq_length() == 200
    cache.reset()
    assert repr(cache) == "FotCache(0 tokens in memory, 0 in the window)"
    text = random_text(2, 75)
    np.testing.assert_array_equal(logits(model, text, past_key_values=cache), logits(model, text))


def test_sampling_streaming_and_beams(load):
    model, text = load("llama"), torch.tensor(random_text(1, 70))
    how = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": V}

    def sample(**more):
        torch.manual_seed(0)
        return model.generate(text, do_sample=True, top_p=0.9, temperature=0.7, **how, **more)

    class Streamer(transformers.generation.BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    streamer = Streamer()
    out = sample(streamer=streamer)
    assert out.shape == (1, 110) and torch.equal(out, sample())
    assert streamer.tokens == [*out[0].tolist(), "end"]
    several = sample(num_return_sequences=3)
    assert several.shape == (3, 110) and len({tuple(row.tolist()) for row in several}) == 3
    # The best of beams is at least as likely as the greedy continuation.
    greedy = model.generate(text, do_sample=False, num_beams=1, **how)
    beams = model.generate(
        text,
        do_sample=False,
        num_beams=4,
        num_return_sequences=4,
        output_scores=True,
        return_dict_in_generate=True,
        **how,
    )
    best = beams.sequences[:1]

    def likelihood(tokens):
        """Of what was written, read in the windows that it was written in."""
        cache = FotCache(model.config)
        parts = [model(part, past_key_values=cache).logits for part in tokens.split((70, C, 8), 1)]
        scores = torch.cat(parts, 1)[:, 69:-1].log_softmax(-1)
        return scores.gather(-1, tokens[:, 70:, None]).sum((1, 2))

    # Each beam's scores are of what that beam has read.
    np.testing.assert_allclose(beams.sequences_scores * 40, likelihood(beams.sequences), rtol=1e-4)
    assert best.shape == (1, 110) and likelihood(best) >= likelihood(greedy)
    first = greedy[0, 70].item()
    without = transformers.LogitsProcessorList(
        [transformers.SuppressTokensLogitsProcessor([first])]
    )
    assert first not in model.generate(text, None, without, do_sample=False, **how)[0, 70:]


def test_a_prompt_is_moved_to_the_model(load):
    with FakeTensorMode():
        x, mask = torch.zeros(1, 9, 32, device="mps"), torch.ones(1, 9, device="mps")
        how = {"inputs_embeds": x, "attention_mask": mask, "logits_to_keep": 1}
        got = load("llama").prepare_inputs_for_generation(None, **how)
    assert got["inputs_embeds"].device.type == got["attention_mask"].device.type == "cpu"
    assert got["logits_to_keep"] == 1


def test_a_model_without_memory_reads_a_whole_window(tmp_path):
    """Of more than the 1,024 tokens that are left of a text where there is a memory."""
    config = dataclasses.replace(PAPER, memory_layers=(), local_context=1_200)
    lm = LanguageModel.of(Transformer(config), random_params(config))
    model = FotForCausalLM.from_pretrained(convert_to(tmp_path, config))
    text = random_text(1, 1_150)
    np.testing.assert_allclose(logits(model, text), lm.logits(text), atol=1e-4)
    for length, new in ((620, 9), (1_195, 5), (1_199, 20)):  # has room, just so, not
        text = random_text(1, length, seed=new)
        how = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": V}
        got = model.generate(torch.tensor(text), attention_mask=torch.ones(1, length), **how)
        assert got[0, length:].tolist() == lm.generate(text[0], new, temperature=0)
    # Read to write on, it is whole where it fits, or else leaves room.
    np.testing.assert_allclose(
        logits(model, text[:, :900], logits_to_keep=1), lm.logits(text[:, :900])[:, -1:], atol=1e-4
    )
    text = random_text(1, 2_000)
    book, question = text[:, :1_990], text[:, 1_990:]
    how["past_key_values"] = model(torch.tensor(book), logits_to_keep=1).past_key_values
    got = model.generate(torch.tensor(text), attention_mask=torch.ones(1, 2_000), **how)
    want = lm.generate(question[0], new, temperature=0, state=lm.read(book[0]))
    assert got[0, 2_000:].tolist() == want


def test_few_logits_are_kept(load):
    text = random_text(2, 100)
    whole = logits(load("llama"), text, last_context_length=5)
    for kept in (1, 7, 40, 100):
        got = logits(load("llama"), text, last_context_length=5, logits_to_keep=kept)
        np.testing.assert_allclose(got, whole[:, -kept:], atol=1e-5)
    some = torch.tensor([3, 90])
    got = logits(load("llama"), text, last_context_length=5, logits_to_keep=some)
    np.testing.assert_allclose(got, whole[:, some.numpy()], atol=1e-5)


def test_loss_of_labels(load):
    text = random_text(2, 100)
    labels = np.where(np.arange(100) < 10, -100, text)
    given = {"input_ids": torch.tensor(text), "labels": torch.tensor(labels).long()}
    loss = load("llama")(**given).loss
    scores = ours("llama").logits(text)[:, :-1].astype(np.float64)
    log_z = np.log(np.exp(scores).sum(-1))
    of_targets = np.take_along_axis(scores, text[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(loss, (log_z - of_targets)[:, 9:].mean(), rtol=1e-5)
    # As Trainer wants it of a part of a batch: of twice as many targets, here.
    of_part = load("llama")(**given, num_items_in_batch=2 * of_targets[:, 9:].size).loss
    np.testing.assert_allclose(of_part, loss / 2, rtol=1e-5)


def test_embeddings_in_the_place_of_tokens(load):
    text = torch.tensor(random_text(1, 75))
    embedded = load("llama").get_input_embeddings()(text)
    got = load("llama")(inputs_embeds=embedded).logits
    assert torch.equal(got, load("llama")(text).logits)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"last_context_length": 33}, "last_context_length = 33: give 1 to 32"),
        ({"output_attentions": True}, "attentions and hidden states"),
        ({"last_context_length": 0}, "last_context_length = 0: give 1 to 32"),
        ({"attention_mask": torch.zeros(1, 5)}, "attention_mask of 5 tokens for 9: give all"),
        ({"attention_mask": torch.ones(1, 1, 9, 9)}, r"attention_mask of shape \(1, 1, 9, 9\)"),
    ],
)
def test_what_is_refused(load, how, message):
    with pytest.raises(ValueError, match=message):
        load("llama")(torch.tensor(random_text(1, 9)), **how)


@pytest.mark.parametrize("name", ["llama", "paper"])
def test_vectors_of_a_bfloat16_directory_are_computed_with_in_float32(converted, tmp_path, name):
    run = converted(name).parent / "run"
    convert.to_hugging_face(run, tmp_path / "out", "bfloat16")
    kind = type_of(name)
    half = kind.from_pretrained(tmp_path / "out")
    assert {x.dtype for n, x in half.named_parameters() if "log_scale" not in n} == {torch.bfloat16}
    assert all(x.dtype == torch.float32 for n, x in half.named_parameters() if "log_scale" in n)
    file = tmp_path / "out" / "model.safetensors"
    kinds = {n: x.dtype for n, x in llamas.load(file).items()}
    assert all((kind == np.float32) == ("log_scale" in n) for n, kind in kinds.items())
    # As others write it, with all in bfloat16.
    tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in llamas.load(file).items()}
    safetensors.numpy.save_file(tensors, file)
    model = kind.from_pretrained(tmp_path / "out", dtype=torch.float32, mem_dtype="float32")
    text = random_text(2, 100)
    want = LanguageModel.load(tmp_path / "out").logits(text, memory=MemoryConfig(storage="float32"))
    np.testing.assert_allclose(logits(model, text), want, atol=1e-4)


def test_generating_from_what_was_read(load):
    """Given the whole text, or what is new with the whole mask; else nobody knows what is new."""
    model, book, more = load("llama"), *map(torch.tensor, (random_text(1, 75), random_text(1, 9)))
    with torch.inference_mode():
        cache = model(book).past_key_values
    text = torch.cat((book, more), 1)
    how = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=V)
    state = ours("llama").read(book.numpy())
    want = torch.tensor(ours("llama").generate(more.numpy(), 20, temperature=0, state=state))
    mask = torch.ones_like(text)
    for new in (text, more):
        got = model.generate(new, attention_mask=mask, past_key_values=copy.deepcopy(cache), **how)
        assert torch.equal(got[:, new.shape[1] :], want)
    for new in (book, more):
        with pytest.raises(ValueError, match="tokens where 75 have been read: give the whole"):
            model.generate(new, past_key_values=copy.deepcopy(cache), **how)
    asked = transformers.GenerationConfig(use_cache=False, **how)
    for without_cache in ({"use_cache": False, **how}, {"generation_config": asked}):
        assert torch.equal(model.generate(text, **without_cache), model.generate(text, **how))
    assert asked.use_cache is False
    in_chunks = model.generate(text, prefill_chunk_size=75, **how)
    assert torch.equal(in_chunks[:, 84:], want)
    # A cache filled in inference mode can be read on from outside of it.
    assert torch.equal(model.generate(text, past_key_values=cache, **how)[:, 84:], want)


@pytest.mark.parametrize("name", ["llama 3", "paper"])
@pytest.mark.parametrize("new", [1, 40])
def test_what_was_read_is_hidden_later(load, name, new):
    """The padding of a row that ended early, which the mask tells of with the next text only."""
    model, text = load(name), torch.tensor(random_text(2, 90 + new + 40))
    mask = torch.ones_like(text)
    mask[1, 50:90] = 0  # of memory and of the window
    early, late = FotCache(model.config), FotCache(model.config)
    model(text[:, :90], attention_mask=mask[:, :90], past_key_values=early)
    model(text[:, :90], past_key_values=late)
    hidden, again = slice(90, 90 + new), slice(90 + new, None)
    how = {"attention_mask": mask[:, : 90 + new], "max_new_tokens": 9, "do_sample": False}
    how |= {"eos_token_id": None, "pad_token_id": V}
    written = model.generate(text[:, : 90 + new], past_key_values=copy.deepcopy(early), **how)
    got = model.generate(text[:, : 90 + new], past_key_values=copy.deepcopy(late), **how)
    assert torch.equal(got, written)
    want = model(text[:, hidden], past_key_values=early).logits
    got = model(text[:, hidden], attention_mask=how["attention_mask"], past_key_values=late).logits
    torch.testing.assert_close(got, want)
    want = model(text[:, again], past_key_values=early).logits
    # What was padding stays that, whatever a mask says of it later.
    ones = torch.ones_like(text)
    got = model(text[:, again], attention_mask=ones, past_key_values=late).logits
    torch.testing.assert_close(got, want)


def test_a_cache_of_another_kind_and_training_are_refused(load):
    model, text = load("llama"), torch.tensor(random_text(1, 9))
    cache = transformers.DynamicCache()
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache: give a FotCache"):
        model(text, past_key_values=cache)
    cache = model(text).past_key_values
    with pytest.raises(ValueError, match="2 rows for a cache of 1: batch_repeat_interleave it"):
        model(torch.cat((text, text)), past_key_values=cache)
    with pytest.raises(ValueError, match="no tokens: give at least one"):
        model(text[:, :0])
    with pytest.raises(NotImplementedError, match="cannot be taken back"):
        FotCache(model.config).crop(3)
    # On Apple's GPUs, transformers asks whether it may write a token too many and take it back.
    deferred = transformers.generation.utils.DeferredStopCheck
    for returned in (False, True):
        assert deferred.is_supported(torch.device("mps"), cache, returned, False) != returned
    for name, end in (("llama", "fot_jax, or .* as a LlamaForCausalLM$"), ("paper", "fot_jax$")):
        with pytest.raises(ValueError, match=f"reads and writes: call eval.*{end}"):
            copy.deepcopy(load(name)).train()(text)


# --- Directories ---------------------------------------------------------------------------------

FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
assert not any(name.startswith(("fot_jax", "jax")) for name in sys.modules)
for i, directory in enumerate(sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    text = torch.arange(150)[None] % 61
    one = model(text).logits
    other = f"{sys.argv[1]}/{i}"
    model.save_pretrained(other)
    again = AutoModelForCausalLM.from_pretrained(other, trust_remote_code=True)
    assert torch.equal(again(text).logits, one)
    assert again.config.mem_layers == [0, 2] and again.config.local_context == 32
    torch.save(one, f"{other}/logits.pt")
"""


def test_a_directory_is_all_that_is_needed(converted, load, tmp_path):
    """In a process without our package: loaded, saved, and loaded again."""
    out = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path, *map(converted, MODELS)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert "newly initialized" not in out.stderr and "FutureWarning" not in out.stderr
    for i, name in enumerate(MODELS):
        got = torch.load(tmp_path / f"{i}" / "logits.pt", weights_only=True).numpy()
        want = logits(load(name), np.arange(150, dtype=np.int32)[None] % 61)
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_paper_family_is_for_our_code_alone(converted):
    with pytest.raises(ValueError, match="trust_remote_code|model type `fot`"):
        transformers.AutoModelForCausalLM.from_pretrained(converted("paper"))
    values = json.loads((converted("paper") / "config.json").read_text())
    assert values["architectures"] == ["FotForCausalLM"] and values["model_type"] == "fot"


def test_a_pipeline(tmp_path):
    """Text in, text out, with tokenizer and all; in a process without our package."""
    from fot_jax.data.vocabulary import Bytes

    directory = tmp_path / "run"
    config = dataclasses.replace(config_of("llama"), vocab_size=258)
    values = leaves_by_path(random_params(config))
    arrays = {
        path: stream.StreamedArray(
            shape=x.shape,
            dtype=x.dtype,
            sliced=path.startswith("layers/"),
            read=lambda i, x=x: x if i is None else x[i],
        )
        for path, x in values.items()
    }
    stream.save(directory, config, arrays)
    Bytes().save(directory / "vocabulary")
    convert.to_hugging_face(directory, tmp_path / "out")
    program = (
        "import sys, transformers\n"
        "pipe = transformers.pipeline('text-generation', sys.argv[1], trust_remote_code=True)\n"
        "out = pipe(['A long text. ' * 9, 'B'], max_new_tokens=60, do_sample=False, batch_size=2)\n"
        "print([each[0]['generated_text'].encode() for each in out])\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "out"],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert out.returncode == 0, out.stderr
    assert "b'A long text. A long text." in out.stdout


def test_a_directory_of_longllama(tmp_path):
    """As its authors' code wrote them, read by class; AutoModel would run what they shipped."""
    llamas.save(tmp_path)
    llamas.edit(
        tmp_path,
        model_type="longllama",
        rope_parameters=None,
        mem_layers=[1],
        mem_dtype="float32",
        mem_positionals=True,
        mem_attention_grouping=None,
        last_context_length=8,
        torch_attention=False,
        gradient_checkpoint_every_ith=1,
    )
    model = FotLlamaForCausalLM.from_pretrained(tmp_path)
    text = llamas.random_tokens(2, 75)
    want = LanguageModel.load(tmp_path).logits(text)
    np.testing.assert_allclose(logits(model, text), want, atol=1e-4)


@pytest.mark.parametrize("kind", [FotConfig, FotLlamaConfig])
def test_configurations_come_back(tmp_path, kind):
    config = kind(
        vocab_size=61,
        hidden_size=32,
        num_attention_heads=4,
        mem_layers=[1],
        mem_positionals=False,
        mem_dtype="float16",
        mem_topk=5,
        last_context_length=9,
        rope_theta=7.0,
        local_context=20,
        tie_word_embeddings=True,
    )
    config.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    for name in ("mem_layers", "mem_positionals", "mem_dtype", "mem_topk", "last_context_length"):
        assert getattr(again, name) == getattr(config, name)
    assert again.rope_parameters == {"rope_theta": 7.0, "rope_type": "default"}
    assert again.local_context == 20 and again.tie_word_embeddings and again.head_dim == 8
    assert kind(mem_dtype=torch.float16).mem_dtype == "float16"
    changed = kind.from_pretrained(tmp_path, mem_dtype=torch.bfloat16, mem_layers=None)
    assert (changed.mem_dtype, changed.mem_layers) == ("bfloat16", [])
    for wrong, message in (
        ({"rope_scaling": {"rope_type": "su"}}, "rope scaling of type 'su' is not supported"),
        ({"mem_dtype": "int8"}, "mem_dtype = 'int8': choose float32, bfloat16 or float16"),
        ({"mem_topk": 0}, "mem_topk = 0: give 1 or more"),
        ({"mem_layers": [32]}, "give numbers of 32 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**wrong)
        if "rope_scaling" not in wrong:
            with pytest.raises(ValueError, match=message):
                kind.from_pretrained(tmp_path, **wrong)
    config.mem_topk = 0
    with pytest.raises(ValueError, match="mem_topk = 0"):
        (FotForCausalLM if kind is FotConfig else FotLlamaForCausalLM)(config)

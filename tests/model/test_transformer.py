"""The transformer against transformers' LLaMA, a float64 NumPy version, and causality."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.crossbatch import visibility
from tiny import (
    LLAMA,
    PAPER,
    forward,
    lane_segments,
    plan_of,
    random_params,
    random_tokens,
    shapes_of,
    tiny,
)

from fot_jax.common.errors import UserError
from fot_jax.hugging_face import config as configs
from fot_jax.inference.language_model import LanguageModel
from fot_jax.model import crossbatch
from fot_jax.model.config import ModelConfig, RopeScaling
from fot_jax.model.schemes import NoCrossbatch, Packed, PackedTable, PreviousContext
from fot_jax.model.transformer import Transformer, queries_keys_values

FAMILIES = pytest.mark.parametrize("family", [LLAMA, PAPER], ids=["llama", "paper"])


def logits_of(config, tokens, segments=None, scheme=None, **how):
    segments = np.ones_like(tokens) if segments is None else segments
    plan = crossbatch.Plan() if scheme is None else plan_of(config, scheme, tokens)
    params = random_params(config)
    return np.asarray(forward(config, params, tokens, segments, plan, **how))


# --- transformers' LlamaForCausalLM --------------------------------------------------------------


def to_transformers(c, params=None):
    """The same model in PyTorch: kernels there are [out, in], layers are separate."""
    import torch
    import transformers

    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling is not None:
        rope |= configs.content(c, "float32", {})["rope_scaling"]
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.mlp_dim,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_epsilon,
        tie_word_embeddings=c.tie_embeddings,
        max_position_embeddings=4096,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    if params is None:
        return model
    layers = params["layers"]
    weights = {
        "model.embed_tokens": params["embedding"],
        "model.norm": params["final_norm"]["scale"],
    }
    weights["lm_head"] = params["embedding"] if c.tie_embeddings else params["head"].T
    for i in range(c.num_layers):
        at = f"model.layers.{i}"
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
            weights[f"{at}.self_attn.{theirs}_proj"] = layers["attention"][ours][i].T
        for name in ("gate", "up", "down"):
            weights[f"{at}.mlp.{name}_proj"] = layers["mlp"][name][i].T
        weights[f"{at}.input_layernorm"] = layers["attention_norm"]["scale"][i]
        weights[f"{at}.post_attention_layernorm"] = layers["mlp_norm"]["scale"][i]
    state = {f"{k}.weight": torch.tensor(np.float32(v)) for k, v in weights.items()}
    model.load_state_dict(state, strict=True)
    return model


SCALED = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=32
)
LLAMAS = {
    "every head its keys": dict(num_kv_heads=4),
    "grouped queries, tied": dict(num_kv_heads=1, tie_embeddings=True),
    "wide heads": dict(head_dim=20),
    "rope theta of Code Llama": dict(rope_theta=1e6, norm_epsilon=1e-5),
    "yarn": dict(head_dim=16, rope_scaling=RopeScaling(4.0, original_max_position=32, kind="yarn")),
    "rope scaling of Llama 3": dict(rope_theta=500_000.0, head_dim=16, rope_scaling=SCALED),
}


@pytest.mark.parametrize("name", LLAMAS)
def test_equals_transformers(name):
    """Also with memory layers: while nothing is in memory, they are a LLaMA's."""
    import torch

    config = dataclasses.replace(LLAMA, local_context=96, **LLAMAS[name])
    tokens = random_tokens(config, 2, 96)
    model = to_transformers(config, random_params(config))
    with torch.no_grad():
        want = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert want.std() > 0.1
    plain = dataclasses.replace(config, memory_layers=())
    for ours in (logits_of(plain, tokens), logits_of(config, tokens)):
        np.testing.assert_allclose(ours, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["yarn", "rope scaling of Llama 3"])
def test_rope_scaling_matters_at_the_length_tested(name):
    config = dataclasses.replace(LLAMA, **LLAMAS[name])
    plain = dataclasses.replace(config, rope_scaling=None)
    tokens = random_tokens(config, 2, 96)
    assert np.abs(logits_of(config, tokens) - logits_of(plain, tokens)).max() > 1e-2


# --- A float64 version, written out -------------------------------------------------------------


def turn(x, theta):
    """Rotary positions as complex numbers: dimension i turns together with i + D/2."""
    T, half = x.shape[1], x.shape[-1] // 2
    angles = np.arange(T)[:, None] / theta ** (np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([z.real, z.imag], -1)


def float64_logits(c, params, tokens, seen):
    """`seen` [R, T, 2, R, T] as `visibility` gives it: which local and which context keys."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    R, T = tokens.shape

    def norm(x, w):
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon)
        return x * w["scale"] + w.get("bias", 0.0)

    x = p["embedding"][tokens]
    for layer in range(c.num_layers):
        w = jax.tree.map(lambda a, layer=layer: a[layer], p["layers"])
        remembers = layer in c.memory_layers
        h = norm(x, w["attention_norm"])
        q, k, v = (
            (h @ w["attention"][name]).reshape(R, T, -1, c.head_dim)
            for name in ("query", "key", "value")
        )
        if c.qk_norm:
            q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
            tau = np.exp(-w["attention"]["log_scale"])[:, None]
        else:
            tau = np.sqrt(c.head_dim)
        positions = c.memory_positions or not remembers
        q, k_local = (turn(a, c.rope_theta) if positions else a for a in (q, k))
        keys = np.repeat(np.stack([k_local, k]), c.num_heads // c.num_kv_heads, axis=3)
        values = np.repeat(np.stack([v, v]), c.num_heads // c.num_kv_heads, axis=3)
        visible = seen if remembers else seen * np.array([1, 0])[:, None, None]
        scores = np.einsum("rthd,cushd->rthcus", q / tau, keys)
        weights = np.exp(scores) * visible[:, :, None]
        weights /= weights.sum((3, 4, 5), keepdims=True)
        attended = np.einsum("rthcus,cushd->rthd", weights, values).reshape(R, T, -1)
        x = x + attended @ w["attention"]["out"]
        h = norm(x, w["mlp_norm"])
        up = h @ w["mlp"]["up"]
        if c.mlp == "swiglu":
            gate = h @ w["mlp"]["gate"]
            inner = gate / (1 + np.exp(-gate)) * up
        else:  # GELU in its tanh form
            inner = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + inner @ w["mlp"]["down"]
    return norm(x, p["final_norm"]) @ (p["embedding"].T if c.tie_embeddings else p["head"])


SCHEMES = [
    NoCrossbatch(),
    PreviousContext(d=1),
    PreviousContext(d=3),
    PreviousContext(d=2, w=2),
    Packed(pack=3, range=4),
    PackedTable(),
]


@pytest.mark.parametrize(
    "family, scheme",
    [
        *((LLAMA, scheme) for scheme in SCHEMES),
        (PAPER, PreviousContext(d=2, w=2)),
        (PAPER, Packed(pack=3, range=4)),
    ],
    ids=lambda x: x.norm if isinstance(x, ModelConfig) else str(x),
)
def test_equals_float64(family, scheme):
    config = dataclasses.replace(family, memory_layers=(0, 2))
    segments = lane_segments(4, scheme.windows, 6)
    tokens = random_tokens(config, len(segments), 6)
    got = logits_of(config, tokens, segments, scheme)
    seen = visibility(scheme, len(segments), len(segments), segments)
    want = float64_logits(config, random_params(config), tokens, seen)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


# --- What depends on what ------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES[2:], ids=str)
def test_tokens_influence_exactly_what_the_scheme_says(scheme):
    """The gradient of every position's logits in every token, against reachability layer by layer.

    Causality, isolation of documents within a window, and who reads whose contexts, in one: a
    gradient is zero, exactly, if and only if no path of attention leads there.
    """
    segments = lane_segments(4, scheme.windows, 4, seed=1)
    N = segments.size
    config = dataclasses.replace(LLAMA, vocab_size=N, memory_layers=(0, 2))
    tokens = np.arange(N, dtype=np.int32).reshape(segments.shape)  # no token occurs twice
    params, plan = random_params(config), plan_of(config, scheme, tokens)

    @jax.jit
    def influence(embedding):
        def outputs(embedding):
            with_it = {**params, "embedding": embedding}
            return forward(config, with_it, tokens, segments, plan).reshape(N, -1) @ np.arange(N)

        backward = jax.vjp(outputs, embedding)[1]
        return jax.lax.map(lambda at: jnp.abs(backward(at)[0]).sum(-1), jnp.eye(N)) > 0

    seen = visibility(scheme, len(segments), len(segments), segments)
    local, contexts = (seen[:, :, i].reshape(N, N) for i in (0, 1))
    reaches = np.eye(N, dtype=bool)
    for layer in range(config.num_layers):
        sees = local | contexts if layer in config.memory_layers else local
        reaches = (np.eye(N, dtype=bool) | sees) @ reaches
    np.testing.assert_array_equal(influence(params["embedding"]), reaches)


@FAMILIES
def test_a_document_inside_a_window_reads_as_if_alone(family):
    """Other documents of the window hide, and rotary positions only matter relatively."""
    tokens = random_tokens(family, 1, 12)
    alone = logits_of(family, tokens[:, 7:])
    segments = np.repeat([[3, 5]], [7, 5], axis=1).astype(np.int32)
    np.testing.assert_allclose(logits_of(family, tokens, segments)[:, 7:], alone, atol=2e-5)


@pytest.mark.parametrize("memory_layers", [(), (0, 1)], ids=str)
@pytest.mark.parametrize("scheme", [PreviousContext(d=2, w=2), Packed(pack=3, range=4)], ids=str)
def test_kept_rows_are_those_of_the_whole_output(scheme, memory_layers):
    config = dataclasses.replace(LLAMA, memory_layers=memory_layers)
    segments = lane_segments(3, scheme.windows, 6)
    tokens = random_tokens(config, len(segments), 6)
    whole = logits_of(config, tokens, segments, scheme)
    kept = logits_of(config, tokens, segments, scheme, keep=scheme)
    if isinstance(scheme, PreviousContext):  # the last window of each lane
        whole = whole[scheme.w :: scheme.w + 1]
    np.testing.assert_allclose(kept, whole, atol=1e-5)


# --- Memory at inference -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, scheme, memory_layers",
    [
        (LLAMA, PreviousContext(d=1), (1, 2)),
        (LLAMA, PreviousContext(d=1, w=3), (2,)),  # w > 1: the same with one memory layer only
        (LLAMA, PackedTable(((0, 0), (1, 0), (2, 0), (3, 0))), (1, 2)),
        (PAPER, PreviousContext(d=1), (1, 2)),
    ],
    ids=lambda x: "" if isinstance(x, ModelConfig) else str(x),
)
def test_memory_is_what_crossbatch_trained_for(family, scheme, memory_layers):
    """The training view of a document is its inference view: the same logits, to rounding."""
    config = dataclasses.replace(family, memory_layers=memory_layers, local_context=6)
    windows = scheme.windows
    tokens = random_tokens(config, 3, windows * 6)
    tokens[:, :6] = tokens[:, -6:]
    lm = LanguageModel.of(Transformer(config), random_params(config))
    read = lm.logits(tokens, last_context_length=6).reshape(3, windows, 6, -1)
    rows = tokens.reshape(3 * windows, 6)
    segments = np.repeat(np.arange(1, 4, dtype=np.int32), windows)[:, None] * np.ones_like(rows)
    trained = logits_of(config, rows, segments, scheme).reshape(read.shape)
    np.testing.assert_allclose(trained[:, -1], read[:, -1], atol=1e-5)
    # The memory is of consequence: a window of the same tokens read first gives something else.
    assert np.abs(read[:, 0] - read[:, -1]).max() > 1e-2


# --- Precision, recomputation, size of the program -----------------------------------------------


def gradient(config, scheme, **how):
    """Compiled (params, tokens, segments) -> ((loss, logits), gradients)."""
    model = Transformer(config, **how)

    def loss(params, tokens, segments):
        plan = plan_of(config, scheme, tokens)
        out = model.apply({"params": params}, tokens, segments, plan)
        logits = model.apply({"params": params}, out.hidden, method="logits")
        return (jax.nn.logsumexp(logits, -1) - logits[..., 0]).mean(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_remat_changes_nothing():
    config = dataclasses.replace(PAPER, mlp="swiglu", num_kv_heads=2, num_layers=2)
    scheme = PreviousContext(d=3)
    segments = lane_segments(3, 2, 6)
    tokens = random_tokens(config, 6, 6)
    args = (random_params(config), tokens, segments)
    (loss, _), grads = gradient(config, scheme)(*args)
    for remat in ("dots", "full"):
        (other, _), others = gradient(config, scheme, remat=remat)(*args)
        np.testing.assert_allclose(other, loss, rtol=1e-6)
        for path, want in jax.tree_util.tree_leaves_with_path(grads):
            got = functools.reduce(lambda tree, key: tree[key.key], path, others)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6, err_msg=str(path))
            assert np.abs(want).max() > 0


def test_gradient_of_a_batch_is_the_mean_of_its_lanes():
    """Rows that see nothing of each other; sizes that no power of two divides.

    Large enough for compiled loops to be cut into tasks, which jaxlib 0.10.2 does wrongly on CPUs
    for some sums (jax issue 39103).
    """
    config = dataclasses.replace(PAPER, hidden_size=24, num_heads=3, num_kv_heads=3)
    tokens = random_tokens(config, 45, 100)
    segments = np.ones_like(tokens)
    of = functools.partial(gradient(config, NoCrossbatch()), random_params(config))
    whole = of(tokens, segments)[1]
    lanes = [of(tokens[i : i + 1], segments[i : i + 1])[1] for i in range(len(tokens))]
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *lanes)
    for got, want in zip(jax.tree.leaves(whole), jax.tree.leaves(mean), strict=True):
        assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)


@FAMILIES
@pytest.mark.parametrize("memory_layers", [(), (0, 1, 2)], ids=["scanned", "memory layers"])
def test_remat_keeps_less_for_the_backward_pass(family, memory_layers):
    """What the forward pass leaves for the backward one; in both kinds of layers."""
    config = dataclasses.replace(family, mlp_dim=256, memory_layers=memory_layers)
    tokens = random_tokens(config, 128, 64)
    plan = plan_of(config, Packed(4, 3), tokens)

    def kept_bytes(remat):
        model = Transformer(config, remat=remat)

        def hidden(params):
            return model.apply({"params": params}, tokens, np.ones_like(tokens), plan).hidden

        backward = jax.eval_shape(lambda params: jax.vjp(hidden, params)[1], shapes_of(config))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

    none, dots, full = (kept_bytes(remat) for remat in ("none", "dots", "full"))
    assert full < dots / 2 and dots < none / 2


def test_remat_saves_temporaries():
    """In the compiled program. XLA's CPU backend undoes recomputation outside of loops, so most
    layers here are scanned ones."""
    config = dataclasses.replace(LLAMA, num_layers=7, mlp_dim=256, memory_layers=(6,))
    tokens = random_tokens(config, 16, 64)

    def temporaries(remat):
        step = gradient(config, Packed(4, 3), remat=remat)
        compiled = step.lower(shapes_of(config), tokens, np.ones_like(tokens)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("full") < temporaries("none") / 2


def test_program_does_not_grow_with_depth():
    """Layers between memory layers are scanned: the lowered program has the same lines."""

    def lines(num_layers):
        config = dataclasses.replace(
            LLAMA, num_layers=num_layers, memory_layers=(num_layers // 3, num_layers * 2 // 3)
        )
        tokens = random_tokens(config, 8, 8)
        step = gradient(config, Packed(4, 3), remat="full")
        lowered = step.lower(shapes_of(config), tokens, np.ones_like(tokens))
        return len(lowered.as_text().splitlines())

    assert lines(9) == lines(27)


@FAMILIES
def test_bfloat16_is_close_and_parameters_stay_float32(family):
    scheme = PreviousContext(d=2)
    segments = lane_segments(3, 2, 8)
    tokens = random_tokens(family, 6, 8)
    args = (random_params(family), tokens, segments)

    def run(dtype):
        return jax.tree.map(np.asarray, gradient(family, scheme, dtype=dtype)(*args))

    (_, want), wanted = run(jnp.float32)
    (_, got), grads = run(jnp.bfloat16)
    assert got.dtype == np.float32  # logits are float32 whatever the compute type
    assert 1e-4 < (got - want).std() / want.std() < 0.05
    shapes = shapes_of(family, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves((shapes, grads))} == {np.dtype(np.float32)}
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_factors_of_all_queries_are_not_rounded_to_bfloat16(qk_norm):
    """1 / sqrt(100), temperatures: all scores would be wrong alike, where others' errors cancel."""
    config = tiny(head_dim=100, qk_norm=qk_norm)
    rng = np.random.default_rng(0)
    layer = jax.tree.map(lambda x: jnp.bfloat16(x[0]), random_params(config)["layers"])
    if qk_norm:
        temperatures = jnp.log(jnp.linspace(3.1, 5.3, config.num_heads))
        layer["attention"]["log_scale"] = temperatures.astype(jnp.float32)
    x = jnp.bfloat16(rng.normal(size=(8, 64, config.hidden_size)))
    got, want = (
        np.float64(queries_keys_values(config, layer, x.astype(dtype))[0])
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    of_heads = (got * want).sum((0, 1, 3)) / (want * want).sum((0, 1, 3))
    np.testing.assert_allclose(of_heads, 1, atol=4e-4)


def test_the_gradient_of_a_frequent_token_is_not_summed_in_bfloat16():
    """There a sum of equal terms stops at 256 of them; a batch has a space thousands of times."""
    config = tiny(num_layers=1, memory_layers=(), local_context=64)
    tokens = random_tokens(config, 64, 64)
    tokens[:, ::2] = 7
    plan, segments = crossbatch.Plan(), np.ones_like(tokens)

    def of_token(dtype):
        def total(params):
            model = Transformer(config, dtype=dtype)
            hidden = model.apply({"params": params}, tokens, segments, plan).hidden
            return hidden.astype(jnp.float32).sum()

        return np.asarray(jax.jit(jax.grad(total))(random_params(config))["embedding"][7])

    got, want = of_token(jnp.bfloat16), of_token(jnp.float32)
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


# --- Bad input -----------------------------------------------------------------------------------


SIZES = [each.name for each in dataclasses.fields(ModelConfig) if each.type == "int"]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, 2**31, 2**40, 2**63, 8.0, True, "8", None])
def test_sizes_have_bounds(name, value):
    """A slip of the keyboard is said, and no shape or table is made of it."""
    with pytest.raises(
        UserError, match=rf"model.{name} = .*: give a whole number from 1 to [\d,]+"
    ):
        dataclasses.replace(LLAMA, **{name: value})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_heads=3), "model.num_heads = 3 is not a multiple of model.num_kv_heads = 2"),
        (dict(head_dim=7), "model.head_dim = 7 is odd"),
        (dict(num_layers=0), "model.num_layers = 0: give a whole number from 1 to 16,384"),
        (dict(hidden_size=32.0), "model.hidden_size = 32.0: give a whole number"),
        (dict(memory_layers=(1, 4)), "memory_layers has 4, but layers are numbered 0 … 2"),
        (dict(memory_layers=(-1,)), "memory_layers has -1, but layers are numbered 0 … 2"),
        (dict(norm="batchnorm"), "model.norm = 'batchnorm': choose one of rmsnorm, layernorm"),
        (dict(mlp="relu"), "model.mlp = 'relu': choose one of swiglu, gelu"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(LLAMA, **change)


def test_bad_remat():
    with pytest.raises(UserError, match="remat = 'some': choose one of none, dots, full"):
        logits_of(LLAMA, random_tokens(LLAMA, 1, 4), remat="some")

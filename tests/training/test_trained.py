"""Training a part of the parameters, or adapters, against the float64 gradient of all of them."""

import dataclasses
import functools

import jax
import numpy as np
import peft
import pytest
import runs
import torch
import transformers
from oracles.training_step import gradient
from test_step import SGD, T, assert_gradient, assert_update, make_batch
from tiny import LLAMA, PAPER, random_params

from fot_jax import LanguageModel
from fot_jax.common.errors import UserError
from fot_jax.common.trees import leaves_by_path, tree_of_leaves
from fot_jax.model import crossbatch
from fot_jax.model.lora import KERNELS, Lora, joined
from fot_jax.model.schemes import PreviousContext
from fot_jax.model.trained import select
from fot_jax.model.transformer import Transformer
from fot_jax.training import partitioning
from fot_jax.training.optimizers import adafactor, adamw
from fot_jax.training.partitioning import MeshShape
from fot_jax.training.step import TrainState, make_train_step

CONFIG = dataclasses.replace(LLAMA, vocab_size=64, num_layers=4, local_context=T)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
DEEPER = dataclasses.replace(PAPER, vocab_size=64, memory_layers=(0, 2), local_context=T)
SCHEME, LANES, GROUP = PreviousContext(d=3), 16, 8


def with_adapters(config, lora):
    """Random parameters, whose adapters change what the model does; and the same ones merged."""
    params = random_params(config)
    rng = np.random.default_rng(1)
    if lora is None:
        return params, params
    adapters = lora.init(jax.random.key(0), params["layers"])
    adapters = jax.tree.map(
        lambda x: np.float32(0.2 * rng.normal(size=x.shape)) if x.ndim == 3 else np.asarray(x),
        adapters,
    )
    merged = leaves_by_path(params)
    for name in lora.kernels:
        if name in adapters:
            a, b = (np.float64(adapters[name][x]) for x in "ab")
            path = f"layers/{KERNELS[name]}/{name}"
            merged[path] = merged[path] + lora.alpha / lora.rank * np.einsum("ler,lrf->lef", a, b)
    return joined(params, adapters), tree_of_leaves(merged)


@functools.cache
def expected(part):
    """Parameters, a batch, and the gradient of everything, adapters too, by the chain rule."""
    config, _, lora, _ = PARTS[part]
    params, merged = with_adapters(config, lora)
    batch = make_batch(config, SCHEME, LANES)
    of_merged, _ = gradient(config, SCHEME, merged, batch, GROUP)
    for name in KERNELS if lora else ():
        if (adapter := params["layers"]["lora"].get(name)) is not None:
            of_kernel = lora.alpha / lora.rank * of_merged["layers"][KERNELS[name]][name]
            of_merged["layers"].setdefault("lora", {})[name] = {
                "a": np.einsum("lef,lrf->ler", of_kernel, adapter["b"]),
                "b": np.einsum("lef,ler->lrf", of_kernel, adapter["a"]),
            }
    return params, batch, of_merged


PARTS = {
    "layers of memory": (CONFIG, ("memory_layers/*",), None, {"layers/mlp/down": [1]}),
    "apart": (
        *(
            CONFIG,
            ("layers/0/mlp/up", "layers/[23]/mlp/*", "layers/3/attention/*", "final_norm/*"),
            None,
        ),
        {"layers/mlp/up": [0, 2, 3], "layers/mlp/gate": [2, 3], "final_norm/scale": None},
    ),
    "whole arrays": (TIED, ("embedding", "layers/*/attention/query"), None, {"embedding": None}),
    "adapters": (DEEPER, None, Lora(2, 3.0), {"layers/lora/up/a": [0, 1, 2]}),
    "adapters beside": (
        *(CONFIG, ("memory_layers/*/attention/*", "head"), Lora(3, 1.0, ("gate", "down"))),
        {"head": None, "layers/lora/gate/b": [0, 1, 2, 3], "layers/attention/out": [1]},
    ),
}


IN_TWO, ON_A_MESH = dict(accumulation=2, remat="dots"), dict(mesh=(1, 4, 2), remat="full")
OTHERWISE = [("apart", ON_A_MESH), ("adapters", IN_TWO), ("adapters beside", ON_A_MESH)]


@pytest.mark.parametrize(
    "part, how",
    [
        *((part, {}) for part in PARTS),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERWISE),
    ],
    ids=str,
)
def test_the_part_is_trained_and_nothing_else(part, how):
    config, patterns, lora, some = PARTS[part]
    params, batch, of_all = expected(part)
    trained = select(params, config, patterns or ())
    assert some.items() <= {p: x and list(x) for p, x in trained.parameters}.items()
    mesh = MeshShape(*how["mesh"]).make() if "mesh" in how else None
    accumulation = how.get("accumulation", 1)
    plan = crossbatch.make_plan(
        SCHEME,
        2 * LANES // accumulation,
        group_rows=GROUP,
        mesh=mesh,
        heads=config.num_heads,
        window=T,
    )
    model = Transformer(config, remat=how.get("remat", "none"), lora=lora, trained=trained)
    state = TrainState(np.int32(7), params, SGD.init(trained.take(params)))
    if mesh is not None:
        state = jax.device_put(state, partitioning.shardings(state, mesh))
        batch = jax.device_put(batch, partitioning.rows(mesh))
    else:
        state = jax.tree.map(np.array, state)
    after, info = make_train_step(model, SGD, SCHEME, plan, accumulation)(state, batch)

    want = trained.take(of_all)
    assert_gradient(after.opt_state[0].trace, want)
    assert_update(trained.take(params), trained.take(after.params), want)
    squares = [np.square(g).sum() for g in jax.tree.leaves(want)]
    np.testing.assert_allclose(info.grad_norm, np.sqrt(sum(squares)), rtol=1e-5)
    before, now = leaves_by_path(params), leaves_by_path(after.params)
    layers_of = dict(trained.parameters)
    for path, leaf in before.items():
        layers = layers_of.get(path, ())
        if layers is not None:
            others = [i for i in range(len(leaf)) if i not in layers]
            np.testing.assert_array_equal(now[path][np.array(others, int)], leaf[others], path)


# --- Whole runs ----------------------------------------------------------------------------------

LORA = """
train.lora = @Lora()
Lora.rank = 2
train.trainable = ("memory_layers/*/attention/*",)
"""


@pytest.mark.slow
def test_a_run_is_resumed_converted_and_trained_on(tmp_path, one_device):
    """Adapters, and beside them a part of the kernels."""
    experiment = runs.write(tmp_path, runs.DICTIONARY + LORA)
    assert runs.train(experiment, tmp_path / "base", "train.lora = None") == 0
    start = f'train.initialize_from = "{tmp_path / "base"}"'
    for steps in (4, 12):
        assert runs.train(experiment, tmp_path / "twice", start, f"train.steps = {steps}") == 0
    assert runs.train(experiment, tmp_path / "once", start) == 0
    assert runs.training_curve(tmp_path / "twice") == runs.training_curve(tmp_path / "once")
    runs.assert_same_parameters(tmp_path / "twice", tmp_path / "once")

    lm = LanguageModel.load(tmp_path / "once")
    tokens = np.arange(40)[None] % 64
    assert not np.allclose(LanguageModel.load(tmp_path / "base").logits(tokens), lm.logits(tokens))
    convert = ["convert", "to-hf", str(tmp_path / "once"), str(tmp_path / "hf")]
    assert runs.cli.main(convert) == 0
    there = LanguageModel.load(tmp_path / "hf")
    np.testing.assert_allclose(there.logits(tokens), lm.logits(tokens), atol=1e-5)
    start = f'train.initialize_from = "{tmp_path / "once"}"'
    at_rest = "constant_rate.value = 0.0"
    for name, lora in (("merged", "train.lora = None"), ("adapted anew", "Lora.rank = 3")):
        changes = (start, "train.steps = 1", at_rest, lora)
        assert runs.train(experiment, tmp_path / name, *changes) == 0
        again = LanguageModel.load(tmp_path / name)
        np.testing.assert_allclose(again.logits(tokens), lm.logits(tokens), atol=1e-5)


@pytest.mark.slow
def test_peft_reads_the_adapters(tmp_path, one_device, capsys):
    experiment = runs.write(tmp_path, runs.DICTIONARY + LORA + "train.trainable = ()")
    base, adapted = tmp_path / "base", tmp_path / "adapted"
    assert runs.train(experiment, base, "train.lora = None", "train.trainable = None") == 0
    start = f'train.initialize_from = "{base}"'
    assert runs.train(experiment, adapted, start, 'Lora.kernels = ("value", "up", "down")') == 0

    assert runs.cli.main(["convert", "to-hf", str(base), str(tmp_path / "hf")]) == 0
    assert runs.cli.main(["convert", "to-peft", str(adapted), str(tmp_path / "peft")]) == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    both = peft.PeftModel.from_pretrained(plain, tmp_path / "peft")
    tokens = np.arange(12)[None] % 64
    with torch.no_grad():
        got = both(torch.tensor(tokens)).logits.numpy()
    want = LanguageModel.load(adapted).logits(tokens)
    np.testing.assert_allclose(got, want, atol=1e-5)
    with both.disable_adapter(), torch.no_grad():
        without = both(torch.tensor(tokens)).logits.numpy()
    assert np.abs(without - want).max() > 1e-2

    capsys.readouterr()
    assert runs.cli.main(["convert", "to-peft", str(base), str(tmp_path / "none")]) == 2
    assert "has no adapters" in capsys.readouterr().err
    beside = 'train.trainable = ("embedding",)', "train.steps = 1"
    assert runs.train(experiment, tmp_path / "beside", *beside) == 0
    assert runs.cli.main(["convert", "to-peft", str(tmp_path / "beside"), str(tmp_path / "x")]) == 2
    assert "embedding were trained beside the adapters" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_dry_run_says_how_much_trains(tmp_path, capsys):
    """Layer 1 of 2 trains its attention; adapters of rank 2 stand at 7 kernels of both."""
    experiment = runs.write(tmp_path, runs.DICTIONARY + LORA)
    assert runs.cli.main([*runs.arguments(experiment, tmp_path / "run"), "--dry_run"]) == 0
    adapters = 2 * (4 * (16 + 16) + 3 * (16 + 32))
    trains = 2 * adapters + 4 * 16 * 16
    everything = runs.PARAMETERS + 2 * adapters + 2
    said = capsys.readouterr().out
    assert said.startswith(f"{everything:,} parameters ({trains:,} of them train)")


def test_cached_contexts_train_in_part(tmp_path, one_device):
    """The baseline of Memorizing Transformers (paper §5.4)."""
    experiment = runs.write(tmp_path, runs.DICTIONARY + LORA)
    scheme = "train.scheme = @CachedContext()", "CachedContext.tokens = 16"
    assert runs.train(experiment, tmp_path / "run", *scheme, "train.steps = 2") == 0
    _, row = runs.training_curve(tmp_path / "run")  # the first has definitions alone, and no loss
    assert row["grad_norm"] > 0 and row["skipped"] == 0


# --- What is refused -----------------------------------------------------------------------------


def test_a_part_that_cannot_be():
    with pytest.raises(UserError, match=r"'layers/7/\*'.*layers/0/attention/query"):
        select(random_params(CONFIG), CONFIG, ("layers/7/*",))
    with pytest.raises(UserError, match="nothing trains"):
        select(random_params(CONFIG), CONFIG, ())
    with pytest.raises(UserError, match=r"\('gate',\): the model has none"):
        Lora(kernels=("gate",)).init(jax.random.key(0), random_params(DEEPER)["layers"])


def test_a_run_goes_on_with_the_part_it_began_with(tmp_path, one_device, capsys):
    experiment = runs.write(tmp_path, runs.DICTIONARY + "train.steps = 1")
    adapted = ("train.lora = @Lora()", "Lora.rank = 2")
    first = ('train.trainable = ("layers/0/attention/*",)',)
    assert runs.train(experiment, tmp_path / "adapted", *adapted) == 0
    assert runs.train(experiment, tmp_path / "first", *first) == 0
    before = runs.files(tmp_path)
    for workdir, changed, said in (
        ("adapted", (*adapted, "Lora.alpha = 1"), "alpha = 32, and this experiment has 1"),
        (
            *("first", ('train.trainable = ("layers/1/attention/*",)',)),
            "of layers/attention/key layers 0 trained before, and layers 1 in this experiment",
        ),
    ):
        again = runs.arguments(experiment, tmp_path / workdir, *changed, "train.steps = 2")
        assert said in runs.refused(capsys, *again)
    assert runs.files(tmp_path) == before
    same = 'train.trainable = ("layers/0/*/query", "layers/0/attention/*")', "train.steps = 2"
    assert runs.train(experiment, tmp_path / "first", *same) == 0


def test_adafactor_takes_the_same_layers_of_every_array():
    params = random_params(CONFIG)
    part = select(params, CONFIG, ("layers/1/*", "layers/2/mlp/*")).take(params)
    adamw(0.1).init(part)
    with pytest.raises(UserError, match="adafactor"):
        adafactor(0.1).init(part)


def test_adafactor_trains_what_is_of_no_layer():
    params = random_params(CONFIG)
    part = select(params, CONFIG, ("embedding", "layers/1/*")).take(params)
    alone = {"embedding": part["embedding"]}
    update = adafactor(0.1)
    both, _ = update.update(part, update.init(part), part)
    one, _ = update.update(alone, update.init(alone), alone)
    np.testing.assert_allclose(both["embedding"], one["embedding"], rtol=1e-6)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(rank=0), "Lora.rank = 0"),
        (dict(alpha=0.0), "Lora.alpha"),
        (dict(kernels=("q_proj",)), "'q_proj': choose from query, key"),
        (dict(kernels=()), "give one or more"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be(arguments, said):
    with pytest.raises(UserError, match=said):
        Lora(**arguments)

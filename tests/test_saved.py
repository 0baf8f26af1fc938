"""What earlier versions saved is read, and training goes on from it (tests/saved/README.md)."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from runs import curve

from fot_jax import LanguageModel
from fot_jax.checkpoints import manager as checkpoint
from fot_jax.checkpoints.items import read_data
from fot_jax.data.vocabulary import Symbols, load_vocabulary

SAVED = Path(__file__).parent / "saved"
V1 = SAVED / "v1"
STOPPED_AFTER, STEPS = 8, 12
TEXT = np.random.default_rng(0).integers(4, 64, 60).tolist()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run of config.gin from the start, which this code and machine do alike."""
    workdir = tmp_path_factory.mktemp("unbroken")
    with runs.first_devices(pytest.MonkeyPatch(), 1):
        assert runs.train(V1 / "run" / "config.gin", workdir, "Checkpoints.keep_last = 9") == 0
    return workdir


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(V1 / "run", workdir)
    with runs.first_devices(pytest.MonkeyPatch(), 1):
        assert runs.train(workdir / "config.gin", workdir) == 0
    return workdir


def same_bits(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_resumes_as_the_unbroken_run_went_on(resumed, unbroken):
    saved = V1 / "run" / "checkpoints" / str(STOPPED_AFTER)
    here = unbroken / "checkpoints" / str(STOPPED_AFTER)
    # Another CPU or version of XLA may round otherwise, also in the steps before the fixture.
    exactly = same_bits(runs.parameters(saved), runs.parameters(here))
    rows, expected = curve(resumed), curve(unbroken)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    if exactly:
        assert rows == expected
        runs.assert_same_parameters(resumed, unbroken)
    for row, other in zip(rows, expected, strict=True):
        # 12 steps in float32: some 1e-6 is what another order of the same sums may make of a loss.
        assert row == pytest.approx(other, rel=1e-4)


def test_resumes_as_it_went_on_then(resumed):
    then = [json.loads(line) for line in (V1 / "unbroken.jsonl").read_text().splitlines()]
    for row, other in zip(curve(resumed), then, strict=True):
        assert row == pytest.approx({name: other[name] for name in row}, rel=1e-4)


def test_the_place_in_the_data_is_that_of_the_unbroken_run(unbroken):
    """Whatever the machine: nothing of it is rounded."""
    step = str(STOPPED_AFTER)
    ours, then = (read_data(at / "checkpoints" / step) for at in (unbroken, V1 / "run"))
    assert ours.keys() == then.keys() == {0, 1}
    for group, arrays in then.items():
        assert arrays.keys() == ours[group].keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, ours[group][name])


def test_saves_the_same_again(resumed):
    """What the resumed run wrote is a checkpoint of today, with all that the older one has."""
    assert runs.steps_saved(resumed) == [STOPPED_AFTER, STEPS]
    restored = checkpoint.load_params(resumed)
    assert restored.step == STEPS
    assert restored.meta.keys() == checkpoint.load_params(V1 / "run").meta.keys()


def test_a_saved_vocabulary():
    vocabulary = load_vocabulary(V1 / "run" / "vocabulary")
    assert isinstance(vocabulary, Symbols) and vocabulary.size == 64
    assert vocabulary.names[:5] == ("<k>", "<v>", "<q>", "</s>", "0")


def test_a_saved_memory():
    """What follows is read with it as after the text itself."""
    lm = LanguageModel.load(V1 / "run")
    more = TEXT[::-1]
    read = lm.logits(np.asarray([more]), state=lm.read(TEXT))
    loaded = lm.logits(np.asarray([more]), state=lm.load_memory(V1 / "memory"))
    np.testing.assert_allclose(loaded, read, atol=1e-5)
    assert np.abs(lm.logits(np.asarray([more])) - read).max() > 1e-2


def test_a_converted_directory():
    ours, theirs = (LanguageModel.load(V1 / name) for name in ("run", "converted"))
    tokens = np.asarray([TEXT])
    np.testing.assert_array_equal(
        ours.logits(tokens, last_context_length=16), theirs.logits(tokens, last_context_length=16)
    )
    assert theirs.vocabulary.size == 64

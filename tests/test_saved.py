"""What earlier versions saved is read, and training goes on from it (tests/saved/README.md)."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from runs import curve

from fot_jax import LanguageModel, cli
from fot_jax.checkpoints.items import read_data
from fot_jax.checkpoints.restore import restore_params
from fot_jax.common import formats
from fot_jax.common.checksums import crc32_of_json, seal
from fot_jax.common.errors import UserError
from fot_jax.data.saved_vocabulary import load_vocabulary
from fot_jax.data.vocabulary import Symbols

SAVED = Path(__file__).parent / "saved"
V1 = SAVED / "v1"
STOPPED_AFTER, STEPS = 8, 12
FORMATS = {
    each.name: each
    for each in (formats.CHECKPOINT, formats.VOCABULARY, formats.MEMORY, formats.CONVERTED)
}
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
        assert arrays.keys() == ours[group].keys() - {"settings"}  # which are of 0.2
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, ours[group][name])


# --- Version numbers -----------------------------------------------------------------------------


def of_newer_format(kind, directory):
    """Copies of what is saved in V1 with the number of a format that nobody knows."""
    workdir = shutil.copytree(V1 / "run", directory / "run")
    for name in ("converted", "memory"):
        shutil.copytree(V1 / name, directory / name)
    path = {
        "checkpoint": workdir / "checkpoints" / str(STOPPED_AFTER) / "meta" / "metadata",
        "vocabulary": workdir / "vocabulary" / "vocabulary.json",
        "memory": directory / "memory" / "memory.json",
        "converted model": directory / "converted" / "config.json",
    }[kind]
    content = json.loads(path.read_text())
    if kind in ("checkpoint", "memory"):
        content = seal({**content["content"], "version": 7})
    elif kind == "vocabulary":
        del content["crc32"]
        content["version"] = 7
        content["crc32"] = crc32_of_json(content, sort_keys=True)
    else:
        content["fot_jax_format"] = 7
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "kind, name, argv",
    [
        ("checkpoint", "checkpoints/8", "train run/config.gin --workdir run"),
        ("checkpoint", "checkpoints/8", "generate --checkpoint run --prompt 0"),
        ("checkpoint", "checkpoints/8", "convert to-hf run out"),
        ("vocabulary", "vocabulary/vocabulary.json", "train run/config.gin --workdir run"),
        ("vocabulary", "vocabulary/vocabulary.json", "convert to-hf run out"),
        ("memory", "memory", "generate --checkpoint run --memory memory --prompt 0"),
        ("converted model", "config.json", "generate --checkpoint converted --prompt 0"),
        ("converted model", "config.json", "convert from-hf converted out"),
    ],
)
def test_a_newer_format_is_refused_by_number(kind, name, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    of_newer_format(kind, tmp_path)
    line = runs.refused(capsys, *argv.split())
    assert line.endswith(
        f"{name}: a {kind} of format version 7, and this fot_jax reads versions up to "
        f"{FORMATS[kind].version}: install a newer fot_jax"
    )
    assert not (tmp_path / "out").exists()
    if kind == "checkpoint":  # nor is an older one taken, and nothing is set aside
        assert runs.steps_saved(tmp_path / "run") == [STOPPED_AFTER]


def test_a_newer_memory_is_not_replaced(tmp_path):
    of_newer_format("memory", tmp_path)
    lm = LanguageModel.load(V1 / "run")
    with pytest.raises(UserError, match="not a memory, so it is not replaced"):
        lm.save_memory(lm.read(TEXT), tmp_path / "memory")


def test_numbers_are_written(resumed, tmp_path):
    """And what had none is of version 1."""
    lm = LanguageModel.load(V1 / "run")
    lm.save_memory(lm.read(TEXT), tmp_path / "memory")
    assert cli.main(["convert", "to-hf", str(V1 / "run"), str(tmp_path / "converted")]) == 0
    lm.vocabulary.save(tmp_path / "run" / "vocabulary")

    def version(kind, path):
        content = json.loads(path.read_text())
        return content.get("content", content).get(FORMATS[kind].field)

    for kind, path in {
        "vocabulary": "run/vocabulary/vocabulary.json",
        "memory": "memory/memory.json",
        "converted model": "converted/config.json",
    }.items():
        assert version(kind, tmp_path / path) == FORMATS[kind].version
        assert version(kind, V1 / path) == (1 if kind == "memory" else None)
    for step, wanted in ((STOPPED_AFTER, None), (STEPS, FORMATS["checkpoint"].version)):
        path = resumed / "checkpoints" / str(step) / "meta" / "metadata"
        assert version("checkpoint", path) == wanted


# --- What a resumed run saves --------------------------------------------------------------------


def test_saves_the_same_again(resumed):
    """What the resumed run wrote is a checkpoint of today, with all that the older one has."""
    assert runs.steps_saved(resumed) == [STOPPED_AFTER, STEPS]
    restored = restore_params(resumed)
    assert restored.step == STEPS
    assert restored.meta.keys() >= restore_params(V1 / "run").meta.keys()


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

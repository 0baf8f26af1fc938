"""Checkpoints of both kinds in a bucket, copied there or written there."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import llamas
import numpy as np
import pytest
import runs

from fot_jax import LanguageModel, compare, convert
from fot_jax.checkpoints import loading
from fot_jax.checkpoints.manager import Checkpointer
from fot_jax.checkpoints.restore import restore_params
from fot_jax.checkpoints.steps import locate
from fot_jax.common.atomic import new_directory, remove_half_written
from fot_jax.common.errors import UserError
from fot_jax.data.saved_vocabulary import load_vocabulary
from fot_jax.data.vocabulary import Bytes

pytestmark = pytest.mark.torch
TOKENS = llamas.random_tokens(1, 40)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face directory with three files of tensors, and a workdir made of it."""
    directory = tmp_path_factory.mktemp("model")
    llamas.save(directory / "hf", shards="40KB")
    convert.from_hugging_face(directory / "hf", directory / "base", memory_layers=(1,))
    return directory


def logits(path):
    return LanguageModel.load(path).logits(TOKENS)


def test_a_conversion_that_is_copied_is_a_checkpoint_there(model, bucket, capsys):
    bucket.copy(model / "base", "base")
    assert locate(f"{bucket.url}/base")[1] == locate(f"{bucket.url}/base/checkpoints/0")[1] == [0]
    np.testing.assert_array_equal(logits(f"{bucket.url}/base"), logits(model / "base"))
    assert compare.check(f"{bucket.url}/base", model / "base")
    before = bucket.files()
    checkpointer = Checkpointer(f"{bucket.url}/base/checkpoints")
    checkpointer.open()
    checkpointer.close()
    assert bucket.files() == before


def test_so_is_one_of_a_version_that_left_no_mark(model, bucket, caplog):
    bucket.copy(model / "base", "base")
    bucket.remove("base/checkpoints/0/commit_success.txt")
    without = bucket.files()
    np.testing.assert_array_equal(logits(f"{bucket.url}/base"), logits(model / "base"))
    checkpointer = Checkpointer(f"{bucket.url}/base/checkpoints")
    checkpointer.open()
    checkpointer.close()
    assert "removing it" not in caplog.text
    assert without.items() <= bucket.files().items()
    assert locate(f"{bucket.url}/base")[1] == [0]


@pytest.mark.parametrize("lost", ["meta/metadata", "params/d/", "data/groups.json"])
def test_a_copy_that_is_not_whole_is_told_from_one_that_is(lost, model, bucket):
    bucket.copy(model / "base", "base")
    for name in bucket.names(f"base/checkpoints/0/{lost}"):
        bucket.remove(name)
    with pytest.raises(UserError, match="of checkpoints 0 none can be read"):
        LanguageModel.load(f"{bucket.url}/base")


@dataclasses.dataclass
class Run:
    experiment: Path
    workdir: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on this machine."""
    directory = tmp_path_factory.mktemp("trained")
    experiment = runs.write(directory, runs.DICTIONARY)
    with pytest.MonkeyPatch.context() as patch, runs.first_devices(patch, 1):
        assert runs.train(experiment, directory / "run") == 0
    return Run(experiment, directory / "run")


def test_an_unfinished_save_of_training_is_none(trained, bucket, one_device, caplog):
    bucket.copy(trained.workdir, "run")
    assert locate(f"{bucket.url}/run")[1] == runs.steps_saved(trained.workdir)
    bucket.remove("run/checkpoints/12/commit_success.txt")
    assert locate(f"{bucket.url}/run")[1][-1] == 8
    assert runs.train(trained.experiment, f"{bucket.url}/run") == 0
    assert "checkpoints/12: a save that never finished: removing it" in caplog.text
    assert locate(f"{bucket.url}/run")[1][-1] == 12
    runs.assert_same_parameters(f"{bucket.url}/run", trained.workdir)


def test_a_damaged_step_is_set_aside_there(trained, bucket, one_device, caplog):
    assert runs.train(trained.experiment, f"{bucket.url}/run") == 0
    bucket.put("run/checkpoints/12/meta/metadata", "{}")
    assert runs.train(trained.experiment, f"{bucket.url}/run") == 0
    assert "checkpoints/12 is damaged" in caplog.text
    assert bucket.get("run/checkpoints/damaged-12/meta/metadata") == b"{}"
    assert locate(f"{bucket.url}/run")[1][-1] == 12
    runs.assert_same_parameters(f"{bucket.url}/run", trained.workdir)


@pytest.fixture
def at_once(monkeypatch):
    """Requests that fail are repeated without a pause."""

    async def sleep(seconds):
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", sleep)


@pytest.mark.parametrize("outage", ["broken", "anonymous"])
def test_a_save_in_an_outage_is_tried_again(bucket, cloud, at_once, outage):
    store, params = Checkpointer(f"{bucket.url}/checkpoints"), {"w": jnp.ones(3)}
    data = {0: {"place": np.array(7)}}
    store.save(1, params, {}, data, {})
    store.wait()
    setattr(cloud, outage, True)
    store.save(2, params, {}, data, {})
    assert store.failed() and store.failures == 1
    store.save(2, params, {}, data, {})
    assert not store.saved() and store.failures == 2
    setattr(cloud, outage, False)
    store.save(2, params, {}, data, {})
    assert store.saved() and store.steps() == [1, 2]
    store.close()


def test_a_directory_that_cannot_take_anothers_place_is_not_lost(bucket, cloud):
    with new_directory(f"{bucket.url}/memory", "mark") as half:
        (half / "mark").write_text("old")

    def renames(method, path):
        if "/rewriteTo/" in path or "/copyTo/" in path or "/moveTo/" in path:
            cloud.forbidden.add("storage.objects.create")

    cloud.before = renames
    with pytest.raises(UserError, match="what is not there yet is in gs://.*half-written") as error:
        with new_directory(f"{bucket.url}/memory", "mark") as half:
            (half / "mark").write_text("new")
            (half / "x").write_text("x")
    there = {name.rsplit("/", 1)[1]: content for name, content in bucket.files().items()}
    assert there == {"mark": b"new", "x": b"x"} and str(half) in str(error.value)


# --- Hugging Face directories --------------------------------------------------------------------


def test_a_hugging_face_directory_is_read_from_there_once(model, bucket, cloud):
    bucket.copy(model / "hf", "hf")
    size = sum(file.stat().st_size for file in (model / "hf").glob("*.safetensors"))
    want = logits(model / "hf")
    cloud.requests.clear()
    np.testing.assert_array_equal(logits(f"{bucket.url}/hf"), want)
    assert size <= cloud.received(".safetensors") < 1.5 * size  # and what is said of the files
    target = restore_params(model / "base").params
    cloud.requests.clear()
    config, params = loading.load_params(f"{bucket.url}/hf", target)
    assert (
        dataclasses.replace(config, memory_layers=(1,)) == LanguageModel.load(model / "base").config
    )
    np.testing.assert_array_equal(params["embedding"], target["embedding"])
    assert size <= cloud.received(".safetensors") < 1.5 * size


def test_converting_reads_from_there(model, bucket, tmp_path, capsys):
    bucket.copy(model / "hf", "hf")
    bucket.copy(model / "base", "base")
    convert.from_hugging_face(f"{bucket.url}/hf", tmp_path / "base", memory_layers=(1,))
    runs.assert_same_parameters(tmp_path / "base", model / "base")
    convert.to_hugging_face(f"{bucket.url}/base", tmp_path / "hf")
    assert llamas.contents(tmp_path / "hf") == llamas.contents(model / "hf")
    assert compare.check(f"{bucket.url}/hf", tmp_path / "hf") is False  # it has no memory


DAMAGES = {
    "cut off": lambda x: x[:-9],
    "cut off in the header": lambda x: x[:30],
    "empty": lambda x: b"",
    "longer": lambda x: x + b"0",
    "header too long": lambda x: b"\xff" * 8 + x[8:],
    "no JSON": lambda x: x[:8] + b"?" + x[9:],
    "another shape": lambda x: x.replace(b'"shape":[32,32]', b'"shape":[32,31]', 1),
    "a list": lambda x: (2).to_bytes(8, "little") + b"[]",
    "overlapping": lambda x: x.replace(b'"data_offsets":[0,', b'"data_offsets":[4,'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_safetensors_there(damage, model, bucket):
    bucket.copy(model / "hf", "hf")
    name = next(name for name in bucket.names("hf/") if "model-00002-of-" in name)
    bucket.put(name, DAMAGES[damage](bucket.get(name)))
    with pytest.raises(UserError, match=rf"{name}: damaged \(.*\): get it again"):
        LanguageModel.load(f"{bucket.url}/hf")


def test_what_is_refused(model, bucket, cloud, capsys):
    bucket.put("pickle/config.json", (model / "hf" / "config.json").read_bytes())
    bucket.put("pickle/pytorch_model.bin", "...")
    bucket.put("empty/x", "")

    def refused(path, *more):
        return runs.refused(capsys, "generate", "--prompt", "x", "--checkpoint", path, *more)

    assert "a pickle, of which no part can be read alone: copy" in refused(f"{bucket.url}/pickle")
    assert refused(f"{bucket.url}/empty").startswith(f"{bucket.url}/empty: no checkpoint here")
    assert refused(f"{bucket.url}/emp").startswith(f"{bucket.url}/emp: does not exist")
    assert refused("gs://no-such/x") == "gs://no-such: there is no such bucket: correct the name"
    assert (
        refused(f"{bucket.url}/a*")
        == f"'{bucket.url}/a*': '*' in a gs:// path: give one without it"
    )
    assert "is no path" in refused("gs:///x") and "is no path" in refused("gs://")
    cloud.forbidden = {"storage.objects.list"}
    assert "storage.objects.list access.): grant roles/" in refused(f"{bucket.url}/empty")
    cloud.anonymous = True
    assert "): log in (gcloud auth application-default login)" in refused(f"{bucket.url}/empty")


# --- Directories that are written whole ----------------------------------------------------------


def test_a_directory_appears_when_it_is_whole(bucket, cloud):
    Bytes().save(f"{bucket.url}/vocabulary")
    with pytest.raises(KeyboardInterrupt):
        with new_directory(f"{bucket.url}/vocabulary", "vocabulary.json") as half:
            (half / "vocabulary.json").write_text("half")
            raise KeyboardInterrupt
    assert load_vocabulary(f"{bucket.url}/vocabulary") == Bytes()
    assert bucket.names() == ["vocabulary/vocabulary.json"]
    bucket.put("vocabulary2/beside", "")
    order = []
    cloud.before = lambda method, path: order.append(path) if "rewriteTo" in path else None
    with new_directory(f"{bucket.url}/vocabulary", "mark") as half:
        for name in ("a", "mark", "z/z"):
            (half / name).write_text(name)
    assert order[-1].endswith("vocabulary/mark")
    assert bucket.names() == [f"vocabulary/{x}" for x in ("a", "mark", "z/z")] + [
        "vocabulary2/beside"
    ]
    with new_directory(f"{bucket.url}/out", "mark") as half:
        (half / "mark").write_text("")
        remove_half_written()
        assert not half.exists()
        (half / "mark").write_text("")
    assert "out/mark" in bucket.names()
    cloud.forbidden = {"storage.objects.create"}
    with pytest.raises(UserError, match="vocabulary: cannot be written: not allowed .*: grant"):
        Bytes().save(f"{bucket.url}/vocabulary")


def refused_to_train(capsys, bucket, experiment, workdir):
    """The one line, and what there is in the bucket since."""
    before = bucket.names()
    line = runs.refused(capsys, *runs.arguments(experiment, workdir))
    assert line.startswith("gs://") and "damaged" not in line
    return line, [name for name in bucket.names() if name not in before and "trial" not in name]


@pytest.mark.parametrize(
    "permission", ["buckets.get", *(f"objects.{x}" for x in ("list", "get", "create", "delete"))]
)
def test_training_without_it_is_one_line(permission, bucket, cloud, tmp_path, one_device, capsys):
    experiment = runs.write(tmp_path, runs.DICTIONARY)
    cloud.forbidden = {f"storage.{permission}"}
    line, left = refused_to_train(capsys, bucket, experiment, f"{bucket.url}/run")
    assert f"does not have storage.{permission} access" in line and "grant roles/storage." in line
    assert left == (["run/running.json"] if permission == "objects.delete" else [])


def test_resuming_without_it_is_one_line(trained, bucket, cloud, one_device, capsys):
    bucket.copy(trained.workdir, "run")
    for permission in ("storage.objects.list", "storage.objects.get"):
        cloud.forbidden = {permission}
        line, left = refused_to_train(capsys, bucket, trained.experiment, f"{bucket.url}/run")
        assert f"does not have {permission} access" in line and "grant roles/storage." in line
        assert left == []


def test_training_without_a_login_or_a_bucket_is_one_line(
    bucket, cloud, tmp_path, one_device, capsys
):
    experiment = runs.write(tmp_path, runs.DICTIONARY)
    line, left = refused_to_train(capsys, bucket, experiment, "gs://no-such-bucket/run")
    assert "there is no such bucket: correct the name" in line and left == []
    cloud.anonymous = True
    line, left = refused_to_train(capsys, bucket, experiment, f"{bucket.url}/run")
    assert "log in (gcloud auth application-default login)" in line and left == []

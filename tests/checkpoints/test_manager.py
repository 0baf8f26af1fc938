"""Saving and restoring: exact, on any mesh, and never wrong data from damaged files."""

import asyncio
import dataclasses
import os
import shutil
import subprocess
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import together
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny import tiny

from fot_jax.checkpoints import items, manager
from fot_jax.checkpoints import restore as restore_
from fot_jax.checkpoints.manager import Checkpointer
from fot_jax.checkpoints.restore import restore_model, restore_params
from fot_jax.common.errors import UserError
from fot_jax.model.config import RopeScaling

optimizer = optax.adamw(1e-2)


def make_params(seed, wide=16):
    rng = np.random.default_rng(seed)
    return {
        "embedding": jnp.asarray(rng.normal(size=(32, 8)), jnp.float32),
        "layers": {
            "up": jnp.asarray(rng.normal(size=(3, 8, wide)), jnp.float32),
            "scale": jnp.asarray(rng.normal(size=(3, 8)), jnp.bfloat16),
        },
    }


def make_opt_state(params):
    return optimizer.update(jax.tree.map(jnp.cos, params), optimizer.init(params), params)[1]


def make_data(step):
    return {
        group: {
            "position": np.array(100 * step + group),
            "left": np.arange(step + group, dtype=np.int32),
        }
        for group in range(3)
    }


def save(store, step):
    params = make_params(step)
    store.save(step, params, make_opt_state(params), make_data(step), {"name": f"at {step}"})
    store.wait()


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def restore(store, sharding=None, groups=None):
    params = make_params(0)
    opt_state = make_opt_state(params)
    return store.restore_latest(abstract(params, sharding), abstract(opt_state, sharding), groups)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_is_step(restored, step):
    assert restored.step == step
    params = make_params(step)
    assert_same(restored.params, params)
    assert_same(restored.opt_state, make_opt_state(params))
    assert_same(restored.data, make_data(step))
    assert restored.meta == {"name": f"at {step}"}


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with steps 1 and 2, to be copied by tests that damage it."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    store = Checkpointer(directory)
    for step in (1, 2):
        save(store, step)
    store.close()
    return directory


def test_round_trip_is_exact(saved):
    store = Checkpointer(saved)
    assert store.steps() == [1, 2]
    assert_is_step(restore(store), 2)


def test_nothing_saved_restores_nothing(tmp_path):
    assert restore(Checkpointer(tmp_path / "a" / "b")) is None


def test_any_mesh_saves_and_any_mesh_restores(tmp_path):
    devices = np.asarray(jax.devices())
    wide = NamedSharding(Mesh(devices.reshape(8), "x"), PartitionSpec())
    split = NamedSharding(Mesh(devices.reshape(8), "x"), PartitionSpec(None, "x"))
    params = jax.device_put(make_params(5), {"embedding": split, "layers": wide})
    store = Checkpointer(tmp_path)
    store.save(5, params, optimizer.init(params), {}, {})
    store.wait()
    four = NamedSharding(Mesh(devices[:4].reshape(2, 2), ("x", "y")), PartitionSpec("x", "y"))
    one = NamedSharding(Mesh(devices[:1], "x"), PartitionSpec())
    target = abstract(make_params(5), one)
    target["embedding"] = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=four)
    restored = restore_params(tmp_path, target)
    assert restored.params["embedding"].sharding == four
    assert restored.params["layers"]["up"].sharding == one
    assert_same(restored.params, make_params(5))


def test_arrays_may_be_donated_and_data_changed_right_after_save(tmp_path):
    store = Checkpointer(tmp_path)
    params, data = make_params(1), make_data(1)
    opt_state = make_opt_state(params)
    store.save(1, params, opt_state, data, {"name": "at 1"})
    data[0]["left"][:] = -1
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 7, tree), donate_argnums=0)
    jax.block_until_ready(spoil((params, opt_state)))
    store.wait()
    assert_is_step(restore(store), 1)


def test_a_step_shows_only_when_complete(tmp_path, monkeypatch):
    """The save is stopped just before its last file; the step must not show up till it goes on."""
    reached, go_on = threading.Event(), threading.Event()
    finalize = items.DataHandler.finalize

    def slow(self, directory):
        reached.set()
        assert go_on.wait(30)
        finalize(self, directory)

    store = Checkpointer(tmp_path)
    save(store, 1)
    monkeypatch.setattr(items.DataHandler, "finalize", slow)
    params = make_params(2)
    store.save(2, params, make_opt_state(params), make_data(2), {"name": "at 2"})
    assert reached.wait(30)
    assert store.steps() == [1]
    assert_is_step(restore(store), 1)
    half_written = tmp_path.parent / f"{tmp_path.name}-killed"
    shutil.copytree(tmp_path, half_written)  # what a kill -9 at this moment leaves
    go_on.set()
    store.wait()
    assert store.steps() == [1, 2]

    again = Checkpointer(half_written)
    assert_is_step(restore(again), 1)
    monkeypatch.setattr(items.DataHandler, "finalize", finalize)
    save(again, 2)
    assert_is_step(restore(again), 2)


# --- Damage --------------------------------------------------------------------------------------


def files_of(step_directory):
    return sorted(p.relative_to(step_directory) for p in step_directory.rglob("*") if p.is_file())


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, empty, flip, os.remove])
def test_damaged_files_never_give_wrong_data(saved, tmp_path, warnings, damage):
    """Every file of the newest step, one at a time: step 2's own, or step 1's and a warning."""
    fell_back = set()
    for i, name in enumerate(files_of(saved / "2")):
        directory = tmp_path / str(i)
        shutil.copytree(saved, directory)
        damage(directory / "2" / name)
        warnings.clear()
        restored = restore(Checkpointer(directory))
        assert restored.step in (1, 2), name
        assert_is_step(restored, restored.step)
        if restored.step == 1:
            fell_back.add(name.parts[0])
            assert len(warnings) == 1 and f"{directory}/2 is damaged (" in warnings[0]
            assert "\n" not in warnings[0]
        shutil.rmtree(directory)
    assert {"params", "opt_state", "data", "meta"} <= fell_back


def test_each_array_and_group_file_is_needed(saved, tmp_path, warnings):
    directory = tmp_path / "copy"
    shutil.copytree(saved, directory)
    os.remove(directory / "2" / "data" / "group-00001.npz")
    store = Checkpointer(directory)
    assert_is_step(restore(store), 1)
    # A host that does not own the lost group has all it needs.
    restored = restore(store, groups=[0, 2])
    assert restored.step == 2
    assert_same(restored.data, {g: make_data(2)[g] for g in (0, 2)})


@pytest.mark.parametrize(
    "what, said",
    [
        ("params", "embedding is not what was saved"),
        ("data/group-00001.npz", "group-00001.npz is not what was saved"),
        ("meta", "meta"),
        ("", "meta"),
    ],
)
def test_what_is_exchanged_with_another_steps_is_noticed(saved, tmp_path, warnings, what, said):
    """Files that are whole, but not the ones saved."""
    directory = tmp_path / "copy"
    shutil.copytree(saved, directory)
    if (saved / "1" / what).is_dir():
        shutil.rmtree(directory / "2" / what)
        shutil.copytree(saved / "1" / what, directory / "2" / what)
    else:
        shutil.copy(saved / "1" / what, directory / "2" / what)
    assert restore(Checkpointer(directory)).step == 1
    assert said in warnings[0]


def test_no_byte_of_a_group_file_changes_unnoticed(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved / "2" / "data", folder / "data")
    file = folder / "data" / "group-00001.npz"
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match="group-00001.npz is not what was saved"):
            items.read_data(folder)


def test_training_goes_on_after_damage(saved, tmp_path, warnings):
    directory = tmp_path / "copy"
    shutil.copytree(saved, directory)
    truncate(directory / "2" / "meta" / "metadata")
    store = Checkpointer(directory, keep_last=2)
    assert restore(store).step == 1
    save(store, 2)  # the same step again
    assert_is_step(restore(store), 2)
    save(store, 3)
    assert store.steps() == [2, 3]
    assert_is_step(restore(Checkpointer(directory)), 3)


def test_all_damaged_says_so(saved, tmp_path, warnings):
    directory = tmp_path / "copy"
    shutil.copytree(saved, directory)
    with pytest.raises(UserError, match="No such file"):
        os.rename(directory / "2" / "meta", directory / "2" / "lost")
        restore_params(directory / "2")
    os.rename(directory / "2" / "lost", directory / "2" / "meta")
    assert not warnings
    for step in "12":
        truncate(directory / step / "meta" / "metadata")
    with pytest.raises(UserError, match="of checkpoints 1, 2 none can be read") as error:
        restore(Checkpointer(directory))
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


# --- Shapes, types, paths ------------------------------------------------------------------------


def test_other_shapes_are_named(saved):
    store = Checkpointer(saved)
    params = make_params(0, wide=24)
    with pytest.raises(UserError, match="layers/up") as error:
        store.restore_latest(abstract(params), abstract(make_opt_state(params)))
    assert "(3, 8, 16)" in str(error.value) and "(3, 8, 24)" in str(error.value)
    extra = make_params(0) | {"head": jnp.zeros((8, 32))}
    with pytest.raises(UserError, match="head is missing in the checkpoint"):
        restore_params(saved, abstract(extra))
    fewer = {"embedding": make_params(0)["embedding"]}
    with pytest.raises(UserError, match="layers/scale of the checkpoint is not part"):
        restore_params(saved, abstract(fewer))
    with pytest.raises(UserError, match="optimizer state"):
        store.restore_latest(
            abstract(make_params(0)), abstract(optax.sgd(0.1, 0.9).init(make_params(0)))
        )


def test_an_optimizer_without_state(tmp_path):
    params = make_params(1)
    opt_state = optax.sgd(0.1).init(params)
    store = Checkpointer(tmp_path)
    store.save(1, params, opt_state, {}, {})
    store.wait()
    assert_same(store.restore_latest(abstract(params), opt_state).opt_state, opt_state)


def test_parameters_alone(saved):
    as_saved = restore_params(saved)
    assert_same(as_saved.params, make_params(2))
    assert as_saved.opt_state is None and as_saved.meta == {"name": "at 2"}
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), make_params(0))
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params(2))
    assert_same(restore_params(saved, target).params, expected)


def test_a_workdir_its_checkpoints_and_a_step_are_found(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run" / "checkpoints")
    assert restore_params(tmp_path / "run").step == 2
    assert restore_params(str(tmp_path / "run" / "checkpoints")).step == 2
    assert restore_params(tmp_path / "run" / "checkpoints" / "1").step == 1
    for nothing in (tmp_path / "run" / "checkpoints" / "3", tmp_path / "none"):
        with pytest.raises(UserError, match=f"{nothing.name}: does not exist: give a workdir"):
            restore_params(nothing)
    with pytest.raises(UserError, match="no checkpoint here"):
        restore_params(tmp_path)
    for workdir in ("7", "8"):  # named as steps are
        shutil.copytree(saved, tmp_path / "runs" / workdir / "checkpoints")
    assert restore_params(tmp_path / "runs" / "7").step == 2


def test_checkpoints_that_were_renamed_are_none(saved, tmp_path, warnings):
    directory = tmp_path / "copy"
    shutil.copytree(saved, directory)
    (directory / "2").rename(directory / "diverged_2")
    for name in ("003", "_4", "5_"):
        shutil.copytree(saved / "1", directory / name)
    store = Checkpointer(directory)
    assert restore(store).step == 1
    save(store, 2)
    assert store.steps() == [1, 2] and not warnings


@pytest.mark.parametrize(
    "error, raised",
    [
        (PermissionError(13, "Permission denied", "file"), UserError),
        (OSError(24, "Too many open files", "file"), UserError),
        (MemoryError("too large"), MemoryError),
    ],
)
def test_what_cannot_be_read_now_is_not_damaged(saved, tmp_path, monkeypatch, error, raised):
    directory = tmp_path / "copy"
    shutil.copytree(saved, directory)

    def fails(*_):
        raise Exception("Encountered error while reading array index: 0") from error

    monkeypatch.setattr(items, "read_data", fails)
    store = Checkpointer(directory)
    with pytest.raises(raised, match="cannot be read: |too large"):
        restore(store)
    monkeypatch.undo()
    save(store, 3)
    assert store.steps() == [2, 3]  # 2 was not set aside


def test_a_model_comes_with_its_configuration(tmp_path):
    config = tiny(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16))
    store = Checkpointer(tmp_path / "run" / "checkpoints")
    meta = {"model": dataclasses.asdict(config)}
    store.save(3, make_params(3), {}, {}, meta)
    store.close()
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "3"):
        loaded, params = restore_model(path)
        assert loaded == config
        assert_same(params, make_params(3))


# --- Keeping, and failing ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.write_bytes(b""), "params: manifest.ocdbt: .*(0).*"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "params: manifest.ocdbt: .*"),
        (lambda file: file.unlink(), "params: params: does not exist"),
    ],
)
def test_what_tensorstore_says_is_cut_to_what_a_person_needs(tmp_path, damage, said):
    store = Checkpointer(tmp_path)
    save(store, 1)
    store.close()
    damage(tmp_path / "1" / "params" / "manifest.ocdbt")
    with pytest.raises(UserError, match=rf"\(1: {said}\): restore one") as error:
        restore_params(tmp_path)
    assert "driver" not in str(error.value) and len(str(error.value)) < 350


def test_a_save_is_finished_before_an_error_ends_the_run(tmp_path, monkeypatch):
    store, go_on = Checkpointer(tmp_path), threading.Event()
    finalize = items.DataHandler.finalize

    def slow(self, directory):
        assert go_on.wait(30)
        finalize(self, directory)

    monkeypatch.setattr(items.DataHandler, "finalize", slow)
    with pytest.raises(UserError, match="bad row"), store.finishing():
        params = make_params(1)
        store.save(1, params, make_opt_state(params), make_data(1), {})
        threading.Timer(0.5, go_on.set).start()
        raise UserError("bad row")
    assert store.steps() == [1]


def test_a_save_that_fails_as_an_error_ends_the_run_is_told_of(tmp_path, monkeypatch, warnings):
    def fails(self, directory):
        raise RuntimeError("the disk sang")

    monkeypatch.setattr(items.DataHandler, "finalize", fails)
    store, params = Checkpointer(tmp_path), make_params(1)
    with pytest.raises(UserError, match="bad row"), store.finishing():
        store.save(1, params, {}, make_data(1), {})
        raise UserError("bad row")
    assert "the checkpoint of step 1 was not written: the disk sang" in warnings


def test_a_save_may_take_as_long_as_writing_takes(tmp_path, monkeypatch):
    """On a disk that writes a quarter of the arrays in a second."""
    save = items.DataHandler.async_save

    async def slow(self, directory, args):
        async def wait():
            await asyncio.sleep(2)

        waiting = ocp.future.CommitFutureAwaitingContractedSignals(wait(), name="slow")
        return [*await save(self, directory, args), waiting]

    monkeypatch.setattr(items.DataHandler, "async_save", slow)
    monkeypatch.setattr(manager, "BARRIER_SECONDS", 1)
    params = make_params(1)
    monkeypatch.setattr(manager, "SLOWEST", sum(x.nbytes for x in jax.tree.leaves(params)) // 4)
    for arrays, in_time in (((), False), (params, True)):
        store = Checkpointer(tmp_path / str(in_time))
        store.open(arrays)
        store.save(1, params, {}, make_data(1), {})
        assert store.saved() == in_time


def test_old_checkpoints_go(tmp_path):
    store = Checkpointer(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 8):
        save(store, step)
    save(store, 7)  # again: nothing to do
    assert store.steps() == [4, 6, 7]
    assert_is_step(restore(store), 7)


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    store = Checkpointer(tmp_path)
    save(store, 1)
    few = shutil._ntuple_diskusage(10**6, 10**6 - 3000, 3000)
    monkeypatch.setattr(manager.shutil, "disk_usage", lambda path: few)
    with pytest.raises(UserError, match="no space left for the checkpoint of step 2") as error:
        save(store, 2)
    assert str(tmp_path) in str(error.value) and "2.93 KiB free" in str(error.value)
    assert store.steps() == [1]


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for 4 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_save_that_finds_no_room_leaves_none_of_it_and_the_next_one_fits(
    small_disk, monkeypatch, caplog
):
    """Room that another program takes between asking for it and writing."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.integers(0, 2**32, 2**18, np.uint32))}  # 1 MiB, incompressible
    store = Checkpointer(small_disk / "checkpoints")
    store.open()
    taken = small_disk / "taken"
    taken.write_bytes(bytes(2**22 - 2**19))
    plenty = shutil._ntuple_diskusage(2**30, 0, 2**30)
    with monkeypatch.context() as patch:
        patch.setattr(manager.shutil, "disk_usage", lambda path: plenty)
        store.save(1, params, {}, make_data(1), {})
        with pytest.raises(UserError, match="no space left"):
            store.wait()
        assert list((small_disk / "checkpoints").iterdir()) == []
    taken.unlink()
    store.save(1, params, {}, make_data(1), {})
    store.close()
    assert store.steps() == [1]


@pytest.mark.parametrize(("arrays", "size"), [(1, 10), (30, 100), (2, 2**18)])
def test_a_save_asks_for_the_room_that_it_takes(tmp_path, monkeypatch, arrays, size):
    rng = np.random.default_rng(0)
    params = {str(i): jnp.asarray(rng.integers(0, 2**32, size, np.uint32)) for i in range(arrays)}
    store = Checkpointer(tmp_path)
    store.save(1, params, {}, make_data(1), {})
    store.wait()
    taken = sum(512 * path.stat().st_blocks for path in Path(tmp_path).rglob("*"))

    def leave(free):
        room = shutil._ntuple_diskusage(2**40, 2**40 - free, free)
        monkeypatch.setattr(manager.shutil, "disk_usage", lambda path: room)

    leave(taken - 1)
    with pytest.raises(UserError, match="no space left for the checkpoint of step 2"):
        store.save(2, params, {}, make_data(1), {})
    leave(taken + 2**19)
    store.save(2, params, {}, make_data(1), {})
    store.close()
    assert store.steps() == [1, 2]


@pytest.mark.parametrize(
    ("failure", "expected", "message"),
    [
        (OSError(28, "No space left on device"), UserError, "no space left"),
        (PermissionError(13, "Permission denied"), UserError, "not allowed to write"),
        (RuntimeError("the disk sang"), RuntimeError, "the disk sang"),
    ],
)
@pytest.mark.parametrize("found_by", ["wait", "save", "close"])
def test_a_save_that_fails_in_the_background_is_raised(
    tmp_path, monkeypatch, failure, expected, message, found_by
):
    store = Checkpointer(tmp_path, keep_last=1)
    save(store, 1)

    def fail(self, directory):
        raise failure

    monkeypatch.setattr(items.DataHandler, "finalize", fail)
    params = make_params(2)
    store.save(2, params, make_opt_state(params), make_data(2), {})
    with pytest.raises(expected, match=message):
        {"wait": store.wait, "save": lambda: save(store, 3), "close": store.close}[found_by]()
    assert store.steps() == [1]  # keep_last = 1, yet the good one is still there
    assert_is_step(restore(Checkpointer(tmp_path)), 1)


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot keep checkpoints here"):
        Checkpointer(tmp_path / "file" / "checkpoints").open()


def test_a_directory_that_cannot_be_written_to(tmp_path):
    """Found out before training. (Root, who may write anywhere, meets a directory in the way.)"""
    (tmp_path / "trial-of-process-0").mkdir()
    with pytest.raises(UserError, match="cannot keep checkpoints here"):
        Checkpointer(tmp_path).open()


def test_object_arrays_are_never_pickled(tmp_path):
    store = Checkpointer(tmp_path)
    data = {0: {"left": np.array([{"not": "plain"}], object)}}
    with pytest.raises(ValueError, match="[Oo]bject"):
        store.save(1, make_params(1), {}, data, {})


def test_what_another_process_cannot_read_now_is_not_damaged(saved, monkeypatch):
    monkeypatch.setattr(restore_, "all_values", lambda x: [x, 2])
    with pytest.raises(UserError, match="another process cannot read it now: see what it says"):
        restore(Checkpointer(saved))
    monkeypatch.setattr(restore_, "all_values", lambda x: [x, 1])
    with pytest.raises(UserError, match="none can be read"):
        restore(Checkpointer(saved))


def test_processes_that_see_other_checkpoints_are_refused(saved, monkeypatch):
    """As of a directory on the disk of each machine, or one that is cached."""
    monkeypatch.setattr(manager, "all_values", lambda x: [x, x + 1])
    with pytest.raises(UserError, match="not all processes see the same checkpoints there: give"):
        restore(Checkpointer(saved))


# --- Several processes ---------------------------------------------------------------------------


def test_two_processes_save_and_any_number_restores(tmp_path):
    script = Path(__file__).with_name("checkpoint_of_two_processes.py")
    codes, said = together.ended(together.start([script, tmp_path], 2, devices=2))
    assert codes == [0, 0], said
    assert ["is damaged (" in errors for _, errors in said] == [True, False]
    failed = "the checkpoint of step 3 was not written: "
    for (_, errors), why in zip(said, ("the bucket sang", "another process has not"), strict=True):
        assert f"{failed}{why}" in errors

    target = {"w": jax.ShapeDtypeStruct((8, 64), jnp.float32)}
    restored = Checkpointer(tmp_path).restore_latest(target, {})  # this process alone
    assert restored.step == 3
    assert_same(restored.data, {g: {"place": np.array(7)} for g in range(2)})
    written = np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32)
    np.testing.assert_array_equal(restored.params["w"], written)

"""Memories in a directory say what memories in RAM say, survive kills, and notice damage."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from readers import C, model_of, random_text

from fot_jax.common.checksums import seal
from fot_jax.common.errors import UserError
from fot_jax.inference import decode, forward, memory_files, segment_files
from fot_jax.inference.state import SHARED, MemoryConfig
from fot_jax.model import clusters
from fot_jax.model import segments as segmented
from fot_jax.model.lookup import Dense, IndexedTopK, TopK

SEGMENT = 2 * C


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(segment_files, "TOKENS", SEGMENT)
    monkeypatch.setattr(clusters, "FEW", 2)
    monkeypatch.setattr(clusters, "COMPARED", 2)


@pytest.fixture
def read(tmp_path):
    """A model, and a memory of three segments and 50 tokens, and 14 tokens in the window."""
    lm = model_of("llama")
    state = lm.read(
        random_text(1, 3 * SEGMENT + C), memory=kept_in(tmp_path / "m"), last_context_length=14
    )
    assert state.segments.tokens == 3 * SEGMENT and state.held == [14]
    return lm, state, tmp_path / "m"


def kept_in(directory, **options):
    return MemoryConfig(directory=str(directory), **options)


@pytest.mark.parametrize(
    "name, storage, lookup, shared",
    [
        ("llama", "float32", Dense(), False),
        ("llama without positions in memory layers", "bfloat16", TopK(7), True),
        # An index that leads to all that there is.
        ("llama", "float32", IndexedTopK(7, 2_000), True),
        ("paper", "int8", IndexedTopK(7, 1_000), False),
        ("llama without positions in memory layers", "int4", IndexedTopK(7, 1_000), False),
    ],
    ids=str,
)
@settings(max_examples=2)
@given(
    length=st.sampled_from([n * SEGMENT + C + d for n in (0, 1, 5) for d in (-1, 0, 1, 30)]),
    padding=st.integers(0, C),
)
@example(length=734, padding=21)
def test_logits_are_those_of_a_memory_in_ram(
    tmp_path_factory, name, storage, lookup, shared, length, padding
):
    lm = model_of(name)
    if storage != "float32":
        # What differs in float32's last bit may be rounded to another number of fewer bits: only in
        # one memory layer do keys not depend on how memory was read before.
        one = dataclasses.replace(lm.config, num_layers=1, memory_layers=(0,))
        first = {**lm.params, "layers": lm.params["layers"][:1]}
        lm = dataclasses.replace(lm, config=one, params=first)
    rows = 1 + shared
    options = {"storage": storage, "shared": shared}
    text, more = random_text(rows, length + padding), random_text(rows, 150, seed=1)
    mask = np.arange(length + padding) >= padding * (np.arange(rows)[:, None] == 0)
    path = tmp_path_factory.mktemp("memory") / "m"
    configs = [MemoryConfig(lookup=lookup, **options), kept_in(path, lookup=lookup, **options)]
    if isinstance(lookup, IndexedTopK):
        configs.insert(0, MemoryConfig(lookup=TopK(lookup.k), **options))
    want, *others = (list(logits_of(lm, config, text, mask, more)) for config in configs)
    for a, b in [pair for got in others for pair in zip(got, want, strict=True)]:
        error = np.abs(a - b).max(-1)
        # Of keys of few bits several are the last of a token's best.
        most = error.max() if storage == "float32" else np.quantile(error, 0.98)
        assert most < 1e-5 * np.abs(b).max()


def logits_of(lm, config, text, mask, more):
    """Of a text, and of what follows, for which a memory in a directory is loaded."""
    state = lm.read(np.zeros((len(text), 1), int), memory=config)
    state.reserve(2_000, 2_000)  # so that programs are those of one size, whatever the length
    yield lm.logits(text, mask=mask, state=state, last_context_length=20)[mask]
    if config.directory:
        lm.save_memory(state, config.directory)
        state = lm.load_memory(config.directory, config.lookup)
        assert state.config == config
    yield lm.logits(more, state=state)


@pytest.mark.parametrize("lookup", [TopK(5), IndexedTopK(5, 200)], ids=str)
def test_nothing_is_compiled_as_memory_grows(read, lookup):
    lm, state, path = read
    lm.save_memory(state, path)
    state = lm.load_memory(path, lookup)
    programs = (
        *(forward.run, forward.evict, forward._stretch, decode.token_after),
        *(segmented._search_segment, segmented._add_found),
        *(segmented._best_gathered, segmented._attend_gathered),
    )

    def read_on(seed):
        lm.read(random_text(1, 5 * C + 40, seed), state=state, last_context_length=50)
        lm.generate([1], 20, temperature=0, state=state)  # while the window overflows

    for seed in range(3):  # until all pieces have met segments of both sizes
        read_on(seed)
    compiled = [each._cache_size() for each in programs]
    read_on(3)
    assert 13 * SEGMENT < state.segments.tokens < 16 * SEGMENT
    assert [each._cache_size() for each in programs] == compiled


def test_copies_and_repeated_states_leave_the_files_as_they_are(read):
    lm, state, path = read
    ram = lm.read(random_text(1, 3 * SEGMENT + C), last_context_length=14)
    more = random_text(2, 2 * SEGMENT, seed=1)
    before = sorted(x.name for x in path.rglob("*"))
    copy, both = state.copy(), state.repeated(2)
    new = lm.generate([1, 2], C, temperature=0, state=ram.copy())
    assert lm.generate([1, 2], C, temperature=0, state=state.copy()) == new
    want = lm.logits(more, state=ram.repeated(2))
    np.testing.assert_allclose(lm.logits(more, state=both), want, atol=1e-5)
    np.testing.assert_allclose(lm.logits(more[:1], state=copy), want[:1], atol=1e-5)
    assert sorted(x.name for x in path.rglob("*")) == before
    np.testing.assert_allclose(lm.logits(more[:1], state=state), want[:1], atol=1e-5)
    with pytest.raises(UserError, match="of a copy of a state nothing is added to its directory"):
        lm.save_memory(copy, path)
    with pytest.raises(UserError, match=f"other: the memory is in {path}: save it there"):
        lm.save_memory(state, path.parent / "other")


def test_two_states_do_not_add_to_one_directory(read):
    lm, state, path = read
    other = lm.load_memory(path)
    lm.read(random_text(1, 2 * SEGMENT), state=state)
    with pytest.raises(UserError, match=f"{path}/segment-000000-000003: written by another"):
        lm.read(random_text(1, 2 * SEGMENT), state=other)


def test_nor_at_the_same_time(read, monkeypatch):
    lm, state, path = read
    other, refused, fsync = lm.load_memory(path), [], os.fsync

    def meanwhile(file):
        if not refused:
            with pytest.raises(UserError, match=f"{path}: written by another") as error:
                refused.append(lm.read(random_text(1, 2 * SEGMENT), state=other))
            refused.append(error)
        fsync(file)

    monkeypatch.setattr(os, "fsync", meanwhile)
    lm.read(random_text(1, 2 * SEGMENT), state=state)
    assert len(refused) == 1 and not [x for x in path.rglob("*") if "half-written" in x.name]
    lm.save_memory(state, path)
    more = random_text(1, 30, seed=1)
    got = lm.logits(more, state=lm.load_memory(path).copy())
    np.testing.assert_array_equal(got, lm.logits(more, state=state.copy()))


def test_an_empty_window_is_saved_again(tmp_path):
    lm = model_of("llama")
    for memory in (SHARED, kept_in(tmp_path / "m", shared=True)):
        path = memory.directory or tmp_path / "ram"
        state = lm.remember(random_text(3, 40), memory=memory)
        for _ in range(2):
            lm.save_memory(state, path)
        loaded = lm.load_memory(path)
        assert loaded.places == [0] and loaded.stored == [120]
    with pytest.raises(UserError, match=f"{path}/open: the end of the memory in {path}: give that"):
        lm.load_memory(tmp_path / "m" / "open")


# --- Kills and damage ----------------------------------------------------------------------------

KILLED = """
    import os, shutil, signal, sys
    sys.path[:0] = {paths}
    from readers import model_of, random_text
    from fot_jax.inference import segment_files
    from fot_jax.inference.state import MemoryConfig
    segment_files.TOKENS = {segment}
    path, files, write = {path!r}, 0, os.fsync
    def fsync(file):
        global files
        files += 1
        if files == {last}:
            os.kill(os.getpid(), signal.SIGKILL)
        if files in {before}:
            shutil.copytree(path, f"{{path}}-{{files}}")
        write(file)
    os.fsync = fsync
    model_of("llama").read(random_text(1, 1000), memory=MemoryConfig(directory=path))
"""
LEFT = {2: 0, 24: 2, 47: 4}  # files when it is killed -> whole segments, of eleven files each


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What is there when a reading has so many files: at the last number it is killed."""
    path, (*before, last) = tmp_path_factory.mktemp("killed") / "m", LEFT
    paths = [p for p in sys.path if p.endswith("tests") or p.endswith("inference")]
    code = KILLED.format(
        **{"paths": paths, "segment": SEGMENT, "path": str(path), "before": before, "last": last}
    )
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    return {last: path} | {files: f"{path}-{files}" for files in before}


@pytest.mark.parametrize("files", LEFT)
def test_killed_while_a_segment_is_written(tmp_path, caplog, left, files):
    path, segments = tmp_path / "m", LEFT[files]
    for copy in (path, tmp_path / "again"):
        shutil.copytree(left[files], copy)
    lm, text = model_of("llama"), random_text(1, 1000)
    state = lm.load_memory(path)
    kept = segments * SEGMENT
    assert f"{path}: has the first {kept} tokens that were read, and not" in caplog.text
    assert state.stored == [kept]
    got = lm.logits(text[:, kept:], state=state)
    np.testing.assert_allclose(got, lm.logits(text)[:, kept:], atol=1e-5)
    assert not list(path.glob("*half-written*"))
    lm.save_memory(state, path)
    caplog.clear()
    np.testing.assert_array_equal(lm.load_memory(path).stored, state.stored)
    assert not caplog.text

    # The same reading once more goes on; nothing else does.
    path, steps = tmp_path / "again", []
    for remains in ("open.half-written-1-a", "open.replaced-1-a"):  # of a kill while that is saved
        (path / remains).mkdir()
    wrongs = ({"tokens": text[:, ::-1]}, {"memory": kept_in(path, storage="int8")})
    for wrong in wrongs if segments else ():
        with pytest.raises(UserError, match="holds a memory already"):
            lm.read(**{"tokens": text, "memory": kept_in(path)} | wrong)
    other = dataclasses.replace(lm.config, last_context_length=30)
    begun = dataclasses.replace(lm, config=other)._begin(1, kept_in(path), None, text)
    assert begun.stored == [kept]
    state = lm.read(text, memory=kept_in(path), progress=steps.append)
    assert sum(steps) == 1000 and (steps[0] == kept or not kept)
    more, unbroken = random_text(1, 2 * C, seed=1), lm.read(text)
    want = lm.logits(more, state=unbroken)
    np.testing.assert_allclose(lm.logits(more, state=state.copy()), want, atol=1e-5)
    assert not list(path.glob("open.*"))
    lm.save_memory(state, path)
    with pytest.raises(UserError, match="holds a memory already"):
        lm.read(text, memory=kept_in(path))


def test_killed_before_merged_segments_are_removed(read):
    lm, state, path = read
    left = path.parent / "left"
    shutil.copytree(path, left)
    more = random_text(1, 2 * SEGMENT, seed=1)
    lm.read(more, state=state, last_context_length=14)
    lm.save_memory(state, path)
    merged = sorted(each.name for each in path.iterdir())
    shutil.copytree(left, path, dirs_exist_ok=True)
    loaded = lm.load_memory(path)
    assert loaded.stored == state.stored
    want = lm.logits(more, state=state.copy())
    np.testing.assert_allclose(lm.logits(more, state=loaded), want, atol=1e-5)
    assert set(merged) - {"open"} < {each.name for each in path.iterdir()}
    assert not list(path.glob("segment-000001-000001"))


def test_loaded_while_another_process_reads_on(read, monkeypatch):
    """Which merges segments that were listed, and removes them."""
    lm, state, path = read
    crc32, others = segment_files._crc32, iter([state])

    def read_on(file):
        for other in others:  # once
            lm.read(random_text(1, SEGMENT + C, seed=1), state=other)
        return crc32(file)

    monkeypatch.setattr(segment_files, "_crc32", read_on)
    loaded = lm.load_memory(path)
    assert loaded.segments.tokens == state.segments.tokens == 4 * SEGMENT
    assert [each.name for each in path.glob("segment-*")] == ["segment-000000-000003"]

    def never_done(file):
        (path / f"segment-{next(numbers):06}-000099").mkdir()
        raise FileNotFoundError(file)

    lm.save_memory(state, path)
    ends = iter([path / "open"])

    def closed_meanwhile(*args):  # by the other, which removes the end that was saved
        for end in ends:
            shutil.rmtree(end)
        return load(*args)

    load = memory_files._load
    monkeypatch.setattr(memory_files, "_load", closed_meanwhile)
    assert lm.load_memory(path).segments.tokens == 4 * SEGMENT
    numbers = iter(range(90, 100))
    monkeypatch.setattr(segment_files, "_crc32", never_done)
    with pytest.raises(UserError, match=f"{path}: another process is adding to it: load it when"):
        lm.load_memory(path)


def test_a_memory_without_its_end_is_read_on_in_its_own_type(read):
    """Whatever type the model would keep a new one in."""
    lm, _, path = read
    other = dataclasses.replace(lm, config=dataclasses.replace(lm.config, memory_dtype="int8"))
    state = other.load_memory(path)
    assert state.memory.storage == "float32" and state.config.storage is None
    other.read(random_text(1, 2 * SEGMENT), state=state)
    other.save_memory(state, path)
    assert lm.load_memory(path).segments.tokens == state.segments.tokens == 4 * SEGMENT


def test_damage_is_noticed(read):
    lm, state, path = read
    lm.save_memory(state, path)
    whole = path.parent / "whole"
    shutil.copytree(path, whole)
    rng = np.random.default_rng(0)
    for file in sorted(path.rglob("segment*/*")):
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 0x10
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{file.parent}.*damaged.*: remove the memory"):
            lm.load_memory(path)
        os.truncate(file, 5)
        with pytest.raises(UserError, match=f"{file.parent}.*damaged.*: remove the memory"):
            lm.load_memory(path)
        file.write_bytes((whole / file.relative_to(path)).read_bytes())
    (path / "segment-000001-000001").rename(path / "a")
    with pytest.raises(UserError, match="segment-000001-000001: missing: remove the memory"):
        lm.load_memory(path)
    (path / "segment-000002-000002").rename(path / "segment-000001-000001")
    (path / "a").rename(path / "segment-000002-000002")
    with pytest.raises(
        UserError, match="segment-000001-000001: damaged .of another memory or place."
    ):
        lm.load_memory(path)


def test_what_a_directory_cannot_be_is_refused(read, tmp_path):
    lm, _, path = read
    text = random_text(1, 10)
    with pytest.raises(UserError, match=f"{path}: holds a memory already: go on from it with"):
        lm.read(text, memory=kept_in(path))
    with pytest.raises(UserError, match="not a memory, so it is not replaced: give a new name"):
        lm.save_memory(lm.read(text), path)
    for rows, mask in ((2, None), (1, np.arange(10)[None] > 2)):
        with pytest.raises(UserError, match=f"{path}: holds a memory already, and only one text w"):
            lm.read(random_text(rows, 10), mask=mask, memory=kept_in(path, shared=True))
    (tmp_path / "thesis").write_text("1")
    with pytest.raises(UserError, match="thesis: something else is there: give a new name"):
        lm.read(text, memory=kept_in(tmp_path / "thesis"))
    new = tmp_path / "new"
    with pytest.raises(
        UserError, match=f"{new}: a memory in a directory, which is of one text, and"
    ):
        lm.read(random_text(2, 10), memory=kept_in(new))
    with pytest.raises(
        UserError, match=f"{new}: a memory in a directory, which forgets nothing: leave"
    ):
        kept_in(new, size=100)
    with pytest.raises(UserError, match="gs://bucket/m: files in a bucket cannot be memory-mapped"):
        kept_in("gs://bucket/m")
    with pytest.raises(UserError, match="last_context_length = 100"):
        lm.read(text, memory=kept_in(new), last_context_length=100)
    lm.read(text, memory=kept_in(new))  # in which nothing was
    full = kept_in(tmp_path / "full", size=200, ring=False)
    with pytest.raises(UserError, match="the memory of 200 tokens is full before the end"):
        lm.read(random_text(1, 400), memory=full)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("memory",))
    with pytest.raises(
        UserError, match=f"{path}: a memory in a directory, which is read on one device"
    ):
        type(lm)(lm.config, lm.params, mesh=mesh).load_memory(path)


def test_what_an_index_cannot_be_is_refused(read, tmp_path):
    lm, state, path = read
    index, text = MemoryConfig(lookup=IndexedTopK()), random_text(1, 10)
    with pytest.raises(UserError, match="visited=4096.: a memory with an index, which forgets not"):
        MemoryConfig(size=10_000, lookup=IndexedTopK())
    with pytest.raises(UserError, match="a memory with an index, which is of one text, and 2 are"):
        lm.read(random_text(2, 10), memory=index)
    with pytest.raises(UserError, match=f"{tmp_path}/a: a memory with an index is saved where it "):
        lm.save_memory(lm.read(text, memory=index), tmp_path / "a")
    lm.save_memory(lm.read(text), tmp_path / "b")
    with pytest.raises(UserError, match=f"{tmp_path}/b: has no index, which memories in a direct"):
        lm.load_memory(tmp_path / "b", IndexedTopK())
    lm.save_memory(state, path)
    content = json.loads((path / "segments.json").read_text())["content"]
    for old in (1, 2):
        (path / "segments.json").write_text(json.dumps(seal(content | {"version": old})))
        message = f"{path}: a memory in segments of format version {old}, and"
        with pytest.raises(UserError, match=message):
            lm.load_memory(path)

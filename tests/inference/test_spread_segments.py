"""Several processes that spread a memory in segments say what one says, after kills, too."""

import signal
from pathlib import Path

import numpy as np
import pytest
import together
from readers import C, model_of, random_text

from fot_jax.common.errors import UserError
from fot_jax.inference import segment_files
from fot_jax.inference.state import MemoryConfig
from fot_jax.model import clusters
from fot_jax.model.lookup import Dense, IndexedTopK, TopK

SEGMENT = 2 * C
TEXT, MORE = random_text(1, 5 * SEGMENT + C + 9), random_text(1, 2 * C, seed=1)
MODEL = "llama without positions in memory layers"  # whose queries grow with the tokens of all
INDEXED = IndexedTopK(7, 1_000)  # goes to all that there is


def memories(directory, few):
    """In files and in RAM."""
    if few:
        yield MemoryConfig(lookup=INDEXED, directory=f"{directory}/memory")
    else:
        yield MemoryConfig(lookup=TopK(7), directory=f"{directory}/memory")
        yield MemoryConfig(lookup=INDEXED)


def read(lm, config):
    """Logits of what follows a text, from its memory, and from the same when it has been loaded."""
    state = lm.read(TEXT, memory=config, last_context_length=14)
    yield "after", lm.logits(MORE, state=state.copy())
    if config.directory:
        lm.save_memory(state, config.directory)
        state = lm.load_memory(config.directory, INDEXED)
        yield "loaded", lm.logits(MORE, state=state)
        lm.save_memory(state, config.directory)  # with more segments in its files
        yield "on", lm.logits(MORE, state=lm.load_memory(config.directory, Dense()))


def start(directory, processes, *arguments):
    script = Path(__file__).with_name("segments_of_processes.py")
    return together.start([script, directory, *arguments], processes)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(segment_files, "TOKENS", SEGMENT)
    monkeypatch.setattr(clusters, "FEW", 2)


def assert_as_one_process(directory, few=False):
    for number, config in enumerate(memories(directory / "alone", few)):
        with np.load(directory / f"{number}.npz") as got:
            for part, want in read(model_of(MODEL), config):
                np.testing.assert_allclose(got[part], want, atol=1e-5, err_msg=part)


@pytest.mark.slow
def test_three_processes(tmp_path):
    codes, said = together.ended(start(tmp_path, 3, "all"))
    assert codes == [0, 0, 0], said
    assert_as_one_process(tmp_path)
    # No other number of processes takes it for its own.
    with pytest.raises(UserError, match="memory: a memory that 3 processes have written, and of"):
        model_of(MODEL).load_memory(tmp_path / "memory")
    with pytest.raises(UserError, match="memory: a memory that 3 processes have written, and of"):
        model_of(MODEL).read(TEXT, memory=MemoryConfig(directory=str(tmp_path / "memory")))
    with pytest.raises(UserError, match="process-1-of-3: one process's share of a memory: give"):
        model_of(MODEL).load_memory(tmp_path / "memory" / "process-1-of-3")


@pytest.mark.slow
def test_one_is_killed(tmp_path):
    """While it writes its fourth segment, before which the other one must not merge, and then, when
    it has gone on, while it merges four."""
    # A segment has eleven files; going on, three segments are there.
    for files, segments in ((36, 3), (14, 4)):
        processes = start(tmp_path, 2, "few", str(files))
        try:
            assert processes[1].wait(timeout=300) == -signal.SIGKILL
            if segments == 3:  # what the other one does until it finds this one gone
                assert processes[0].wait(timeout=300) != 0
        finally:
            for process in processes:
                process.kill()
            said = [process.communicate() for process in processes]
        if segments == 4:
            assert going_on_after(3) in said[0][1]
    codes, said = together.ended(start(tmp_path, 2, "few"))
    assert codes == [0, 0], said
    assert going_on_after(4) in said[0][1]
    assert_as_one_process(tmp_path, few=True)


def going_on_after(segments):
    return f"memory: has the first {segments * SEGMENT} of {TEXT.size} tokens: going on"

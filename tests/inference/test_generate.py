"""`fot generate`: from a prompt to text on the screen, with memories kept between runs."""

import json
import os
import shutil
import signal
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st
from runs import refused

from fot_jax import cli
from fot_jax.data.vocabulary import Bytes
from fot_jax.inference import segment_files
from fot_jax.inference.generate import as_text
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import MemoryConfig

EXPERIMENT = f"""{runs.MODEL}{runs.ONE_STEP_ON_TEXT}
ModelConfig.vocab_size = 258
Corpus.path = "texts"
Checkpoints.every = 1
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A model of bytes, trained for a step."""
    here = tmp_path_factory.mktemp("run")
    texts = here / "texts"
    texts.mkdir()
    for split in ("train", "valid"):
        rows = (json.dumps({"text": f"{split} {i} " * 60}) for i in range(8))
        (texts / f"{split}.jsonl").write_text("\n".join(rows))
    experiment = here / "experiment.gin"
    experiment.write_text(EXPERIMENT)
    with pytest.MonkeyPatch.context() as patch, runs.first_devices(patch, 1):
        assert runs.train(experiment, here / "workdir", f'Corpus.path = "{texts}"') == 0
    return here / "workdir"


def generate(capsys, workdir, *options):
    capsys.readouterr()
    assert cli.main(["generate", "--checkpoint", str(workdir), *map(str, options)]) == 0
    return capsys.readouterr().out


# --- What is written -----------------------------------------------------------------------------


def test_prints_what_the_model_writes(workdir, capsys):
    lm = LanguageModel.load(workdir)
    prompt = "train 3 train 3"
    tokens = [Bytes.bos, *prompt.encode()]
    for options, how in (
        ((), dict(temperature=0.7)),
        (("--top_p", 0.5, "--seed", 7), dict(temperature=0.7, top_p=0.5, seed=7)),
        (
            ("--k", 2, "--memory_size", 4),
            dict(temperature=0.7, memory=MemoryConfig(4, lookup=cli_lookup(2))),
        ),
        (
            ("--memory_dtype", "int8", "--last_context_length", 5),
            dict(temperature=0.7, memory=MemoryConfig(storage="int8"), last_context_length=5),
        ),
        (("--temperature", 0, "--devices", 8), dict(temperature=0)),
    ):
        out = generate(capsys, workdir, "--prompt", prompt, "--max_new_tokens", 40, *options)
        new = lm.generate(tokens, 40, stop=[Bytes.eos], **how)
        said = "".join(as_text(Bytes(), new))
        assert out == said + "\n" and len(new) > 5


def cli_lookup(k):
    from fot_jax.model.lookup import TopK

    return TopK(k)


def test_a_prompt_from_a_file_and_a_memory_kept(workdir, capsys, tmp_path):
    """Read once, asked twice: as if the question stood in the text."""
    book, question = tmp_path / "book.txt", "train 5"
    text = ("train 5 wäre " * 30).encode()
    book.write_bytes("\ufeff".encode() + text)  # as some editors save it
    kept = tmp_path / "book.memory"
    out = generate(
        *(capsys, workdir, "--prompt_file", book, "--save_memory", kept, "--max_new_tokens", 0)
    )
    assert out == ""
    options = ("--temperature", 0, "--max_new_tokens", 30)
    before = runs.files(kept)
    first, second = (
        generate(capsys, workdir, "--memory", kept, "--prompt", question, *options)
        for _ in range(2)
    )
    assert first == second and runs.files(kept) == before
    lm = LanguageModel.load(workdir)
    state = lm.read([Bytes.bos, *text])
    new = lm.generate(list(question.encode()), 30, temperature=0, stop=[257], state=state)
    assert first == "".join(as_text(Bytes(), new)) + "\n"
    more = tmp_path / "more.memory"
    generate(
        *(capsys, workdir, "--memory", kept, "--prompt", question, "--save_memory", more),
        *("--max_new_tokens", 3),
    )
    state = lm.read([Bytes.bos, *text])
    state = lm.read(list(question.encode()), state=state)
    loaded = lm.load_memory(more)
    assert loaded.places.tolist() == state.places.tolist()
    np.testing.assert_array_equal(loaded.memory.appended, state.memory.appended)


def test_a_memory_in_a_directory(workdir, capsys, tmp_path, monkeypatch):
    """Says the same, stays as it is when it is asked, and is added to when that is wanted."""
    monkeypatch.setattr(segment_files, "TOKENS", 64)
    book, in_ram, kept = (tmp_path / name for name in ("book.txt", "ram", "kept[1]*"))
    book.write_text("train 5 wäre " * 30)
    read = (capsys, workdir, "--prompt_file", book, "--max_new_tokens", 0)
    assert generate(*read, "--memory_directory", kept) == generate(*read, "--save_memory", in_ram)
    before = runs.files(kept)
    assert (kept / "segment-000000-000003").exists()
    written = tmp_path / "written"  # what is written after the prompt is none of it
    generate(*read[:-1], 100, "--memory_directory", written, "--temperature", 0)
    assert runs.files(written) == before
    ask = (capsys, workdir, "--prompt", "train 5", "--temperature", 0, "--max_new_tokens", 30)
    assert generate(*ask, "--memory", kept) == generate(*ask, "--memory", in_ram)
    best = generate(*ask, "--memory", kept, "--k", 5)
    assert generate(*ask, "--memory", kept, "--k", 5, "--visited", 1_000) == best
    assert runs.files(kept) == before
    generate(*ask, "--memory", kept, "--save_memory", kept)
    state = LanguageModel.load(workdir).load_memory(kept)
    assert state.stored + state.held == 1 + len(book.read_bytes()) + len("train 5")
    argv = ("generate", "--checkpoint", workdir, "--prompt", "a", "--memory", kept)
    assert "give their number, --k, too" in refused(capsys, *argv, "--visited", 1_000)
    other = refused(capsys, *argv, "--save_memory", tmp_path / "other")
    assert f"{tmp_path}/other: the memory is in {kept}: save it there" in other
    end = refused(capsys, *argv[:-1], kept / "open")
    assert f"{kept}/open: the end of the memory in {kept}: give that" in end
    end = refused(capsys, *argv[:-2], "--save_memory", kept / "open")
    assert f"{kept}/open: the end of the memory in {kept}: give that" in end
    unread = ("generate", *read[2:], "--checkpoint", workdir, "--k", 5, "--visited", 9)
    unread = refused(capsys, *unread, "--save_memory", tmp_path / "index")
    assert f"{tmp_path}/index: a memory with an index is saved where it is read into" in unread
    shutil.rmtree(kept / "open")  # as after a kill
    assert f"{kept}: reading was killed after 384" in refused(capsys, *argv, "--save_memory", kept)


@given(st.text(max_size=200), st.integers(1, 5))
def test_text_comes_in_whole_characters(text, context):
    tokens = list(text.encode())
    pieces = list(as_text(Bytes(), tokens, context))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


SLOW_TO_SAVE = """if True:
    import sys, time
    from fot_jax import cli
    from fot_jax.inference import memory_files
    memory_files._write_tree = lambda *args: time.sleep(60)
    sys.exit(cli.main())
"""


def wait_for(there):
    deadline = time.monotonic() + 120
    while not there() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert there()


@pytest.mark.slow
@pytest.mark.parametrize(
    "signum, option",
    [
        (signal.SIGINT, "--save_memory"),
        (signal.SIGTERM, "--memory_directory"),
        (signal.SIGHUP, "--save_memory"),
    ],
)
def test_a_signal_while_saving_leaves_nothing(workdir, tmp_path, signum, option):
    argv = ["generate", "--checkpoint", str(workdir), "--prompt", "train 5 train 5 train 5"]
    argv += [option, str(tmp_path / "new" / "memory")]
    nohup = signum != signal.SIGHUP
    process = runs.start(argv, ("-c", SLOW_TO_SAVE), nohup)
    halves = (tmp_path / "new").rglob

    def saving():  # after the check that it can be saved there, which makes a directory too
        return any(half.is_dir() for half in halves("*half-written*")) and process.poll() is None

    try:
        wait_for(saving)
        time.sleep(1)
        wait_for(saving)
        if nohup:
            process.send_signal(signal.SIGHUP)
            time.sleep(0.5)
            assert saving()
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 128 + signum and stderr.endswith("fot: interrupted\n")
        assert not list(halves("*half-written*"))
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("signum, after", [(signal.SIGINT, 3.0), (signal.SIGTERM, 5.0)])
def test_a_signal_ends_it(workdir, tmp_path, signum, after):
    """While it compiles, reads or writes, nothing compiled beforehand: no crash."""
    book = tmp_path / "book.txt"
    book.write_text("train 5 " * 3000)
    argv = ["generate", "--checkpoint", str(workdir), "--prompt_file", str(book)]
    # The most likely tokens go on for ever; drawn ones would end the text after some hundreds.
    process = runs.start([*argv, "--max_new_tokens", "200000", "--temperature", "0"])
    time.sleep(after)
    assert process.poll() is None
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    # Before Python has come to our handler, it is Python's or the system's own.
    assert process.returncode in (128 + signum, -signum)
    assert "Traceback" not in stderr or "KeyboardInterrupt" in stderr


@pytest.mark.slow
def test_text_is_there_before_the_end(workdir, tmp_path):
    """As a process, whose reader then goes away."""
    argv = ["generate", "--checkpoint", str(workdir), "--prompt", "train"]
    process = runs.start([*argv, "--max_new_tokens", "200000"])
    try:
        assert os.read(process.stdout.fileno(), 1)  # waits for it
        assert process.poll() is None
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == ""
    finally:
        process.kill()


# --- What is refused -----------------------------------------------------------------------------


def test_bad_input_is_one_line(workdir, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("latin").write_bytes("grün".encode("latin-1"))
    Path("empty").write_text("")
    here = os.path.realpath(tmp_path)
    for options, message in (
        ((), "give a prompt, with --prompt or with --prompt_file"),
        (("--prompt", "a", "--prompt_file", "latin"), "give a prompt, with --prompt or with"),
        (("--prompt", ""), "the prompt is empty: give some text"),
        (("--prompt_file", "empty"), "the prompt is empty: give some text"),
        (("--prompt_file", "gone"), "gone: no such file: give one with the prompt in it"),
        (("--prompt_file", "."), ".: no such file: give one with the prompt in it"),
        (("--prompt", "a\udcff"), "the prompt is not UTF-8 text: correct it, or the locale"),
        (("--prompt_file", "/dev/zero"), "/dev/zero: a device, which has no end: give a file"),
        (("--prompt_file", "latin"), "latin: not UTF-8 text (byte 2): give a text file"),
        (("--prompt", "a", "--memory", "gone"), "gone: no memory here: give a directory that a"),
        (("--prompt", "a", "--k", 0), "TopK.k = 0: give 1 or more"),
        (
            ("--prompt", "a", "--k", 9, "--memory_size", 8),
            "TopK.k = 9 is larger than the memory of",
        ),
        (("--prompt", "a", "--memory_size", -1), "MemoryConfig.size = -1: give a number from 0"),
        (("--prompt", "a", "--memory_dtype", "int2"), "MemoryConfig.storage = 'int2': choose one"),
        (("--prompt", "a", "--top_p", 2), "generate.top_p = 2.0: give a number from 0 to 1"),
        (("--prompt", "a", "--temperature", "nan"), "generate.temperature = nan: give 0 or more"),
        (("--prompt", "a", "--seed", -1), "generate.seed = -1: give a number from 0"),
        (("--prompt", "a", "--max_new_tokens", -1), "generate.max_new_tokens = -1: give a numbe"),
        (
            ("--prompt", "a", "--max_new_tokens", 2**63),
            f"generate.max_new_tokens = {2**63}: give a",
        ),
        (("--prompt", "a", "--last_context_length", 17), "last_context_length = 17: give a whole"),
        (("--prompt", "a", "--devices", 99), "devices = 99, but this machine has 8"),
        (("--prompt", "a", "--devices", 0), "LanguageModel.devices = 0: give 1 or more"),
        (("--prompt", "a", "--save_memory", "latin"), f"{here}/latin: not a memory, so it is not"),
        (("--prompt", "a", "--save_memory", "new/er/m", "--devices", 99), "devices = 99, but this"),
        (
            ("--prompt", "a", "--save_memory", "m", "--memory_directory", "n"),
            "give --memory_directory or --save_memory: either saves the memory",
        ),
        (("--prompt", "a", "--save_memory", ""), "'' is no path: give one of this machine"),
    ):
        before = runs.files(tmp_path)
        line = refused(capsys, "generate", "--checkpoint", workdir, *options)
        assert line.startswith(message), line
        assert runs.files(tmp_path) == before and not Path("new").exists()
    line = refused(capsys, "generate", "--checkpoint", "gone", "--prompt", "a")
    assert line.startswith("gone: does not exist: give a workdir")


def test_a_saved_memory_keeps_what_it_is(workdir, capsys, tmp_path):
    kept = tmp_path / "kept"
    generate(capsys, workdir, "--prompt", "a" * 50, "--save_memory", kept, "--max_new_tokens", 0)
    for options in (("--memory_size", 8), ("--memory_dtype", "int8"), ("--memory_directory", "m")):
        argv = ("generate", "--checkpoint", workdir, "--memory", kept, "--prompt", "a", *options)
        assert "a saved memory keeps its size, its type and its place" in refused(capsys, *argv)
    assert generate(capsys, workdir, "--memory", kept, "--prompt", "a", "--k", 3)


def test_a_memory_of_another_model(workdir, capsys, tmp_path):
    kept = tmp_path / "kept"
    generate(capsys, workdir, "--prompt", "a" * 50, "--save_memory", kept, "--max_new_tokens", 0)
    description = json.loads((kept / "memory.json").read_text())
    content = description["content"]
    content["fingerprint"]["model"]["num_layers"] = 3
    crc = zlib.crc32(json.dumps(content).encode())
    (kept / "memory.json").write_text(json.dumps({"crc32": crc, "content": content}))
    line = refused(
        *(capsys, "generate", "--checkpoint", workdir, "--memory", kept, "--prompt", "a")
    )
    assert "the memory of another model, with num_layers = 3 and not 2: load that model" in line


def test_a_plain_model_has_no_memory(workdir, capsys, tmp_path):
    """Asked for one, it says so; not asked, it writes."""
    plain = tmp_path / "plain"
    experiment = workdir.parent / "experiment.gin"
    texts = workdir.parent / "texts"
    with pytest.MonkeyPatch.context() as patch, runs.first_devices(patch, 1):
        settings = (
            f'Corpus.path = "{texts}"',
            "ModelConfig.memory_layers = ()",
            "train.scheme = @NoCrossbatch()",
        )
        assert runs.train(experiment, plain, *settings) == 0
    assert generate(capsys, plain, "--prompt", "ab", "--max_new_tokens", 5)
    for options, message in (
        (("--memory_size", 8), "a memory of 8 tokens for a model without memory layers: it reads"),
        (("--k", 8), "a memory with TopK(k=8) for a model without memory layers: it reads its"),
        (("--save_memory", tmp_path / "m"), "the model has no memory layers: there is no memory"),
    ):
        line = refused(capsys, "generate", "--checkpoint", plain, "--prompt", "ab", *options)
        assert message in line

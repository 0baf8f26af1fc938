"""Processes that read text: what they import, what they say, how they end."""

import subprocess
import sys

import pytest


def run_python(code, *arguments):
    argv = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run


def test_importing_it_imports_neither_tensorflow_nor_seqio():
    code = "import sys, fot_jax.data.tasks as t; t.Text((t.Corpus('x'),)); print(*sys.modules)"
    assert not {"tensorflow", "seqio", "jax"} & set(run_python(code).stdout.split())


READ_IN_A_THREAD = """
import jax, sys, threading
from fot_jax.data.corpus import Corpus
from fot_jax.data.tasks import Text
from fot_jax.data.vocabulary import Bytes
from fot_jax.common.errors import UserError

def read(path):
    try:
        source = Text([Corpus(path)], Bytes())
        print(*(len(document.tokens) for document in source.documents("train")))
    except UserError as error:
        print(error)

for path in sys.argv[1:]:
    thread = threading.Thread(target=read, args=[path])
    thread.start()
    thread.join()
"""


def test_tensorflow_says_nothing(tmp_path):
    """Neither when it is imported, in whatever thread, nor about an error that we report."""
    good, broken = (tmp_path / name / "train.jsonl" for name in ("good", "broken"))
    for file in (good, broken):
        file.parent.mkdir()
        file.write_text('{"text": "12345678"}\n')
    with broken.open("a") as file:
        file.write('{"text": "123')  # not the first, which we look at
    run = run_python(READ_IN_A_THREAD, good.parent, broken.parent)
    of_good, of_broken = run.stdout.splitlines()
    assert of_good == "10" and of_broken.startswith(f"{broken}:2: broken row, not JSON")
    assert run.stderr == ""


SLOW_READER = """
import dataclasses, time
from fot_jax.data.lanes import Lanes
from fot_jax.data.prefetch import Prefetch
from fot_jax.data.tasks import Text
from fot_jax.data.vocabulary import Bytes

@dataclasses.dataclass(frozen=True)
class Slow(Bytes):
    def encode(self, text):
        time.sleep(0.5)
        return [0]

source = Text(tokenizer=Slow())
stream = source.stream(0, 2, seed=0)
next(stream)
import tensorflow as tf
print(tf.config.get_visible_devices("GPU"))
prefetch = Prefetch(Lanes(source, lanes=1, window=2), lambda batch: batch)
next(prefetch)
next(stream)
"""


@pytest.mark.slow
def test_a_process_ends_cleanly_while_documents_are_read_ahead():
    run = run_python(SLOW_READER)
    assert run.stdout == "[]\n"
    assert "Traceback" not in run.stderr and "Exception" not in run.stderr

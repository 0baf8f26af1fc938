"""For every test: eight CPU devices, and programs that are compiled quickly, as most run once."""

import contextlib
import gc
import importlib.util
import itertools
import os
import re
import sys
import tempfile
import uuid
from importlib.metadata import version
from pathlib import Path

# Before JAX starts. Workers of pytest, and processes that tests start, inherit it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="fot_jax_compiled_")  # removed at exit
    os.environ |= {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_COMPILATION_CACHE_DIR": COMPILED.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # Of torch and NumPy: there is a worker on each core already.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    if version("jaxlib").startswith("0.10."):  # XLA ends where it does not know a flag
        # Half the time of compiling for CPUs.
        flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import buckets  # noqa: E402
import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
import runs  # noqa: E402

from fot_jax import cli  # noqa: E402

# What tests need beyond the extra `dev` -> the extra that brings it.
EXTRAS = {
    "accelerate": "test",
    "datasets": "lm_eval",
    "libtpu": "tpu",
    "lm_eval": "lm_eval",
    "mkdocs": "docs",
    "peft": "test",
    "torch": "torch",
    "wonderwords": "lm_eval",
}

# No test fails for being slow: machines that run them do other things, too.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser):
    parser.addoption(
        "--every_extra",
        action="store_true",
        help="tests whose extra is not installed fail, as in CI; else they are skipped",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(*modules): skipped where one is not installed")


def _skip_without(modules):
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs the extra {EXTRAS[module]}")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A module of tests that imports what is not installed is skipped as a whole."""
    if collector.config.getoption("every_extra"):
        return (yield)
    collect = collector.collect

    def collect_or_skip():
        try:
            return collect()
        except collector.CollectError as error:
            (missing, *_) = re.findall(r"No module named '(\w+)", str(error)) or [None]
            if missing not in EXTRAS:
                raise
            pytest.skip(f"needs the extra {EXTRAS[missing]}", allow_module_level=True)

    collector.collect = collect_or_skip
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    if not item.config.getoption("every_extra"):
        for mark in item.iter_markers("needs"):
            _skip_without(mark.args)
    with _skipped_without_extras(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with _skipped_without_extras(item):
        return (yield)


@contextlib.contextmanager
def _skipped_without_extras(item):
    """A test that meets what is not installed is skipped."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if item.config.getoption("every_extra") or missing not in EXTRAS:
            raise
        pytest.skip(f"needs the extra {EXTRAS[missing]}")


_ended = itertools.count()  # tests


def pytest_runtest_teardown():
    """Each compiled program maps memory, and Linux gives a process no more than 65,530 mappings."""
    maps = Path("/proc/self/maps")  # takes tens of milliseconds to read
    if next(_ended) % 8 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def one_device(monkeypatch):
    with runs.first_devices(monkeypatch, 1):
        yield


@pytest.fixture(scope="session")
def reproduce():
    """The module that `python experiments/reproduce` runs."""
    directory = Path(__file__).parents[1] / "experiments" / "reproduce"
    sys.path.insert(0, str(directory))
    spec = importlib.util.spec_from_file_location("reproduce", directory / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current directory, with experiment.gin."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment.gin").write_text(runs.DICTIONARY + runs.EVALUATED)
    return tmp_path


@pytest.fixture
def two(tmp_path, monkeypatch):
    """The current directory, with a, a LLaMA, and b, the workdir with a memory layer made of it."""
    import llamas  # and with it torch, which not every test needs

    monkeypatch.chdir(tmp_path)
    llamas.save(tmp_path / "a", num_key_value_heads=2)
    cli.main(["convert", "from-hf", "a", "b", "--memory_layers", "1"])
    return tmp_path


@pytest.fixture(scope="session")
def _cloud():
    cloud = buckets.Cloud()
    os.environ |= cloud.environment  # read when a library is first used; processes inherit it
    yield cloud
    cloud.close()


@pytest.fixture
def cloud(_cloud):
    """Google Cloud Storage on this machine, where gs:// paths lead from now on."""
    _cloud.requests.clear()
    yield _cloud
    _cloud.forbidden, _cloud.anonymous, _cloud.broken, _cloud.before = set(), False, False, None


@pytest.fixture
def bucket(cloud):
    """An empty bucket there."""
    return cloud.bucket(f"test-{uuid.uuid4().hex}")

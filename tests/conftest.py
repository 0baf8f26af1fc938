"""Eight CPU devices for every test, set before JAX starts."""

import gc
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402
import runs  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def programs_go_with_their_module():
    """All compiled programs together are more mappings of memory than Linux gives a process."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def one_device(monkeypatch):
    with runs.first_devices(monkeypatch, 1):
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current directory, with experiment.gin."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment.gin").write_text(runs.DICTIONARY + runs.EVALUATED)
    return tmp_path

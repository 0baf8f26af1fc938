"""Which host of how many this is, and processes that become one program."""

import http.server
import os
import re
import socket
import subprocess
import sys
import threading

import pytest
import runs
import together

from fot_jax.common.errors import UserError
from fot_jax.training import cluster

NAMES = (
    *("FOT_WORKERS", "FOT_WORKER", "FOT_COORDINATOR", "FOT_PROCESSES", "FOT_PROCESS_ID"),
    *("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "MEGASCALE_NUM_SLICES", "GCE_METADATA_HOST"),
    *("TPU_SKIP_MDS_QUERY", "JAX_PLATFORMS"),
)
ALONE = (
    "this machine is worker 3 of 16 of a pod: started alone it would wait for the others forever: "
    "start the same on all of them, under python -m tpu worker (tpu/README.md), or set "
    "JAX_PLATFORMS=cpu to compute on this machine's CPUs alone"
)


@pytest.fixture
def surroundings(monkeypatch):
    """Sets what is given, and nothing else that says which host this is."""

    def set_(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    set_(TPU_SKIP_MDS_QUERY="1")
    return set_


@pytest.fixture
def metadata():
    """A metadata server: its address, and the attributes or HTTP errors it answers with."""
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            folder, _, name = self.path.rpartition("/")
            assert folder == "/computeMetadata/v1/instance/attributes"
            assert self.headers["Metadata-Flavor"] == "Google"
            answer = answers.get(name, 404)
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            if isinstance(answer, str):
                self.wfile.write(answer.encode())

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", answers
        server.shutdown()


# --- Where a host is -----------------------------------------------------------------------------


def test_alone(surroundings):
    assert cluster.place() == cluster.ALONE


def test_of_our_own_variables(surroundings):
    surroundings(FOT_WORKERS="a:1000, b ,c:3", FOT_WORKER="1", TPU_WORKER_HOSTNAMES="x,y")
    assert cluster.place() == (1, ("a", "b", "c"), 1000)
    surroundings(FOT_WORKERS="a,b", FOT_WORKER="0")
    assert cluster.place() == (0, ("a", "b"), 8475)


def test_of_the_variables_of_a_cluster(surroundings):
    surroundings(TPU_WORKER_HOSTNAMES="a,b", TPU_WORKER_ID="1", MEGASCALE_NUM_SLICES="1")
    assert cluster.place() == (1, ("a", "b"), 8475)
    surroundings(TPU_WORKER_HOSTNAMES="localhost")
    assert cluster.place() == cluster.ALONE


@pytest.mark.parametrize("endpoints", ["10.0.0.1,10.0.0.2", "u:u:10.0.0.1,u:u:10.0.0.2"])
def test_of_the_metadata_server(surroundings, metadata, endpoints):
    address, answers = metadata
    answers |= {"worker-network-endpoints": endpoints, "agent-worker-number": "1"}
    surroundings(GCE_METADATA_HOST=address)
    assert cluster.place() == (1, ("10.0.0.1", "10.0.0.2"), 8475)
    surroundings(GCE_METADATA_HOST=address, TPU_SKIP_MDS_QUERY="1")
    assert cluster.place() == cluster.ALONE
    answers["tpu-env"] = "ACCELERATOR_TYPE: 'v4-16'\nMEGASCALE_NUM_SLICES: '2'\n"
    surroundings(GCE_METADATA_HOST=address)
    with pytest.raises(UserError, match="MEGASCALE_NUM_SLICES = 2: a slice knows the hosts of its"):
        cluster.place()


def test_of_a_machine_that_is_no_host_of_a_pod(surroundings, metadata):
    surroundings(GCE_METADATA_HOST=metadata[0])
    assert cluster.place() == cluster.ALONE


@pytest.mark.slow
def test_without_a_metadata_server(surroundings):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        surroundings(GCE_METADATA_HOST=f"127.0.0.1:{closed.getsockname()[1]}")
        assert cluster.place() == cluster.ALONE


@pytest.mark.slow
def test_a_metadata_server_that_fails_is_named(surroundings, metadata):
    address, answers = metadata
    answers["worker-network-endpoints"] = 503
    surroundings(GCE_METADATA_HOST=address)
    with pytest.raises(UserError, match="answers 503 when asked for worker-network-endpoints"):
        cluster.place()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"FOT_WORKERS": "a,b"}, "FOT_WORKER = '', with 2 workers (a, b): give a number"),
        ({"FOT_WORKERS": "a,b", "FOT_WORKER": "2"}, "FOT_WORKER = '2', with 2 workers"),
        ({"FOT_WORKERS": "a,b", "FOT_WORKER": "-1"}, "FOT_WORKER = '-1'"),
        ({"FOT_WORKERS": "a,,b", "FOT_WORKER": "0"}, "FOT_WORKERS: '' is no address"),
        ({"FOT_WORKERS": "a:x", "FOT_WORKER": "0"}, "FOT_WORKERS: 'a:x' is no address"),
        ({"FOT_WORKERS": "a:65535", "FOT_WORKER": "0"}, "FOT_WORKERS: 'a:65535' is no address"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID = ''"),
        (
            {
                **{"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"},
                "MEGASCALE_NUM_SLICES": "2",
            },
            "MEGASCALE_NUM_SLICES = 2: a slice knows the hosts of its own alone",
        ),
    ],
)
def test_what_makes_no_sense_is_named(surroundings, values, message):
    surroundings(**values)
    with pytest.raises(UserError) as raised:
        cluster.place()
    assert message in str(raised.value)


# --- Joining -------------------------------------------------------------------------------------


def on_a_pod():
    return {"TPU_WORKER_HOSTNAMES": ",".join("abcdefghijklmnop"), "TPU_WORKER_ID": "3"}


def test_one_host_of_a_pod_does_not_start_alone(surroundings):
    surroundings(**on_a_pod())
    with pytest.raises(UserError, match=f"^{re.escape(ALONE)}$"):
        cluster.join()
    surroundings(**on_a_pod(), JAX_PLATFORMS="tpu,cpu")
    with pytest.raises(UserError, match=f"^{re.escape(ALONE)}$"):
        cluster.join()


def test_one_host_of_a_pod_uses_its_cpus_alone(surroundings):
    surroundings(**on_a_pod(), JAX_PLATFORMS="cpu")
    cluster.join()


def test_train_refuses_and_a_dry_run_does_not(surroundings, here, capsys):
    surroundings(**on_a_pod())
    assert ALONE == runs.refused_untouched(capsys, "train", "experiment.gin", "--workdir", "run")
    assert runs.cli.main(["train", "experiment.gin", "--dry_run"]) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"FOT_PROCESSES": "four"}, "FOT_PROCESSES = 'four'"),
        ({"FOT_PROCESSES": "0"}, "FOT_PROCESSES = '0'"),
        ({"FOT_PROCESS_ID": "4"}, "FOT_PROCESS_ID = '4': give a number from 0 to 3"),
        ({"FOT_PROCESS_ID": ""}, "FOT_PROCESS_ID = ''"),
        ({"FOT_COORDINATOR": "a"}, "FOT_COORDINATOR = 'a': give host:port"),
        ({"FOT_COORDINATOR": ":1"}, "FOT_COORDINATOR = ':1'"),
        ({"FOT_COORDINATOR": "a:65536"}, "FOT_COORDINATOR = 'a:65536'"),
    ],
)
def test_a_membership_that_makes_no_sense_is_named(surroundings, values, message):
    sound = {"FOT_COORDINATOR": "a:1", "FOT_PROCESSES": "4", "FOT_PROCESS_ID": "3"}
    surroundings(**{**sound, **values})
    with pytest.raises(UserError) as raised:
        cluster.join()
    assert message in str(raised.value)


GATHERS = """
import os, sys
from fot_jax.training import cluster
cluster.join()
import numpy as np
from jax.experimental.multihost_utils import process_allgather
gathered = process_allgather(np.array(int(os.environ["FOT_PROCESS_ID"]))).tolist()
print(gathered, file=sys.stderr, flush=True)  # where JAX's collectives say nothing of their own
"""
# Process 1 fails; process 0 would be waited for.
ONE_FAILS = f"""{GATHERS}
import time
from fot_jax import cli

def main():
    if os.environ["FOT_PROCESS_ID"] == "0":
        time.sleep(600)
    FAILURE

cli.main = main
cli.run()
"""
RAISES = ONE_FAILS.replace("FAILURE", 'raise RuntimeError("broken")')
RETURNS = ONE_FAILS.replace("FAILURE", "return 2")


@pytest.fixture
def run_of_two():
    """Starts two processes that run a program; they do not outlive the test."""
    started = []

    def start(program):
        started.extend(together.start(["-c", program], 2))
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=60)


def test_a_port_that_is_taken_is_named(surroundings):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        surroundings(FOT_COORDINATOR=f"a:{port}", FOT_PROCESSES="2", FOT_PROCESS_ID="0")
        with pytest.raises(UserError, match=f"process 0 cannot listen on port {port} of FOT_COORD"):
            cluster.join()


def test_all_devices_of_a_host_are_used_under_slurm():
    """JAX would take one GPU for a task, of which there may be one for a host of eight."""
    variables = {"JOB_ID": "1", "STEP_NODELIST": "a", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
    slurm = {f"SLURM_{name}": value for name, value in variables.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = f"""
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES
from fot_jax.training import cluster
cluster._initialize("127.0.0.1:{port}", 1, 0)
print(CUDA_VISIBLE_DEVICES.value)
"""
    argv, environment = [sys.executable, "-c", program], {**os.environ, **slurm}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "all\n", done.stderr


def test_processes_join(run_of_two):
    """And know whether all of them come to a place, where one would wait for the others."""
    arrive = """
from fot_jax.common.agreement import all_arrive
alone = os.environ["FOT_PROCESS_ID"] == "1" or all_arrive("one", 1)
print(all_arrive("both"), alone, file=sys.stderr)
cluster.finish()
"""
    for process, arrived in zip(run_of_two(GATHERS + arrive), ("False", "True"), strict=True):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert {"[0, 1]", f"True {arrived}"} <= set(err.splitlines())


@pytest.mark.parametrize(("program", "code"), [(RAISES, 1), (RETURNS, 2)])
def test_one_that_fails_does_not_wait_for_the_others(run_of_two, program, code):
    waiting, failing = run_of_two(program)
    _, err = failing.communicate(timeout=120)  # JAX would wait for 300 s
    assert failing.returncode == code
    assert "[0, 1]" in err.splitlines()
    assert ("RuntimeError: broken" in err) == (program == RAISES)
    assert waiting.poll() is None

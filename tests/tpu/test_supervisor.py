"""Workers start together and end together, whatever happens to one of them."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import hosts
import pytest
from hosts import Pod, alive, wait_until

SAYS = """
import os
print([os.environ[f"FOT_{name}"] for name in ("COORDINATOR", "PROCESSES", "PROCESS_ID")])
"""
# Says its process id in a file, sleeps; 143 after SIGTERM, with a word that it came.
SLEEPS = """
import os, pathlib, signal, sys, time
def stop(signum, frame):
    print("saved", signum, flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
path = pathlib.Path(os.environ["PIDS"], os.environ.get("FOT_PROCESS_ID", "0"))
path.with_suffix(".partial").write_text(str(os.getpid()))
path.with_suffix(".partial").rename(path)
time.sleep(600)
"""
FAILS = "import sys; print('broken', file=sys.stderr); sys.exit(3)"


@pytest.fixture
def pod(tmp_path):
    """Makes pods of so many workers."""
    made = []

    def make(count):
        made.append(Pod(tmp_path / "runs", count))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def pids(tmp_path):
    """Where sleeping commands say who they are, and a function that waits for that of a worker."""
    directory = tmp_path / "pids"
    directory.mkdir()

    def of(worker):
        path = directory / str(worker)
        wait_until(path.exists, f"the start of worker {worker}")
        return int(path.read_text())

    of.environment = {"PIDS": str(directory)}
    return of


def start_sleeping(pod, pids, *flags):
    for worker in range(pod.count):
        pod.start(worker, SLEEPS, *flags, **pids.environment)
    return [pids(worker) for worker in range(pod.count)]


def assert_stopped(pod, worker, because):
    code, _, line = pod.end(worker)
    assert (code, line) == (1, f"tpu worker {worker}: stopped because {because}")
    state = pod.state(worker)
    assert (state["state"], state["code"], state["why"]) == ("failed", 1, because)


# --- Together ------------------------------------------------------------------------------------


def test_all_start_and_finish(pod):
    three = pod(3)
    for worker in (2, 0, 1):
        three.start(worker, SAYS)
    for worker in range(3):
        code, out, _ = three.end(worker)
        assert (code, out) == (0, f"['127.0.0.1:{three.port + 1}', '3', '{worker}']\n")
        state = three.state(worker)
        assert (state["state"], state["code"], state["why"]) == ("finished", 0, None)
        assert (state["worker"], state["workers"]) == (worker, 3)
        assert state["started"] <= state["ended"]


def test_one_alone_is_not_one_of_several(pod):
    one = pod(1)
    one.start(0, "import os, sys; sys.exit('FOT_PROCESSES' in os.environ)", FOT_PROCESSES="4")
    assert one.end(0)[0] == 0
    assert one.state(0)["state"] == "finished"


def test_who_has_finished_waits_for_the_others(pod, pids):
    two = pod(2)
    two.start(0, SLEEPS, **pids.environment)
    two.start(1, "")
    first = pids(0)
    with pytest.raises(subprocess.TimeoutExpired):
        two.workers[1].wait(timeout=1)
    assert two.state(1)["state"] == "running" and alive(first)
    two.workers[0].send_signal(signal.SIGTERM)
    assert [two.end(worker)[0] for worker in (0, 1)] == [143, 143]


# --- The count -----------------------------------------------------------------------------------


def test_one_that_never_starts_is_named(pod):
    four = pod(4)
    for worker in (0, 1, 3):
        four.start(worker, SAYS, "--timeout", "3")
    for worker in (0, 1, 3):
        code, out, line = four.end(worker)
        assert (code, out) == (2, "")
        assert line.startswith("tpu: error: missing after 3 s: worker 2 (127.0.0.1) of 4 workers")
        state = four.state(worker)
        assert (state["state"], state["code"]) == ("failed", 2)
        assert "worker 2 (127.0.0.1)" in state["why"]


def test_a_worker_0_that_never_starts_is_named(pod):
    two = pod(2)
    two.start(1, SAYS, "--timeout", "1")
    code, _, line = two.end(1)
    assert code == 2
    assert f"worker 1 cannot reach worker 0 at 127.0.0.1:{two.port} within 1 s" in line


def test_a_second_run_beside_one_that_goes_on_is_refused(pod, pids, tmp_path):
    """Of another account, say. Its commands would take themselves for parts of the first one."""
    first, second = pod(2), pod(2)
    second.port, second.directory = first.port, tmp_path / "second"
    start_sleeping(first, pids)
    refusals = (f"cannot listen on port {first.port}", "another run is going on here")
    for worker, why in enumerate(refusals):
        second.start(worker, SAYS)
        code, out, line = second.end(worker)
        assert (code, out) == (2, "") and why in line
    for worker in first.workers.values():
        worker.send_signal(signal.SIGTERM)
    assert [first.end(worker)[:2] for worker in (0, 1)] == [(143, "saved 15\n")] * 2


def test_one_who_counts_otherwise_is_refused(pod):
    three = pod(3)
    three.start(0, SAYS, "--timeout", "4")
    three.count = 2
    three.start(1, SAYS)
    code, _, line = three.end(1)
    assert code == 2 and "it counts 2 workers, worker 0 3" in line
    code, _, line = three.end(0)
    assert code == 2 and "worker 1 (127.0.0.1), worker 2 (127.0.0.1)" in line


def test_one_that_is_stopped_while_it_waits_starts_nothing(pod):
    two = pod(2)
    two.start(0, SAYS)
    wait_until(lambda: (two.directory / "0" / "state.json").exists())
    wait_until(lambda: listens(two.port))
    two.workers[0].send_signal(signal.SIGTERM)
    assert two.end(0)[:2] == (143, "")
    assert two.state(0)["state"] == "stopped"


def test_a_worker_0_that_is_stopped_while_it_waits_stops_the_others(pod):
    three = pod(3)
    three.start(0, SAYS)
    wait_until(lambda: listens(three.port))
    three.start(1, SAYS)
    wait_until(lambda: connections(three.port))
    three.workers[0].send_signal(signal.SIGTERM)
    for worker in (0, 1):
        assert three.end(worker) == (143, "", "")
        assert three.state(worker)["state"] == "stopped"


def connections(port):
    """Whether a connection to a port of this machine is open at both ends."""
    open_ = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(int(x[1].split(":")[1], 16) == port and x[3] == "01" for x in open_)


def listens(port):
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def test_rubbish_on_the_port_is_ignored(pod):
    two = pod(2)
    two.start(0, SAYS)
    wait_until(lambda: listens(two.port))
    rubbish = (
        *(b"GET / HTTP/1.1\r\n\r\n", b"\xff\x00\n", b"[]\n", b'"worker"\n', b"[" * 3000 + b"\n"),
        *(b"x" * 100_000, b'{"worker": "1", "workers": 2}\n', b'{"lost": "all"}\n', b""),
    )
    for text in rubbish:
        with socket.create_connection(("127.0.0.1", two.port)) as stranger:
            stranger.sendall(text)
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(hosts.LIMIT)
            try:
                assert stranger.recv(100) == b""  # it hangs up
            except ConnectionResetError:
                pass  # with some of what was sent unread
    two.start(1, SAYS)
    assert [two.end(worker)[0] for worker in (0, 1)] == [0, 0]


# --- Failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [0, 2])
def test_one_command_that_fails_stops_the_others(pod, pids, failing):
    three = pod(3)
    others = [worker for worker in range(3) if worker != failing]
    for worker in others:
        three.start(worker, SLEEPS, **pids.environment)
    three.start(failing, FAILS)
    code, _, line = three.end(failing)
    why = f"worker {failing} (127.0.0.1) ended with exit code 3"
    assert (code, line) == (3, f"tpu worker {failing}: {why}")
    assert three.state(failing)["failed"] == failing
    for worker in others:
        assert_stopped(three, worker, because=why)


def test_a_command_that_is_killed_stops_the_others(pod, pids):
    three = pod(3)
    commands = start_sleeping(three, pids)
    os.kill(commands[1], signal.SIGKILL)
    killed = time.monotonic()
    why = "worker 1 (127.0.0.1) ended with signal 9"
    assert_stopped(three, 0, because=why)
    assert_stopped(three, 2, because=why)
    assert time.monotonic() - killed < 10
    code, out, line = three.end(1)
    assert (code, line) == (128 + 9, f"tpu worker 1: {why}")
    assert not any(map(alive, commands))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_supervisor_that_is_killed_takes_its_command_with_it(pod, pids, killed):
    three = pod(3)
    commands = start_sleeping(three, pids)
    three.workers[killed].kill()
    wait_until(lambda: not any(map(alive, commands)), "the end of the commands")
    why = f"worker {killed} (127.0.0.1) vanished: its connection broke"
    for worker in set(range(3)) - {killed}:
        assert_stopped(three, worker, because=why)


@pytest.mark.parametrize("silent", [0, 1])
def test_one_that_falls_silent_is_lost(pod, pids, silent):
    three = pod(3)
    commands = start_sleeping(three, pids, "--silence", "2")
    three.workers[silent].send_signal(signal.SIGSTOP)
    why = f"worker {silent} (127.0.0.1) gave no sign of life for 2 s"
    others = sorted(set(range(3)) - {silent})
    for worker in others:
        assert_stopped(three, worker, because=why)
    assert not any(alive(commands[worker]) for worker in others)
    three.workers[silent].send_signal(signal.SIGCONT)
    assert three.end(silent)[0] != 0
    assert not alive(commands[silent])


def test_a_command_leaves_no_processes_behind(pod, tmp_path):
    one = pod(1)
    starts = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    one.start(0, starts)
    code, out, _ = one.end(0)
    assert code == 0 and not alive(int(out))


def test_no_such_program(tmp_path):
    worker = [*hosts.verb("worker"), "--run_dir", tmp_path, "--", "no/such/program"]
    ended = subprocess.run(
        worker, cwd=hosts.ROOT, capture_output=True, text=True, timeout=hosts.LIMIT
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("tpu: error: no/such/program: ")


# --- Stopping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_commands_are_asked_to_save_and_stop(pod, pids, how):
    three = pod(3)
    start_sleeping(three, pids)
    for worker in three.workers.values():
        worker.send_signal(how)
    for worker in range(3):
        assert three.end(worker)[:2] == (143, "saved 15\n")
        state = three.state(worker)
        assert (state["state"], state["code"], state["why"]) == ("stopped", 143, None)


SAVES = """
import os, sys, time
from fot_jax.training.signals import stop_signals
with stop_signals() as signals:
    print(os.getpid(), flush=True)
    while not signals.received:
        time.sleep(0.01)
    time.sleep(0.5)
    print("saved", flush=True)
sys.exit(143)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [["SIGTERM"], ["SIGTERM", "SIGHUP"], ["SIGHUP"]], ids="+".join)
def test_what_reaches_both_processes_lets_the_command_save(pod, how):
    """As systemd stops a unit, or a session's end all that it has started."""
    one, before = pod(1), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        one.start(0, SAVES)
    finally:
        signal.signal(signal.SIGHUP, before)
    command = int(one.workers[0].stdout.readline())
    for each in how:
        os.kill(command, signal.Signals[each])
        one.workers[0].send_signal(signal.Signals[each])
    assert one.end(0) == (143, "saved\n", "")


def test_a_second_signal_is_passed_on_as_well(pod, tmp_path):
    counts = """
import signal, sys, time
came = []
def count(signum, frame):
    came.append(signum)
    print(len(came), flush=True)
    if len(came) == 2:
        sys.exit(143)
signal.signal(signal.SIGTERM, count)
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""
    one = pod(1)
    one.start(0, counts)
    lines = one.workers[0].stdout
    assert lines.readline() == "ready\n"
    for number in (1, 2):
        one.workers[0].send_signal(signal.SIGTERM)
        assert lines.readline() == f"{number}\n"
    assert one.end(0)[0] == 143


def test_one_that_does_not_stop_with_the_others_is_named(pod, pids):
    two = pod(2)
    stubborn = SLEEPS.replace("print(", "return print(")
    two.start(0, SLEEPS, "--timeout", "3", **pids.environment)
    two.start(1, stubborn, "--timeout", "3", **pids.environment)
    command = [pids(worker) for worker in range(2)][1]
    for worker in two.workers.values():
        worker.send_signal(signal.SIGTERM)
    why = "worker 1 (127.0.0.1) did not end within 3 s after another one"
    assert_stopped(two, 0, because=why)
    assert two.end(1)[0] == 128 + 9
    assert not alive(command)


def test_one_that_does_not_end_with_the_others_is_named(pod, pids):
    three = pod(3)
    for worker, program in enumerate(("", SLEEPS, "")):
        three.start(worker, program, "--timeout", "3", **pids.environment)
    command = pids(1)
    _, err = three.workers[0].communicate(timeout=hosts.LIMIT)
    late = "worker 1 (127.0.0.1)"
    why = f"{late} did not end within 3 s after another one"
    waiting, stopped = err.splitlines()
    assert waiting.startswith("tpu worker 0: waiting for ") and late in waiting
    assert stopped == f"tpu worker 0: stopped because {why}"
    assert_stopped(three, 2, because=why)
    assert three.end(1)[0] == 128 + 9
    assert not alive(command)


def test_it_starts_without_jax():
    program = "import sys, tpu.supervisor; sys.exit('jax' in sys.modules)"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, cwd=hosts.ROOT, timeout=hosts.LIMIT).returncode == 0

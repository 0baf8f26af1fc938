"""Memory of a step: what `fot train` says of it, what its process takes, what a machine has."""

import re

import runs

from fot_jax.training.needs import free_bytes

# Much memory for little work: 600 MB of activations in each of a few short steps.
WIDE = ("ModelConfig.mlp_dim = 2048", "train.steps = 6", "Checkpoints.every = 100")
LARGE = ("Data.lanes = 256",)

# `fot` on a machine with 1 GB free, which says at its end what it held (the kernel's own figure
# counts its parent, too).
FOT = """if True:
    import atexit, pathlib
    from fot_jax import cli
    from fot_jax.training import needs
    needs.free_bytes = lambda: 10**9
    atexit.register(lambda: print(pathlib.Path("/proc/self/status").read_text()))
    cli.run()
"""


def test_a_run_holds_one_set_of_temporaries_where_there_is_no_room_for_more(tmp_path):
    """Its memory beyond that of a run of small steps is what it says it needs, at every step."""
    experiment = runs.write(tmp_path, runs.DICTIONARY)

    def run(name, *bindings):
        """(bytes that it said a step needs, most bytes that its process had)."""
        argv = runs.arguments(experiment, tmp_path / name, *WIDE, *bindings)
        status, said = (process := runs.start(argv, ("-c", FOT))).communicate()
        assert process.returncode == 0, said
        number, unit = re.search(r"needs ([\d.]+) (MB|GB)", said).groups()
        most = re.search(r"VmHWM:\s*(\d+) kB", status)[1]
        return float(number) * {"MB": 1e6, "GB": 1e9}[unit], int(most) * 1024

    small, large = run("small"), run("large", *LARGE)
    more_said, more_taken = (b - a for a, b in zip(small, large, strict=True))
    assert 0.7 * more_said < more_taken < 1.3 * more_said


def test_what_is_free_is_the_least_of_machine_and_groups(tmp_path):
    """Files as Linux writes them; what the kernel can drop of a group's files counts as free."""
    files = {
        "proc/meminfo": "MemTotal:       900 kB\nMemAvailable:    500 kB\n",
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": "300000\n",
        "sys/fs/cgroup/a/memory.current": "250000\n",
        "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 20000\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "250000\n",
    }
    assert free_bytes(tmp_path) is None
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert free_bytes(tmp_path) == 70_000
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/c\n0::/\n")
    assert free_bytes(tmp_path) == 500 * 1024
    group = tmp_path / "sys/fs/cgroup/memory/c"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("100000\n")
    (group / "memory.usage_in_bytes").write_text("99000\n")
    (group / "memory.stat").write_text("total_inactive_file 4000\n")
    assert free_bytes(tmp_path) == 5000

"""What memory a step needs on a CPU, and what the machine has; of others the compiler says it."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

import jax

# Sets of temporaries that a heap of which nothing is given back was seen to hold: smaller blocks
# are cut from a freed set, and the next step takes another one.
KEPT_SETS = 3
KEPT_SHARE = 1 / 8  # of what is free: so much may they be


def prepare(compiled: jax.stages.Compiled) -> str:
    """Gets the process ready for a compiled step on a CPU, and says in a line what it needs.

    Temporaries that are few for the machine are kept between steps, which spares the time of
    mapping them again. Where it has less than the step adds, the line warns.

    Args:
      compiled: called (state, batch), both of which are there already.
    """
    memory, devices = compiled.memory_analysis(), jax.local_device_count()
    there = memory.argument_size_in_bytes * devices
    more = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    more *= devices  # of each device; all of them are in the memory of one machine
    line = (
        f"a step needs {_size(there + more)} of memory: {_size(there)} for what is trained and its "
        f"batch, {_size(more)} for temporaries"
    )
    free = free_bytes()
    _keep_large_blocks(free is not None and KEPT_SETS * more < KEPT_SHARE * free)
    if free is not None and free < more:
        line += (
            f'; WARNING: {_size(free)} are free here: set Compute.remat = "full", raise '
            "Compute.accumulation, or lower Data.lanes"
        )
    return line


def free_bytes(root: Path = Path("/")) -> int | None:
    """What this process may still take of its machine and its control groups; None: unknown."""
    free = []
    if available := re.search(r"^MemAvailable: *(\d+) kB", _read(root / "proc/meminfo"), re.M):
        free.append(int(available[1]) * 1024)
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            names = "memory.max", "memory.current", "inactive_file"
            top = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            top = root / "sys/fs/cgroup/memory"
        else:
            continue
        group = top / path.lstrip("/")
        for directory in (group, *group.parents):
            limit, used = (_read(directory / name).strip() for name in names[:2])
            if limit.isdigit() and used.isdigit():
                unused = re.search(rf"^{names[2]} (\d+)", _read(directory / "memory.stat"), re.M)
                free.append(int(limit) - int(used) + (int(unused[1]) if unused else 0))
            if directory == top:
                break
    return max(0, min(free)) if free else None


def _keep_large_blocks(keep: bool) -> None:
    m_mmap_max = -4  # of glibc's malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        libc.mallopt(m_mmap_max, 0 if keep else 2**16)  # its default


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _size(of: int) -> str:
    return f"{of / 1e9:.1f} GB" if of >= 1e9 else f"{of / 1e6:.1f} MB"

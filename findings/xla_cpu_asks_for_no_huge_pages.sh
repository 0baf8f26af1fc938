#!/usr/bin/env bash
# Where the kernel gives huge pages to those who ask (transparent_hugepage/enabled is "madvise", as
# Debian and Ubuntu ship it), NumPy's large arrays have them, as NumPy asks. What XLA's CPU backend
# allocates, results and temporaries, is of pages of 4 KB, each of which the kernel maps and clears
# at its first touch; a large program's temporaries are given back and touched anew in every call.
# glibc's malloc asks on behalf of everybody if GLIBC_TUNABLES=glibc.malloc.hugetlb=1 is set before
# the process starts (glibc 2.35 and later); setting it in os.environ is too late.
#
# jax 0.10.2, numpy 2.4.6, glibc 2.36, Linux with "always [madvise] never".
# Seen (MB of 512 in huge pages, of NumPy and of JAX): 510 0; with the tunable 510 516
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv venv && source venv/bin/activate
pip install --quiet jax==0.10.2 numpy==2.4.6
cat >test.py <<'EOF'
import re

import jax
import jax.numpy as jnp
import numpy as np


def huge():
    """MB of this process that are in huge pages."""
    text = open("/proc/self/smaps_rollup").read()
    return int(re.search(r"AnonHugePages: *(\d+)", text)[1]) // 1024


assert "[madvise]" in open("/sys/kernel/mm/transparent_hugepage/enabled").read(), "another setting"
begun = huge()
ours = np.ones(2**27, np.float32)
numpy = huge() - begun
theirs = jax.jit(lambda x: jnp.arange(2**27, dtype=jnp.float32) + x)(1.0).block_until_ready()
print(numpy, huge() - begun - numpy)
EOF
export JAX_PLATFORMS=cpu
unset GLIBC_TUNABLES
plain=$(python test.py)
tuned=$(GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python test.py)
echo "NumPy, JAX: $plain; with the tunable: $tuned"
for mb in ${plain% *} $tuned; do [ "$mb" -gt 450 ]; done
[ "${plain#* }" -lt 50 ]

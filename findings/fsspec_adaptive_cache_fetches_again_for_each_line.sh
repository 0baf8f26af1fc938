#!/usr/bin/env bash
# fsspec, gcsfs: a file in a bucket that is opened for reading with "adaptive" caching, which gcsfs takes by
# default, downloads a block of 5 MiB for nearly every line that is read of it: a line is looked for in whole
# blocks, and the step back to its end starts the read-ahead anew. Of 15 MB in lines of 5 KB the first 300
# take a thousand times their size; the older cache, which fsspec has by default, takes two blocks at once.
# io.BufferedReader around the file reads the same lines in steps that only go forward.
#
# fsspec 2026.9.0, gcsfs 2026.10.1 (for its default alone; nothing is sent anywhere)
# Seen: gcsfs's default: adaptive; 300 lines of 5 KB: readahead 1 requests, 10 MB; adaptive 300 requests,
# 1573 MB; adaptive, buffered 2 requests, 2 MB
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv venv && source venv/bin/activate
pip install --quiet fsspec==2026.9.0 gcsfs==2026.10.1
cat >test.py <<'EOF'
import io
import itertools

import fsspec
from fsspec.spec import AbstractBufferedFile
from gcsfs.core import _get_prefetcher_and_cache_config

DATA = (b"x" * 4_999 + b"\n") * 3_000
fetched = []


class File(AbstractBufferedFile):
    """As of a bucket: a range is a request."""

    def _fetch_range(self, start, end):
        fetched.append(end - start)
        return DATA[start:end]


def read(cache, around=lambda file: file):
    fetched.clear()
    file = File(fsspec.AbstractFileSystem(), "name", cache_type=cache, size=len(DATA))
    lines = sum(1 for _ in itertools.islice(around(file), 300))
    assert lines == 300
    return len(fetched), sum(fetched)


default, _ = _get_prefetcher_and_cache_config()
found = {
    "readahead": read("readahead"),
    "adaptive": read("adaptive"),
    "adaptive, buffered": read("adaptive", lambda file: io.BufferedReader(file, 2**20)),
}
shown = "; ".join(f"{name} {n} requests, {size / 1e6:.0f} MB" for name, (n, size) in found.items())
print(f"gcsfs's default: {default}; 300 lines of 5 KB: {shown}", flush=True)
assert default == "adaptive"
assert found["readahead"][1] < 12e6 and found["adaptive, buffered"][1] < 12e6
assert found["adaptive"][0] > 150 and found["adaptive"][1] > 500e6
EOF
python test.py 2>/dev/null

#!/usr/bin/env bash
# etils.epath: Path.stat() of a file on a disk looks up the names of its owner and its group, and raises
# a KeyError where one of them has none: in a container whose user has a number alone (docker run --user,
# runAsUser of Kubernetes), or over NFS. os.stat(), exists(), open() and reading are fine, so that code
# which asks for a size works everywhere until it runs in such a container, and then fails with an error
# that is no OSError. (As root this gives a file to such a user; else it takes the names away.)
#
# etils 1.15.0
# Seen: os.stat: 3 bytes; read: b'abc'; epath stat: KeyError
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv venv
venv/bin/pip install --quiet 'etils[epath]==1.15.0' fsspec==2026.9.0
cat > look.py <<'PYTHON'
import os
import pwd

from etils import epath

path = epath.Path("file")
path.write_text("abc")
if os.getuid() == 0:
    os.chown(path, 54321, -1)
else:
    pwd.getpwuid = lambda number: {}[f"getpwuid(): uid not found: {number}"]
said = [f"os.stat: {os.stat(path).st_size} bytes", f"read: {path.read_bytes()}"]
try:
    said.append(f"epath stat: {path.stat().length} bytes")
except KeyError as error:
    said.append(f"epath stat: {type(error).__name__}")
print("; ".join(said))
PYTHON
seen="$(venv/bin/python look.py)"
echo "$seen"
[ "$seen" = "os.stat: 3 bytes; read: b'abc'; epath stat: KeyError" ]

#!/usr/bin/env bash
# etils.epath: resolve() makes a path absolute and takes ".." out of it, but follows no symbolic links,
# unlike that of pathlib, which epath.Path is otherwise a drop-in for (and inherits from, on a disk). So
# "is this path within that directory?" is answered No where one of them is spelt through a link, and
# code that protects a directory by it does not; "link/.." is not where the system goes, either.
#
# etils 1.15.0
# Seen: pathlib: ('real/x', True); epath: ('link/x', False)
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv venv
venv/bin/pip install --quiet 'etils[epath]==1.15.0' fsspec==2026.9.0
cat > look.py <<'PYTHON'
import os
import pathlib

from etils import epath

os.makedirs("real/x")
os.symlink("real", "link")
here = os.path.realpath(".")
said = []
for kind in (pathlib.Path, epath.Path):
    asked, within = kind("link/x").resolve(), kind("real").resolve()
    said.append((os.path.relpath(asked, here), within in asked.parents))
print(f"pathlib: {said[0]}; epath: {said[1]}")
PYTHON
seen="$(venv/bin/python look.py)"
echo "$seen"
[ "$seen" = "pathlib: ('real/x', True); epath: ('link/x', False)" ]

#!/usr/bin/env bash
# etils.epath through gcsfs: of a directory in a bucket that the caller may not list (403), exists()
# and iterdir() raise an OSError, but is_dir() says False, as of a directory that is not there. Code
# that asks is_dir() before it looks for what is in a directory takes a missing right for an empty
# start. And the OSErrors have no errno, so they are no PermissionError. (Those of
# fot_jax/common/bucket_filesystem.py have numbers.)
#
# etils 1.15.0, gcsfs 2026.10.1, fsspec 2026.9.0
# Seen: exists: OSError, errno None; is_dir: False; iterdir: OSError, errno None
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv venv
venv/bin/pip install --quiet 'etils[epath]==1.15.0' gcsfs==2026.10.1 fsspec==2026.9.0
cat > look.py <<'PYTHON'
import http.server, logging, os, threading

class Forbids(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"error": {"code": 403, "message": "no storage.objects.list access"}}'
        self.send_response(403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbids)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{server.server_port}"
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
logging.disable()
from etils import epath

path = epath.Path("gs://bucket/run/checkpoints")
said = []
for name, look in (("exists", path.exists), ("is_dir", path.is_dir), ("iterdir", lambda: list(path.iterdir()))):
    try:
        said.append(f"{name}: {look()}")
    except OSError as error:
        said.append(f"{name}: {type(error).__name__}, errno {error.errno}")
print("; ".join(said))
PYTHON
seen="$(venv/bin/python look.py)"
echo "$seen"
[ "$seen" = "exists: OSError, errno None; is_dir: False; iterdir: OSError, errno None" ]

"""Takes the place of fot_jax/__main__.py on fake workers: training that does what a file says.

`training.json` of the fake cloud: {"steps": 5, "hold": {"1": 3}, "fail": {"1": [2, 5]}}.
Worker 0 writes a checkpoint each step into the fake bucket, from which all resume. hold: on the
first queued resource, wait after step 3. fail: worker 1 ends at step 2, when started again at 5.
"""

import json
import os
import sys
import time
from pathlib import Path

CLOUD = Path(os.environ["FAKE_GCLOUD"])


def main():
    worker = os.environ["FOT_WORKER"]
    plan = json.loads((CLOUD / "training.json").read_text())
    created = json.loads((CLOUD / "state.json").read_text())["created"]
    started = {"argv": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}
    starts = CLOUD / f"starts-{worker}.jsonl"
    with starts.open("a") as file:
        file.write(json.dumps(started) + "\n")
    times = len(starts.read_text().splitlines())

    workdir = next(x for x in sys.argv if x.startswith("--workdir=gs://")).split("gs://")[1]
    checkpoints = CLOUD / "buckets" / workdir / "checkpoints"
    done = max((int(each.name) for each in checkpoints.glob("*")), default=0)
    for step in range(done + 1, plan["steps"] + 1):
        while plan.get("hold", {}).get(str(created)) == step - 1:
            time.sleep(0.1)
        if step in plan.get("fail", {}).get(worker, [])[times - 1 : times]:
            raise RuntimeError(f"worker {worker} broke at step {step}")
        print(f"step {step}")
        if worker == "0":
            (checkpoints / str(step)).mkdir(parents=True)
            (checkpoints / str(step) / "commit_success.txt").touch()
        time.sleep(0.1)


if __name__ == "__main__":
    main()

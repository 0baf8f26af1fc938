"""Means, finite check, files and console."""

import io
import json
import math
import sys
import threading
import time
import types
from contextlib import closing

import buckets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot_jax.common import bucket_files
from fot_jax.common.errors import UserError
from fot_jax.training import metrics
from fot_jax.training.history import History
from fot_jax.training.metrics import Counts, Metrics


def test_means_weigh_every_token_alike():
    rng = np.random.default_rng(0)
    nats = [rng.uniform(0, 5, size=n) for n in (3, 100, 1)]
    correct = [rng.integers(0, 2, size=len(x)) for x in nats]
    total = Counts()
    for x, c in zip(nats, correct, strict=True):
        sums = types.SimpleNamespace(
            loss=jnp.float32(x.sum()), correct=jnp.float32(c.sum()), weights=jnp.float32(len(x))
        )
        total = total + Counts.of(sums)
    everything = np.concatenate(nats)
    assert total.means() == pytest.approx(
        {
            "loss": everything.mean(),
            "perplexity": np.exp(everything.mean()),
            "accuracy": np.concatenate(correct).mean(),
        },
        rel=1e-6,
    )


def test_means_of_nothing_and_of_too_much():
    assert all(math.isnan(x) for x in Counts().means().values())
    assert Counts(loss=1e4, weights=1.0).means()["perplexity"] == math.inf


def test_matmul_rate_is_in_flop_per_second():
    for dtype in ("float32", "bfloat16"):
        assert 1e8 < metrics.matmul_rate(dtype) < 1e17  # from one slow core to many accelerators
    assert metrics.utilisation(flops=10.0, seconds=2.0, rate=20.0) == 0.25


def test_a_step_ends_when_its_arrays_are_there_not_when_they_are_fetched():
    there = threading.Event()
    first = metrics.when_ready(jnp.ones(()), time.perf_counter)
    waits = types.SimpleNamespace(block_until_ready=there.wait)
    second = metrics.when_ready(waits, time.perf_counter)
    first()
    between = time.perf_counter()
    there.set()
    assert first() < between < second()


def test_goodput_is_the_share_that_all_steps_took():
    history = History(started=time.time() - 100)
    for step in range(1, 5):
        history = history.after(step, None, Counts(1.0, 1.0, 1.0), True, seconds=10.0)
    assert history.goodput() == pytest.approx(0.4, abs=0.01)


# --- Files ---------------------------------------------------------------------------------------


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def open_metrics(workdir, first_step=0, console=None, **more):
    return Metrics(workdir, first_step, 10, 100, console=console or io.StringIO(), **more)


def test_lines_hold_step_time_and_numbers(tmp_path):
    before = time.time()
    m = open_metrics(tmp_path / "run", peak_flops=100.0)
    m.training(2, time.perf_counter(), {"loss": jnp.float32(1.5), "d": 4}, flops=2 * 10.0)
    m.write(2, {"valid/loss": np.float64(2.5), "gradient_norm": math.inf})
    m.close()
    first, second = rows(tmp_path / "run")
    assert (first["step"], first["loss"], first["d"]) == (2, 1.5, 4)
    assert before - 1 <= first["time"] <= time.time() + 1
    assert first["tokens_per_second"] == pytest.approx(100 / first["seconds_per_step"])
    assert first["utilisation"] == pytest.approx(10 / first["seconds_per_step"] / 100)
    assert second == {"step": 2, "time": second["time"], "valid/loss": 2.5, "gradient_norm": None}


def test_steps_that_were_seen_to_end_late(tmp_path):
    """The first was; then there are short ones, all but one seen as the last of them ends."""
    m = open_metrics(tmp_path)
    start = m.clock()
    m.timed_from(0, start, 0.0)
    for step, ended in enumerate((2, 1, 5, 5.01, 5.3, 5.3, 5.3, 6), 1):
        m.training(step, start + ended, {})
    m.close()
    seconds = [row["seconds_per_step"] for row in rows(tmp_path)]
    assert seconds == pytest.approx([2, 1, 3, 1.505, 0.29, 0.145, 0.29 / 3, 0.7], abs=0.01)


def test_a_resumed_run_has_each_step_once(tmp_path):
    m = open_metrics(tmp_path)
    for step in range(1, 8):
        m.write(step, {"loss": step})
    m.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "time": 17')  # killed while it wrote
    m = open_metrics(tmp_path, first_step=5)
    m.write(6, {"loss": 60})
    m.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        *((step, step) for step in range(1, 6)),
        (6, 60),
    ]
    open_metrics(tmp_path, first_step=0).close()  # started over: no checkpoint was left
    assert rows(tmp_path) == []


def test_tensorboard_reads_the_events(tmp_path, monkeypatch):
    # TensorBoard's own reader, kept from loading TensorFlow where that is installed.
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    m = open_metrics(tmp_path)
    for step in (1, 2, 3, 4):
        m.write(step, {"loss": 10.0 * step, "d": 2})
    m.close()
    m = open_metrics(tmp_path, first_step=2)  # resumed from step 2
    m.write(3, {"loss": 33.0})
    m.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 10.0), (2, 20.0), (3, 33.0)]
    assert [(e.step, e.value) for e in events.Scalars("d")] == [(1, 2.0), (2, 2.0)]


def test_a_full_disk_is_one_line(tmp_path):
    m = open_metrics(tmp_path)
    m._lines = open("/dev/full", "wb")
    with pytest.raises(UserError, match="metrics of step 3 .*No space left"), closing(m):
        m.write(3, {"loss": 1.0})


# --- Console -------------------------------------------------------------------------------------


def test_plain_lines_off_a_terminal(tmp_path):
    console = io.StringIO()
    m = open_metrics(tmp_path, console=console)
    m.training(
        1,
        time.perf_counter(),
        {"loss": 1.25, "perplexity": math.exp(1.25), "d": 2, "gradient_norm": 9.0},
    )
    m.write(1, {"valid/loss": 2.0})
    m.say("saved")
    first, second = console.getvalue().splitlines()
    assert first.startswith("step 1/10  loss 1.2500  perplexity 3.49  tokens/s ")
    assert "  d 2  ETA 0:0" in first
    assert second == "saved"


def test_the_time_left_is_that_of_steps_that_were_not_compiled(tmp_path):
    console, start = io.StringIO(), time.perf_counter()
    m = open_metrics(tmp_path, console=console)
    m.training(1, start + 100, {}, compiled=True)
    m.timed_from(1, start + 100, 0.0)
    m.training(2, start + 103, {})
    assert rows(tmp_path)[1]["seconds_per_step"] == pytest.approx(3)
    first, second = console.getvalue().splitlines()
    assert "ETA" not in first and second.endswith("  ETA 0:00:24")


def test_a_bar_on_a_terminal(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    console = Terminal()
    m = open_metrics(tmp_path, first_step=4, console=console)
    m.timed_from(5, 0.0, 0.0)
    m.training(6, 0.0, {"loss": 1.25})
    m.say("a line of its own")
    m.close()
    text = console.getvalue()
    assert "6/10" in text and "loss=1.2500" in text and "tokens/s=" in text
    assert "\na line of its own\n" in text or "\ra line of its own\n" in text


def test_evaluation_does_not_count_against_speed(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 70.0, 80.0])  # opened, evaluation from, to, end of the step
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(metrics.time, "time", lambda: 1.0, raising=False)
    m = open_metrics(tmp_path)
    with m.untimed():
        assert m.clock() == m.clock() == 10.0  # of a step that was seen to end late
    m.training(5, m.clock(), {})
    assert rows(tmp_path)[0]["seconds_per_step"] == 4.0
    assert rows(tmp_path)[0]["tokens_per_second"] == 25.0


def test_utilisation_is_of_all_the_steps_of_a_row(tmp_path):
    """Of which each may have another d, and so other FLOPs."""
    m, start = open_metrics(tmp_path, peak_flops=100.0), time.perf_counter() + 100
    m.timed_from(1, start, 700.0)
    m.training(4, start + 6, {}, flops=700.0 + 10 + 100 + 190)
    m.training(5, start + 7, {}, flops=1_000.0 + 50)
    assert [row["utilisation"] for row in rows(tmp_path)] == pytest.approx([0.5, 0.5])


def test_only_process_0_writes_and_speaks(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    console = io.StringIO()
    m = open_metrics(tmp_path, console=console)
    m.training(1, 0.0, {"loss": 1.0})
    m.say("hello")
    m.close()
    assert console.getvalue() == "" and list(tmp_path.iterdir()) == []


# --- In a bucket ---------------------------------------------------------------------------------


def events_of(content):
    """(step, {name: number}) of every event of a file."""
    import struct

    from tensorboard.compat.proto import event_pb2

    found = []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        found.append((event.step, {v.tag: v.simple_value for v in event.summary.value}))
        content = content[16 + length :]
    return found


def in_bucket(bucket):
    """Rows of metrics.jsonl, and events of all files."""
    names = bucket.names("run/")
    assert all(name == "run/metrics.jsonl" or "tfevents" in name for name in names)
    lines = bucket.get("run/metrics.jsonl").decode().splitlines()
    events = [e for name in names if "tfevents" in name for e in events_of(bucket.get(name))]
    return [json.loads(line) for line in lines], [e for e in events if e[1]]


def test_files_in_a_bucket_grow(bucket, cloud, monkeypatch):
    """Each sending has what is new, and no more; what another run wrote stays."""
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(bucket_files, "time", clock)
    run = open_metrics(f"{bucket.url}/run")
    run.write(1, {"loss": 1.0})
    assert not bucket.names()  # no sending a step
    for step in range(2, 40):
        clock.now += 5
        run.write(step, {"loss": float(step)})
        if step == 20:
            rows, events = in_bucket(bucket)
            assert [row["step"] for row in rows] == [step for step, _ in events]
            assert len(rows) in (19, 20)
    run.send()
    assert len(in_bucket(bucket)[0]) == 39
    size = sum(len(content) for content in bucket.files("run/").values())
    assert sum(sent for method, _, sent, _ in cloud.requests) < 2 * size + 60 * 500
    run.write(40, {"loss": 40.0})
    # Killed here: 40 is lost, and written again by the one that resumes after a checkpoint of 30.
    other = open_metrics(f"{bucket.url}/run", first_step=30)
    for step in range(31, 42):
        other.write(step, {"loss": -1.0})
    other.close()
    rows, events = in_bucket(bucket)
    assert [row["step"] for row in rows] == [*range(1, 42)]
    assert [row["loss"] for row in rows] == [*map(float, range(1, 31)), *[-1.0] * 11]
    assert [step for step, _ in events] == [*range(1, 40), *range(31, 42)]
    names = [name for name in bucket.names("run/") if "tfevents" in name]
    assert len(names) == 2 and events_of(bucket.get(names[1]))[1] == (31, {})  # a new session


def test_what_a_bucket_does_not_take_is_sent_later(bucket, cloud, caplog):
    run = open_metrics(f"{bucket.url}/run")
    run.write(1, {"loss": 1.0})
    cloud.forbidden = {"storage.objects.create"}
    run.send()
    assert "metrics are not written yet" in caplog.text and not bucket.names()
    cloud.forbidden = set()
    run.write(2, {"loss": 2.0})
    run.close()
    rows, events = in_bucket(bucket)
    assert [row["step"] for row in rows] == [step for step, _ in events] == [1, 2]


def test_an_answer_that_is_lost_doubles_nothing(bucket, cloud):
    """The bucket has made one object of two, but the caller does not know, and asks again."""
    file = bucket_files.AppendableFile(f"{bucket.url}/run/file")
    file.write(b"one")
    file.send()
    lost = []

    def lose(method, path):
        if path.split("?")[0].endswith("/compose") and not lost:
            lost.append(path)
            bucket.put("run/file", b"onetwo")

    cloud.before = lose
    file.write(b"two")
    file.send()
    file.write(b"three")
    file.close()
    assert lost and bucket.files() == {"run/file": b"onetwothree"}


def test_a_removal_whose_answer_is_lost_doubles_nothing(bucket, cloud):
    file = bucket_files.AppendableFile(f"{bucket.url}/run/file")
    file.write(b"one")
    file.send()

    def lose(method, path):
        if method == "DELETE" or path.startswith("/batch/"):
            cloud.before = None
            bucket.remove("run/appending")

    cloud.before = lose
    for content in (b"two", b"three", b"four"):
        file.write(content)
        file.send()
    file.close()
    assert cloud.before is None and bucket.files() == {"run/file": b"onetwothreefour"}


def test_an_outage_after_appending_doubles_nothing(bucket, cloud, monkeypatch):
    async def at_once(seconds):
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
    file = bucket_files.AppendableFile(f"{bucket.url}/run/file")
    file.write(b"one")
    file.send()

    def appended(method, path):
        if b"two" in bucket.get("run/file"):
            raise buckets.Outage

    cloud.before = appended
    file.write(b"two")
    with pytest.raises(OSError):
        file.send()
    cloud.before = None
    file.write(b"three")
    file.close()
    assert bucket.get("run/file") == b"onetwothree"

"""`fot bench`: that it runs, and that its ratios are those of what it says."""

import dataclasses
import functools
import importlib.util
import json

import numpy as np
import pytest
from jax.experimental import pallas as pl

from fot_jax.bench import gpu as bench_gpu
from fot_jax.bench import index as bench_index
from fot_jax.bench import memory as bench_memory
from fot_jax.bench import pytorch as bench_pytorch
from fot_jax.bench import train as bench_train
from fot_jax.common.errors import UserError
from fot_jax.model import crossbatch
from fot_jax.model.attention import gpu as kernels


@pytest.mark.slow
def test_memory(monkeypatch, capsys):
    """A small model and small memories; the peers give the same answers to compare with."""
    model = dataclasses.replace(
        bench_memory.MODEL, hidden_size=64, num_layers=3, memory_layers=(1,), local_context=32
    )
    monkeypatch.setattr(bench_memory, "MODEL", dataclasses.replace(model, head_dim=8))
    monkeypatch.setattr(bench_memory, "matmul_rate", lambda: 1e12)
    monkeypatch.setattr(bench_memory, "copy_bandwidth", lambda: 1e12)
    small = dict(prefill=(64, 96), sizes=(4096,), searched=(4096,), largest=8192)
    bench_memory.memory(as_json=True, **small)
    found = json.loads(capsys.readouterr().out)
    first, last = found["read and write"]
    assert (first["tokens"], last["tokens"]) == (64, 96)
    assert first["times_floor"] == pytest.approx(first["read_s"] / first["floor_s"])
    # Of 2 windows the first goes through one layer, and to keys and values of the next; the second
    # through 3, and sees 32 keys in one of them.
    of_layer = 4 * 64 * 64 + 3 * 64 * 1376
    parameters, products = 3 * of_layer, 32 * (4 * of_layer + 2 * 64 * 64)
    scores = (1 + 3) * (32 * 33 // 2) + 32 * 32
    assert first["floor_s"] == pytest.approx((2 * products + 4 * 64 * scores) / 1e12)
    read = 4 * (parameters + 64 * 1024 + 2 * 64 * (48 + 3 * 16))
    assert first["times_copy"] * first["tokens_per_s"] == pytest.approx(1e12 / read)
    others = "llama_read_s", "llama_tokens_per_s", "bfloat16_read_s", "bfloat16_tokens_per_s"
    assert all(first[name] > 0 for name in (*others, "tokens_per_s_of_8"))
    assert "tokens_per_s" not in last
    one, many = found["attend to all"]
    assert (one["queries"], many["queries"]) == (1, 512)
    assert one["times_copy"] == pytest.approx(one["seconds"] * 1e12 / (2 * 4096 * 64 * 4))
    assert many["times_matmul"] == pytest.approx(many["seconds"] * 1e12 / (4 * 4096 * 512 * 64))
    *searches, largest = found["find the best keys"]
    assert [row["queries"] for row in searches] == [1, 512]
    for row in searches:
        assert row["times_faster"] == pytest.approx(row["faiss_s"] / row["seconds"])
    flops = 2 * 8192 * 4 * 256 * 32
    assert largest["times_matmul"] == pytest.approx(largest["seconds"] * 1e12 / flops)
    bench_memory.memory(**{**small, "largest": 0})
    titles = [line for line in capsys.readouterr().out.splitlines() if line in found]
    assert titles == list(found)[2:]


def test_index(capsys):
    """Who visits all keys finds the best, and FAISS's what it must."""
    bench_index.index(as_json=True, sizes=(4096,), visited=(64, 4096), segment=512)
    exact, few, all_keys, *theirs = json.loads(capsys.readouterr().out)["rows"]
    assert (exact["recall"], exact["error"]) == (1.0, 0.0)
    assert few["recall"] < 1.0 == all_keys["recall"]
    assert all_keys["error"] < 1e-4 < few["error"]
    assert len(theirs) == 4  # of two kinds
    for row, wanted in zip(theirs, (few, all_keys) * 2, strict=True):
        assert "FAISS IVF256" in row["search"]
        assert row["recall"] >= wanted["recall"] or row["search"].endswith("256 visited")


@pytest.mark.slow
@pytest.mark.torch
def test_pytorch(monkeypatch, capsys):
    """Each of the two in a process of its own; the ratios are those of the columns."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # threads that wait leave the CPU to others
    bench_pytorch.pytorch(as_json=True, lengths=(600,))
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["tokens"] == 600
    assert row["times_faster_read"] == pytest.approx(row["llama_read_s"] / row["read_s"])
    written = row["tokens_per_s"] / row["llama_tokens_per_s"]
    assert row["times_faster_write"] == pytest.approx(written)
    # 66 tokens more; keys and values of 8 layers of 512 dimensions, in the LLaMA of all of them.
    assert row["llama_mb"] > 600 * 8 * 2 * 512 * 4 / 1e6
    assert row["mb"] > 512 * 8 * 2 * 512 * 4 / 1e6


def test_pytorch_is_needed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torch and transformers are needed: pip install"):
        bench_pytorch.pytorch()


@pytest.mark.slow
def test_train(monkeypatch, capsys):
    """Small models; the utilisation is that of the step's own FLOPs, counted by hand."""
    small = dict(hidden_size=32, num_layers=3, mlp_dim=48, memory_layers=(1,), local_context=16)
    small |= dict(num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=96)
    for name in ("MODEL", "REAL"):
        model = dataclasses.replace(getattr(bench_train, name), **small)
        monkeypatch.setattr(bench_train, name, model)
    monkeypatch.setattr(bench_train, "matmul_rate", lambda dtype: 1e12)
    bench_train.train(as_json=True, ranges=(1,), runs=1)
    found = json.loads(capsys.readouterr().out)
    ranges, real = list(found.values())[2:]
    none, dots, llama = real
    assert [row["remat"] for row in real] == ["none", "dots", "none"]
    # The kernels of a layer and the head; the causal half of a window's scores.
    layer = 32 * (2 * 32 + 2 * 16) + 3 * 32 * 48
    forward = 4 * (2 * 16 * (3 * layer + 32 * 96) + 3 * 4 * 32 * (16 * 17 // 2))
    assert llama["model_gflop_per_step"] == pytest.approx(3 * forward / 1e9)
    assert none["model_gflop_per_step"] == dots["model_gflop_per_step"]
    assert none["model_gflop_per_step"] > llama["model_gflop_per_step"]
    assert none["temporaries_mb"] > dots["temporaries_mb"] > 0
    for row in (*ranges, *real):
        rate = row["model_gflop_per_step"] * 1e9 / row["seconds_per_step"]
        assert row["utilisation"] == pytest.approx(rate / 1e12)


def test_gpu(monkeypatch, capsys):
    """Kernels that are interpreted; what they are compared with computes the same."""
    for module in (bench_gpu, crossbatch):
        monkeypatch.setattr(module, "engine_of", lambda mesh, window: kernels)
    monkeypatch.setattr(
        kernels.pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)
    )
    monkeypatch.setattr(bench_train, "matmul_rate", lambda dtype: 1e12)
    found = []
    monkeypatch.setattr(bench_gpu, "best_of", lambda run, times: found.append(run()) or len(found))
    small = dict(hidden_size=32, num_layers=2, mlp_dim=48, memory_layers=(1,), vocab_size=96)
    small |= dict(num_heads=2, num_kv_heads=2, head_dim=16)
    model = functools.partial(dataclasses.replace, bench_train.MODEL, **small)
    shapes = dict(models={"small": model}, heads=((2, 16),), windows=(32,), ds=(1, 2))
    bench_gpu.gpu(as_json=True, **shapes)
    printed = json.loads(capsys.readouterr().out)
    one, two = printed["training steps"]
    # Windows of two lanes see one more, with 2 heads of 16, forward and backward.
    more = two["model_gflop_per_step"] - one["model_gflop_per_step"]
    assert more == pytest.approx(3 * 2 * 4 * 32 * 32 * 32 / 1e9)
    rate = two["model_gflop_per_step"] * 1e9 / two["seconds_per_step"]
    assert two["utilisation"] == pytest.approx(rate / 1e12)
    (local, local_gradients), (causal, causal_gradients) = found[:2], found[2:4]
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (local, causal)), atol=0.02)
    for ours, theirs in zip(local_gradients, causal_gradients, strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()
    # Seconds were 1, 2, 3 and so on: of local attention, cuDNN's, its full one, and of each d.
    rows = printed["attention"]
    assert [row["contexts"] for row in rows] == [0, 1, 2]
    assert [row["forward_us"] for row in rows] == [1e6 / 4, 1e6 * 6 / 2, 1e6 * 8 / 4]
    assert [row["cudnn_with_gradients_us"] for row in rows] == [
        1e6 * 4 / 4,
        1e6 * 6 / 4,
        1e6 * 6 / 4,
    ]


def test_a_gpu_is_needed():
    with pytest.raises(UserError, match="needs an NVIDIA GPU, Ampere or later, and JAX finds cpu"):
        bench_gpu.gpu()

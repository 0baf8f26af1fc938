"""A model's whole life in a bucket: from a conversion over killed runs to its use."""

import json
import signal

import llamas
import numpy as np
import pytest
import runs
import together

from fot_jax import LanguageModel, cli, compare
from fot_jax.checkpoints.steps import complete_steps
from fot_jax.data.vocabulary import Bytes
from fot_jax.hugging_face import tokenizers

pytestmark = [pytest.mark.slow, pytest.mark.torch]

STEPS = 24
EXPERIMENT = f"""{runs.PACKED}{runs.EVALUATED}
train.steps = {STEPS}
train.log_every = 1
Checkpoints.every = 4
Checkpoints.keep_last = 2
Compute.mesh = @MeshShape()
"""


def killed(cloud, argv, processes, when):
    """`fot` as one process, or several that train together, until a request, which never arrives:
    then all of them are gone. What the first one said."""
    words = ["-m", "fot_jax", *argv, "--gin", f"MeshShape.data = {processes}"]
    started = together.start(words, processes)

    def before(method, path):
        if when(method, path):
            cloud.before = None
            for process in started:
                process.send_signal(signal.SIGKILL)
            raise ConnectionAbortedError

    cloud.before = before
    codes, said = together.ended(started)
    assert codes == [-9] * processes, said
    return said[0][1]


def test_a_whole_life_in_a_bucket(bucket, cloud, tmp_path, one_device, capsys):
    # --- Converted here, copied there --------------------------------------------------------
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    llamas.save(tmp_path / "hf", vocab_size=258, num_attention_heads=2, **shape)
    tokenizers.write(Bytes(), tmp_path / "hf")
    from_hf = ["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "base")]
    assert cli.main([*from_hf, "--memory_layers", "1"]) == 0
    bucket.copy(tmp_path / "base", "base")
    bucket.copy(runs.write_corpus(tmp_path / "corpus"), "corpus")

    def experiment_in(place):
        found = tmp_path / place.rpartition("/")[2]
        found.mkdir(exist_ok=True)
        more = f'train.initialize_from = "{place}/base"\nCorpus.path = "{place}/corpus"\n'
        return runs.write(found, EXPERIMENT + more)

    # --- Trained, and killed while it saves -----------------------------------------------------
    experiment, workdir = experiment_in(bucket.url), f"{bucket.url}/run"
    argv, saving = runs.arguments(experiment, workdir), "run/checkpoints"
    kills = [
        # The first array of a save; the last file of one; an old step, half removed.
        (1, lambda method, path: method == "POST" and f"{saving}/8/params" in path),
        (2, lambda method, path: method == "POST" and f"{saving}/12/commit_success.txt" in path),
        (1, lambda method, path: method == "DELETE" and f"{saving}/8/" in path),
    ]
    resumed = []
    for processes, when in kills:
        said = killed(cloud, argv, processes, when)
        resumed += [line for line in said.splitlines() if line.startswith("resuming")]
    capsys.readouterr()
    assert runs.train(experiment, workdir) == 0
    said = capsys.readouterr().err
    resumed += [line for line in said.splitlines() if line.startswith("resuming")]
    assert resumed == [f"resuming {workdir} after step {step}" for step in (4, 8, 16)]
    saved = complete_steps(f"{workdir}/checkpoints")
    assert saved[-2:] == [20, 24]

    # --- As if nothing had happened -------------------------------------------------------------
    assert runs.train(experiment_in(str(tmp_path)), tmp_path / "unbroken") == 0
    rows = [json.loads(line) for line in bucket.get("run/metrics.jsonl").splitlines()]
    *rows, evaluated = rows
    *want, evaluated_here = runs.curve(tmp_path / "unbroken")
    assert [row["step"] for row in rows] == [row["step"] for row in want] == [*range(1, STEPS + 1)]
    for name in ("loss", "grad_norm", "learning_rate"):
        of_both = ([row[name] for row in some] for some in (rows, want))
        np.testing.assert_allclose(*of_both, rtol=1e-4, err_msg=name)
    del evaluated["time"]
    assert evaluated == pytest.approx(evaluated_here, rel=1e-3)
    names = bucket.names("run/")
    assert sum("tfevents" in name for name in names) == 1 + len(resumed)
    assert bucket.get("run/plots/perplexity_by_context.png").startswith(b"\x89PNG")
    assert {"run/config.gin", "run/vocabulary/vocabulary.json"} < set(names)
    assert not [name for name in names if "partial" in name or "half" in name or "trial" in name]

    # --- Used -----------------------------------------------------------------------------------
    output = f"{bucket.url}/results/rows.json"
    assert cli.main(["evaluate", str(experiment), "--checkpoint", workdir, "--output", output]) == 0
    results = json.loads(bucket.get("results/rows.json"))
    assert len(results["perplexity_by_context"]) == 2
    assert bucket.get("results/rows.perplexity_by_context.png").startswith(b"\x89PNG")

    text = tmp_path / "text"
    text.write_text("some words to read, " * 5)
    bucket.put("text", text.read_bytes())
    said = []
    capsys.readouterr()
    for place, prompt in ((bucket.url, f"{bucket.url}/text"), (str(tmp_path), str(text))):
        asked = ["--checkpoint", workdir, "--max_new_tokens", "9", "--seed", "1"]
        saves = ["--prompt_file", prompt, "--save_memory", f"{place}/memory"]
        reads = ["--prompt", "and so", "--memory", f"{place}/memory"]
        for _ in range(2):  # a memory is replaced
            assert cli.main(["generate", *asked, *saves]) == 0
        assert cli.main(["generate", *asked, *reads]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    memory = {path.name for path in (tmp_path / "memory").iterdir()}
    assert {name.split("/")[1] for name in bucket.names("memory")} == memory

    assert cli.main(["convert", "to-hf", workdir, str(tmp_path / "out")]) == 0
    assert compare.check(workdir, tmp_path / "out")
    tokens = llamas.random_tokens(1, 16, 258)
    np.testing.assert_allclose(
        LanguageModel.load(tmp_path / "out").logits(tokens),
        LanguageModel.load(workdir).logits(tokens),
    )
    print(f"{len(kills)} kills, {len(resumed)} resumes")

"""`fot convert`: both ways and back, in processes that are killed, and what is refused."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import huggingface_hub
import llamas
import numpy as np
import pytest
import runs
import sentencepiece
import torch
import transformers
from safetensors.numpy import save_file

from fot_jax import convert
from fot_jax.cli import main
from fot_jax.data.sentencepiece_vocabulary import SentencePiece, TrainedSentencePiece
from fot_jax.inference.language_model import LanguageModel

pytestmark = pytest.mark.torch


def fot(*argv):
    return main(["convert", *map(str, argv)])


# --- There and back ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, dtype",  # every shape, and every type with a head and without one
    [
        ("multi-head", "float16"),
        ("4 to 1", "float32"),
        ("8 to 1, tied", "float32"),
        ("8 to 1, tied", "bfloat16"),
        ("llama 3", "bfloat16"),
        ("head_dim", "float16"),
    ],
)
def test_there_and_back(tmp_path, shape, dtype, capsys):
    theirs = llamas.save(
        tmp_path / "a", dtype=getattr(torch, dtype), shards="20KB", **llamas.SHAPES[shape]
    )
    assert fot("from-hf", tmp_path / "a", tmp_path / "b", "--memory_layers", "1,2") == 0
    assert fot("to-hf", tmp_path / "b", tmp_path / "c") == 0
    said = capsys.readouterr().out.splitlines()
    window = llamas.SHAPES[shape].get("local_context", 16)
    assert said[-1] == (
        f"{tmp_path / 'c'}: 3 layers, with memory: 1, 2; windows of {window} tokens; {dtype}"
    )
    assert llamas.contents(tmp_path / "c") == llamas.contents(tmp_path / "a")

    tokens = llamas.random_tokens(2, 16)
    wanted = llamas.logits(theirs, tokens)
    for directory in ("a", "b", "c"):
        lm = LanguageModel.load(tmp_path / directory)
        assert lm.config.memory_layers == (() if directory == "a" else (1, 2))
        found = lm.logits(tokens, last_context_length=16)
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    # Without our code: by name, and by what config.json says.
    for load in (transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM):
        plain = load.from_pretrained(tmp_path / "c", dtype=torch.float32)
        assert type(plain) is transformers.LlamaForCausalLM
        longest = plain.config.max_position_embeddings
        assert longest == theirs.config.max_position_embeddings
        np.testing.assert_allclose(llamas.logits(plain, tokens), wanted, atol=1e-4)


def test_a_base_says_how_long_texts_may_be_only_of_its_own_positions(tmp_path):
    llamas.save(tmp_path / "a", **llamas.SHAPES["llama 3"])
    assert fot("from-hf", tmp_path / "a", tmp_path / "b") == 0
    kept = tmp_path / "b" / "hugging_face"
    changes = {"max_position_embeddings": 8}, {"rope_parameters": None}  # one after the other
    for fields, longest in zip(changes, (16, 8 * 16), strict=True):
        llamas.edit(kept, **fields)
        assert fot("to-hf", tmp_path / "b", tmp_path / f"{longest}") == 0
        values = json.loads((tmp_path / f"{longest}" / "config.json").read_text())
        assert values["max_position_embeddings"] == longest


@pytest.mark.parametrize(
    ("shape", "Plain"),
    [
        ({}, transformers.LlamaForCausalLM),
        # As which transformers has heads that do not divide the width.
        ({"num_attention_heads": 6, "head_dim": 8}, transformers.MistralForCausalLM),
    ],
)
def test_mistral(tmp_path, shape, Plain):
    theirs = llamas.save(
        tmp_path / "a",
        "mistral",
        **{"num_key_value_heads": 2, "sliding_window": None, "rope_theta": 5e4, **shape},
    )
    assert fot("from-hf", tmp_path / "a", tmp_path / "b", "--memory_layers", "1") == 0
    assert fot("to-hf", tmp_path / "b", tmp_path / "c") == 0
    assert fot("check", tmp_path / "b", tmp_path / "c") == 0
    tokens = llamas.random_tokens(2, 16)
    wanted = llamas.logits(theirs, tokens)
    found = LanguageModel.load(tmp_path / "b").logits(tokens, last_context_length=16)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    load = transformers.AutoModelForCausalLM.from_pretrained
    plain, ours = load(tmp_path / "c"), load(tmp_path / "c", trust_remote_code=True)
    assert type(plain) is Plain
    for model in (plain, ours):
        np.testing.assert_allclose(llamas.logits(model, tokens), wanted, atol=1e-4)
    ours.save_pretrained(tmp_path / "d")
    np.testing.assert_allclose(llamas.logits(load(tmp_path / "d"), tokens), wanted, atol=1e-4)


@pytest.mark.parametrize("left", ["both", "the head alone"])
def test_a_head_beside_an_embedding_that_config_json_ties_to_it(tmp_path, left):
    """Read as transformers does, and written so that config.json says what the files have."""
    llamas.save(tmp_path / "a")
    llamas.edit(tmp_path / "a", tie_word_embeddings=True)
    if left == "the head alone":
        content = llamas.load(tmp_path / "a" / "model.safetensors")
        del content["model.embed_tokens.weight"]
        save_file(content, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    tokens = llamas.random_tokens(2, 16)
    load = transformers.LlamaForCausalLM.from_pretrained
    wanted = llamas.logits(load(tmp_path / "a").eval(), tokens)
    assert fot("from-hf", tmp_path / "a", tmp_path / "b") == 0
    assert fot("to-hf", tmp_path / "b", tmp_path / "c") == 0
    assert fot("check", tmp_path / "a", tmp_path / "c") == 0
    for directory in ("a", "b", "c"):
        found = LanguageModel.load(tmp_path / directory).logits(tokens, last_context_length=16)
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    values = json.loads((tmp_path / "c" / "config.json").read_text())
    assert values["tie_word_embeddings"] == (left != "both")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_types_on_the_way(tmp_path, dtype):
    theirs = llamas.save(tmp_path / "a")
    wanted = {
        name: x.to(getattr(torch, dtype)).float().numpy() for name, x in theirs.state_dict().items()
    }
    assert fot("from-hf", tmp_path / "a", tmp_path / "b", "--dtype", dtype) == 0
    assert fot("to-hf", tmp_path / "b", tmp_path / "c") == 0
    assert fot("from-hf", tmp_path / "a", tmp_path / "d") == 0
    assert fot("to-hf", tmp_path / "d", tmp_path / "e", "--dtype", dtype) == 0
    assert llamas.contents(tmp_path / "c") == llamas.contents(tmp_path / "e")
    for name, x in llamas.load(tmp_path / "c" / "model.safetensors").items():
        assert x.dtype.name == dtype
        np.testing.assert_array_equal(x.astype(np.float32), wanted[name])
    values = json.loads((tmp_path / "c" / "config.json").read_text())
    assert values["torch_dtype"] == dtype
    assert llamas.logits(
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "c").float(),
        llamas.random_tokens(1, 3),
    ).shape == (1, 3, 61)


def test_the_other_files_come_along(tmp_path):
    llamas.save(tmp_path / "a", vocab_size=280)
    TrainedSentencePiece(280).train(["def f(x): return x\n" * 99]).save(tmp_path / "vocabulary")
    (tmp_path / "vocabulary" / "tokenizer.model").rename(tmp_path / "a" / "tokenizer.model")
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    generation = '{"eos_token_id": [7, 9], "temperature": 0.5}'
    (tmp_path / "a" / "generation_config.json").write_text(generation)
    llamas.edit(tmp_path / "a", eos_token_id=7, bos_token_id=3)
    fot("from-hf", tmp_path / "a", tmp_path / "b", "--memory_layers", "1")
    vocabulary = LanguageModel.load(tmp_path / "b").vocabulary
    model = SentencePiece(tmp_path / "a" / "tokenizer.model")
    assert vocabulary.encode("def f(x)") == model.encode("def f(x)")
    assert (vocabulary.bos, vocabulary.eos, vocabulary.ends) == (model.bos, model.eos, (7, 9))
    fot("to-hf", tmp_path / "b", tmp_path / "c")
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        same = (tmp_path / "c" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
        assert same, name
    values = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (3, 7)


NO_EVALS = "Evaluation.evals = ()"
OF_THE_EXPERIMENT = {  # the shapes of `here`'s experiment.gin
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}

CARD_OF_THE_BASE = """---
license: apache-2.0
language: [en]
model_name: Some Model
tags: [theirs]
---
# Some Model
Said of it.
"""


def test_the_model_card(here, one_device, capsys):
    """Licence and name come from the base model's, what was trained and measured from the run."""
    llamas.save(here / "a", **OF_THE_EXPERIMENT)
    (here / "a" / "README.md").write_text(CARD_OF_THE_BASE)
    (here / "a" / "LICENSE").write_text("may be used")
    start = 'train.initialize_from = "a"'
    evaluated = (
        "train.evaluation = @Evaluation()",
        "Evaluation.evals = (@PerplexityByContext(),)",
        "PerplexityByContext.memory_sizes = (0, 16)",
    )
    assert runs.train("experiment.gin", "run", start, "train.steps = 2", *evaluated) == 0
    assert fot("to-hf", "run", "out") == 0
    card = huggingface_hub.ModelCard.load(here / "out" / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["language"]) == ("apache-2.0", ["en"])
    assert "theirs" not in data["tags"] and data["library_name"] == "transformers"
    assert "derive from Some Model, whose licence is apache-2.0" in card.text
    assert (here / "out" / "LICENSE").read_text() == "may be used"
    last = runs.curve("run")[-1]
    name, value = next((k, x) for k, x in last.items() if "/memory_" in k)
    assert f"| {name} | {value:.4g} | 2 |" in card.text
    assert "to step 2, from" in card.text and "train.steps = 2" in card.text
    with open(here / "run" / "metrics.jsonl", "ab") as file:  # and of a later step, killed there
        file.write(b'{"step": 3, "loss": 1}\n{"step": 3, "later": 1}\n[]\n{"step": 2, "of_\xff')
    (here / "run" / "config.gin").write_bytes(b"# \xff\n# ```\n")
    assert fot("to-hf", "run/checkpoints/2", 'a "b"') == 0
    again = (here / 'a "b"' / "README.md").read_text()
    assert "to step 2, from" in again and "later" not in again and f"| {name} |" in again
    assert "````\n# \ufffd\n# ```\n````\n" in again and r'from_pretrained("a \"b\"")' in again
    assert fot("to-hf", "a", "plain") == 0
    plain = huggingface_hub.ModelCard.load(here / "plain" / "README.md")
    assert "without memory" in plain.text and "Training" not in plain.text
    capsys.readouterr()
    for name, said, licence in (
        ("no YAML", "---\n]: [\n---\n", "says nothing of its licence"),
        ("no front matter", "# A", "says nothing of its licence"),
        ("several", "---\nlicense: [mit, other]\nmodel_name: 3\n---\n", "is mit, other."),
        ("named", "---\nlicense: other\nlicense_name: llama3\n---\n", "whose licence is llama3."),
    ):
        (here / "a" / "README.md").write_text(said)
        assert fot("to-hf", "a", name) == 0
        assert licence in (here / name / "README.md").read_text()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("marks", "padding"),
    [
        ({"eos_token_id": [7, 9]}, 7),
        ({"eos_token_id": [7, 9], "pad_token_id": 5}, 5),
        ({"eos_token_id": [7, 9], "pad_token_id": [4, 5]}, 4),
        ({"eos_token_id": 7, "pad_token_id": None}, 7),
        ({"eos_token_id": [99, 7], "pad_token_id": -1}, 7),  # -1: none; 99: beyond the embedding
        ({"eos_token_id": []}, None),
        ({"eos_token_id": None, "pad_token_id": 99}, None),
    ],
)
def test_what_rows_are_filled_with(tmp_path, marks, padding):
    llamas.save(tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").unlink()
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | marks))
    assert fot("to-hf", tmp_path / "a", tmp_path / "b") == 0
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "b" / name).read_text())
        if name == "generation_config.json" or marks.get("pad_token_id") is not None:
            assert values["pad_token_id"] == padding
        assert values["eos_token_id"] == marks["eos_token_id"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert model.generation_config.pad_token_id == padding


def test_a_vocabulary_that_no_tokenizer_json_can_follow(two, capsys):
    shutil.rmtree(two / "b" / "hugging_face")
    trainer = sentencepiece.SentencePieceTrainer
    with open("unigram.model", "wb") as file:
        text = iter(["def f(x): return x + y", "import os"] * 99)
        trainer.train(sentence_iterator=text, model_writer=file, vocab_size=22, minloglevel=2)
    SentencePiece(two / "unigram.model").save(two / "b" / "vocabulary")
    assert refused(capsys, "to-hf", "b", "out") == (
        "a tokenizer.json cannot make the tokens of this SentencePiece model: it is a unigram "
        "model, whose scores are added with another rounding there: to convert the weights alone, "
        "move the workdir's directory vocabulary away; its tokenizer.model is read by the library "
        "sentencepiece"
    )
    (two / "b" / "vocabulary").rename(two / "elsewhere")
    assert fot("to-hf", "b", "out") == 0
    assert llamas.contents(two / "out") == llamas.contents(two / "a")


def test_a_trained_checkpoint(here, one_device):
    """From an experiment to a directory that transformers reads, tokenizer and all."""
    assert runs.train("experiment.gin", "run", "train.steps = 2", NO_EVALS) == 0
    assert fot("to-hf", "run", "out") == 0
    assert fot("check", "run", "out") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    lm = LanguageModel.load("run")
    symbols = lm.vocabulary.names[3:9]
    assert tokenizer(" ".join(symbols), add_special_tokens=False).input_ids == [*range(3, 9)]
    values = json.loads((here / "out" / "generation_config.json").read_text())
    assert values["eos_token_id"] == lm.vocabulary.eos == tokenizer.eos_token_id
    tokens = llamas.random_tokens(1, 9, 64)
    plain = transformers.AutoModelForCausalLM.from_pretrained("out")
    np.testing.assert_allclose(llamas.logits(plain, tokens), lm.logits(tokens), atol=1e-4)


@pytest.mark.parametrize("kind", ["hugging face", "workdir"])
def test_training_starts_from_either(here, one_device, kind):
    llamas.save(here / "a", **OF_THE_EXPERIMENT)
    of_memory = dict(mem_layers=[1], last_context_length=8, mem_dtype="float16")
    as_mistral = dict(model_type="mistral", sliding_window=16, max_position_embeddings=32)
    llamas.edit(here / "a", **of_memory, **as_mistral)  # whose window is longer than the run's
    fot("from-hf", "a", "b", "--local_context", 16)
    start = "a" if kind == "hugging face" else "b"
    bindings = "train.learning_rate = @constant_rate()", "constant_rate.value = 0.0", NO_EVALS
    binding = f'train.initialize_from = "{start}"'
    assert runs.train("experiment.gin", "run", binding, "train.steps = 1", *bindings) == 0
    runs.assert_same_parameters("run", "b")
    if kind == "hugging face":  # kept where it would be copied to, or within
        for workdir, kept in ("c", "c/hugging_face"), ("d", "d/hugging_face/a"):
            shutil.copytree("a", kept)
            binding = f'train.initialize_from = "{kept}"'
            assert runs.train("experiment.gin", workdir, binding, "train.steps = 1", *bindings) == 0
        shutil.rmtree("c/checkpoints")  # as killed at step 0, and started by another name
        (here / "link").symlink_to("c")
        binding = 'train.initialize_from = "link/hugging_face"'
        assert runs.train("experiment.gin", "c", binding, "train.steps = 1", *bindings) == 0
    # What came with the model is there for to-hf.
    assert runs.files("run/hugging_face") == runs.files("b/hugging_face")
    fot("to-hf", "run", "out")
    values = json.loads((here / "out" / "config.json").read_text())
    assert {name: values[name] for name in of_memory} == of_memory
    # But the marks are of the tokens that the run has, as what it started from has none.
    vocabulary = LanguageModel.load(here / "out").vocabulary
    for file in ("config.json", "generation_config.json"):
        assert json.loads((here / "out" / file).read_text())["eos_token_id"] == vocabulary.eos
    assert vocabulary.ends == LanguageModel.load(here / "run").vocabulary.ends == (3,)


def test_training_of_another_function_is_warned_of(here, one_device, caplog):
    tiny = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    llamas.save(here / "a", vocab_size=64, rms_norm_eps=1e-3, **tiny)
    short = "train.steps = 1", NO_EVALS
    binding = 'train.initialize_from = "a"'
    assert runs.train("experiment.gin", "run", binding, *short) == 0
    assert "a was trained with norm_epsilon = 0.001, this run has 1e-06" in caplog.text
    caplog.clear()
    llamas.edit(here / "a", rms_norm_eps=float(np.float32(1e-3)))
    binding = "ModelConfig.norm_epsilon = 1e-3", 'train.initialize_from = "a"'
    assert runs.train("experiment.gin", "other", *binding, *short) == 0
    assert "was trained with" not in caplog.text
    binding = *binding, "ModelConfig.memory_positions = False"  # memory_layers are (1,)
    assert runs.train("experiment.gin", "another", *binding, *short) == 0
    assert caplog.text.count("was trained with") == 1
    assert "positions in the window in layers = (0, 1), this run has (0,)" in caplog.text


def test_training_from_another_shape(here, one_device, capsys):
    llamas.save(here / "a", vocab_size=64)
    begun = runs.arguments("experiment.gin", "run", 'train.initialize_from = "a"')
    line = runs.refused(capsys, *begun)
    assert line.startswith("a: parameter embedding is (64, 32) in the checkpoint and (64, 16) in")
    llamas.edit(here / "a", model_type="mistral", sliding_window=8)
    assert runs.refused(capsys, *begun) == (
        "a/config.json: sliding_window = 8 is shorter than the window of 16 tokens, and layers "
        "that see less than the window are not supported: set local_context to 8, or less"
    )


# --- LongLLaMA -----------------------------------------------------------------------------------


def test_a_directory_of_longllama(tmp_path):
    """As its authors' code wrote them: read, with its memory, and made new."""
    llamas.save(tmp_path / "old")
    llamas.edit(
        tmp_path / "old",
        model_type="longllama",
        architectures=["LongLlamaForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_longllama.LongLlamaForCausalLM"},
        rope_parameters=None,
        mem_layers=[1],
        mem_positionals=True,
        mem_dtype="bfloat16",
        mem_attention_grouping=None,
        last_context_length=8,
        mem_topk=32,
        torch_attention=False,
    )
    lm = LanguageModel.load(tmp_path / "old")
    assert lm.config.memory_layers == (1,)
    assert lm.read(range(40)).memory.storage == "bfloat16"
    assert fot("to-hf", tmp_path / "old", tmp_path / "new") == 0
    assert fot("check", tmp_path / "old", tmp_path / "new") == 0
    values = json.loads((tmp_path / "new" / "config.json").read_text())
    assert values["model_type"] == "llama" and values["mem_layers"] == [1]
    assert values["last_context_length"] == 8 and values["mem_dtype"] == "bfloat16"
    assert values["mem_topk"] == 32


# --- Memory, signals -----------------------------------------------------------------------------

LARGE = {
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """270M parameters, 540 MB; the same as a workdir."""
    directory = tmp_path_factory.mktemp("large")
    with torch.device("cpu"):
        config = transformers.LlamaConfig(**LARGE, num_attention_heads=8)
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = transformers.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory / "a", max_shard_size="200MB")
    del model
    assert fot("from-hf", directory / "a", directory / "b") == 0
    yield directory
    shutil.rmtree(directory)


PEAK = """
import resource, sys
from fot_jax import convert
from fot_jax.checkpoints import stream
import fot_jax.cli, jax
jax.devices()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fot_jax.cli.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["from-hf", "to-hf"])
def test_converting_holds_no_more_than_a_few_matrices(large, tmp_path, direction):
    source = large / ("a" if direction == "from-hf" else "b")
    argv = [sys.executable, "-c", PEAK, "convert", direction, source, tmp_path / "out"]
    out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    matrix = 2 * 1024 * 4096
    assert int(out.split()[-1]) * 1024 < 25 * matrix  # of 540 MB


def half_written(directory):
    """Whether there is a file of more than 1 MiB, by now."""
    with contextlib.suppress(FileNotFoundError):  # one has just been renamed
        return any(path.stat().st_size > 2**20 for path in directory.glob("out.half*/**/*"))
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    "direction, sign",
    [
        *(("from-hf", signal.SIGTERM), ("from-hf", signal.SIGKILL)),
        *(("to-hf", signal.SIGINT), ("to-hf", signal.SIGKILL)),
    ],
)
def test_a_conversion_that_is_stopped(large, tmp_path, direction, sign):
    source, out = large / ("a" if direction == "from-hf" else "b"), tmp_path / "out"
    process = runs.start(["convert", direction, source, out])
    deadline = time.monotonic() + 120
    while not half_written(tmp_path):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(sign)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-9 if sign == signal.SIGKILL else 128 + sign), said
    assert "Traceback" not in said
    assert not out.exists()
    if sign == signal.SIGKILL:  # nobody can clean up, but nothing there is read for a whole one
        (half,) = tmp_path.glob("out.half*")
        with pytest.raises(convert.UserError):
            LanguageModel.load(half)
        assert fot(direction, source, out) == 0
        if direction == "to-hf":
            assert llamas.contents(out) == llamas.contents(large / "a")
    else:
        assert not list(tmp_path.glob("out*"))


# --- What is refused -----------------------------------------------------------------------------


def refused(capsys, *argv):
    return runs.refused_untouched(capsys, "convert", *argv)


def test_what_is_refused(two, capsys):
    assert refused(capsys, "from-hf", "none", "out") == (
        "none: does not exist: give a Hugging Face model directory"
    )
    assert refused(capsys, "from-hf", "b", "out").startswith("b: no config.json")
    assert refused(capsys, "to-hf", "none", "out").startswith("none: does not exist")
    assert refused(capsys, "from-hf", "a", "b") == (
        "b: exists and is not empty: give a new directory"
    )
    assert refused(capsys, "to-hf", "b", "a") == "a: exists and is not empty: give a new directory"
    (two / "file").write_text("")
    assert refused(capsys, "to-hf", "b", "file").startswith("file: exists and is not empty")
    assert "dtype = 'int8': choose one of float32, float16, bfloat16" in refused(
        capsys, "from-hf", "a", "out", "--dtype", "int8"
    )
    assert refused(capsys, "from-hf", "a", "out", "--memory_layers", "1,3") == (
        "model.memory_layers has 3, but layers are numbered 0 … 2"
    )
    assert refused(capsys, "from-hf", "a", "out", "--local_context", "0") == (
        "model.local_context = 0: give a whole number from 1 to 4,194,304"
    )
    for direction in ("from-hf", "to-hf"):
        assert refused(capsys, direction, "a", "gs://a/b") == (
            "gs://a/b: give a directory of this machine, and copy it there: gcloud storage cp "
            "--recursive"
        )
    assert "out: cannot be written" in refused(capsys, "from-hf", "a", "file/out")
    llamas.edit(two / "a", model_type="gpt2")
    assert 'model_type = "gpt2" is not supported: have "llama", "mistral"' in refused(
        capsys, "from-hf", "a", "out"
    )
    assert 'model_type = "gpt2"' in refused(capsys, "check", "a", "b")


def test_an_empty_directory_will_do(two):
    (two / "out").mkdir()
    assert fot("to-hf", "b", "out") == 0
    assert (two / "out" / "config.json").exists()


def test_values_beyond_float16(two, capsys):
    path = two / "a" / "model.safetensors"
    content = llamas.load(path)
    content["model.layers.1.mlp.up_proj.weight"][3, 4] = -1e6
    save_file(content, path)
    assert refused(capsys, "from-hf", "a", "out", "--dtype", "float16") == (
        "layers/mlp/up of layer 1 has values up to 1e+06, beyond float16: choose bfloat16"
    )
    assert fot("from-hf", "a", "out", "--dtype", "bfloat16") == 0


def test_a_damaged_checkpoint(two, capsys):
    data = two / "b" / "checkpoints" / "0" / "params" / "ocdbt.process_0" / "d"
    for file in data.iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert "is damaged: restore the checkpoint from a copy" in refused(capsys, "to-hf", "b", "out")


def test_a_damaged_tokenizer(two, capsys):
    (two / "a" / "tokenizer.model").write_text("none")
    assert "not a SentencePiece model" in refused(capsys, "from-hf", "a", "out")


def test_generating_without_a_tokenizer(two, capsys):
    line = runs.refused(capsys, "generate", "--checkpoint", "b", "--prompt", "x")
    assert line.startswith("b: has no tokenizer: put tokenizer.json or tokenizer.model into")


def test_paths_with_odd_characters(two, capsys):
    for name in ("a b#1", "per%41cent", "ünï'c\"ode"):
        assert fot("from-hf", "a", name) == 0
        assert fot("to-hf", name, f"{name} back") == 0
        assert llamas.contents(two / f"{name} back") == llamas.contents(two / "a")
    capsys.readouterr()
    for name in ("x[1]", "what?", "all*", "back\\slash"):
        line = refused(capsys, "from-hf", "a", name)
        assert re.match(f"{re.escape(name)}: .* in the path .*: give one without it", line)


def test_outputs_that_cannot_be_replaced_are_refused_at_once(two, capsys, monkeypatch):
    (two / "empty").mkdir()
    (two / "link").symlink_to("empty")
    assert fot("to-hf", "b", "link") == 0
    assert (two / "link").is_symlink() and (two / "empty" / "config.json").exists()
    assert refused(capsys, "to-hf", "b", "link").startswith("link: exists and is not empty")
    (two / "here").mkdir()
    monkeypatch.chdir(two / "here")
    assert refused(capsys, "to-hf", "../b", ".") == (
        ".: cannot be replaced when all is written: give a new directory"
    )


@pytest.mark.parametrize("direction", ["from-hf", "to-hf"])
def test_what_has_come_there_meanwhile_stays(two, capsys, monkeypatch, direction):
    read_as_written, written = convert._read_as_written, []

    def read(*args, **how):
        if not written:
            (two / "out").mkdir()
            (two / "out" / "precious").write_text("x")
        written.append(args)
        return read_as_written(*args, **how)

    monkeypatch.setattr(convert, "_read_as_written", read)
    source = "a" if direction == "from-hf" else "b"
    line = runs.refused(capsys, "convert", direction, source, "out")
    assert line.endswith("out: exists and is not empty: give a new directory")
    assert runs.files(two / "out") == {"precious": b"x"}
    assert not list(two.glob("out.*"))


def test_infinite_values_do_not_hide_those_beyond_float16(two, capsys):
    path = two / "a" / "model.safetensors"
    content = llamas.load(path)
    content["model.norm.weight"][:3] = np.inf, np.nan, 1e30
    save_file(content, path)
    assert "final_norm/scale has values up to 1e+30, beyond float16" in refused(
        capsys, "from-hf", "a", "out", "--dtype", "float16"
    )


@pytest.mark.parametrize("text", ["", "{", "3", '{"eos_token_id": "x"}'])
def test_a_damaged_configuration_beside_the_weights(two, capsys, text):
    (two / "b" / "hugging_face" / "config.json").write_text(text)
    line = refused(capsys, "to-hf", "b", "out")
    assert line.startswith("b/hugging_face/config.json: ") or "config.json" in line


def test_more_layers_than_there_are(two, capsys):
    llamas.edit(two / "a", num_hidden_layers=16384)
    line = refused(capsys, "from-hf", "a", "out")
    assert "has no tensor model.layers.16383.input_layernorm.weight, which config.json" in line

"""Files of tensors, read and written, against safetensors, torch and transformers."""

import json

import llamas
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from read_tensors import assert_same, expected, parameters, reader, refused
from safetensors.numpy import save_file

from fot_jax.hugging_face import tensors

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("files", ["one", "several", "pickle", "pickles", "old pickle"])
def test_every_kind_of_file(tmp_path, files, dtype):
    shards = "20KB" if files == "several" else "5GB"
    model = llamas.save(tmp_path, dtype=getattr(torch, dtype), shards=shards)
    if "pickle" in files:
        state = {k: x.to(getattr(torch, dtype)) for k, x in model.state_dict().items()}
        (tmp_path / "model.safetensors").unlink()
        old = {"_use_new_zipfile_serialization": files != "old pickle"}
        if files == "pickles":
            names = sorted(state)
            where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
            for file in set(where.values()):
                torch.save({n: state[n] for n in names if where[n] == file}, tmp_path / file)
            index = {"weight_map": where}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        else:
            torch.save(state, tmp_path / "pytorch_model.bin", **old)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 or files != "several"
    found = parameters(tmp_path)
    assert_same(found, expected(model))
    assert {x.dtype.name for x in found.values()} == {dtype}


def test_a_head_that_is_tied_and_saved_all_the_same_and_angles_are_passed_over(tmp_path):
    model = llamas.save(tmp_path, tie_word_embeddings=True)
    content = llamas.load(tmp_path / "model.safetensors")
    content["lm_head.weight"] = content["model.embed_tokens.weight"]
    content["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(content, tmp_path / "model.safetensors")
    assert_same(parameters(tmp_path), expected(model))


def test_layers_of_different_types_are_read_as_float32(tmp_path):
    model = llamas.save(tmp_path)
    content = llamas.load(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    content[name] = content[name].astype(ml_dtypes.bfloat16)
    save_file(content, tmp_path / "model.safetensors")
    wanted = expected(model)
    wanted[name] = content[name].astype(np.float32)
    found = parameters(tmp_path)
    assert_same(found, wanted)
    assert found[name].dtype == np.float32


@pytest.mark.parametrize("size", [10**9, 20_000, 1])
def test_what_is_written_is_read_by_safetensors(tmp_path, monkeypatch, size):
    monkeypatch.setattr(tensors, "SHARD", size)
    source, output = tmp_path / "a", tmp_path / "b"
    llamas.save(source, dtype=torch.bfloat16, num_key_value_heads=2)
    output.mkdir()
    content, counted = reader(source), []
    tensors.write(
        output, content.config, lambda path: content.arrays[path][1], content.read, counted.append
    )
    assert llamas.contents(output) == llamas.contents(source)
    files = sorted(path.name for path in output.iterdir())
    total = sum(len(x[2]) for x in llamas.contents(source).values())
    assert sum(counted) == total
    if size == 10**9:
        assert files == ["model.safetensors"]
        return
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    for name, file in index["weight_map"].items():
        assert name in llamas.load(output / file)
    largest = max(len(x[2]) for x in llamas.contents(source).values())
    count = len(files) - 1
    assert files[0] == f"model-00001-of-{count:05d}.safetensors" and count > 1
    for file in files[:-1]:
        bytes_of = sum(x.nbytes for x in llamas.load(output / file).values())
        assert bytes_of <= max(size, largest)


# --- Files that disagree -------------------------------------------------------------------------

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
WHOLE = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
FIRST, LAST = 0, 1  # of two shards


class Directory:
    """A model of two layers, in files of one kind or the other, to be put in disorder."""

    def __init__(self, path, kind, tied):
        self.path, self.kind = path, kind
        shape = {"num_hidden_layers": 2, "tie_word_embeddings": tied}
        self.state = dict(llamas.make(**shape).state_dict())
        self.other = dict(llamas.make(seed=1, **shape).state_dict())
        if tied:
            del self.state[HEAD], self.other[HEAD]
        llamas.make(**shape).config.save_pretrained(path)

    def file(self, i=None, kind=None):
        name, suffix = WHOLE[kind or self.kind].split(".")
        return name + ("" if i is None else f"-0000{i + 1}-of-00002") + f".{suffix}"

    def write(self, name, state):
        if name.endswith("bin"):
            torch.save(state, self.path / name)
        else:
            state = {name: x.clone().contiguous() for name, x in state.items()}
            safetensors.torch.save_file(state, self.path / name, {"format": "pt"})

    def whole(self, state=None, kind=None):
        self.write(self.file(kind=kind), self.state if state is None else state)

    def shards(self, state=None, kind=None):
        """Two of them: norms in the last one."""
        halves = [{}, {}]
        for name, x in (self.state if state is None else state).items():
            halves["norm" in name][name] = x
        for i, half in enumerate(halves):
            self.write(self.file(i, kind), half)
        where = {name: self.file(i, kind) for i, half in enumerate(halves) for name in half}
        self.index(where, kind)
        return halves

    def index(self, where=None, kind=None, **changed):
        path = self.path / f"{WHOLE[kind or self.kind]}.index.json"
        where = json.loads(path.read_text())["weight_map"] if where is None else where
        path.write_text(json.dumps({"metadata": {}, "weight_map": where | changed}))

    def renamed(self, rename):
        self.whole({rename(name): x for name, x in self.state.items()})


def head(x):
    """Another head, which is not the embedding."""
    return x.state | {HEAD: x.state[EMBEDDING].flip(0) * 2}


def rotary(x):
    angles = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in (0, 1)}
    x.whole(x.state | angles | {"model.rotary_emb.inv_freq": torch.ones(2, dtype=torch.float64)})


def mixed(x):
    types = [torch.float32, torch.float16, torch.bfloat16]
    x.whole({name: w.to(types[i % 3]) for i, (name, w) in enumerate(x.state.items())})


def twice(x, said):
    first, last = x.shards()
    x.write(x.file(FIRST), first | {NORM: x.other[NORM]})
    x.index(**{NORM: x.file(said)})


def leftover(x):
    """A shard of another model, which no index names."""
    x.whole()
    x.write(x.file(FIRST), x.other)


def emptied(x):
    x.shards()
    for i in (FIRST, LAST):
        (x.path / x.file(i)).unlink()


def kinds(x, safe, pickle):
    """Of both kinds at once, of different weights."""
    for form, kind, held in ((safe, "safetensors", x.state), (pickle, "bin", x.other)):
        (x.whole if form == "whole" else x.shards)(held, kind)


def partly(x):
    kinds(x, "shards", "whole")
    (x.path / x.file(LAST, "safetensors")).unlink()


def pointer(x):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (x.path / x.file()).write_text(text)


def without(x, *names):
    return {name: w for name, w in x.state.items() if name not in names}


# What is done: whether config.json ties the head, how, and why it is refused, if it is.
DISORDERS = {
    "whole": (False, Directory.whole, None),
    "shards": (False, Directory.shards, None),
    "an index beside a whole file": (False, lambda x: (emptied(x), x.whole()), None),
    "shards and index of another model beside a whole file": (
        False,
        lambda x: (x.shards(x.other), x.whole()),
        None,
    ),
    "a damaged index beside a whole file": (
        False,
        lambda x: (x.whole(), (x.path / f"{x.file()}.index.json").write_text("{")),
        None,
    ),
    "a shard of another model beside a whole file": (False, leftover, None),
    "an index of no files": (False, emptied, "missing, though"),
    "shards without an index": (
        False,
        lambda x: (x.shards(), (x.path / f"{x.file()}.index.json").unlink()),
        "the directory has no weights",
    ),
    "a shard that no index names": (
        False,
        lambda x: (x.shards(), x.write(x.file(7), {NORM: x.other[NORM]})),
        None,
    ),
    "needed, but in no file that the index names": (
        False,
        lambda x: (
            x.shards(without(x, NORM)),
            x.write(x.file(7), {NORM: x.other[NORM]}),
        ),
        "has no tensor model.norm.weight",
    ),
    "both kinds, whole": (False, lambda x: kinds(x, "whole", "whole"), None),
    "shards beside a whole pickle": (False, lambda x: kinds(x, "shards", "whole"), None),
    "shards of pickles beside a whole file": (False, lambda x: kinds(x, "whole", "shards"), None),
    "shards of both kinds": (False, lambda x: kinds(x, "shards", "shards"), None),
    "a shard missing beside a whole pickle": (False, partly, "missing, though"),
    "tied": (True, Directory.whole, None),
    "tied, in shards": (True, Directory.shards, None),
    "tied, the head alone": (
        True,
        lambda x: x.whole(without(x, EMBEDDING) | {HEAD: x.state[EMBEDDING]}),
        None,
    ),
    "tied, the head alone, in shards": (
        True,
        lambda x: x.shards(without(x, EMBEDDING) | {HEAD: x.state[EMBEDDING]}),
        None,
    ),
    "tied, both the same": (True, lambda x: x.whole(x.state | {HEAD: x.state[EMBEDDING]}), None),
    "tied, both the same in other types": (
        True,
        lambda x: x.whole(
            x.state
            | {HEAD: x.state[EMBEDDING].half().float(), EMBEDDING: x.state[EMBEDDING].half()}
        ),
        None,
    ),
    "tied, another head": (True, lambda x: x.whole(head(x)), None),
    "tied, another head, in shards": (True, lambda x: x.shards(head(x)), None),
    "tied, one entry of the head is another": (
        True,
        lambda x: x.whole(x.state | {HEAD: x.state[EMBEDDING].index_fill(0, torch.tensor(60), 0)}),
        None,
    ),
    "tied, a head of another shape": (
        True,
        lambda x: x.whole(x.state | {HEAD: x.state[EMBEDDING][:60]}),
        "lm_head.weight is [60, 32], but [61, 32] by config.json",
    ),
    "tied, neither": (
        True,
        lambda x: x.whole(without(x, EMBEDDING)),
        "has no tensor model.embed_tokens.weight",
    ),
    "not tied, no head": (
        False,
        lambda x: x.whole(without(x, HEAD)),
        "has no tensor lm_head.weight, which config.json needs: restore the files from a copy, or",
    ),
    "not tied, no embedding": (
        False,
        lambda x: x.whole(without(x, EMBEDDING)),
        "has no tensor model.embed_tokens.weight",
    ),
    "names of a model without its head, tied": (
        True,
        lambda x: x.renamed(lambda name: name.removeprefix("model.")),
        None,
    ),
    "names of a model without its head, and a head": (
        False,
        lambda x: x.renamed(lambda name: name.removeprefix("model.")),
        None,
    ),
    "names of a model without its head, and none": (
        False,
        lambda x: x.whole({name.removeprefix("model."): w for name, w in without(x, HEAD).items()}),
        "has no tensor lm_head.weight",
    ),
    "names of a model without its head, in shards": (
        False,
        lambda x: x.shards({name.removeprefix("model."): w for name, w in x.state.items()}),
        None,
    ),
    "a prefix too many": (False, lambda x: x.renamed(lambda name: f"model.{name}"), None),
    "a prefix too many, but for the head": (
        False,
        lambda x: x.renamed(lambda name: name if name == HEAD else f"model.{name}"),
        None,
    ),
    "two prefixes too many": (
        False,
        lambda x: x.renamed(lambda name: f"model.model.{name}"),
        "has no tensor model.layers.1.",
    ),
    "prefixes of a wrapper": (
        False,
        lambda x: x.renamed(lambda name: f"module.{name}"),
        "has no tensor model.layers.1.",
    ),
    "two names of one tensor": (
        False,
        lambda x: x.whole(x.state | {"norm.weight": x.other[NORM]}),
        "are two names of one tensor",
    ),
    "angles": (False, rotary, None),
    "a bias": (
        False,
        lambda x: x.whole(x.state | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        "q_proj.bias is no tensor of a LLaMA",
    ),
    "a value head": (
        False,
        lambda x: x.whole(x.state | {"v_head.summary.weight": torch.ones(1, 32)}),
        "v_head.summary.weight is no tensor of a LLaMA",
    ),
    "layers beyond those of config.json": (
        False,
        lambda x: x.whole(x.state | {"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)}),
        "model.layers.2.mlp.up_proj.weight is no tensor of a LLaMA",
    ),
    "one norm missing": (
        False,
        lambda x: x.whole(without(x, "model.layers.0.input_layernorm.weight")),
        "has no tensor model.layers.0.input_layernorm.weight",
    ),
    "types mixed": (False, mixed, None),
    "norms of another type, in shards": (
        False,
        lambda x: x.shards({n: w if "norm" in n else w.bfloat16() for n, w in x.state.items()}),
        None,
    ),
    "a type of no weights": (
        False,
        lambda x: x.whole(x.state | {NORM: x.state[NORM].to(torch.int32)}),
        "model.norm.weight is of type",
    ),
    "a tensor twice, the last one in the index": (False, lambda x: twice(x, LAST), None),
    "a tensor twice, the first one in the index": (
        False,
        lambda x: twice(x, FIRST),
        "has model.norm.weight, which the index says is in",
    ),
    "an index that says another file": (
        False,
        lambda x: (x.shards(), x.index(**{HEAD: x.file(LAST)})),
        "has lm_head.weight, which the index says is in",
    ),
    "an index that says less": (
        False,
        lambda x: (x.shards(), x.index({"a": x.file(FIRST), "b": x.file(LAST)})),
        None,
    ),
    "an index that says more": (
        False,
        lambda x: (x.shards(), x.index(**{"model.other.weight": x.file(LAST)})),
        None,
    ),
    "tied, an index that says there is a head": (
        True,
        lambda x: (x.shards(), x.index(**{HEAD: x.file(LAST)})),
        None,
    ),
    "a tensor that only the index has": (
        False,
        lambda x: (x.shards(without(x, NORM)), x.index(**{NORM: x.file(LAST)})),
        "has no tensor model.norm.weight",
    ),
    "shards of other numbers of vocabulary": (
        False,
        lambda x: x.shards(x.state | {HEAD: x.state[HEAD][:50]}),
        "lm_head.weight is [50, 32], but [61, 32] by config.json",
    ),
    "a pointer of Git LFS": (False, pointer, "a pointer of Git LFS, not the file"),
    "an adapter beside the model": (
        False,
        lambda x: (x.whole(), (x.path / "adapter_config.json").write_text("{}")),
        "holds an adapter (adapter_config.json), which is not applied",
    ),
    "files named in config.json": (
        False,
        lambda x: (x.whole(), llamas.edit(x.path, transformers_weights="other.safetensors")),
        "transformers_weights",
    ),
    "quantized": (
        False,
        lambda x: (x.whole(), llamas.edit(x.path, quantization_config={"quant_method": "fp8"})),
        "quantization_config: quantized weights are not supported",
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("disorder", DISORDERS)
def test_files_that_disagree_are_read_as_transformers_does_or_refused(tmp_path, disorder, kind):
    tied, do, message = DISORDERS[disorder]
    do(Directory(tmp_path, kind, tied))
    if message:
        assert message in refused(tmp_path)
        return
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]  # which would be random
    found, wanted = parameters(tmp_path), theirs.state_dict()
    assert set(wanted) - set(found) <= {HEAD}
    found.setdefault(HEAD, found[EMBEDDING])
    assert_same(found, {name: x.numpy() for name, x in wanted.items()})

"""Every setting of a .gguf file as a value of another kind: refused in a line that names it."""

import functools
import itertools

import gguf
import ggufs
import llamas
import pytest
from gguf import GGUFValueType as Kind
from gguf import TokenType

from fot_jax.common.errors import UserError
from fot_jax.gguf import directory
from fot_jax.gguf.weights import File

pytestmark = pytest.mark.torch
VALUES = [  # and the kinds that they are of
    ("some text", "text", Kind.STRING),
    ("", "text", Kind.STRING),
    (True, "bool", Kind.BOOL),
    (0, "whole number", Kind.INT32),
    (-1, "whole number", Kind.INT32),
    (2**40, "whole number", Kind.UINT64),
    (0.5, "number", Kind.FLOAT32),
    (float("nan"), "number", Kind.FLOAT32),
    (float("inf"), "number", Kind.FLOAT32),
    ([1, 2], "whole numbers", Kind.INT32),
    ([0.5, 2.0], "numbers", Kind.FLOAT32),
    (["a b", "b"], "texts", Kind.STRING),
]
SIZES = {
    f"llama.{name}": "whole number"
    for name in (
        *("block_count", "context_length", "embedding_length", "feed_forward_length"),
        *("attention.head_count", "attention.head_count_kv", "rope.dimension_count"),
        *("attention.key_length", "attention.value_length"),
    )
}
OF_ALL = SIZES | {
    "llama.attention.layer_norm_rms_epsilon": "number",
    "llama.rope.freq_base": "number",
    "llama.expert_count": "number",
    "general.architecture": "text",
    "general.type": "text",
    "split.count": "whole number",
    "tokenizer.ggml.model": "text",
    "tokenizer.ggml.tokens": "texts",
    "tokenizer.ggml.token_type": "whole numbers",
    "tokenizer.ggml.bos_token_id": "whole number",
    "tokenizer.ggml.eos_token_id": "whole number",
    "tokenizer.ggml.padding_token_id": "whole number",
    "tokenizer.ggml.add_bos_token": "bool",
    "tokenizer.ggml.add_eos_token": "bool",
    "tokenizer.chat_template": "text",
}
YARN = {
    "rope__scaling__type": "yarn",
    "rope__scaling__factor": 8.0,
    "rope__scaling__original_context_length": 4096,
    "rope__scaling__yarn_beta_fast": 16.0,
    "rope__scaling__yarn_attn_factor": 1.0,
}
OF_PIECES = {
    "llama.rope.scaling.type": "text",
    "llama.rope.scaling.factor": "number",
    "llama.rope.scaling.original_context_length": "whole number",
    "llama.rope.scaling.yarn_beta_fast": "number",
    "llama.rope.scaling.yarn_attn_factor": "number",
    "tokenizer.ggml.scores": "numbers",
    "tokenizer.ggml.unknown_token_id": "whole number",
    "tokenizer.ggml.add_space_prefix": "bool",
    "tokenizer.ggml.remove_extra_whitespaces": "bool",
}
OF_BYTE_PAIRS = {
    "llama.rope.scale_linear": "number",
    "tokenizer.ggml.pre": "text",
    "tokenizer.ggml.merges": "texts",
    "tokenizer.ggml.eot_token_id": "whole number",
}


def byte_pairs(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab"])
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


@functools.cache
def fields_and_tensors(path):
    reader = gguf.GGUFReader(path)
    fields = {x.name: (x.contents(), *x.types) for x in reader.fields.values()}
    return {k: x for k, x in fields.items() if not k.startswith("GGUF.")}, reader.tensors


def rewritten(path, out, name, content, kind):
    """A copy of a file with another value of one setting."""
    fields, tensors = fields_and_tensors(path)
    many = isinstance(content, list)
    writer = gguf.GGUFWriter(out, "llama")
    writer.kv_data[0].clear()
    for key, (x, *types) in (
        fields | {name: (content, Kind.ARRAY, kind) if many else (content, kind)}
    ).items():
        writer.add_key_value(key, x, types[0], types[1] if len(types) > 1 else None)
    for tensor in tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def is_of(kind, wanted):
    """Whole numbers are numbers, too."""
    return kind == wanted or (kind, wanted) in (
        ("whole number", "number"),
        ("whole numbers", "numbers"),
    )


@pytest.mark.parametrize(
    "names, tokenizer, size, more",
    [
        (OF_ALL | OF_PIECES, None, 8, YARN),
        (OF_ALL | OF_BYTE_PAIRS, byte_pairs, 5, {"rope__scale_linear": 2.5}),
    ],
    ids=["pieces", "byte pairs"],
)
def test_values_of_other_kinds(tmp_path, names, tokenizer, size, more):
    model = llamas.make(num_hidden_layers=1, vocab_size=size)
    ggufs.write(tmp_path / "right.gguf", model, tokenizer=tokenizer, **more)
    directory.write(File(tmp_path / "right.gguf"), tmp_path)
    for (name, wanted), (content, kind, written) in itertools.product(names.items(), VALUES):
        path = tmp_path / "a.gguf"
        rewritten(tmp_path / "right.gguf", path, name, content, written)
        try:
            directory.write(File(path), tmp_path)
        except UserError as error:
            assert is_of(kind, wanted) or f"{path}: {name} " in str(error), (name, content)
            assert "\n" not in str(error)
        else:
            assert is_of(kind, wanted), f"{name} = {content!r} is taken"
        path.unlink()

"""Files of llama.cpp for tests, written with its own library from models of transformers."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType, TokenType

BLOCKS = {  # bytes of 256 values whose bits are anything, with the places of float16 scales
    "Q4_K": (144, (0, 2)),
    "Q5_K": (176, (0, 2)),
    "Q6_K": (210, (208,)),
    "Q2_K": (84, (80, 82)),
}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def name_of(theirs):
    if theirs.startswith("model.layers."):
        layer, part = theirs.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        return f"blk.{layer}.{PARTS[part]}.weight"
    return {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }[theirs]


def neighbours(x, heads):
    """Rows of queries or keys as llama.cpp has them: two that rotate together are neighbours."""
    size = len(x) // heads
    order = np.arange(size).reshape(2, size // 2).T.reshape(-1)
    return x.reshape(heads, size, -1)[:, order].reshape(x.shape)


def encoded(x, kind, rng):
    """(bytes, type) of a matrix; vectors stay float32, as everywhere."""
    kind = GGMLQuantizationType[kind if x.ndim > 1 else "F32"]
    if kind.name in BLOCKS:
        size, scales = BLOCKS[kind.name]
        rows = rng.integers(0, 256, (len(x), x.shape[1] // 256, size), dtype=np.uint8)
        for place in scales:
            scale = rng.uniform(1e-5, 3e-5, rows.shape[:2]).astype(np.float16)
            rows[..., place : place + 2] = scale[..., None].view(np.uint8)
        return rows.reshape(len(x), -1), kind
    return gguf.quants.quantize(x, kind), kind


def write(
    path,
    model,
    kind="F32",
    change=lambda tensors: tensors,
    tokenizer=None,
    split=0,
    architecture="llama",
    byte_order=gguf.GGUFEndian.LITTLE,
    **settings,
):
    """Writes a LlamaForCausalLM.

    Args:
      kind: of matrices.
      change: of the tensors by name, before they are written: (content, type).
      split: tensors of a file; 0: all in one.
      tokenizer: called with the writer; None: symbols of their own.
      settings: of rope.scaling and so on, by name, with __ for dots; None leaves one out.
    """
    c, rng = model.config, np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture, endianess=byte_order, split_max_tensors=split)
    values = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": float(c.rope_parameters["rope_theta"]),
        "vocab_size": c.vocab_size,
    } | {name.replace("__", "."): x for name, x in settings.items()}
    for name, x in values.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        if x is not None:
            add[type(x)](f"llama.{name}", x)
    (tokenizer or symbols(c.vocab_size))(writer)
    tensors = {}
    for name, x in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        x, name = x.float().numpy(), name_of(name)
        if name.endswith("attn_q.weight"):
            x = neighbours(x, c.num_attention_heads)
        if name.endswith("attn_k.weight"):
            x = neighbours(x, c.num_key_value_heads)
        tensors[name] = encoded(x, kind, rng)
    for name, (x, of) in change(tensors).items():
        writer.add_tensor(name, x, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def symbols(size):
    """The tokens of a model that no text is read with: each a name of its own."""

    def add(writer):
        tokens = ["<unk>", "<s>", "</s>", *(chr(0x4E00 + i) for i in range(size - 3))]
        kinds = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.NORMAL] * (size - 3)]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(i) for i in range(size)])
        writer.add_token_types(kinds)

    return add


def of_bytes(size):
    """The tokens of a model that reads texts byte by byte; the rest of them are in no text."""
    tokens = {"<unk>": TokenType.UNKNOWN, **dict.fromkeys(("<s>", "</s>"), TokenType.CONTROL)}
    tokens |= {f"<0x{i:02X}>": TokenType.BYTE for i in range(256)}
    tokens |= {f"unused {i}": TokenType.UNUSED for i in range(size - len(tokens))}

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([*tokens])
        writer.add_token_scores([-float(i) for i in range(size)])
        writer.add_token_types([*tokens.values()])

    return add

#!/usr/bin/env bash
# A .gguf file of Llama 3.1, 3.2 or 3.3 has its scaled rotary frequencies in a tensor,
# rope_freqs.weight, and says nothing of them in its settings. transformers reads the file
# (gguf_file=) without a word about that tensor and computes with frequencies that are not scaled:
# other logits, from the first positions on, than of the model that the file was made of.
#
# transformers 5.23.0, gguf 0.19.0, torch 2.13.0.
# Seen: 0.0 7.24 (the largest difference of logits without and with scaling in the model)
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv venv && source venv/bin/activate
pip install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cat >test.py <<'EOF'
import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

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
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
HEADS, DIM = 4, 16


def name_of(theirs):
    theirs = theirs.removesuffix(".weight")
    if theirs in WHOLE:
        return f"{WHOLE[theirs]}.weight"
    _, _, layer, part = theirs.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.weight"


def difference(rope):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HEADS * DIM,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=256,
        initializer_range=0.2,
        rope_parameters=rope,
    )
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter("a.gguf", "llama")
    writer.add_vocab_size(64)
    writer.add_context_length(256)
    writer.add_embedding_length(HEADS * DIM)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(DIM)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(chr(0x4E00 + i) for i in range(61))])
    writer.add_token_scores([-float(i) for i in range(64)])
    writer.add_token_types([2, 3, 3, *[1] * 61])
    if rope["rope_type"] == "llama3":
        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
        plain = rope["rope_theta"] ** -(np.arange(0, DIM, 2) / DIM)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    for name, x in model.state_dict().items():
        x, name = x.numpy(), name_of(name)
        if name.endswith(("attn_q.weight", "attn_k.weight")):  # neighbours rotate together there
            x = x.reshape(HEADS, 2, DIM // 2, -1).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(name, np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = LlamaForCausalLM.from_pretrained(".", gguf_file="a.gguf").eval()
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        return float((model(tokens).logits - read(tokens).logits).abs().max())


plain = difference({"rope_type": "default", "rope_theta": 10_000.0})
scaled = difference(
    {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
)
print(plain, scaled)
assert plain < 1e-4 and scaled > 0.1
EOF
python test.py

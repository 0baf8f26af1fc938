#!/usr/bin/env bash
# llama.cpp cuts texts of Mistral Nemo's tokenizer ("tekken") into words in another way than the
# model's own tokenizer.json: its regular expressions know no marks that combine with letters, and
# the vowels of Hindi (as of Thai or Bengali) are such marks. So a word is cut at each vowel, and the
# tokens that the model was trained on are not the ones it is given; English tokens are the same.
# Both read one .gguf file here, of a small tokenizer trained on two sentences.
#
# llama-cpp-python 0.3.36 (it is compiled: about ten minutes), gguf 0.19.0, tokenizers 0.23.3.
# Seen: 2 14 5 5 (two words of Hindi: 2 tokens by tokenizers, 14 by llama.cpp; five of English: 5, 5)
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv venv && source venv/bin/activate
pip install --quiet llama-cpp-python==0.3.36 gguf==0.19.0 tokenizers==0.23.3
cat >test.py <<'EOF'
import json
import sys

import gguf
import numpy as np
from llama_cpp import Llama
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

# As in the tokenizer.json of Mistral-Nemo-Instruct-2407.
upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
start = r"[^\r\n\p{L}\p{N}]?"
words = rf"{start}{upper}*{lower}+|{start}{upper}+{lower}*"
words += r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
sentences = ["हिन्दी भाषा में लिखा गया पाठ है।", "the text of a book is read"]
trainer = trainers.BpeTrainer(
    vocab_size=400,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<unk>", "<s>", "</s>"],
    show_progress=False,
)
tokenizer.train_from_iterator(sentences * 20, trainer)
model = json.loads(tokenizer.to_str())["model"]
tokens = sorted(model["vocab"], key=model["vocab"].get)

writer = gguf.GGUFWriter("a.gguf", "llama")
writer.add_context_length(64)
writer.add_embedding_length(32)
writer.add_block_count(1)
writer.add_feed_forward_length(32)
writer.add_head_count(4)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("tekken")
writer.add_token_list(tokens)
writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
writer.add_bos_token_id(1)
writer.add_eos_token_id(2)
writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

llama = Llama("a.gguf", vocab_only=True, verbose=False)
counts = []
for text in ("हिन्दी भाषा", "the text of a book"):
    theirs = llama.tokenize(text.encode(), add_bos=False)
    counts += [len(tokenizer.encode(text).ids), len(theirs)]
print(*counts)
sys.exit(counts != [2, 14, 5, 5])
EOF
python test.py

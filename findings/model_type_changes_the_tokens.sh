#!/usr/bin/env bash
# With transformers 5, the tokens of a text depend on model_type in config.json, not on the tokenizer's
# files alone: a directory with tokenizer.model and a tokenizer_config.json that names LlamaTokenizer is
# read by LlamaTokenizer where model_type is "llama", and by TokenizersBackend where it is "mistral". The
# second puts no space before the text, so that its first word is another token than the one that
# sentencepiece gives and the model was trained with. Whoever converts such a Mistral model to a LLaMA
# (the weights have the same form) changes its tokens by it. And neither follows the normalizer of the
# model: of two spaces and the line's end in "hello  world\n" sentencepiece here makes one space and
# nothing.
#
# transformers 5.23.0, tokenizers 0.23.3, sentencepiece 0.2.3
# Seen: llama ['▁hello', '▁', '▁world', '<0x0A>'] mistral ['h', 'ello', '▁', '▁world', '▁']
# (sentencepiece: ['▁hello', '▁world'])
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2
cd "$here"
HF_HUB_OFFLINE=1 "$here/venv/bin/python" - <<'PY'
import json
import pathlib
import sys

import sentencepiece
from transformers import AutoTokenizer

model = pathlib.Path("model")
model.mkdir()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["hello world of tokens"] * 50),
    model_prefix="model/tokenizer", model_type="bpe", vocab_size=290, byte_fallback=True,
    minloglevel=2,
)
marks = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
config = {"tokenizer_class": "LlamaTokenizer", **marks}
(model / "tokenizer_config.json").write_text(json.dumps(config))
text = "hello  world\n"
seen = {}
for kind in ("llama", "mistral"):
    (model / "config.json").write_text(json.dumps({"model_type": kind}))
    seen[kind] = AutoTokenizer.from_pretrained(model).tokenize(text)
    print(kind, seen[kind])
own = sentencepiece.SentencePieceProcessor(model_file="model/tokenizer.model")
print("sentencepiece", own.encode(text, out_type=str))
sys.exit(
    seen["llama"] != ["▁hello", "▁", "▁world", "<0x0A>"]
    or seen["mistral"] != ["h", "ello", "▁", "▁world", "▁"]
    or own.encode(text, out_type=str) != ["▁hello", "▁world"]
)
PY

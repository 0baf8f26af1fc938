#!/usr/bin/env bash
# lm-eval 0.4.13, `hf` adapter: an answer that joins with its question into one token ("wor" + "ld")
# has no token left to score, and the adapter fails with an assertion, as it should. But if in the
# same call the same question is also asked with an answer of one token, it does not: the answer of
# no token gets log-probability 0.0 and "greedy", that is, it is certain, and wins over all others
# (accuracy of multiple choice, silently). It is answered from the cache of logits that questions
# with answers of one token share. One would expect the assertion, or a score, in both.
#
# Seen: alone: AssertionError; beside another answer: [(0.0, True), (-4.14, False)]
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet \
    lm-eval==0.4.13 transformers==5.23.0 torch==2.13.0 accelerate==1.15.0
cd "$directory"
HF_HUB_OFFLINE=1 venv/bin/python - 2>errors.txt <<'PYTHON' || { cat errors.txt; exit 1; }
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

merges = [("w", "o"), ("wo", "r"), ("l", "d"), ("wor", "ld")]
names = ["</s>", *"abdlorw", *("".join(merge) for merge in merges)]
tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
torch.manual_seed(0)
shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
config = LlamaConfig(vocab_size=len(names), num_attention_heads=4, initializer_range=0.3, **shape)
adapter = HFLM(LlamaForCausalLM(config).eval(), tokenizer=tokenizer, batch_size=1)


def scores(*answers):
    pairs = [("awor", answer) for answer in answers]
    requests = [Instance("loglikelihood", {}, pair, 0, ("task", 0, 1)) for pair in pairs]
    try:
        found = adapter.loglikelihood(requests, disable_tqdm=True)
        return [(round(nats, 2), greedy) for nats, greedy in found]
    except AssertionError:
        return "AssertionError"


alone, beside = scores("ld"), scores("ld", "b")
print(f"alone: {alone}; beside another answer: {beside}")
raise SystemExit(alone != "AssertionError" or beside[0] != (0.0, True))
PYTHON

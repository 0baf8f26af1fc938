#!/usr/bin/env bash
# tokenizers 0.23.3 passes over the ids that a tokenizer.json gives to its added tokens: they are
# numbered on from the model's vocabulary in the order of the file. Where there is a gap (rows of an
# embedding padded to a multiple of 64, and tokens added after them) an added token gets the id of
# another row, without a word. transformers 5.23.0 passes over the ids of added_tokens_decoder in
# tokenizer_config.json, too, whose keys they are. One would expect these ids, or an error.
#
# Seen: tokenizer.json says 64, tokenizers 3; tokenizer_config.json says 64, AutoTokenizer 3
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet tokenizers==0.23.3 transformers==5.23.0
cd "$directory"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import json
import pathlib

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
content = json.loads(tokenizer.to_str())
flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
mark = {"content": "<mark>", **flags, "special": True}
content["added_tokens"] = [{"id": 64, **mark}]
pathlib.Path("tokenizer.json").write_text(json.dumps(content))
config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
config["added_tokens_decoder"] = {"64": mark}
pathlib.Path("tokenizer_config.json").write_text(json.dumps(config))

library = Tokenizer.from_file("tokenizer.json").token_to_id("<mark>")
auto = AutoTokenizer.from_pretrained(".").convert_tokens_to_ids("<mark>")
print(
    f"tokenizer.json says 64, tokenizers {library}; "
    f"tokenizer_config.json says 64, AutoTokenizer {auto}"
)
raise SystemExit((library, auto) != (3, 3))
PYTHON

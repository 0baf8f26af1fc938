"""Tokenizers that do not fit the rows of an embedding, as published models have them."""

import json
import types

import llamas
import numpy as np
import pytest
import runs
import torch
import transformers
from safetensors.numpy import save_file

from fot_jax.cli import main
from fot_jax.common.errors import UserError
from fot_jax.data.sentencepiece_vocabulary import TrainedSentencePiece
from fot_jax.hugging_face import tokenizers
from fot_jax.inference.language_model import LanguageModel
from fot_jax.training.checks import check_vocabulary

pytestmark = pytest.mark.torch
TEXT = "def f(x):\n    return x + 1\n"
SIZE = 280  # of the tokenizer


def add(name, **marks):
    def change(content, config):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = {"id": SIZE, "content": name, **flags, "special": True}
        content["added_tokens"].append(added)
        if "bos_token" in marks:
            single = [{"SpecialToken": {"id": name, "type_id": 0}}]
            single.append({"Sequence": {"id": "A", "type_id": 0}})
            post = {"type": "TemplateProcessing", "single": single, "pair": single}
            of_text = {name: {"id": name, "ids": [SIZE], "tokens": [name]}}
            content["post_processor"] = post | {"special_tokens": of_text}
        config |= {"split_special_tokens": False, **marks}

    return change


def hole(content, config):
    """One piece is taken away, and what is made with it."""
    (name,) = (name for name, i in content["model"]["vocab"].items() if i == 265)
    del content["model"]["vocab"][name]
    merges = content["model"]["merges"]
    content["model"]["merges"] = [m for m in merges if name not in ("".join(m), *m)]


# Rows of the embedding, what is changed in the tokenizer, the ends that are told.
FITTING = {
    "as many": (SIZE, None, None),
    "more rows": (320, None, None),
    "an added token in rows that were too many": (320, add("<pad>"), None),
    "an added token beyond the rows": (SIZE, add("<pad>", pad_token="<pad>"), None),
    "an id without a token": (SIZE, hole, None),
    "an end beyond the rows": (SIZE, None, [999, 2]),
}
MISFITTING = {
    "fewer rows": (SIZE - 1, None),
    "a mark before texts beyond the rows": (SIZE, add("<bos>", bos_token="<bos>")),
}


@pytest.fixture(scope="module")
def vocabulary():
    return TrainedSentencePiece(SIZE).train([TEXT * 50])


def save(directory, vocabulary, rows, change, ends=None):
    llamas.save(directory, vocab_size=rows)
    tokenizers.write(vocabulary, directory)
    (directory / "tokenizer.model").unlink()
    paths = [directory / name for name in ("tokenizer.json", "tokenizer_config.json")]
    contents = [json.loads(path.read_text()) for path in paths]
    if change is not None:
        change(*contents)
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends or 2}))


def greedy(directory, prompt):
    """Tokens and text of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([tokenizer(prompt).input_ids])
    ones = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=ones, max_new_tokens=8, do_sample=False)
    new = out[0, ids.shape[1] :].tolist()
    return new, tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("name", FITTING)
def test_what_fits_is_read_as_transformers_does(tmp_path, vocabulary, name):
    rows, change, ends = FITTING[name]
    save(tmp_path / "a", vocabulary, rows, change, ends)
    wanted = greedy(tmp_path / "a", "def")
    assert main(["convert", "from-hf", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "b"), str(tmp_path / "c")]) == 0
    assert greedy(tmp_path / "c", "def") == wanted
    for directory in ("a", "b"):
        lm = LanguageModel.load(tmp_path / directory)
        new = lm.generate(lm.encode("def"), max_new_tokens=8, temperature=0.0)
        assert (list(new), lm.decode(new)) == wanted
        check_vocabulary(types.SimpleNamespace(vocabulary=lm.vocabulary), lm.config)  # to train
    if name == "an added token beyond the rows":
        with pytest.raises(UserError) as error:
            lm.logits(np.array([lm.encode("def <pad>")]))
        assert str(error.value) == (
            "token 280 is outside the model's vocabulary of 280: the tokenizer has 281: leave what "
            "was added to it out of the text"
        )


def test_rows_without_a_token_give_no_text(tmp_path, vocabulary):
    """Tokens of such rows may be drawn, in transformers, too."""
    save(tmp_path, vocabulary, 320, None)
    path = tmp_path / "model.safetensors"
    content = llamas.load(path)
    content["lm_head.weight"][300] = 9 * content["lm_head.weight"][greedy(tmp_path, "def")[0][0]]
    save_file(content, path, {"format": "pt"})
    tokens, text = greedy(tmp_path, "def")
    assert 300 in tokens
    lm = LanguageModel.load(tmp_path)
    new = lm.generate(lm.encode("def"), max_new_tokens=8, temperature=0.0)
    assert (list(new), lm.decode(new)) == (tokens, text)


@pytest.mark.parametrize("name", MISFITTING)
def test_what_does_not_fit_is_refused(tmp_path, vocabulary, capsys, monkeypatch, name):
    rows, change = MISFITTING[name]
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a", vocabulary, rows, change)
    message = (
        f"a: the tokenizer has {rows + 1} tokens, the model's embedding {rows} rows: get both from "
        "the same model"
    )
    assert runs.refused_untouched(capsys, "convert", "from-hf", "a", "out") == message
    assert runs.refused(capsys, "generate", "--checkpoint", "a", "--prompt", "def") == message

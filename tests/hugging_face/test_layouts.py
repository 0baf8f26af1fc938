"""Directories laid out as published models: tokens, text and ends as transformers has them."""

import functools
import io
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import runs
import sentencepiece
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers.tokenization_utils_base import generate_merges

from fot_jax import convert
from fot_jax.common.errors import UserError
from fot_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer
from fot_jax.data.saved_vocabulary import load_vocabulary
from fot_jax.data.vocabulary import encode_document, encode_prompt
from fot_jax.hugging_face import tokenizers
from fot_jax.inference.generate import as_text
from fot_jax.inference.language_model import LanguageModel

pytestmark = pytest.mark.torch
TEXT = (Path(sysconfig.get_path("stdlib")) / "json" / "decoder.py").read_text()
ROWS = 640  # of the models here: more than the tokens of any
TEXTS = (
    "Hello  world, it 's <fine> .\n\n\tdef f(x):\n        return x + 1\n",
    " leading, and trailing ",
    "é🙂 ｆｕｌｌ\u3000▁ 12345",
    "<s>[INST] a [/INST] b</s> <|im_start|>user\nhi<|im_end|>\n<|eot_id|>c <unk>",
    "<|endoftext|>x<|begin_of_text|>  <pad><｜begin▁of▁sentence｜>",
    "a",
)

# --- Tokenizers ----------------------------------------------------------------------------------


@functools.cache
def llama(**settings):
    """A tokenizer.model; like LLaMA's unless it is said otherwise."""
    settings = {
        **{"model_type": "bpe", "vocab_size": 500, "byte_fallback": True},
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        **settings,
    }
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=content, minloglevel=2, **settings
    )
    return content.getvalue()


def open_llama():
    """It changes characters, and runs of spaces are one."""
    return llama(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)


def code_llama():
    return llama(user_defined_symbols="▁<PRE>,▁<MID>,▁<SUF>,▁<EOT>")


def mistral_3():
    return llama(control_symbols="[INST],[/INST],[TOOL_CALLS],[AVAILABLE_TOOLS]")


@functools.cache
def as_json(model, newer=False, added=()):
    """The tokenizer.json that is published beside a tokenizer.model."""
    pieces = sentencepiece_model_pb2.ModelProto.FromString(model).pieces
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(ids, generate_merges(ids), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if newer:
        tokenizer.pre_tokenizer = pre.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)]
    )
    special = [p.piece for p in pieces if p.type in (p.CONTROL, p.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in added])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()


@functools.cache
def of_bytes(before=(), after=(), steps=(), template=None):
    """A tokenizer.json of bytes, with special tokens before and after the others."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=bool(after)))
    level = pre.ByteLevel(add_prefix_space=False, use_regex=not steps)
    tokenizer.pre_tokenizer = pre.Sequence([*steps, level]) if steps else level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=list(before),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in after])
    if template is not None:
        mark = (template, tokenizer.token_to_id(template))
        process = TemplateProcessing(single=f"{template} $A", special_tokens=[mark])
        tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=True), process])
    return tokenizer.to_str()


def of_words():
    """A tokenizer.json without a decoder, of which transformers puts spaces between tokens."""
    names = ("<unk>", "<s>", "</s>", *"abc,.!", "it", "do", "n't", "'s", "'")
    words = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre.WhitespaceSplit()
    tokenizer.add_special_tokens(list(names[:3]))
    return tokenizer.to_str()


LLAMA_3_MARKS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_0|>", "<|finetune_right_pad_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
)
SMOL_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>")
DEEPSEEK_MARKS = ("<｜fim▁hole｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|EOT|>")


def llama_3():
    split = Regex(r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+")
    return of_bytes((), LLAMA_3_MARKS, (pre.Split(split, "isolated"),), "<|begin_of_text|>")


def smol():
    return of_bytes(SMOL_MARKS, (), (pre.Digits(individual_digits=True), pre.ByteLevel(False)))


def deepseek():
    steps = (pre.Split(Regex("[\r\n]"), "isolated"), pre.Digits(individual_digits=True))
    return of_bytes((), DEEPSEEK_MARKS, steps, "<｜begin▁of▁sentence｜>")


# --- Layouts -------------------------------------------------------------------------------------


def token(name, **more):
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": name, **flags, **more}


def decoder(ids):
    """added_tokens_decoder."""
    return {str(i): token(name, special=True) for name, i in ids.items()}


THREE = {"<unk>": 0, "<s>": 1, "</s>": 2}
MARKS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MAP = {name: token(value) for name, value in MARKS.items()}
OBJECTS = {name: {"__type": "AddedToken", **each} for name, each in MAP.items()}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
LEGACY = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "use_fast": True}
CLEAN = {"clean_up_tokenization_spaces": False, "sp_model_kwargs": {}, "model_max_length": 2048}
ADDS = {"add_bos_token": True, "add_eos_token": False}
MISTRAL = {"model_type": "mistral", "sliding_window": None, **IDS}
CHAT = {"<|im_end|>": 500, "<|im_start|>": 501}
BOS_3, EOS_3, EOM_3, EOT_3 = (400, 401, 406, 407)
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 131072}
FAST |= {"clean_up_tokenization_spaces": True, "model_input_names": ["input_ids"]}
SMOL = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "vocab_size": 49152}
SMOL |= {"clean_up_tokenization_spaces": False, "unk_token": "<|endoftext|>"}
SMOL |= {"added_tokens_decoder": decoder({name: i for i, name in enumerate(SMOL_MARKS)})}
INSTRUCT_3 = FAST | {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
INSTRUCT_3 |= {"added_tokens_decoder": decoder({m: 400 + i for i, m in enumerate(LLAMA_3_MARKS)})}
SENTENCES = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}


def layout(
    model=None,
    json=None,
    config=None,
    map=None,
    added=None,
    generation=None,
    extra=None,
    **of_model,
):
    """What the files of a directory hold; None: there is no such file."""
    return {
        "tokenizer.model": model,
        "tokenizer.json": json,
        "tokenizer_config.json": config,
        "special_tokens_map.json": map,
        "added_tokens.json": added,
        "generation_config.json": generation,
        "config.json": {"model_type": "llama", **of_model},
        **(extra or {}),
    }


def sentence_pieces():
    """Layouts of models with a SentencePiece vocabulary."""
    plain, both = {"model": llama()}, {"model": llama(), "json": as_json(llama())}
    newer = as_json(llama(), newer=True)
    two = {**ADDS, **OBJECTS, **CLEAN, "tokenizer_class": "LlamaTokenizer", "legacy": False}
    told = {**two, "added_tokens_decoder": decoder(THREE)}
    generation = {"_from_model_config": True, **IDS, "pad_token_id": 0}
    sampling = {**generation, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    for name, files in {"model": plain, "json": {"json": both["json"]}, "both": both}.items():
        yield f"1-{name}", layout(**files, config={**LEGACY, **ADDS, **OBJECTS}, map=MAP, **IDS)
        yield f"2-{name}", layout(**files, config=two, map=MAP, generation=generation, **IDS)
        yield f"2-chat-{name}", layout(**files, config=told, generation=sampling, **IDS)
        yield f"legacy-{name}", layout(**files, config={**told, "legacy": True}, **IDS)
        yield f"no-legacy-{name}", layout(**files, config={**LEGACY, **MARKS, "legacy": None})
        yield f"no-class-{name}", layout(**files, config=MARKS, map=MAP, **IDS)
        yield (
            f"fast-{name}",
            layout(**files, config={**told, "tokenizer_class": "LlamaTokenizerFast"}),
        )
        yield f"bare-{name}", layout(**files, **IDS)
        yield f"map-only-{name}", layout(**files, map=MARKS, **IDS)
        yield f"no-bos-{name}", layout(**files, config={**told, "add_bos_token": False}, **IDS)
        yield f"eos-{name}", layout(**files, config={**told, "add_eos_token": True}, **IDS)
        yield (
            f"no-prefix-{name}",
            layout(**files, config={**told, "add_prefix_space": False}, **IDS),
        )
        cleans = {**told, "clean_up_tokenization_spaces": True}
        yield f"cleans-{name}", layout(**files, config=cleans, **IDS)
        forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        yield f"cleans-all-{name}", layout(**files, config={**cleans, forced: True}, **IDS)
        split = {**told, "split_special_tokens": True}
        yield f"splits-{name}", layout(**files, config=split, **IDS)
        several = {"eos_token_id": [2, -1, 2**40]}  # the others are none
        yield f"ends-nowhere-{name}", layout(**files, config=told, generation=several, **IDS)
        vicuna = {**LEGACY, **ADDS, **OBJECTS, "pad_token": None, "padding_side": "right"}
        yield (
            f"vicuna-{name}",
            layout(**files, config=vicuna, map={**MAP, "pad_token": "<unk>"}, **IDS),
        )
        tiny = {**told, "pad_token": "</s>", "chat_template": "{{ messages }}"}
        yield (
            f"tinyllama-{name}",
            layout(**files, config=tiny, map={**MAP, "pad_token": "</s>"}, **IDS),
        )
        chat = {**told, "eos_token": "<|im_end|>", "added_tokens_decoder": decoder(THREE | CHAT)}
        ends = {"bos_token_id": 1, "eos_token_id": 500}
        if name != "json":
            more = dict(files, json=as_json(llama(), added=tuple(CHAT)) if name == "both" else None)
            yield f"chat-{name}", layout(**more, config=chat, added=CHAT, **ends)
            older = {**LEGACY, **MARKS, "eos_token": "<|im_end|>"}
            names = {
                **MARKS,
                "eos_token": "<|im_end|>",
                "additional_special_tokens": ["<|im_start|>"],
            }
            yield f"chat-old-{name}", layout(**more, config=older, map=names, added=CHAT, **ends)
            pad = {"[PAD]": 500}
            padded = {**LEGACY, **MARKS, "pad_token": "[PAD]"}
            more = dict(files, json=as_json(llama(), added=("[PAD]",)) if name == "both" else None)
            yield f"alpaca-{name}", layout(**more, config=padded, added=pad, **IDS)
        yield (
            f"long-llama-{name}",
            layout(
                **files,
                config={**LEGACY, **ADDS, **OBJECTS},
                map=MAP,
                **{**IDS, "model_type": "longllama", "mem_layers": []},
                auto_map={"AutoConfig": "configuration_longllama.LongLlamaConfig"},
            ),
        )
        yield f"mistral-1-{name}", layout(**files, config=told, generation=generation, **MISTRAL)
        yield f"mistral-1-bare-{name}", layout(**files, **MISTRAL)
    padded = {**told, "added_tokens_decoder": decoder(THREE | CHAT), "pad_token": "<unk>"}
    padded |= {"chat_template": "{{ messages }}", "padding_side": "right"}
    names = {**MARKS, "pad_token": "<unk>", "additional_special_tokens": ["<|im_start|>"]}
    older = {**LEGACY, **MARKS, "model_max_length": 2048}
    yield "mistral-chat", layout(**plain, config=padded, **MISTRAL)
    yield "mistral-chat-old", layout(**plain, config=older, map=names, added=CHAT, **MISTRAL)
    yield "mistral-newer", layout(json=newer, config={**told, "legacy": True}, **MISTRAL)
    yield "llama-newer", layout(json=newer, config={**told, "legacy": True}, **IDS)
    model = mistral_3()
    control = {"[INST]": 3, "[/INST]": 4, "[TOOL_CALLS]": 5, "[AVAILABLE_TOOLS]": 6}
    three = {**told, "added_tokens_decoder": decoder(THREE | control), "legacy": False}
    for name, files in {
        "model": {"model": model},
        "both": {"model": model, "json": as_json(model, newer=True)},
        "json": {"json": as_json(model)},
    }.items():
        yield f"mistral-3-{name}", layout(**files, config=three, generation=generation, **MISTRAL)
    model = open_llama()
    for name, extra in {"1": {}, "2": {"legacy": True}, "3": {"legacy": False}}.items():
        config = {**ADDS, **OBJECTS, **CLEAN, "tokenizer_class": "LlamaTokenizer", **extra}
        yield f"open-llama-{name}", layout(model, config=config, map=MAP, generation=IDS, **IDS)
    yield "open-llama-bare", layout(model, **IDS)
    model = code_llama()
    names = {"prefix_token": "▁<PRE>", "middle_token": "▁<MID>", "suffix_token": "▁<SUF>"}
    infill = {**told, **names, "eot_token": "▁<EOT>", "fill_token": "<FILL_ME>"}
    infill["tokenizer_class"] = "CodeLlamaTokenizer"
    more = {**infill, "additional_special_tokens": [*names.values(), "▁<EOT>"]}
    filled = as_json(model, added=(*names.values(), "▁<EOT>"))
    for name, files in {
        "model": {"model": model},
        "both": {"model": model, "json": filled},
    }.items():
        yield f"code-llama-{name}", layout(**files, config=infill, map=MAP, **IDS)
        yield f"code-llama-instruct-{name}", layout(**files, config=more, map=MAP, **IDS)
        yield f"code-llama-python-{name}", layout(**files, config=two, map=MAP, **IDS)


def byte_pairs():
    """Layouts of models with a vocabulary of bytes and pairs."""
    three, smol_, deep = llama_3(), smol(), deepseek()
    base = {**INSTRUCT_3, "eos_token": "<|end_of_text|>"}
    ids = {"bos_token_id": BOS_3, "eos_token_id": EOS_3}
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    several = {"bos_token_id": BOS_3, "eos_token_id": [EOS_3, EOM_3, EOT_3]}
    yield "llama-3", layout(json=three, config=base, map=names, generation=ids, **ids)
    yield "llama-3-bare", layout(json=three, **ids)
    yield "llama-3-of-config", layout(json=three, config=base, **several)
    yield "llama-3-instruct", layout(json=three, config=INSTRUCT_3, generation=several, **ids)
    yield "llama-3.2", layout(json=three, config=INSTRUCT_3, generation=several, **several)
    yield "llama-3-one", layout(json=three, config=INSTRUCT_3, generation=ids, **several)
    yield (
        "llama-3-none-told",
        layout(json=three, config=INSTRUCT_3, generation={"top_p": 0.9}, **several),
    )
    yield (
        "llama-3-null",
        layout(json=three, config=INSTRUCT_3, generation={"eos_token_id": None}, **ids),
    )
    yield "llama-3-nothing", layout(json=three, config=base)
    wrong = {**INSTRUCT_3, "tokenizer_class": "LlamaTokenizerFast"}
    yield "llama-3-of-llama-2", layout(json=three, config=wrong, generation=several, **ids)
    yield "llama-3-no-bos", layout(json=three, config={**INSTRUCT_3, "add_bos_token": False}, **ids)
    begins = {"bos_token_id": 0, "eos_token_id": 0}
    base = {**SMOL, "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    yield "smollm2", layout(json=smol_, config=base, map={"eos_token": "<|endoftext|>"}, **begins)
    chat = {
        **SMOL,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    additional = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    yield (
        "smollm2-instruct",
        layout(json=smol_, config={**chat, **additional}, generation=ids, **ids),
    )
    content = json.loads(smol_)["model"]
    merges = "#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in content["merges"])
    files = {"vocab.json": content["vocab"], "merges.txt": merges}
    yield (
        "smollm2-pieces",
        layout(config=base, map={"eos_token": "<|endoftext|>"}, extra=files, **begins),
    )
    yield "smollm2-all", layout(json=smol_, config=chat, extra=files, generation=ids, **ids)
    templates = {"chat_template.jinja": "{{ messages }}"}
    templates |= {"additional_chat_templates/tool_use.jinja": "{{ messages }} {{ tools }}"}
    yield "smollm2-templates", layout(json=smol_, config=chat, extra=templates, **ids)
    named = {**FAST, **names, "fast_tokenizer_files": ["tokenizer.4.0.0.json"]}
    newer = {"tokenizer.4.0.0.json": three}
    yield "llama-3-two-files", layout(json=smol_, config=named, extra=newer, **several)
    yield "smollm2-bos", layout(json=smol_, config={**chat, "add_bos_token": True}, **ids)
    code = {**SENTENCES, "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}
    code |= {"pad_token": "<｜end▁of▁sentence｜>", "model_max_length": 16384, "legacy": True}
    ids = {"bos_token_id": 401, "eos_token_id": 402}
    yield (
        "deepseek",
        layout(json=deep, config={**code, "sp_model_kwargs": {}}, generation=ids, **ids),
    )
    code |= {"eos_token": {"__type": "AddedToken", **token("<|EOT|>")}}
    ids = {"bos_token_id": 401, "eos_token_id": 403}
    yield "deepseek-instruct", layout(json=deep, config=code, **ids)
    yield "deepseek-no-bos", layout(json=deep, config={**code, "add_bos_token": False}, **ids)


LAYOUTS = {**dict(sentence_pieces()), **dict(byte_pairs())}

EXPERIMENT = f"""{runs.ONE_STEP_ON_TEXT}
train.model = @ModelConfig()
ModelConfig.memory_layers = (0,)
"""

# --- What they are the tokenizers of -------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model that writes one token after another, 77 rows further on each time."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 256, "vocab_size": ROWS}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    with torch.no_grad():
        embedding = torch.randn(ROWS, 64)
        embedding /= embedding.norm(dim=1, keepdim=True)
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight[(torch.arange(ROWS) + 77) % ROWS] = embedding
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    directory = tmp_path_factory.mktemp("weights")
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def directory(request, tmp_path, weights):
    """In the layout named by the parameter, with that model."""
    shape = json.loads((weights / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "model_type", "architectures"):
        shape.pop(name, None)
    here = lay_out(LAYOUTS[request.param], tmp_path / "published", **shape)
    (here / "model.safetensors").symlink_to(weights / "model.safetensors")
    return here


def lay_out(files, here, **shape):
    """Writes files, and what the shape of the model is into config.json."""
    here.mkdir()
    for name, content in files.items():
        (here / name).parent.mkdir(exist_ok=True)
        if name == "config.json":
            content = {**shape, **content}
        if isinstance(content, dict):
            content = json.dumps(content)
        if isinstance(content, bytes):
            (here / name).write_bytes(content)
        elif content is not None:
            (here / name).write_text(content)
    return here


def theirs_of(directory):
    return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def model_of(directory):
    Model = transformers.LlamaForCausalLM
    if json.loads((directory / "config.json").read_text())["model_type"] == "mistral":
        Model = transformers.MistralForCausalLM
    return Model.from_pretrained(directory).eval()


def check_same(vocabulary, theirs):
    """All that a tokenizer does."""
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert encode_prompt(vocabulary, text) == ids
        assert vocabulary.encode(text) == theirs(text, add_special_tokens=False).input_ids
        assert vocabulary.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    rng = np.random.default_rng(0)
    for _ in range(5):
        ids = rng.integers(len(theirs), size=30).tolist()
        want = theirs.decode(ids, skip_special_tokens=True)
        assert vocabulary.decode(ids) == want
        assert "".join(as_text(vocabulary, ids, context=3)) == want
    assert vocabulary.size == len(theirs) - (vocabulary.infilling is not None)
    assert vocabulary.bos == theirs.bos_token_id
    assert theirs.eos_token_id in (vocabulary.eos, None)


def ends_of(model):
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return tuple(end for end in ends if end is not None and 0 <= end < 2**32)


@pytest.mark.parametrize("directory", LAYOUTS, indirect=True)
def test_as_transformers_reads_it(directory, tmp_path):
    theirs, model = theirs_of(directory), model_of(directory)
    lm = LanguageModel.load(directory)
    check_same(lm.vocabulary, theirs)
    assert lm.vocabulary.ends == ends_of(model)

    # What it writes, after a prompt that makes it end soon, if it does.
    goals = [end for end in lm.vocabulary.ends if end < ROWS] or [0]
    for text in map(chr, range(33, 127)):
        steps = [(goal - theirs(text).input_ids[-1]) * pow(77, -1, ROWS) % ROWS for goal in goals]
        if 2 < min(steps) < 40:
            break
    tokens = theirs(text, return_tensors="pt").input_ids
    new = model.generate(tokens, max_new_tokens=45, do_sample=False, pad_token_id=0)
    want = new[0, tokens.shape[1] :].tolist()
    ended = lm.vocabulary.ends and not lm.vocabulary.after  # which all prompts end with
    assert not ended or want[-1] in lm.vocabulary.ends
    got = lm.generate(lm.encode(text), 45, temperature=0)
    assert got == (want[:-1] if want[-1] in lm.vocabulary.ends else want)
    assert lm.decode(got) == theirs.decode(want, skip_special_tokens=True)
    assert "".join(as_text(lm.vocabulary, got)) == lm.decode(got)

    # And so it stays: kept beside a checkpoint, and written for transformers again.
    convert.from_hugging_face(directory, tmp_path / "ours")
    assert load_vocabulary(tmp_path / "ours" / "vocabulary") == lm.vocabulary
    convert.to_hugging_face(tmp_path / "ours", tmp_path / "back")
    back = theirs_of(tmp_path / "back")
    check_same(lm.vocabulary, back)
    kept = ("pad_token_id", "unk_token_id", "chat_template", "model_max_length")
    assert [getattr(back, name) for name in kept] == [getattr(theirs, name) for name in kept]
    assert {*back.all_special_tokens} == {*theirs.all_special_tokens}
    assert back.padding_side == theirs.init_kwargs.get("padding_side", back.padding_side)
    assert ends_of(model_of(tmp_path / "back")) == lm.vocabulary.ends


@pytest.mark.parametrize("directory", ["mistral-1-model"], indirect=True)
def test_training_goes_on_with_them(directory, tmp_path, monkeypatch):
    """From the directory to a checkpoint, and to a directory of another type of model."""
    theirs, texts = theirs_of(directory), tmp_path / "texts"
    texts.mkdir()
    for split in ("train", "valid"):
        row = json.dumps({"text": TEXT[:3000]})
        (texts / f"{split}.jsonl").write_text("\n".join([row] * 4))
    shape = {"vocab_size": ROWS, "hidden_size": 64, "num_layers": 1, "num_heads": 2}
    shape |= {"num_kv_heads": 2, "head_dim": 32, "mlp_dim": 8, "local_context": 64}
    lines = [f"ModelConfig.{name} = {value}" for name, value in shape.items()]
    (tmp_path / "experiment.gin").write_text("\n".join([EXPERIMENT, *lines]))
    bindings = f'train.initialize_from = "{directory}"', f'Corpus.path = "{texts}"'
    with runs.first_devices(monkeypatch, 1):
        assert runs.train(tmp_path / "experiment.gin", tmp_path / "run", *bindings) == 0
    trained = LanguageModel.load(tmp_path / "run").vocabulary
    assert trained == tokenizers.vocabulary_of(directory)
    convert.to_hugging_face(tmp_path / "run", tmp_path / "out")
    check_same(trained, theirs)
    check_same(trained, theirs_of(tmp_path / "out"))
    assert ends_of(model_of(tmp_path / "out")) == trained.ends


# --- One by one ----------------------------------------------------------------------------------


def vocabulary_of(name, tmp_path):
    return tokenizers.vocabulary_of(lay_out(LAYOUTS[name], tmp_path / name))


def test_documents_have_the_marks_that_the_model_was_trained_with(tmp_path):
    """As its tokenizer puts them around a text, and its end behind, once."""
    for name, before in {"2-model": [1], "smollm2": [], "bare-model": [], "eos-model": [1]}.items():
        vocabulary = vocabulary_of(name, tmp_path)
        tokens = [*before, *vocabulary.encode("a b"), vocabulary.eos]
        assert encode_document(vocabulary, "a b").tolist() == tokens, name


def test_a_gap_in_a_text(tmp_path):
    """Code Llama's own way to be asked for what is missing."""
    here = lay_out(LAYOUTS["code-llama-both"], tmp_path / "a")
    ours = tokenizers.vocabulary_of(here)
    for text in ("def f(x):\n  <FILL_ME>\n  return x", "<FILL_ME> b", "a<FILL_ME>", "é <FILL_ME>é"):
        theirs = theirs_of(here)  # which a text with a gap changes
        assert encode_prompt(ours, text) == theirs(text).input_ids
        ours.save(tmp_path / "saved")
        assert load_vocabulary(tmp_path / "saved").encode(text) == ours.encode(text)
    with pytest.raises(UserError, match="the text has 2 gaps, <FILL_ME>: leave one of them"):
        ours.encode("a<FILL_ME>b<FILL_ME>")
    for text in ("a<FILL_ME>b", "a<FILL_ME>", "a<FILL_ME>b<FILL_ME>"):  # no request in training
        *_, tokens = (ours.before, encode_document(ours, text).tolist()[len(ours.before) : -1])
        assert ours.decode(tokens) == text
    assert ours.size == len(sentencepiece.SentencePieceProcessor(model_proto=code_llama()))


def test_what_is_trained_from_scratch_is_written_with_its_marks(tmp_path):
    """A tokenizer.json that puts none around a text begins documents with one in training."""
    (tmp_path / "tokenizer.json").write_text(smol())
    ours = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    assert ours.before == ours.ends == (ours.eos,) == (0,)
    config = {"chat_template": "{{ messages }}", "model_max_length": 99, "pad_token": "<|x|>"}
    others = {"map": {"eos_token": "<|im_end|>"}, "added": {"<|x|>": 900}}  # of another tokenizer
    out = lay_out(layout(config=config, **others, eos_token_id=0), tmp_path / "out")
    tokenizers.write(ours, out)
    theirs = theirs_of(out)
    assert theirs("a b").input_ids == encode_prompt(ours, "a b")
    assert theirs.eos_token_id == theirs.pad_token_id == ours.eos and len(theirs) == ours.size
    assert (theirs.chat_template, theirs.model_max_length) == ("{{ messages }}", 99)
    read = tokenizers.vocabulary_of(out)
    assert (read.before, read.after, read.ends) == (ours.before, ours.after, ours.ends)


def test_other_models_of_pieces(tmp_path):
    """Unigrams; text cleaned up after them; added tokens with numbers they do not get; words."""
    unigram = llama(model_type="unigram")
    cleans = {**MARKS, "clean_up_tokenization_spaces": True}
    apart = {**LEGACY, **MARKS, "added_tokens_decoder": decoder({"<x>": 510, "<y>": 505})}
    for name, files in {
        "a": layout(unigram, config={"tokenizer_class": "LlamaTokenizer"}),
        "b": layout(unigram, config=cleans),
        "c": layout(llama(), config=apart),
        "d": layout(json=of_words(), config={**FAST, **MARKS}),
    }.items():
        here = lay_out(files, tmp_path / name)
        vocabulary, theirs = tokenizers.vocabulary_of(here), theirs_of(here)
        check_same(vocabulary, theirs)
        ids = theirs("it 's a . , ! b ' c do n't , \n", add_special_tokens=False).input_ids
        assert "".join(as_text(vocabulary, ids, context=2)) == theirs.decode(ids)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            layout(llama(), config={**MARKS, "bos_token": ""}),
            "config.json: bos_token is empty: give",
        ),
        (layout(llama(), map={"eos_token": ""}), "tokens_map.json: eos_token is empty: give"),
        (layout(llama(), config=MARKS, generation={"eos_token_id": "2"}), '= "2": give a token id'),
        (
            layout(llama(), config=MARKS, generation={"eos_token_id": [2, None]}),
            "= [2, null]: give a token id",
        ),
        (layout(llama(), config={"added_tokens_decoder": [1]}), "cannot read its tokenizer"),
        (
            layout(llama(), config=MARKS, hidden_size=32, num_attention_heads=3),
            "config.json: transformers refuses it (Class validation error for validator "
            "'validate_architecture': ValueError: The hidden size (32) is not a multiple of",
        ),
        (layout(json="{}"), "cannot read its tokenizer"),
        (layout(json=of_bytes(("<a>",)), config=FAST), "not known: add eos_token, its name, to"),
        (layout(json=smol(), config={"tokenizer_class": "ByT5Tokenizer"}), "is a program, ByT5"),
    ],
)
def test_refused_in_one_line(tmp_path, files, message):
    with pytest.raises(UserError) as refused:
        tokenizers.vocabulary_of(lay_out(files, tmp_path / "a"))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_in_a_bucket(tmp_path, bucket):
    here = lay_out(LAYOUTS["llama-3-instruct"], tmp_path / "a")
    bucket.copy(here, "a")
    found = tokenizers.vocabulary_of(f"{bucket.url}/a")
    assert found is not None and found == tokenizers.vocabulary_of(here)


def test_an_end_that_only_the_model_names(tmp_path):
    files = layout(json=of_bytes(("<a>",)), config=FAST, eos_token_id=0)
    assert tokenizers.vocabulary_of(lay_out(files, tmp_path / "a")).eos == 0

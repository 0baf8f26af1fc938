"""Every experiment file is read and its training step traced, with its numbers from the paper."""

import ast
import contextlib
import itertools
import math
import re
from pathlib import Path

import gin
import pytest
import tokenizers

from fot_jax import cli, gin_files, gin_uses
from fot_jax.data import tasks
from fot_jax.data.sentencepiece_vocabulary import TrainedSentencePiece

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "experiments").glob("*.gin"))

MIXTURE = {  # percent, shortest document, in tokens
    "arxiv": (25, 0),
    "python": (25, 4096),
    "book": (10, 0),
    "common_crawl": (29, 0),
    "c4": (5, 1024),
    "github": (2, 2048),
    "stackexchange": (2, 1024),
    "wikipedia": (2, 1024),
}


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    """What experiments leave to their users: a tokenizer.model and a tokenizer.json."""
    directory = tmp_path_factory.mktemp("tokenizers")
    text = [f"some words, all different: {i}" for i in range(100)]
    (directory / "tokenizer.model").write_bytes(TrainedSentencePiece(300).train(text).model)
    words = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "word": 2}, unk_token="word")
    tokenizers.Tokenizer(words).save(str(directory / "tokenizer.json"))
    return directory


def given(name, tokenizers):
    """What the command in the file's header gives."""
    sentencepiece = f'VOCABULARY = "{tokenizers / "tokenizer.model"}"'
    base = 'train.initialize_from = "a/checkpoint"'
    mixture = [f'{corpus}/Corpus.path = "texts/{corpus}"' for corpus in MIXTURE]
    return {
        "quickstart": [],
        "dictionary_37m": [],
        "pg19_184m_d2_to_64": [sentencepiece, 'Text.data_dir = "a/directory"'],
        "arxiv_184m_w2_d2": [sentencepiece, 'Corpus.path = "texts/arxiv"'],
        "c4_184m_finetune_d2_128": [sentencepiece, base, 'Text.data_dir = "a/directory"'],
        "long_llama_3b": [sentencepiece, base, *mixture],
        "long_llama_7b": [sentencepiece, base, *mixture],
        "long_llama_code_7b": [sentencepiece, base, *mixture],
        "llama3_8b_fot": [
            f'TOKENIZER = "{tokenizers / "tokenizer.json"}"',
            *(base, *mixture),
        ],
        "smollm2_135m_fot": [],
    }[name]


def dry_run(name, tokenizers, capsys, *more):
    """What `fot train --dry_run` prints; gin then knows what was bound, and what was used."""
    bindings = [*given(name, tokenizers), *more]
    argv = ["train", str(ROOT / "experiments" / f"{name}.gin"), "--dry_run"]
    code = cli.main([*argv, *(word for binding in bindings for word in ("--gin", binding))])
    said = capsys.readouterr()
    assert code == 0, said.err
    # What was used is what a command line may bind.
    reached = gin_uses.reached_now()
    for scope, selector in gin.config._OPERATIVE_CONFIG:
        assert (tuple(scope.split("/")) if scope else ()) in reached[selector], (scope, selector)
    return said.out


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Experiment files work from any directory."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


# --- Expected numbers ----------------------------------------------------------------------------


def paper(vocabulary, width, inner, mlp, heads, layers=12):
    """Parameters of a model of the paper's: tied embeddings, LayerNorm, a temperature per head."""
    of_layer = 4 * width * inner + 2 * width * mlp + 2 * 2 * width + heads
    return vocabulary * width + layers * of_layer + 2 * width


# Parameters: those of the paper's models are counted here, others as published with their weights.
# Tokens: new ones in a step. The rest: values as used, defaults among them.
PAPER = {
    "train.optimizer": "@adafactor",
    "adafactor.b1": 0.9,
    "train.learning_rate": "@inverse_square_root()",
    "inverse_square_root.warmup_steps": 1000,
    "train.scheme": "@PreviousContext()",
}
PAPER_184M = PAPER | {
    "parameters": paper(32_000, 1024, 1024, 4096, heads=8),
    "window": 512,
    "tokens": 2**15,
    "train.steps": 500_000,
    "inverse_square_root.max_value": 0.01,
    "inverse_square_root.min_value": 0.0005,
    "PreviousContext.w": 1,
}
LONG_LLAMA = {
    "tokens": 2**18,
    "train.optimizer": "@adamw",
    "adamw.weight_decay": 0.01,
    "train.learning_rate": "@constant_rate()",
    "constant_rate.value": 2e-5,
    "constant_rate.warmup_steps": 0,
    "train.scheme": "@PackedTable()",
    "PackedTable.table": ((0, 0), (1, 2), (2, 5), (3, 4)),
    **{f"{name}/Corpus.weight": MIXTURE[name][0] for name in MIXTURE},
    **{f"{name}/Corpus.min_document_length": MIXTURE[name][1] for name in MIXTURE},
    "python/Corpus.join_by": "directory",
}
EXPECTED = {
    "dictionary_37m": PAPER
    | {
        "parameters": paper(64, 512, 512, 2048, heads=8),
        "window": 256,
        "tokens": 2 * 2**15,  # half of them questions
        "train.steps": 5_000,
        "inverse_square_root.max_value": 0.02,
        "inverse_square_root.min_value": 0.01,
        "DictionaryLookup.document_tokens": 512,
        "train.d": "@SwitchAtAccuracy()",
        "SwitchAtAccuracy.threshold": 0.98,
        "SwitchAtAccuracy.values": (1, 128),
    },
    "pg19_184m_d2_to_64": PAPER_184M
    | {
        "Corpus.path": "tfds:pg19",
        "train.d": "@SwitchAtStep()",
        "SwitchAtStep.steps": (450_000,),
        "SwitchAtStep.values": (2, 64),
    },
    "arxiv_184m_w2_d2": PAPER_184M | {"PreviousContext.w": 2, "PreviousContext.d": 2},
    "c4_184m_finetune_d2_128": PAPER_184M
    | {
        "window": 1024,
        "tokens": 2**17,
        "train.steps": 10_000,
        "Corpus.path": "tfds:c4/en",
        "train.d": "@DrawnEachStep()",
        "DrawnEachStep.values": (2, 128),
    },
    "long_llama_3b": LONG_LLAMA
    | {
        "parameters": 3_426_473_600,
        "window": 2048,
        "devices": 128,
        "all tokens": 10e9,
        "PackedTable.table": ((0, 0), (1, 1), (2, 1), (3, 0)),
    },
    "long_llama_7b": LONG_LLAMA
    | {"parameters": 6_738_415_616, "window": 2048, "devices": 128, "all tokens": 3e9},
    "long_llama_code_7b": LONG_LLAMA
    | {"parameters": 6_738_546_688, "window": 4096, "devices": 64, "all tokens": 3e9},
    "llama3_8b_fot": LONG_LLAMA
    | {"parameters": 8_030_261_248, "window": 8192, "devices": 64, "all tokens": 3e9},
    "smollm2_135m_fot": {
        # As published, and adapters of rank 32: of queries and outputs, keys and values, the MLP;
        # and what each layer's are multiplied by.
        "parameters": 134_515_008 + 30 * (32 * (4 * 576 + 2 * (576 + 192) + 3 * (576 + 1536)) + 1),
        "window": 512,
        "tokens": 4096,
        "train.steps": 60,
        "train.scheme": "@PackedTable()",
        "PackedTable.table": ((0, 0), (1, 4), (2, 4), (3, 4)),
        "Corpus.path": "standard_library",
        "Lora.rank": 32,
        "cosine.max_value": 5e-4,
    },
    "quickstart": {
        # A layer: 4 matrices of attention, 2 temperatures, 3 matrices of the MLP, 2 norms;
        # embedding and head, a norm.
        "parameters": 3 * (4 * 128**2 + 2 + 3 * 128 * 352 + 2 * 128) + 2 * 1024 * 128 + 128,
        "window": 64,
        "tokens": 2 * 32 * 64,
        "train.steps": 2000,
        "train.scheme": "@Packed()",
        "Corpus.path": "standard_library",
        "TrainedSentencePiece.pieces": 1024,
    },
}


def printed(out):
    """The numbers of a dry run."""
    line = re.fullmatch(
        r"([\d,]+) parameters(?: \([\d,]+ of them train\))?, mesh (\{.*\}), \d+ rows of "
        r"(\d+) tokens \(([\d,]+) new tokens a step\), .* FLOPs a step, "
        r"([\d,]+) steps: nothing written\n",
        out,
    )
    parameters, mesh, window, tokens, steps = (x.replace(",", "") for x in line.groups())
    devices = math.prod(int(size) for size in re.findall(r": (\d+)", mesh))
    return {
        "parameters": int(parameters),
        "devices": devices,
        "window": int(window),
        "tokens": int(tokens),
        "all tokens": pytest.approx(int(tokens) * int(steps), rel=1e-4),
    }


def values(text):
    """Name -> value in gin's text of a configuration; references as text, macros looked up."""
    found = {}
    for name, value in re.findall(r"^([\w/.]+) = (?:\\\n *)?(.*)$", text, flags=re.MULTILINE):
        found[name] = found.get(value.removeprefix("%"), value)
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            found[name] = ast.literal_eval(found[name])
    return found


def test_every_file_is_expected():
    assert {file.stem for file in FILES} == EXPECTED.keys()


SLOW = {"quickstart": pytest.mark.slow}  # trains a tokenizer


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW.get(name, ())) for name in EXPECTED]
)
def test_numbers(name, tokenizer_files, elsewhere, monkeypatch, capsys):
    """And everything that the file and its parts say is of consequence."""
    monkeypatch.setattr(tasks, "TRAINING_CHARACTERS", 200_000)  # for a tokenizer of no consequence
    out = dry_run(name, tokenizer_files, capsys)
    used = values(gin_files.settings_text())
    got = used | printed(out)
    # A setting of no scope, as defaults are, is that of all of them.
    found = {key: got[key if key in got else key.split("/")[-1]] for key in EXPECTED[name]}
    assert found == EXPECTED[name]
    assert values(gin.config_str()).keys() <= used.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_what_must_be_given_is_asked_for_and_in_the_header(name, tokenizer_files, capsys):
    header = command(ROOT / "experiments" / f"{name}.gin")
    for left_out in given(name, tokenizer_files):
        binding = left_out.split(" = ")[0]
        assert binding in header
        if binding == "Text.data_dir":  # has a default
            continue
        kept = [one for one in given(name, tokenizer_files) if one != left_out]
        argv = ["train", str(ROOT / "experiments" / f"{name}.gin"), "--dry_run"]
        assert cli.main([*argv, *(word for one in kept for word in ("--gin", one))]) == 2
        assert " is not set: add --gin" in capsys.readouterr().err


def command(file):
    """How a file's header, or another one's that it refers to, says that it is run."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    header = "\n".join(lines)
    if same := re.search(r"# Run: as experiments/(\w+)\.gin", header):
        return command(file.with_name(f"{same[1]}.gin"))
    text = header[header.index(f"fot train experiments/{file.name}") :]
    for part in re.findall(r"parts/\w+\.gin", text):
        text += (ROOT / "experiments" / part).read_text()
    return text


@pytest.mark.parametrize("name", EXPECTED)
def test_headers_say_what_is_reproduced_and_on_what(name):
    text = (ROOT / "experiments" / f"{name}.gin").read_text()
    header = text[: text.index("\n\n")]
    assert command(ROOT / "experiments" / f"{name}.gin")
    if name != "quickstart":
        assert re.search(r"^# (Reproduces: |Not in the paper: |Like LongLLaMA)", header, re.M)
        assert re.search(r"^# Hardware: ", header, re.M)


EVALUATIONS = ("perplexity", "memory_layers", "passkey", "few_shot", "ruler", "short_tasks")


@pytest.mark.parametrize(
    "files",
    [
        *(["quickstart", f"parts/{name}"] for name in EVALUATIONS),
        ["reproduce/real_model_layers"],
        ["reproduce/real_model_long"],
    ],
    ids=lambda files: files[-1],
)
def test_evaluations_of_a_run_that_is_done(files, capsys, elsewhere):
    """All is read and made before the checkpoint is looked for."""
    files = [ROOT / "experiments" / f"{name}.gin" for name in files]
    argv = ["evaluate", *map(str, files)]
    for name in re.findall(r"--gin '(\w+) = \"DIR\"'", files[-1].read_text()):
        argv += ["--gin", f'{name} = "{name}"']
    assert cli.main([*argv, "--checkpoint", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("fot: error: nowhere: does not exist")
    evaluations = gin.get_configurable("Evaluation")().evals
    assert evaluations and all(each.name for each in evaluations)


def test_perplexity_is_that_of_the_part_whatever_scopes_a_run_has():
    files = [ROOT / "experiments" / f"{x}.gin" for x in ("reproduce/text_cpu", "parts/perplexity")]
    gin_files.load([str(file) for file in files], ['Corpus.path = "texts"'])
    for evaluation in gin.get_configurable("Evaluation")().evals:
        assert evaluation.memory_sizes[-1] == 131_072 and evaluation.documents == 32


def test_every_part_is_tested():
    parts = {file.stem for file in (ROOT / "experiments" / "parts").glob("*.gin")}
    assert parts == {*EVALUATIONS, "long_llama", "long_llama_mixture", "paper_184m"}

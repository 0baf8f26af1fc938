"""What is wrong in an experiment file, or in a --gin binding, is said in one line."""

import contextlib
import dataclasses
import os
import random
import re
import sys
from unittest import mock

import gin
import pytest
import runs
from runs import DICTIONARY, bind, refused_untouched

from fot_jax import cli, evals, gin_files
from fot_jax.common.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")

CORPORA = "Text.corpora = (@Corpus(),)"


NAMES = """
    train evaluate compile_experiment Data Compute Checkpoints MeshShape Evaluation
    Text Corpus Bytes SentencePiece TrainedSentencePiece HuggingFaceTokenizer Mixture
    DictionaryLookup Passkey ModelConfig RopeScaling fot_37m fot_184m fot_600m fot_1_2b openllama_3b
    openllama_7b code_llama_7b llama3_2_1b llama3_1_8b Dense TopK ApproximateTopK NoCrossbatch
    PreviousContext Packed PackedTable CachedContext SwitchAtStep SwitchAtAccuracy DrawnEachStep
    adamw adafactor constant_rate inverse_square_root cosine DictionaryAccuracy PositiveMass FewShot
    LmEval IndexRecall MemoryLayerProbe PasskeyRetrieval PerplexityByContext RetrievalTable Sample
"""  # of experiment files that others have saved


def test_names_that_saved_experiments_use_are_known():
    gin_files.load([], [f"KNOWN = ({', '.join(f'@{name}' for name in NAMES.split())})"])


def test_two_things_of_one_name_are_refused(tmp_path, monkeypatch):
    """Or one of them would be forgotten without a word."""
    (tmp_path / "another_sample.py").write_text(
        "from fot_jax.common.configurable import configurable\n\n"
        "@configurable\nclass Sample:\n    pass\n"
    )
    monkeypatch.setattr(evals, "__path__", [*evals.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match="fot_jax.Sample.*already exists"):
        gin_files.load([], [])
    sys.modules.pop("fot_jax.evals.another_sample")


def test_a_new_file_is_enough_for_a_new_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "word_count.py").write_text(
        "from fot_jax.common.configurable import configurable\n\n"
        "@configurable\nclass WordCount:\n"
        "    def __init__(self, words: int = 3):\n        self.words = words\n"
    )
    monkeypatch.setattr(evals, "__path__", [*evals.__path__, str(tmp_path)])
    gin_files.load([], ["WordCount.words = 'x'"])
    with pytest.raises(UserError, match="WordCount.words = 'x': give a whole number"):
        gin.get_configurable("WordCount")()


@pytest.mark.parametrize(
    "verb", [["train"], ["train", "--dry_run"], ["evaluate", "--checkpoint=x"]]
)
def test_no_experiment_file(here, capsys, verb):
    assert refused_untouched(capsys, *verb, "nothing.gin") == (
        "no experiment file nothing.gin: give the path of a .gin file"
    )


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "Dta.lanes = 4",
            "unknown name 'Dta' (broken.gin:3); did you mean Data",
        ),
        (
            "train.scheme = @PreviousContexts()",
            "unknown name 'PreviousContexts' (broken.gin:3); did you mean PreviousContext",
        ),
        (
            "Evaluation.evals = (@during/PerplexityByContex(),)",
            "unknown name 'PerplexityByContex' (broken.gin:3); did you mean PerplexityByContext",
        ),
        (
            "zzz.zzz = 4",
            "unknown name 'zzz' (broken.gin:3): see the files in experiments/",
        ),
        (
            "Data.lane = 4",
            "Data has no parameter 'lane' (broken.gin:3); did you mean lanes or lane_groups",
        ),
        (
            "Data.lanes = ",
            "broken.gin:3: Unable to parse value: a line is NAME = VALUE, or include 'FILE.gin'",
        ),
        (
            "Data.lanes == 4",
            "broken.gin:3: ",
        ),
        (
            "a/Corpus.path = data/my texts  # from home",
            'broken.gin:3: text takes quotes: a/Corpus.path = "data/my texts"',
        ),
        (
            "TEXTS = gs://bucket/texts",
            'broken.gin:3: text takes quotes: TEXTS = "gs://bucket/texts"',
        ),
        (
            "Corpus.paths = data/my",
            "broken.gin:3: Failed to parse token 'data': a value is a number",
        ),
        (
            "Data.lanes = four",
            "broken.gin:3: Failed to parse token 'four': a value is a number",
        ),
        (
            "Data.lanes = (4,",
            "broken.gin:3: a bracket or quote is not closed up to the end",
        ),
        (
            'Data.lanes = """4\n\n\n',
            "broken.gin:3: a bracket or quote is not closed up to the end",
        ),
        (
            "Data.lanes = float('nan')",
            "broken.gin:3: Failed to parse token 'float': a value is a number",
        ),
        (
            "Data.lanes = {[1]: 2}",
            "broken.gin:3: unhashable type: 'list': give another value",
        ),
        (
            "include 'broken.gin'",
            "broken.gin -> broken.gin: these files include each other in a circle",
        ),
        (
            f"Data.lanes = {'[' * 999}",
            "broken.gin:3: brackets are nested too deeply",
        ),
        (
            "include 'latin.gin'",
            "latin.gin:2: not a text in UTF-8: save the file as one",
        ),
        (
            "import nothing_there",
            "No module named 'nothing_there' (broken.gin:3): install it, or correct the import",
        ),
        (
            "from __gin__ import dynamic_registration",
            "broken.gin:3: from __gin__ import dynamic_registration: leave that line out, imports",
        ),
        (
            "include 't5x.gin'",
            "t5x.gin:1: from __gin__ import dynamic_registration: leave that line out, imports of "
            "modules too, and write names without a module: train.steps = 10",
        ),
        (
            "  Data.lanes = 4\n Data.lanes = 4",
            "broken.gin:4: unindent does not match any outer indentation level: a line is NAME",
        ),
        (
            "Data.lanes = lambda: 4",
            "broken.gin:3: Failed to parse token 'lambda': a value is a number",
        ),
        ("Data.lanes = -%N", "broken.gin:3: -% is not for gin: give what it names the minus"),
        ("Data.lanes = (1,\n -@N())", "broken.gin:4: -@ is not for gin: give what it names"),
        ("X = (1, - # less\n %N)", "broken.gin:4: -% is not for gin: give what it names the m"),
        (
            "include 'parts'",
            "no file parts to include (broken.gin:3): paths are relative to the",
        ),
        (
            "include 'parts/nothing.gin'",
            "no file parts/nothing.gin to include (broken.gin:3): paths are relative to the",
        ),
    ],
)
def test_files_that_gin_cannot_read(here, capsys, line, message):
    (here / "latin.gin").write_bytes(b"# tea\n# caf\xe9\n")
    (here / "parts").mkdir()
    (here / "t5x.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom fot_jax import train\ntrain.train.seed = 3"
    )
    (here / "broken.gin").write_text(f"include 'experiment.gin'\n\n{line}\n")
    assert refused_untouched(capsys, "train", "broken.gin").startswith(message)


def test_a_directory_in_place_of_an_experiment_file(here, capsys):
    line = refused_untouched(capsys, "train", str(here))
    assert line == f"{here} is a directory: give the path of a .gin file"
    line = refused_untouched(capsys, "train", "gs://bucket/run/config.gin")
    assert line.startswith("gs://bucket/run/config.gin: experiment files are read on this machine")


def test_bindings_that_gin_cannot_read(here, capsys):
    for binding, message in (
        (
            "from __gin__ import dynamic_registration",
            "--gin 'from __gin__ import dynamic_registration': from __gin__ import dynamic",
        ),
        ("Dta.lanes = 4", "unknown name 'Dta' (--gin 'Dta.lanes = 4'); did you mean Data"),
        ("Data.lanes = ", "--gin 'Data.lanes = ': Unable to parse value"),
        (
            "Corpus.path = my_texts",
            "--gin 'Corpus.path = my_texts': text takes quotes: --gin 'Corpus.path = \"my_texts\"'",
        ),
        (
            "Corpus.path = \u201cmy_texts\u201d",
            "--gin 'Corpus.path = \u201cmy_texts\u201d': text takes quotes: "
            "--gin 'Corpus.path = \"my_texts\"'",
        ),
        ("Corpse.path = my_texts", "--gin 'Corpse.path = my_texts': Failed to parse token"),
        (
            "Lora.kernels = (query, key)",
            "--gin 'Lora.kernels = (query, key)': Failed to parse token 'query': a value is a "
            'number, text in "quotes", @NAME',
        ),
        ("Data.lanes = (4", "--gin 'Data.lanes = (4': a bracket or quote is not closed"),
    ):
        line = refused_untouched(capsys, "train", "experiment.gin", "--gin", binding)
        assert line.startswith(message)


UNUSED = "nothing in this experiment uses "


@pytest.mark.parametrize(
    "binding, message",
    [
        ("STEP = 5", f"{UNUSED}the name STEP: did you mean STEPS?"),
        ("LIMIT = 5", f"{UNUSED}the name LIMIT: correct it, or leave it out"),
        ("Lora.rank = 4", f"{UNUSED}@Lora: name it where it belongs, in another --gin, or leave"),
        ("Lora.rank = 4\nLora.alpha = 1.0", f"{UNUSED}@Lora: name it where it belongs"),
        ("shrot/Mixture.sources = ()", f"{UNUSED}@shrot/Mixture: did you mean short?"),
        ("adafactor.b1 = 0.5", f"{UNUSED}@adafactor: name it where it belongs"),
        (
            "Mixture.weights = (1, 2)",
            "overridden by short/Mixture.weights: set what overrides it",
        ),
        # Another one is used in that scope; one that inherits it; one that an inner one overrides.
        ("a/TopK.k = 3", f"{UNUSED}@a/TopK: correct it"),
        ("Dense = 1", f"{UNUSED}the name Dense: correct it"),
        ("ApproximateTopK.k = 9", "overridden by b/ApproximateTopK.k: set what overrides it"),
        ("b/c/PerplexityByContext.rows = 1", f"{UNUSED}@b/c/PerplexityByContext: correct it"),
        ("c/PerplexityByContext.rows = 1", "overridden by c/d/PerplexityByContext.rows: set what"),
    ],
)
def test_bindings_that_change_nothing(here, capsys, binding, message):
    """Else a run would have other settings than its command says."""
    (here / "named.gin").write_text(
        "include 'experiment.gin'\ntrain.steps = %STEPS\nSTEPS = 3\n"
        "Data.source = @short/Mixture()\nUNUSED = 1\nadafactor.b1 = 0.1\n"
        "short/Mixture.weights = (1, 1)\n"
        "a/PerplexityByContext.lookup = @own/TopK()\nown/TopK.k = 2\n"
        "b/PerplexityByContext.lookup = @ApproximateTopK()\nb/ApproximateTopK.k = 8\n"
        "c/d/PerplexityByContext.rows = 2\nEvaluation.evals = (@a/PerplexityByContext(), "
        "@b/PerplexityByContext(), @c/d/PerplexityByContext())\n"
    )
    line = refused_untouched(capsys, "train", "named.gin", *bind(binding))
    assert line.startswith(f"--gin {binding!r}: {message}")


def test_bindings_that_other_bindings_use(here, capsys):
    """Two levels down, and in whatever order."""
    more = bind("adamw.b1 = %B1", "MINE = (@adamw,)", "B1 = 0.5", "OTHER = %MINE")
    line = refused_untouched(capsys, "train", "experiment.gin", *more)
    assert line.startswith(f"--gin 'MINE = (@adamw,)': {UNUSED}the name MINE: correct it")
    more = bind("RATE = %TOP", "constant_rate.value = %RATE", "TOP = 1e-3", "train.steps = 3")
    assert cli.main(["train", "experiment.gin", *more, "--dry_run"]) == 0
    assert ", 3 steps: nothing written" in capsys.readouterr().out


@pytest.mark.parametrize(
    "without, message",
    [
        ("train.steps", "train needs steps: set train.steps = ..."),
        ("train.model", "train needs model: set train.model = ..."),
        ("ModelConfig.mlp_dim", "ModelConfig needs mlp_dim: set ModelConfig.mlp_dim = ..."),
        ("Data.lanes", "Data needs lanes: set Data.lanes = ..."),
        ("train.learning_rate", "train needs learning_rate: set train.learning_rate = ..."),
    ],
)
def test_values_that_must_be_given(here, capsys, without, message):
    lines = DICTIONARY.splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(f"{without} =")]
    assert len(kept) == len(lines) - 1
    (here / "short.gin").write_text("".join(kept))
    assert refused_untouched(capsys, "train", "short.gin") == message


def test_two_evaluations_of_a_kind_need_two_names(here, capsys):
    """Or the results of one would replace those of the other."""
    twice = bind("Evaluation.evals = (@PerplexityByContext(), @test/PerplexityByContext())")
    argv = ["train", "experiment.gin", "--dry_run", *twice]
    assert refused_untouched(capsys, *argv).startswith(
        "Evaluation.evals has two evaluations named 'perplexity_by_context': give one of them"
    )
    assert cli.main([*argv, *bind("test/PerplexityByContext.name = 'of_test'")]) == 0
    argv += bind("test/PerplexityByContext.name = 'a/b'")
    assert refused_untouched(capsys, *argv).startswith("the name 'a/b' of an evaluation: give")


def test_an_optimizer_that_is_called_in_the_file(here, capsys):
    line = refused_untouched(capsys, "train", "experiment.gin", *bind("train.optimizer = @adamw()"))
    assert line == "adamw needs learning_rate: write @adamw without ()"


@pytest.mark.parametrize(
    "bindings, circle",
    [
        (["STEPS = %STEPS", "train.steps = %STEPS"], "%STEPS -> %STEPS"),
        (["A = %B", "B = (1, %A)", "train.steps = %A"], "%B -> %A -> %B"),
        (["Corpus.path = @Corpus()", "Data.source = @Text()", CORPORA], "@Corpus -> @Corpus"),
        (["train.steps = @train()"], "@train -> @train"),
    ],
)
def test_values_that_refer_back_to_themselves(here, capsys, bindings, circle):
    line = refused_untouched(capsys, "train", "experiment.gin", *bind(*bindings))
    assert line == f"{circle}: refers back to itself: give one of them a value of its own"


def test_values_that_are_not_for_experiment_files(here, capsys):
    for name in ("train.workdir", "train.config_text", "train.dry_run", "evaluate.output"):
        verb, _ = name.split(".")
        line = refused_untouched(capsys, "train", "experiment.gin", *bind(f"{name} = 'x'"))
        place = f"--gin \"{name} = 'x'\""
        assert line == f"{name} is not for experiment files ({place}): see fot {verb} --help"


def test_a_value_that_one_of_several_leaves_to_the_user(here, capsys):
    """Its name is that of the one."""
    more = bind("A = @arxiv/Passkey()", "Data.source = %A", "Passkey.document_tokens = 999")
    more += bind("arxiv/Passkey.document_tokens = %gin.REQUIRED")
    line = refused_untouched(capsys, "train", "experiment.gin", *more)
    name = "arxiv/Passkey.document_tokens"
    assert line == f"{name} is not set: add --gin '{name} = ...', or set it in a file"


def test_included_files_include_others_beside_them(here, tmp_path_factory):
    """From wherever: their paths are relative to the file that has them."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "parts").mkdir()
    (elsewhere / "parts" / "steps.gin").write_text("train.steps = 7\n")
    (elsewhere / "all.gin").write_text("include 'parts/steps.gin'\n")
    (here / "mine.gin").write_text(f"include 'experiment.gin'\ninclude '{elsewhere}/all.gin'\n")
    gin_files.load(["mine.gin"], [])
    assert gin_files.value_of("train.steps") == 7


def test_files_of_one_name_in_two_directories(here, capsys):
    """Each is included by the file beside it; where two could be meant, neither is."""
    for name, steps in (("a", 3), ("b", 4)):
        (here / name).mkdir()
        (here / name / "mine.gin").write_text("include 'common.gin'\n")
        (here / name / "common.gin").write_text(f"{name}/train.steps = {steps}\n")
    gin_files.load(["a/mine.gin", "b/mine.gin"], [])
    assert gin_files.value_of("a/train.steps") == 3
    assert gin_files.value_of("b/train.steps") == 4
    (here / "common.gin").write_text((here / "b" / "common.gin").read_text())
    gin_files.load(["b/mine.gin"], [])
    for name, steps in (("b", 7), (".", 8)):  # two files alike do not include the same
        (here / name / "common.gin").write_text("include 'steps.gin'\n")
        (here / name / "steps.gin").write_text(f"train.steps = {steps}\n")
    line = refused_untouched(capsys, "train", "experiment.gin", "b/mine.gin")
    assert line.startswith(f"b/common.gin: include 'steps.gin' may be {here}/steps.gin or {here}/b")
    line = refused_untouched(capsys, "train", "experiment.gin", "a/mine.gin")
    assert line == (
        f"a/mine.gin: include 'common.gin' may be {here}/common.gin or {here}/a/common.gin: give "
        "the whole path"
    )


def test_saved_settings_are_where_they_were_set(here):
    """What a scope inherits, it inherits from later files and bindings, too."""
    (here / "mine.gin").write_text(
        "include 'experiment.gin'\nData.source = @a/b/DictionaryLookup()\nN = 30\n"
        "a/DictionaryLookup.document_tokens = 48\na/b/DictionaryLookup.key_length = 3\n"
        "DictionaryLookup.near_symbols = %N\n"
    )
    gin_files.load(["mine.gin"], [])
    made = gin.get_configurable("Data")().source
    (here / "config.gin").write_text(gin_files.settings_text())
    gin_files.load(["config.gin"], [])
    assert gin.get_configurable("Data")().source == made
    assert gin_files.settings_text() == (here / "config.gin").read_text()
    for name, value in (("near_symbols", 31), ("value_length", 2)):
        gin_files.load(["config.gin"], [f"DictionaryLookup.{name} = {value}"])
        changed = gin.get_configurable("Data")().source
        assert changed == dataclasses.replace(made, **{name: value})


def test_a_link_before_two_dots_is_followed_first(here, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "inner").mkdir()
    (elsewhere / "mine.gin").write_text("include 'inner/../steps.gin'\n")
    (elsewhere / "steps.gin").write_text("train.steps = 7\n")
    (here / "mine.gin").write_text("train.steps = 8\n")
    (here / "link").symlink_to(elsewhere / "inner")
    gin_files.load(["link/../mine.gin"], [])
    assert gin_files.value_of("train.steps") == 7


def _as_gin_reads_it(file):
    """All values, or None where gin refuses the file; with the names that `load` registered."""
    gin.clear_config()
    with (
        mock.patch.object(gin.config, "_FILE_READERS", [(open, os.path.isfile)]),
        contextlib.suppress(Exception),
    ):
        gin.parse_config_file(file)
        return gin.config_str()


PIECES = [*"\t\\\r()[]{}'\"@%=:;#$\x0c\x00\u00a0é’", "\\\n", '"""']
LINES = [
    *("include 'steps.gin'", "include steps.gin", "include 'steps.gin' x", "include ''"),
    *("include 'gone.gin'", "import os", "import os as o", "from os import path", "import"),
    *("from . import x", "train:\n  steps = 3", "train:\n\tsteps = 3", "  train.steps = 3"),
    *("train.steps = 1_000", "train.steps = +3", "train.steps = 1e400", "train.steps = 07"),
    *("X = %X", "%X = 3", "train.steps = %UNSET", "a/b/train.steps = 3", "train = 3"),
    *("train.steps = @a/b/cosine()", "fot_jax.train.steps = 3", "train.train.steps = 3"),
    *("gin.macro.value = 3", "train.steps = f'x'", "train.steps = 'a' 'b'", "class.x = 3"),
    *("train.steps = 1 + 2", "train.steps = {'a': [1]}", "train.steps = {[1]: 2}"),
    *("train.steps =\n  3", "train.steps = \\\n  3", "train.steps = (1, 2", "train.steps = @"),
    *("train.steps = lambda: 3", "train.steps = @Data.nothing()", "train.steps = 3  # three"),
]


def test_files_are_read_as_gin_reads_them_or_refused_in_a_line(here):
    lines = DICTIONARY.splitlines(keepends=True)
    (here / "steps.gin").write_text("train.steps = 7\n")
    rng = random.Random(0)
    read = []
    for _ in range(300):
        changed = list(lines)
        i = rng.randrange(len(lines))
        if rng.random() < 0.6:
            changed.insert(i, rng.choice(LINES) + "\n")
        else:
            place = rng.randrange(len(lines[i]) + 1)
            changed[i] = lines[i][:place] + rng.choice(PIECES) + lines[i][place:]
        (here / "changed.gin").write_text("".join(changed), newline="")
        try:
            gin_files.load(["changed.gin"], [])
            values = gin.config_str()
        except UserError as error:
            assert re.search(r"changed\.gin:\d+", str(error)) and "\n" not in str(error)
            values = None
        assert values == _as_gin_reads_it("changed.gin"), "".join(changed)
        read.append(values is not None)
    assert 50 < sum(read) < 250
    text = (here / "experiment.gin").read_text()
    gin_files.load(["experiment.gin"], [])
    plain = gin.config_str()
    windows = "\ufeff" + text.replace("\n", "\r\n")
    (here / "windows.gin").write_text(windows, encoding="utf-8", newline="")
    gin_files.load(["windows.gin"], [])
    assert gin.config_str() == plain


def test_values_that_a_file_leaves_to_its_user(here, capsys):
    (here / "open.gin").write_text(
        "include 'experiment.gin'\nData.lanes = %gin.REQUIRED\n"
        "train.steps = %STEPS\nSTEPS = %gin.REQUIRED\n"
    )
    argv = ["train", "open.gin"]
    line = refused_untouched(capsys, *argv)
    assert line == "Data.lanes is not set: add --gin 'Data.lanes = ...', or set it in a file"
    argv += bind("Data.lanes = 4")
    assert refused_untouched(capsys, *argv).startswith("train.steps is not set: add --gin")
    assert cli.main([*argv, *bind("STEPS = 3"), "--dry_run"]) == 0
    assert ", 3 steps: nothing written" in capsys.readouterr().out
    line = refused_untouched(capsys, *argv, *bind("train.steps = %OTHER"))
    assert line == "%OTHER has no value: set OTHER = ... in the experiment file"


def test_later_files_and_bindings_win(here, capsys):
    (here / "shorter.gin").write_text("train.steps = 7\nData.lanes = 2\n")
    argv = ["train", "experiment.gin", "shorter.gin", "--dry_run", *bind("Data.lanes = 8")]
    before = runs.files(here)
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.startswith(
        f"{runs.PARAMETERS:,} parameters, mesh {{'replica': 1, 'data': 8, 'fsdp': 1, 'tensor': 1}},"
        " 16 rows of 16 tokens (256 new tokens a step), "
    )
    assert runs.files(here) == before

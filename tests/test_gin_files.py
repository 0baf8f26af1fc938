"""What is wrong in an experiment file, or in a --gin binding, is said in one line."""

import contextlib
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
from fot_jax.common.configurable import configurables_of
from fot_jax.common.errors import UserError
from fot_jax.model import sizes

pytestmark = pytest.mark.usefixtures("one_device")

CORPORA = "Text.corpora = (@Corpus(),)"


NAMES = """
    train evaluate compile_experiment Data Compute Checkpoints MeshShape Evaluation
    Text Corpus Bytes SentencePiece TrainedSentencePiece HuggingFaceTokenizer Mixture
    DictionaryLookup Passkey ModelConfig RopeScaling fot_37m fot_184m fot_600m fot_1_2b openllama_3b
    openllama_7b code_llama_7b llama3_2_1b llama3_1_8b Dense TopK ApproximateTopK NoCrossbatch
    PreviousContext Packed PackedTable CachedContext SwitchAtStep SwitchAtAccuracy DrawnEachStep
    adamw adafactor constant_rate inverse_square_root cosine DictionaryAccuracy PositiveMass FewShot
    LmEval MemoryLayerProbe PasskeyRetrieval PerplexityByContext RetrievalTable Sample
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
    ],
)
def test_bindings_that_change_nothing(here, capsys, binding, message):
    """Else a run would have other settings than its command says."""
    (here / "named.gin").write_text(
        "include 'experiment.gin'\ntrain.steps = %STEPS\nSTEPS = 3\n"
        "Data.source = @short/Mixture()\nUNUSED = 1\nadafactor.b1 = 0.1\n"
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
    line = refused_untouched(capsys, "train", "experiment.gin", "a/mine.gin")
    assert line == (
        f"a/mine.gin: include 'common.gin' may be {here}/common.gin or {here}/a/common.gin: give "
        "the whole path"
    )


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


SOURCES = "@Mixture(), @DictionaryLookup(), @Passkey() or @Text()"
SCHEDULES = "@constant_rate(), @inverse_square_root() or @cosine()"
SIZES = [f"@{size.__name__}()" for size in configurables_of(sizes)]
MODELS = ", ".join(["@ModelConfig()", *SIZES[:-1]]) + f" or {SIZES[-1]}"


@pytest.mark.parametrize(
    "binding, message",
    [
        ("ModelConfig.hidden_size = '16'", "'16': give a whole number"),
        ("ModelConfig.rope_theta = 'x'", "'x': give a number"),
        ("ModelConfig.memory_layers = 1", "1: give a tuple, each of it a whole number"),
        ("ModelConfig.memory_layers = ('1',)", "('1',): give a tuple, each of it a whole number"),
        ("ModelConfig.qk_norm = 1", "1: give True or False"),
        ("ModelConfig.norm = None", 'None: give a text in "quotes"'),
        ("Data.lanes = '8'", "'8': give a whole number"),
        ("Data.lanes = 8.0", "8.0: give a whole number"),
        ("Data.lanes = True", "True: give a whole number"),
        ("Data.group_lanes = '2'", "'2': give a whole number or None"),
        ("Data.source = 'texts'", f"'texts': give {SOURCES}"),
        ("Data.source = @Text", f"@Text: give {SOURCES}"),
        ("Data.source = @Corpus()", f"@Corpus(): give {SOURCES}"),
        ("Data.source = (@Text(),)", f"(@Text(),): give {SOURCES}"),
        ("train.steps = 10.5", "10.5: give a whole number"),
        ("train.model = 'fot_184m'", f"'fot_184m': give {MODELS}"),
        ("train.model = @Corpus()", f"@Corpus(): give {MODELS}"),
        ("train.data = @Data", "@Data: give @Data()"),
        ("train.data = @Text()", "@Text(): give @Data()"),
        ("train.checkpoints = @Evaluation()", "@Evaluation(): give @Checkpoints()"),
        ("train.evaluation = @Corpus()", "@Corpus(): give @Evaluation()"),
        ("train.learning_rate = 0.1", f"0.1: give {SCHEDULES}"),
        ("train.learning_rate = @cosine", f"@cosine: give {SCHEDULES}"),
        ("train.learning_rate = @adamw", f"@adamw: give {SCHEDULES}"),
        ("train.optimizer = @cosine", "@cosine: give @adamw or @adafactor"),
        ("train.optimizer = @Corpus", "@Corpus: give @adamw or @adafactor"),
        (
            "train.scheme = @Corpus()",
            "@Corpus(): give @NoCrossbatch(), @PreviousContext(), @Packed(), @PackedTable() or "
            "@CachedContext()",
        ),
        (
            "Evaluation.evals = (@Corpus(),)",
            "(@Corpus(),): give a tuple, each of it @DictionaryAccuracy(), @PositiveMass(), "
            "@FewShot(), @LmEval(), @MemoryLayerProbe(), @PasskeyRetrieval(), "
            "@PerplexityByContext(), @RetrievalTable() or @Sample()",
        ),
        ("train.initialize_from = 3", '3: give a text in "quotes" or None'),
        ("train.profile_steps = 3", "3: give (a whole number, a whole number) or None"),
        ("train.profile_steps = (3,)", "(3,): give (a whole number, a whole number) or None"),
        ("constant_rate.value = '0.1'", "'0.1': give a number"),
        ("adamw.b1 = 'x'", "'x': give a number"),
        ("PreviousContext.d = None", "None: give a whole number"),
        ("Checkpoints.every = '4'", "'4': give a whole number"),
        ("DictionaryLookup.document_tokens = 32.0", "32.0: give a whole number"),
        ("PerplexityByContext.memory_sizes = 16", "16: give a tuple, each of it a whole number"),
    ],
)
def test_values_of_the_wrong_type(here, capsys, binding, message):
    line = refused_untouched(capsys, "train", "experiment.gin", *bind(binding))
    assert line == f"{binding.split(' ')[0]} = {message}"


@pytest.mark.parametrize(
    "bindings, message",
    [
        (["train.steps = 0"], "train.steps = 0: give 1 or more"),
        (["train.log_every = 0"], "train.log_every = 0: give 1 or more"),
        (
            ["train.log_every = 4", "train.positive_mass_every = 6"],
            "train.positive_mass_every = 6 is not a multiple of train.log_every = 4: change one",
        ),
        (["Checkpoints.every = 0"], "Checkpoints.every = 0: give 1 or more"),
        (["Checkpoints.keep_last = 0"], "Checkpoints.keep_last = 0: give 1 or more"),
        (["Data.lanes = 0"], "Data.lanes = 0: give 1 or more"),
        (["Data.lanes = 1000000"], "Data.lanes = 1000000 makes 2000000 rows a step (2 a lane), "),
        (["train.seed = -1"], "train.seed = -1: give a number from 0 to 9223372036854775807"),
        ([f"Data.seed = {2**63}"], f"Data.seed = {2**63}: give a number from 0 to "),
        (["train.z_loss = -0.1"], "train.z_loss = -0.1: give 0 or more"),
        (["train.max_skipped = -1"], "train.max_skipped = -1: give 0 or more"),
        (["train.positive_mass_every = 0"], "train.positive_mass_every = 0: give 1 or more"),
        *(
            (
                [f"train.profile_steps = {steps}"],
                f"train.profile_steps = {steps}: give (first, last), two of the steps 1 … 12, in",
            )
            for steps in ((0, 2), (5, 2), (2, 13))
        ),
        (["constant_rate.value = -1"], "constant_rate.value = -1: give 0 or more"),
        (
            ["constant_rate.value = 1e999"],
            "constant_rate.value = inf: give 0 or more, at most 3.4e+38",
        ),
        (["adamw.b1 = 2"], "adamw.b1 = 2: give a number from 0 to 1"),
        (["Evaluation.every = -1"], "Evaluation.every = -1: give 1 or more"),
        (["PerplexityByContext.memory_sizes = ()"], "PerplexityByContext.memory_sizes = (): give"),
        (["PerplexityByContext.documents = 0"], "PerplexityByContext.documents = 0: give 1 or"),
        (["Compute.remat = 'some'"], "remat = 'some': choose one of none, dots, full"),
        (["Compute.dtype = 'int8'"], "Compute.dtype = 'int8': choose one of float32, bfloat16"),
        (["Evaluation.every = 5"], "Evaluation.during and Evaluation.every go together"),
        (
            ["ModelConfig.memory_layers = (2,)"],
            "model.memory_layers has 2, but layers are numbered",
        ),
        (["DictionaryLookup.document_tokens = 4"], "DictionaryLookup.document_tokens = 4 is too"),
        (
            ["PreviousContext.d = 5"],
            "PreviousContext.d = 5 is larger than the crossbatch group of 4 lanes: lower d, or "
            "raise Data.lanes",
        ),
        (
            ["train.d = @SwitchAtStep()", "SwitchAtStep.values = (2, 64)"],
            "PreviousContext.d = 64 is larger than the crossbatch group of 4 lanes",
        ),
        (
            ["train.scheme = @NoCrossbatch()", "train.d = @SwitchAtStep()"],
            "the scheme NoCrossbatch has no d (asked for d=2): drop train.d",
        ),
        (
            ["Data.lane_groups = 3"],
            "Data.lanes = 4 is not a multiple of Data.lane_groups = 3: change one of them",
        ),
        (
            ["Data.group_lanes = 3"],
            "8 rows of a microbatch are not whole crossbatch groups of 6 rows (2 a lane): change "
            "Data.group_lanes or Compute.accumulation",
        ),
        (
            ["Compute.accumulation = 3"],
            "8 rows do not divide into Compute.accumulation = 3 microbatches: change it or",
        ),
        (
            ["Compute.accumulation = 2"],
            "4 rows of a microbatch are not whole crossbatch groups of 8 rows (2 a lane)",
        ),
        (
            ["MeshShape.data = 3", "--dry_run"],
            "8 rows of a microbatch do not divide over 3 devices (mesh axes replica x data x fsdp)",
        ),
        (
            ["MeshShape.data = 2"],
            "mesh replica=1 x data=2 x fsdp=1 x tensor=1 does not use 1 devices exactly",
        ),
        (
            ["MeshShape.data = 1", "MeshShape.tensor = 4", "--dry_run"],
            "model.num_heads = 2 does not divide over mesh axis tensor of 4: change MeshShape",
        ),
        (
            [
                *("MeshShape.data = 1", "MeshShape.tensor = 4", "ModelConfig.num_heads = 4"),
                "--dry_run",
            ],
            "model.num_kv_heads = 2 does not divide over mesh axis tensor of 4",
        ),
        (
            ["ModelConfig.vocab_size = 63"],
            "the tokenizer has 64 tokens, the model a vocabulary of 63: raise the model's",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_values_that_do_not_fit(here, capsys, bindings, message):
    (here / "parts.gin").write_text("train.compute = @Compute()\nCompute.mesh = @MeshShape()\n")
    flags = [word for word in bindings if word.startswith("--")]
    gin = bind(*(word for word in bindings if word not in flags))
    line = refused_untouched(capsys, "train", "experiment.gin", "parts.gin", *gin, *flags)
    assert line.startswith(message)


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


@pytest.mark.parametrize("value", [2**31, 2**40, 2**63, "1e39", "1e300"])
@pytest.mark.parametrize(
    "name",
    [
        *("train.z_loss", "constant_rate.value", "constant_rate.warmup_steps"),
        *("adamw.weight_decay", "adamw.eps", "adamw.clip_norm"),
    ],
)
def test_numbers_that_programs_cannot_hold(here, capsys, name, value):
    """One line, or a whole number where a float is meant, which is one."""
    argv = ["train", "experiment.gin", "--dry_run", *bind(f"{name} = {value}")]
    code, said = cli.main(argv), capsys.readouterr().err.splitlines()
    if code == 2:
        assert len(said) == 1 and f"{name} = " in said[0]
    else:
        assert code == 0 and not isinstance(value, str) and "steps" not in name

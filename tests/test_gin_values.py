"""Values of an experiment that are of another type, or do not fit, are named in one line."""

import pytest
from runs import bind, refused_untouched

from fot_jax import cli
from fot_jax.common.configurable import configurables_of
from fot_jax.model import sizes

pytestmark = pytest.mark.usefixtures("one_device")

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
            "@FewShot(), @LmEval(), @IndexRecall(), @MemoryLayerProbe(), @PasskeyRetrieval(), "
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
    if binding.startswith("ModelConfig."):  # of a model with a name, too
        binding = binding.replace("ModelConfig", "fot_37m")
        more = bind("train.model = @fot_37m()", binding)
        line = refused_untouched(capsys, "train", "experiment.gin", *more)
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
            [f"constant_rate.value = {10**310}"],
            "constant_rate.value = inf: give 0 or more, at most",
        ),
        (
            ["constant_rate.value = 1e999"],
            "constant_rate.value = inf: give 0 or more, at most 3.4e+38",
        ),
        (["adamw.b1 = 1"], "adamw.b1 = 1: give a number from 0 to 0.999999"),
        (["adamw.eps = 0"], "adamw.eps = 0: give 1e-30 or more"),
        (
            [
                "ModelConfig.rope_scaling = @RopeScaling()",
                *("RopeScaling.factor = 8.0", "RopeScaling.kind = 'yarn'"),
                *("RopeScaling.original_max_position = 16", "RopeScaling.beta_fast = 0.5"),
            ],
            "RopeScaling.beta_fast = 0.5 is below RopeScaling.beta_slow = 1.0: exchange them",
        ),
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

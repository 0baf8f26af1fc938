"""The figures of the paper, and what is trained for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from figure import Figure, Run


def _seeds(seed: int) -> tuple[str, ...]:
    return f"train.seed = {seed}", f"Data.seed = {seed}"


# --- Dictionary lookup (paper §5) ----------------------------------------------------------------

NO_NEGATIVES = "SwitchAtAccuracy.values = (1, 1)"


def _dictionary(seed: int) -> list[Run]:
    own, start, last = _seeds(seed), f"short_{seed}", ("dictionary.gin",)
    return [
        Run(start, "", ("dictionary_short.gin",), own),
        Run(f"fot_{seed}", "FoT, d = 1, then 128", last, own, start),
        Run(f"d1_{seed}", "FoT, d = 1", last, (*own, NO_NEGATIVES), start),
        Run(f"plain_{seed}", "plain transformer", ("dictionary_plain.gin",), own, start),
    ]


def _dictionary_cpu(seed: int) -> list[Run]:
    own, start = _seeds(seed), f"middle_{seed}"
    d1 = (*own, NO_NEGATIVES)
    return [
        *_dictionary_cpu_fot(seed),
        Run(f"d1_{seed}", "FoT, d = 1", ("dictionary_cpu.gin",), d1, start),
        Run(f"plain_{seed}", "plain transformer", ("dictionary_cpu_plain.gin",), own, start),
    ]


def _dictionary_cpu_fot(seed: int) -> list[Run]:
    own = _seeds(seed)
    short, middle, last = ((f"dictionary_cpu{part}.gin",) for part in ("_short", "_d1", ""))
    return [
        Run(f"short_{seed}", "", short, own),
        Run(f"middle_{seed}", "", middle, own, f"short_{seed}"),
        Run(f"fot_{seed}", "FoT, d = 1, then 32", last, own, f"middle_{seed}"),
    ]


def _hard_negatives_cpu(seed: int) -> list[Run]:
    """Keys of a step are of the same 12 symbols; as control, of all."""
    near = (*_seeds(seed), "DictionaryLookup.near_documents = 32")
    last = ("dictionary_cpu.gin",)
    return [
        *_dictionary_cpu_fot(seed),
        Run(f"near_{seed}", "the same, hard negatives", last, near, f"middle_{seed}"),
    ]


_DICTIONARY = Figure(
    title="Dictionary lookup: value tokens found after training on documents of 512 tokens",
    paper="above 92 % at 16M tokens (37M parameters, d = 128); a plain transformer fails at 16K",
    family="dictionary",
    runs=_dictionary,
    evaluation="dictionary_accuracy",
    x="dictionary",
    y="accuracy",
    labels=("dictionary (tokens)", "value tokens found (%)"),
    percent=True,
)

# --- Text (paper §3.3, §5) -----------------------------------------------------------------------


CACHED = ("train.scheme = @CachedContext()", "train.d = None")


def _previous(w: int, d: int) -> tuple[str, ...]:
    return f"PreviousContext.w = {w}", f"PreviousContext.d = {d}"


def _memorizing(tokens: int) -> tuple[str, ...]:
    lookup = ("CachedContext.lookup = @TopK()", "TopK.k = 32")
    return (*CACHED, f"CachedContext.tokens = {tokens}", *lookup)


def _transformer_xl(model: str, layers: int, window: int) -> tuple[str, ...]:
    return (
        *(*CACHED, f"CachedContext.tokens = {window}"),
        *(f"{model}.memory_layers = {tuple(range(layers))}", f"{model}.memory_positions = True"),
        f"{model}.memory_before = True",
    )


def _text(seed: int, file: str, model: str, layers: int, window: int, switch: int) -> list[Run]:
    """The models that are compared on text, trained alike but for what makes them what they are.

    Args:
      file: the experiment; scheme A with d = 1 as it stands.
      model: its `train.model`, of so many layers and tokens of a window.
      switch: the step at which d goes from 2 to 64.
    """
    switching = ("train.d = @SwitchAtStep()", "SwitchAtStep.values = (2, 64)")
    memorizing = _memorizing(2_048)
    evals = "(@PositiveMass(), @single/PerplexityByContext(), @multi/PerplexityByContext())"
    no_index = f"Evaluation.evals = {evals}"  # of a memory that is the window before
    models = {
        "plain": ("plain transformer", ("train.scheme = @NoCrossbatch()",)),
        **{f"d{d}": (f"FoT, d = {d}", _previous(1, d)) for d in (1, 2, 8)},
        "d2_64": ("FoT, d = 2, then 64", (*switching, f"SwitchAtStep.steps = ({switch},)")),
        "mt": ("Memorizing Transformer", (*memorizing, f"{model}.memory_gate = True")),
        "mt_no_gate": ("the same, no gate", memorizing),
        "xl": ("Transformer-XL", (*_transformer_xl(model, layers, window), no_index)),
    }
    return _models(seed, file, models)


def _models(seed: int, file: str, models: dict, start: str | None = None) -> list[Run]:
    """Of name -> (title, bindings)."""
    return [
        Run(f"{name}_{seed}", title, (file,), (*_seeds(seed), *bindings), start)
        for name, (title, bindings) in models.items()
    ]


def _text_paper(seed: int) -> list[Run]:
    return _text(seed, "text.gin", "fot_184m", layers=12, window=512, switch=450_000)


def _text_cpu(seed: int) -> list[Run]:
    return _text(seed, "text_cpu.gin", "ModelConfig", layers=3, window=64, switch=1_800)


def _index_recall_cpu(seed: int) -> list[Run]:
    """Those with a memory to make an index of."""
    return [run for run in _text_cpu(seed) if run.name != f"xl_{seed}"]


_DISTRACTION = Figure(
    title="Distraction: attention to the own document among d previous contexts",
    paper="about 1 / d of a plain transformer; FoT stays higher, the more so the larger its d",
    family="text",
    runs=_text_paper,
    evaluation="positive_mass",
    x="d",
    y="mass",
    labels=("previous contexts", "attention to the own document (%)"),
    percent=True,
    times_even="attention to the own document (times 1 / d)",
)
_MULTI_DOC = Figure(
    title="Multi-doc: perplexity with a memory that documents share, by its size",
    paper="higher d is better; FoT 2 then 64 loses 0.18 up to 500K tokens; d = 1 collapses",
    family="text",
    runs=_text_paper,
    evaluation="multi_doc",
    x="memory",
    y="perplexity",
    labels=("memory (tokens)", "perplexity per token"),
)
_SINGLE_DOC = dataclasses.replace(
    _MULTI_DOC,
    title="Single-doc: perplexity with a memory of each document's own, by its size",
    paper="FoT gains from longer contexts, and more than the Memorizing Transformer",
    evaluation="single_doc",
)


def _w_and_d(seed: int, file: str, memory: int) -> list[Run]:
    """Previous windows of the own document, and documents."""
    pairs = {"d1": (1, 1), "d2": (1, 2), "w2_d1": (2, 1), "w2_d2": (2, 2)}
    models = {name: (f"FoT, w = {w}, d = {d}", _previous(w, d)) for name, (w, d) in pairs.items()}
    models["mt_no_gate"] = ("Memorizing Transformer, no gate", _memorizing(memory))
    return _models(seed, file, models)


_W_AND_D = dataclasses.replace(
    _SINGLE_DOC,
    title="Loss by size of the memory, of (w, d)",
    paper="4K to 128K: (1, 1) 2.292 to 2.187, (1, 2) 2.299 to 2.171, (2, 1) 2.305 to 2.152, "
    "(2, 2) 2.309 to 2.148; Memorizing Transformer with 16K 2.348 to 2.164",
    family="arxiv",
    runs=lambda seed: _w_and_d(seed, "arxiv.gin", 16_384),
    y="nats",
    labels=("memory (tokens)", "loss per token (nats)"),
)


def _finetuned(
    seed: int, file: str, base: Run, model: str, layers: int, window: int, lanes: int
) -> list[Run]:
    """A plain transformer, and what it becomes in a few steps, of as many tokens for each."""
    longer = (
        *(f"{model}.local_context = {4 * window}", f"Data.lanes = {lanes // 4}"),
        f"{model}.memory_layers = ()",
    )
    models = {
        "tuned_fot": ("FoT", ()),
        "tuned_longer": (
            "plain, windows of four times the length",
            ("train.scheme = @NoCrossbatch()", "train.d = None", *longer),
        ),
        "tuned_xl": ("Transformer-XL", _transformer_xl(model, layers, window)),
        "tuned_mt": ("Memorizing Transformer, no gate", _memorizing(2_048)),
    }
    return [base, *_models(seed, file, models, base.name)]


def _c4_finetuned(seed: int) -> list[Run]:
    plain = ("train.scheme = @NoCrossbatch()", "train.d = None", "train.initialize_from = None")
    bindings = (*_seeds(seed), *plain, "train.steps = 100_000")
    base = Run(f"base_{seed}", "", ("c4_finetune.gin",), bindings)
    shape = {"layers": 12, "window": 1_024, "lanes": 128}
    return _finetuned(seed, "c4_finetune.gin", base, "fot_184m", **shape)


def _finetuned_cpu(seed: int) -> list[Run]:
    base, *_ = _text_cpu(seed)
    of_base = dataclasses.replace(base, model="plain, before")
    shape = {"layers": 3, "window": 64, "lanes": 64}
    return _finetuned(seed, "finetune_cpu.gin", of_base, "ModelConfig", **shape)


def _c4_figure(domain: str, paper: str) -> Figure:
    return dataclasses.replace(
        _SINGLE_DOC,
        title=f"Fine-tuned on C4: perplexity on {domain} by size of the memory",
        paper=paper,
        family="c4_finetune",
        runs=_c4_finetuned,
        evaluation=domain,
    )


# --- A real model --------------------------------------------------------------------------------

AT_REST = (
    "STEPS = 1",
    "cosine.warmup_steps = 0",
    "cosine.max_value = 0.0",
    "cosine.min_value = 0.0",
)


def _real_model(seed: int) -> list[Run]:
    """SmolLM2 135M as it is, and after as many tokens of each kind of training."""
    own = "smollm2_135m.memory_scaling = 0.0"  # as published, each of them
    rows = "Data.lanes = 16"  # where a lane gives one window a step
    recurrent = _transformer_xl("smollm2_135m", 30, 512)
    halves = "Data.group_lanes = 8", "Compute.accumulation = 2"
    models = {
        "base": ("the model as it is", (*AT_REST, own)),
        "fot": ("FoT", ()),
        "mt": ("Memorizing Transformer, no gate", (*_memorizing(2_048), own, rows)),
        # In halves: every layer sees two windows, and a whole step would take 16 GB.
        "xl": ("Transformer-XL", (*recurrent, own, rows, *halves)),
        "longer": (
            "plain, windows of four times the length",
            (
                "train.scheme = @NoCrossbatch()",
                "smollm2_135m.memory_layers = ()",
                own,
                "smollm2_135m.local_context = 2_048",
                "Data.lanes = 4",
            ),
        ),
    }
    return _models(seed, "real_model.gin", models)


def _real_model_figure(domain: str) -> Figure:
    return dataclasses.replace(
        _SINGLE_DOC,
        title=f"SmolLM2 135M: perplexity on {domain} by size of the memory",
        paper="2K to 64K, of a 184M model: FoT gains with every size; the others less or not",
        family="real_model",
        runs=_real_model,
        evaluation=domain,
    )


# --- Pass keys (paper §4) ------------------------------------------------------------------------

NO_MEMORY = ("ModelConfig.memory_layers = ()", "train.scheme = @NoCrossbatch()")


def _passkey_cpu(seed: int) -> list[Run]:
    """The plain transformer goes on from the other: by itself it found none after 2,600 steps."""
    own, short, long = _seeds(seed), ("passkey_cpu_short.gin",), ("passkey_cpu.gin",)
    whole = (*NO_MEMORY, "ModelConfig.local_context = 2_048", "STEPS = 700")
    return [
        Run(f"short_{seed}", "", short, own),
        Run(f"fot_{seed}", "FoT, windows of 512", long, own, f"short_{seed}"),
        Run(f"plain_{seed}", "plain, a window of 2K", long, (*own, *whole), f"fot_{seed}"),
    ]


_PASSKEY = Figure(
    title="Pass keys retrieved, by length of the text, after training on 2,048 tokens",
    paper="94.5 % at 100K tokens, 73 % at 256K (LongLLaMA 3B); a plain model 0 beyond its window",
    family="passkey_cpu",
    runs=_passkey_cpu,
    evaluation="passkey",
    x="length",
    y="accuracy",
    labels=("length of the text (tokens)", "pass keys retrieved (%)"),
    percent=True,
)


def _smaller(figure: Figure, family: str, runs: Callable[[int], list[Run]]) -> Figure:
    return dataclasses.replace(figure, family=family, runs=runs)


FIGURES = {
    "dictionary": _DICTIONARY,
    "distraction": _DISTRACTION,
    "multi_doc": _MULTI_DOC,
    "single_doc": _SINGLE_DOC,
    "w_and_d": _W_AND_D,
    "c4_finetune_github": _c4_figure("github", "2K to 64K: FoT 6.72 to 5.32, MT 8.10 to 7.26"),
    "c4_finetune_isabelle": _c4_figure("isabelle", "2K to 64K: FoT 5.63 to 4.44, MT 7.34 to 6.64"),
    "c4_finetune_arxiv": _c4_figure("arxiv", "2K to 64K: FoT 8.17 to 6.81, MT 9.39 to 8.60"),
    "c4_finetune_pg19": _c4_figure("pg19", "2K to 64K: FoT 23.74 to 22.65, MT 24.03 to 23.24"),
    "dictionary_cpu": _smaller(_DICTIONARY, "dictionary_cpu", _dictionary_cpu),
    "hard_negatives_cpu": dataclasses.replace(
        _smaller(_DICTIONARY, "dictionary_cpu", _hard_negatives_cpu),
        title="Dictionary lookup with hard negatives, and without",
        paper="left open",
    ),
    "distraction_cpu": _smaller(_DISTRACTION, "text_cpu", _text_cpu),
    "multi_doc_cpu": _smaller(_MULTI_DOC, "text_cpu", _text_cpu),
    "single_doc_cpu": _smaller(_SINGLE_DOC, "text_cpu", _text_cpu),
    "index_recall_cpu": Figure(
        title="What an index finds of the 32 best keys, by the share of keys that it visits",
        paper="left open",
        family="text_cpu",
        runs=_index_recall_cpu,
        evaluation="index_recall",
        x="visited",
        y="recall",
        labels=("share of keys visited", "of the 32 best keys found (%)"),
        percent=True,
    ),
    "w_and_d_cpu": _smaller(
        _W_AND_D, "text_cpu", lambda seed: _w_and_d(seed, "text_cpu.gin", 2_048)
    ),
    "finetune_cpu": dataclasses.replace(
        _smaller(_SINGLE_DOC, "text_cpu", _finetuned_cpu),
        title="Fine-tuned: perplexity by size of the memory",
        paper="FoT gains with every size up to 64K, and more than the Memorizing Transformer",
    ),
    "passkey_cpu": _PASSKEY,
    **{
        f"real_model_{domain}": _real_model_figure(domain)
        for domain in ("isabelle", "latex", "code", "books")
    },
}

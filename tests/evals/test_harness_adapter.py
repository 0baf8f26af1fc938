"""What the harness asks of a model, against its own `hf` adapter on the same directory."""

import json

import hypothesis.strategies as st
import llamas
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from fot_jax.common.errors import UserError
from fot_jax.evals.harness import LmEval
from fot_jax.evals.harness_adapter import LENGTH_SETTINGS, adapter, generation_settings
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import EVERYTHING

pytestmark = [pytest.mark.slow, pytest.mark.torch]

CONTEXT = 32
MERGES = (("w", "o"), ("wo", "r"), ("wor", "l"), ("worl", "d"), ("h", "e"), ("l", "o"))
SPECIAL = ("<s>", "</s>", "<|im_end|>")
# Some refuse a system message, as this one does.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{{ message.role }}: {{ message.content }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def write(path, begins):
    """A tiny LLaMA, whose tokenizer puts <s> before a text, or has no such mark."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    few = {c for (word, _) in letters.pre_tokenize_str("abdehlorw \n.é</s>") for c in word}
    names = [*sorted(few), *("".join(merge) for merge in MERGES)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(MERGES)))
    tokenizer.pre_tokenizer, tokenizer.decoder = letters, decoders.ByteLevel()
    marks = SPECIAL if begins else ("<pad>", *SPECIAL[1:])  # as many: programs are compiled once
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    ids = {mark: tokenizer.token_to_id(mark) for mark in marks}
    if begins:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
        )
    model = llamas.make(
        seed=4,
        vocab_size=len(names) + len(marks),
        max_position_embeddings=CONTEXT,
        num_hidden_layers=2,
        bos_token_id=ids.get("<s>"),
        eos_token_id=ids["</s>"],
    )
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    config |= {"bos_token": "<s>"} if begins else {}
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "</s>"}))
    (path / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="module", params=[True, False], ids=["with bos", "without"])
def both(request, tmp_path_factory):
    """The harness's adapter, ours, and the model that ours asks."""
    from lm_eval.models.huggingface import HFLM

    path = tmp_path_factory.mktemp("llama")
    write(path, request.param)
    lm = LanguageModel.load(path)
    hf = HFLM(str(path), device="cpu", dtype="float32", batch_size=1)
    return hf, adapter(lm, EVERYTHING, rows=3, templates=hf.tokenizer), lm


def request(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, ("a_task", 0, 1))


PARTS = ("hello ", "world", "wor", "ld", " ", "\n", "é", ".", "\n\n", "a", "ho", *SPECIAL)
texts = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)
answers = st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map("".join)
several = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def of_hf(hf, question, answer):
    """What the harness's adapter finds; where it fails as nothing of the answer is left, what it
    finds of the answer's own tokens."""
    try:
        return hf.loglikelihood([request("loglikelihood", question, answer)], disable_tqdm=True)[0]
    except AssertionError:
        space = question[len(question.rstrip()) :]
        before = hf.tok_encode(question.rstrip()) or [hf.prefix_token_id]
        after = hf.tok_encode(space + answer, add_special_tokens=False)
        return hf._loglikelihood_tokens([(None, before, after)], disable_tqdm=True)[0]


@several
@given(st.lists(st.tuples(texts, answers), min_size=4, max_size=12))
@example([("hello wor", "ld"), ("hello wor ", "ld"), ("", " world"), ("", "\n"), (" ", "a")])
@example([("world" * 40, "a"), ("a" * 40, "d" * 31), ("<s>a", "b"), ("é", "</s>"), ("a\n", "b")])
def test_answers_are_scored_as_hf_scores_them(both, pairs):
    hf, ours, _ = both
    pairs = [pair for pair in pairs if pair not in (("", "<s>"), ("", "</s>"))]
    found = ours.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    for pair, (nats, correct) in zip(pairs, found, strict=True):
        want, greedy = of_hf(hf, *pair)
        assert nats == pytest.approx(want, abs=1e-4), pair
        assert correct == greedy, pair


@several
@given(st.lists(st.lists(st.sampled_from(PARTS), max_size=60).map("".join), max_size=6))
@example(["", "a", "a" * (CONTEXT - 1), "a" * CONTEXT, "ab" * CONTEXT, "b" * (3 * CONTEXT + 1)])
def test_whole_texts_are_scored_as_hf_scores_them(both, whole):
    hf, ours, _ = both
    requests = [request("loglikelihood_rolling", text) for text in whole]
    want = hf.loglikelihood_rolling(requests, disable_tqdm=True) if requests else []
    assert ours.loglikelihood_rolling(requests) == pytest.approx(want, abs=1e-3)


ends = st.one_of(
    st.sampled_from(PARTS), st.lists(st.sampled_from(PARTS), max_size=4), st.just([""])
)
lengths = st.dictionaries(st.sampled_from(LENGTH_SETTINGS), st.sampled_from([1, 7, 20]), max_size=2)
greedy = st.sampled_from(
    [
        {},
        {"do_sample": False},
        {"do_sample": False, "temperature": 1},
        {"do_sample": False, "temperature": 0.0, "top_p": 0.5},
        {"temperature": 0.0, "num_beams": 1},
        {"top_p": 0.95},
        {"do_sample": True, "temperature": 0.7, "top_k": 1},
    ]
)


@st.composite
def settings_of_tasks(draw):
    kwargs = draw(lengths) or {"max_gen_toks": 20}
    kwargs |= draw(greedy)
    if draw(st.booleans()):
        kwargs["until"] = draw(ends)
    return kwargs


@several
@given(st.lists(st.tuples(texts, settings_of_tasks()), min_size=4, max_size=12))
@example([("hello", {"max_gen_toks": 20, "until": end}) for end in (*PARTS, [], [""], "</s>")])
def test_answers_are_written_as_hf_writes_them(both, requests):
    hf, ours, _ = both
    requests = [(text, how) for text, how in requests if text]  # of nothing, hf writes nothing
    found = ours.generate_until([request("generate_until", *each) for each in requests])
    for (text, how), answer in zip(requests, found, strict=True):
        copied = json.loads(json.dumps(how))  # it adds to the list
        (want,) = hf.generate_until([request("generate_until", text, copied)], disable_tqdm=True)
        assert answer == want, (text, how)


def test_writing_stops_at_the_first_of_several_ends(both, monkeypatch):
    _, ours, lm = both
    question = "hello wo", {"max_gen_toks": 24, "until": []}
    (text,) = ours.generate_until([request("generate_until", *question)])
    pairs = (text[i : i + 2] for i in range(2, 12))
    end = next(pair for pair in pairs if text.index(pair) > 1)
    read, write = [], LanguageModel.generate
    monkeypatch.setattr(
        LanguageModel, "generate", lambda *args, **how: read.append(write(*args, **how)) or read[-1]
    )
    question[1]["until"] = ["no such", end]
    (cut,) = ours.generate_until([request("generate_until", *question)])
    assert cut == text[: text.index(end)]
    assert end not in lm.vocabulary.decode(read[0][0][:-1])


@pytest.mark.parametrize("both", [True], indirect=True)
def test_repeats_are_draws_of_their_own_whatever_the_rows(both):
    _, _, lm = both
    how = {"max_gen_toks": 6, "do_sample": True, "temperature": 2.0}
    texts = ["hello", "hello", "world", "hello", "hello", "hello"]
    requests = [request("generate_until", text, how) for text in texts]
    found = [
        adapter(lm, EVERYTHING, rows=rows, seed=seed).generate_until(requests)
        for rows, seed in ((1, 0), (4, 0), (6, 1))
    ]
    assert found[0] == found[1] != found[2]
    assert len({found[0][i] for i in (0, 1, 3, 4, 5)}) > 3


def test_settings_of_generation_config():
    """It holds where a task does not say; what it asks for that cannot be had is refused."""
    sampled = {"do_sample": True, "temperature": 1}
    assert generation_settings("t", sampled, {"top_p": 0.9}) == (256, 1.0, 50, 0.9, ())
    of_model = {"top_p": 0.9, "top_k": 0}
    assert generation_settings("t", {**sampled, "top_p": 0.8}, of_model).top_p == 0.8
    of_model = {"top_p": 0.9, "temperature": 0.6, "do_sample": True}
    assert generation_settings("t", {}, of_model).temperature == 0
    of_beams = {"length_penalty": 2.0, "early_stopping": True, "renormalize_logits": True}
    plain = generation_settings("t", {}, {})
    assert generation_settings("t", {}, {**of_beams, "max_length": 9, "guidance_scale": 1}) == plain
    assert generation_settings("t", of_beams, {"top_h": 0.5}) == plain


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1.2),
        ("max_new_tokens", 3),
        ("max_time", 0.5),
        ("stop_strings", ["o"]),
        ("penalty_alpha", 0.6),
        ("bad_words_ids", [[3]]),
        ("suppress_tokens", [3, 4]),
        ("begin_suppress_tokens", [3]),
        ("forced_eos_token_id", 3),
        ("sequence_bias", [[[3], 9.0]]),
        ("exponential_decay_length_penalty", [2, 3.0]),
        ("guidance_scale", 2.0),
        ("watermarking_config", {"bias": 9.0}),
        ("token_healing", True),
        ("dola_layers", "low"),
    ],
)
def test_settings_of_generation_config_that_would_change_answers(name, value):
    with pytest.raises(UserError, match=f"generation_config.json: {name} = .*: answers are not"):
        generation_settings("t", {}, {name: value})
    if name != "max_new_tokens":
        with pytest.raises(UserError, match=f"generation_kwargs: {name} = .*: answers are not"):
            generation_settings("t", {name: value}, {})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_beams": 10}, "num_beams = 10: answers are not written with that here"),
        ({"stop": ["a"]}, r"stop = \['a'\]: answers"),
        ({"repetition_penalty": 1.1}, "repetition_penalty = 1.1: answers"),
        ({"do_sample": True, "temperature": 1, "min_p": 0.1}, "min_p = 0.1: answers"),
        ({"do_sample": True}, "temperature = 0.0: where do_sample is true, give more than 0"),
        ({"do_sample": "no"}, "do_sample = 'no': give true or false"),
        ({"temperature": "warm"}, "temperature = 'warm': give a number, 0 or more"),
        ({"max_gen_toks": -1}, "max_gen_toks = -1: give a number, 0 or more"),
        ({"until": ["a", 1]}, r"until = \['a', 1\]: give a text or a list of them"),
    ],
)
def test_settings_that_cannot_be_had_are_named(asked, message):
    with pytest.raises(UserError, match=f"LmEval.tasks: a_task: generation_kwargs: {message}"):
        generation_settings("a_task", asked, {})


@pytest.mark.parametrize("both", [True], indirect=True)
def test_questions_that_cannot_be_asked_are_named(both):
    _, ours, _ = both
    with pytest.raises(UserError, match="a_task: an answer of question 0 is '', of which"):
        ours.loglikelihood([request("loglikelihood", "a", "")])
    with pytest.raises(UserError, match="a_task: answers of up to 32 tokens leave no room for"):
        ours.generate_until([request("generate_until", "a", {"max_tokens": CONTEXT})])


@pytest.mark.parametrize("system", [None, "hello"])
def test_chats_are_written_as_hf_writes_them(both, system):
    hf, ours, _ = both
    chat = [{"role": "system", "content": system}] if system else []
    chat += [{"role": "user", "content": " wo"}, {"role": "assistant", "content": "rld"}]
    for ends in (chat, chat[:-1]):
        last = ends is chat  # an answer that has begun
        text = ours.apply_chat_template(ends, add_generation_prompt=not last)
        assert text == hf.apply_chat_template(ends, add_generation_prompt=not last)
        assert ours.tok_encode(text) == hf.tok_encode(text)
    assert ours.chat_template(True) == TEMPLATE


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {directory}/rows.jsonl
test_split: test
fewshot_split: test
output_type: {kind}
doc_to_text: "{{{{q}}}}"
doc_to_target: {target}
{more}
"""
KINDS = {
    "choices": (
        "multiple_choice",
        "gold",
        """
doc_to_choice: "{{c}}"
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_mutual_info
""",
    ),
    "likely": (
        "loglikelihood",
        '"{{a}}"',
        """
metric_list:
  - metric: acc
""",
    ),
    "rolled": (
        "loglikelihood_rolling",
        '"{{q}}{{a}}"',
        """
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    ),
    "written": (
        "generate_until",
        '"{{a}}"',
        """
generation_kwargs:
  until: ["o", "."]
  max_gen_toks: 9
  temperature: 1
  do_sample: false
metric_list:
  - metric: exact_match
  - metric: chrf
""",
    ),
    "begun": (
        "generate_until",
        '"{{a}}"',
        """
gen_prefix: "he"
generation_kwargs:
  max_completion_tokens: 7
metric_list:
  - metric: chrf
""",
    ),
}


@pytest.mark.parametrize("both", [True], indirect=True)
@pytest.mark.parametrize(
    "options",
    [
        {"num_fewshot": 2, "system_instruction": "lord "},
        {"apply_chat_template": True, "num_fewshot": 1, "system_instruction": "lord"},
        {"apply_chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": False},
    ],
    ids=" ".join,
)
def test_whole_evaluations_are_those_of_hf(both, options, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    hf, _, lm = both
    rows = [
        {"q": q, "c": ["ld", "hello", " a"], "gold": i % 3, "a": ("world", "hello.")[i % 2]}
        for i, q in enumerate(("hello wor", "world ", "a\n", "hello hello", "r", "dad "))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, (kind, target, more) in KINDS.items():
        task = TASK.format(name=name, kind=kind, target=target, more=more, directory=tmp_path)
        (tmp_path / f"{name}.yaml").write_text(task)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")

    class Own(TaskManager):
        """Without the harness's tasks, which takes seconds."""

        def __init__(self, **how):
            super().__init__(**how, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Own)
    want = simple_evaluate(
        model=hf,
        tasks=[*KINDS],
        task_manager=Own(include_path=str(tmp_path)),
        **dict.fromkeys(seeds, 0),
        **options,
    )["results"]
    each = LmEval(tuple(KINDS), include_path=str(tmp_path), rows=1, **options)
    found = each.run(lm, None)
    assert {row["task"] for row in found} == {*KINDS}
    for row in found:
        assert row["value"] == pytest.approx(want[row["task"]][row["metric"]], rel=1e-4), row

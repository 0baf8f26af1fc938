"""A LanguageModel as the lm-evaluation-harness asks it.

It answers as the harness's `hf` adapter does, but for what that one cannot do: texts longer than
the local context are read window by window into memory, and nothing is cut off. Of models without
memory the last window sees no other.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fot_jax.common.errors import UserError
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import MemoryConfig, last_context

# How a task says how many tokens it waits for: the first of these that it sets counts.
LENGTH_SETTINGS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# As `hf`, where a task does not say; top_k is what transformers draws with.
DEFAULT_NEW_TOKENS, DEFAULT_TOP_K = 256, 50
# Settings of draws: no matter where the most likely token is taken.
SAMPLING_SETTINGS = (
    *("top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
)
# Of searches with several beams, or of how transformers computes: they change no answer.
IGNORED = (
    *("length_penalty", "early_stopping", "renormalize_logits", "remove_invalid_values"),
    "use_cache",
)
# What else may be set, to the value with which it changes nothing; None: to no value.
WITHOUT_EFFECT = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "guidance_scale": 1,
    "penalty_alpha": 0,
    "token_healing": False,
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"), []),
    **dict.fromkeys(
        (
            *("forced_eos_token_id", "exponential_decay_length_penalty", "sequence_bias"),
            *("watermarking_config", "max_time", "stop_strings", "dola_layers"),
        )
    ),
}


class GenerationSettings(NamedTuple):
    """How answers are generated."""

    max_new_tokens: int
    temperature: float  # 0: the most likely token
    top_k: int | None
    top_p: float
    until: tuple[str, ...]  # an answer ends before the first of these


def generation_settings(
    task: str, requested: Mapping[str, Any], of_model: Mapping[str, Any]
) -> GenerationSettings:
    """What a task's generation_kwargs mean.

    Args:
      task: its name.
      requested: as the task has them.
      of_model: generation_config.json, whose settings hold where the task has none.

    Raises:
      UserError: a setting that is unknown, or of no use, and would change the answer.
    """
    settings = {name: value for name, value in requested.items() if value is not None}
    until = settings.pop("until", [])
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(each, str) for each in until):
        raise _refusal(task, "until", until, "give a text or a list of them")
    lengths = [settings.pop(name) for name in LENGTH_SETTINGS if name in settings]
    most = _number(task, LENGTH_SETTINGS[0], lengths[0] if lengths else DEFAULT_NEW_TOKENS)
    temperature = _number(task, "temperature", settings.pop("temperature", 0))
    draws = settings.pop("do_sample", temperature > 0)
    if draws not in (True, False):
        raise _refusal(task, "do_sample", draws, "give true or false")
    if draws and not temperature > 0:
        raise _refusal(
            task, "temperature", temperature, "where do_sample is true, give more than 0"
        )
    settings = {name: value for name, value in settings.items() if name not in IGNORED}
    # max_new_tokens there is the most of all answers, whatever a task says of its own.
    names = (*SAMPLING_SETTINGS, *WITHOUT_EFFECT, "max_new_tokens")
    own = {name: of_model[name] for name in names if of_model.get(name) is not None}
    settings = {"top_k": DEFAULT_TOP_K, "top_p": 1.0, **own, **settings}
    if not draws:
        settings = {
            name: value for name, value in settings.items() if name not in SAMPLING_SETTINGS
        }
    top_k = int(_number(task, "top_k", settings.pop("top_k", 0)))
    top_p = _number(task, "top_p", settings.pop("top_p", 1.0))
    for name, value in settings.items():
        if name in WITHOUT_EFFECT and value == WITHOUT_EFFECT[name]:
            continue
        if name not in requested and name in own:
            raise UserError(
                f"generation_config.json: {name} = {value!r}: answers are not written with that "
                "here: remove it there to have them without"
            )
        raise _refusal(task, name, value, "answers are not written with that here: leave it out")
    return GenerationSettings(
        max_new_tokens=int(most),
        temperature=temperature if draws else 0.0,
        top_k=top_k or None,
        top_p=top_p,
        until=tuple(until),
    )


def _number(task: str, name: str, value: Any) -> float:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # "1e-3" is a text in YAML
        except ValueError:
            number = -1.0
        if 0 <= number < float("inf"):
            return number
    raise _refusal(task, name, value, "give a number, 0 or more")


def _refusal(task: str, name: str, value: Any, advice: str) -> UserError:
    return UserError(f"LmEval.tasks: {task}: generation_kwargs: {name} = {value!r}: {advice}")


def adapter(
    lm: LanguageModel,
    memory: MemoryConfig,
    *,
    rows: int = 8,
    seed: int = 0,
    generation_config: Mapping[str, Any] | None = None,
    templates: Any = None,
):
    """The model as the harness wants it, a `lm_eval.api.model.LM`.

    Args:
      lm: with a vocabulary.
      memory: of each text.
      rows: so many texts are read side by side.
      seed: of draws: the n-th question has draws of its own, whatever `rows`.
      generation_config: the settings of generation_config.json.
      templates: the tokenizer of `transformers` that has the chat template.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    vocabulary = lm.vocabulary
    start = vocabulary.eos if vocabulary.bos is None else vocabulary.bos
    end = getattr(vocabulary, "eos_token", None)
    name = getattr(vocabulary, "bos_token", None) or end
    context = lm.config.local_context
    remembers = bool(lm.config.memory_layers)

    class Adapter(TemplateLM):
        eot_token_id = vocabulary.eos
        prefix_token_id = start
        tokenizer = templates

        @property
        def tokenizer_name(self):
            return type(vocabulary).__name__

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            begun = bool(name) and string.startswith(name)  # by a chat template, say
            continues = begun if add_special_tokens is None else not add_special_tokens
            return lm.encode(string, continues=continues)

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            import jinja2

            def rendered(messages):
                return templates.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )

            try:
                return rendered(chat_history)
            except jinja2.TemplateError:  # some templates refuse a system message
                pass
            try:
                return rendered([each for each in chat_history if each["role"] != "system"])
            except (jinja2.TemplateError, ValueError) as error:
                raise UserError(
                    f"LmEval.apply_chat_template: the checkpoint's chat template cannot be used: "
                    f"{error}"
                ) from error

        def loglikelihood(self, requests, disable_tqdm=False):
            pairs = []
            for request in requests:
                before, after = self._pair(*request.args)
                if not after:
                    raise UserError(
                        f"LmEval.tasks: {request.task_name}: an answer of question "
                        f"{request.doc_id} is {request.args[1]!r}, of which there is no token to "
                        "score: correct the task"
                    )
                pairs.append((request.args, before, after))
            return self._loglikelihood_tokens(pairs)

        def _pair(self, question, answer):
            """Tokens of a question, and of an answer to it, which may join with the question's."""
            if question:
                before, after = self._encode_pair(question, answer)
                if not after:  # all of it is in the question's last token: score it alone
                    space = question[len(question.rstrip()) :]
                    after = self.tok_encode(space + answer, add_special_tokens=False)
                return before or [start], after
            after = self.tok_encode(answer, add_special_tokens=False)
            return ([start], after) if after[:1] != [start] else (after[:1], after[1:])

        def _loglikelihood_tokens(self, requests, **kwargs):
            texts = [[*before, *after] for _, before, after in requests]
            found = []
            for scores, (_, _, after) in zip(_scores(texts), requests, strict=True):
                nats, correct = (x[len(x) - len(after) :] for x in scores)
                found.append((-float(nats.sum()), bool(correct.all())))
            return found

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            """Of all tokens, the mark of a beginning among them, as `hf` counts it."""
            windows, counts = [], []
            for request in requests:
                tokens = self.tok_encode(request.args[0])
                longest = len(tokens) or 1 if remembers else context
                some = get_rolling_token_windows(tokens, start, longest, context_len=1)
                some = [(None, *make_disjoint_window(window)) for window in some]
                windows += some
                counts.append(len(some))
            found = iter(self._loglikelihood_tokens(windows))
            return [sum(nats for nats, _ in itertools.islice(found, n)) for n in counts]

        def generate_until(self, requests, disable_tqdm=False):
            alike: dict[GenerationSettings, list[int]] = {}
            for i, request in enumerate(requests):
                how = generation_settings(
                    request.task_name, request.args[1], generation_config or {}
                )
                if not remembers and how.max_new_tokens >= context:
                    raise UserError(
                        f"LmEval.tasks: {request.task_name}: answers of up to "
                        f"{how.max_new_tokens} tokens leave no room for the question in a window "
                        f"of {context}: have a model with memory, or leave the task out"
                    )
                alike.setdefault(how, []).append(i)
            found: list[Any] = [None] * len(requests)
            for how, places in alike.items():
                for some in batches(places, rows):
                    prompts = [self.tok_encode(requests[i].args[0]) for i in some]
                    for i, text in zip(some, self._generate(how, prompts, some), strict=True):
                        found[i] = text
            return found

        def _generate(self, how, prompts, places):
            until = [*how.until]
            if end and end not in until:
                until.append(end)  # `hf` cuts at its letters, too
            room = min(how.max_new_tokens, context // 2) if remembers else how.max_new_tokens
            written = lm.generate(
                [prompt or [start] for prompt in prompts],
                how.max_new_tokens,
                temperature=how.temperature,
                top_k=how.top_k,
                top_p=how.top_p,
                seed=[_seed(seed, place) for place in places],
                stop=(*vocabulary.ends, *_marks(lm, until)),
                until=_ends(lm, until),
                memory=memory,
                last_context_length=last_context(lm.config, room),
            )
            return [_before(lm.decode(new), until) for new in written]

    def _scores(texts: Sequence[list[int]]):
        """(nats, correct) of every token but the first of each text, in order."""
        found: list[Any] = [None] * len(texts)
        last = last_context(lm.config)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for _, alike in itertools.groupby(by_length, key=lambda i: len(texts[i])):
            for some in batches(list(alike), rows):
                texts_now = [texts[i] for i in some]
                scores = lm.score(texts_now, memory=memory, last_context_length=last)
                for i, nats, correct in zip(some, *scores, strict=True):
                    found[i] = (nats, correct)
        return found

    return Adapter()


def batches(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _seed(seed: int, place: int) -> int:
    return int(np.random.SeedSequence((seed, place)).generate_state(1, np.uint64)[0] >> 1)


def _marks(lm: LanguageModel, until: Sequence[str]) -> list[int]:
    """Those of the texts that are marks: a token each, of which decoding leaves nothing."""
    tokens = [lm.encode(text, continues=True) for text in until if text]
    return [each[0] for each in tokens if len(each) == 1 and not lm.decode(each)]


def _ends(lm: LanguageModel, until: Sequence[str]):
    """Whether one of the texts is in what a row has written, of which the end is looked at."""
    if not until:
        return None
    reach = max(len(text.encode()) for text in until) + 8  # hardly a token is less than a byte
    return lambda new: any(text in lm.decode(new[-reach:]) for text in until)


def _before(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.partition(end)[0] if end else text
    return text

"""RULER's tasks in the lm-evaluation-harness: questions of any length (Hsieh et al., 2024).

Their code shortens a question until it fits. Where no question fits, that is an endless loop which
no signal ends, so the shortest question is measured first, by the functions that make it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from fot_jax.common.errors import UserError

METRIC = "string_match"  # share of what is to be found that an answer has; named by length there


def check(tasks: Sequence[str], length: int, encode: Callable[[str], Sequence[int]]) -> None:
    """Checks that questions of some tasks fit.

    Args:
      tasks: of the harness, without tags and groups; those of other kinds are passed over.
      length: tokens of question and answer.
      encode: the tokens of a text.

    Raises:
      UserError: the length is too short.
    """
    needed = {
        "ruler_cwe": lambda: _common_words(length, encode),
        "ruler_fwe": lambda: _frequent_words(encode),
        "ruler_vt": lambda: _variables(encode),
    }
    for task in sorted(needed.keys() & set(tasks)):
        least = needed[task]()
        if least > length:
            raise UserError(
                f"LmEval.lengths: {length}: a question of {task} takes {least} tokens of this "
                "vocabulary or more: raise it, or leave the task out"
            )


def _common_words(length: int, encode) -> int:
    from lm_eval.tasks.ruler import cwe_utils

    example, question, answers = cwe_utils.generate_input_output(10, length)
    answer = " ".join(f"{i + 1}. {word}" for i, word in enumerate(answers))
    return len(encode(f"{example}\n{question} {answer}")) + cwe_utils.CONFIG["tokens_to_generate"]


def _frequent_words(encode) -> int:
    from lm_eval.tasks.ruler import fwe_utils

    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(64)]
    text = len(encode(fwe_utils.TEMPLATE.format(context=" ".join(words), query="")))
    return max(text, 250)  # a word for every 50 tokens, and five words at least


def _variables(encode) -> int:
    from lm_eval.tasks.ruler import vt_utils

    room = vt_utils.CONFIG["variable_tracking"]["tokens_to_generate"]

    def tokens(noise: int, example: bool) -> int:
        text, answer = vt_utils.generate_input_output(noise, 1, 4, is_icl=example)
        return len(encode(f"{text} {answer}"))

    example = tokens(5, True)
    if example + room > 500:  # as many as the demonstration may take, whatever the length
        raise UserError(
            f"LmEval.tasks: the demonstration of ruler_vt takes {example + room} tokens of this "
            "vocabulary, and the harness gives it 500: leave the task out"
        )
    return tokens(10, False) + room + example + 40  # names of variables are drawn anew

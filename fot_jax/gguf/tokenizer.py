"""The tokenizer in a .gguf file, as a tokenizer.json.

Two kinds: byte pairs of GPT-2's alphabet, whose texts are first cut into words in a way that the
file only names; and SentencePiece's, with a score for each piece. Both make the tokens that
llama.cpp makes where it parses marks in a text, as tokenizers of transformers do.
"""

from __future__ import annotations

from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from fot_jax.common.errors import UserError
from fot_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer, Marks
from fot_jax.gguf.weights import File

_SPACE = "▁"
# Marks at which llama.cpp ends a text whatever the file says of them (src/llama-vocab.cpp): files
# name but one of several, or call them ordinary texts.
_ENDS = {
    *("<|eot_id|>", "<|eom_id|>", "<|end|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>"),
    *("<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<|tool_response>", "<turn|>"),
    *("</s>", "<eos>", "[EOS]", "[EOT]", "<EOT>", "_<EOT>", "<end_of_turn>", "<end_of_utterance>"),
    *("<｜end▁of▁sentence｜>", "[e~["),
}
# And those of a role that the file does not name.
_ENDS_BY_ROLE = {
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_sep": ("<|file_sep|>",),
}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _END)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _END
)


def _splits(*patterns: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


def _words(*before: Any, gpt2: bool = False) -> Any:
    """Cuts a text into words, and writes their bytes in GPT-2's alphabet."""
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)
    return pre_tokenizers.Sequence([*before, last])


def _digits() -> Any:
    return pre_tokenizers.Digits(individual_digits=True)


# How texts are cut into words, by tokenizer.ggml.pre, of models of the LLaMA family; whether a word
# that is a token is one whatever its merges say; whether a text begins with its mark, if the file
# does not say.
_WORDS = {
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3"), (lambda: _words(*_splits(_LLAMA3)), True, True)
    ),
    "smaug-bpe": (lambda: _words(*_splits(_LLAMA3)), False, False),
    "tekken": (lambda: _words(*_splits(_TEKKEN)), True, True),
    "gpt-2": (lambda: _words(gpt2=True), False, False),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact"), (lambda: _words(_digits(), gpt2=True), False, False)
    ),
    "deepseek-coder": (
        lambda: _words(
            *_splits(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"), _digits()
        ),
        False,
        False,
    ),
}


class _Settings:
    """tokenizer.ggml.* of a file, checked as they are asked for."""

    def __init__(self, file: File):
        self.path, self._file = file.path, file
        self.names: list[str] = self.list_of(str, "tokens")
        if not self.names:
            raise UserError(f"{self.path}: its tokenizer has no tokens: get the file again")
        types = self.list_of(int, "token_type") or [TokenType.NORMAL] * len(self.names)
        if len(types) != len(self.names):
            raise UserError(
                f"{self.path}: its tokenizer has types of {len(types)} of its {len(self.names)} "
                "tokens: get the file again"
            )
        known = {*TokenType}
        for token, kind in enumerate(types):
            if kind not in known:
                raise UserError(
                    f"{self.path}: the type of token {token} is {kind}, which is none: get the "
                    "file again"
                )
        self.ends = set(_ENDS)  # by name
        for role, names in _ENDS_BY_ROLE.items():
            if self.token(role) is None:
                self.ends.update(names)
        self.types = [
            TokenType.CONTROL if name in self.ends else TokenType(kind)
            for name, kind in zip(self.names, types, strict=True)
        ]

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        return self._file.setting(f"tokenizer.ggml.{name}", kind, default)

    def list_of(self, kind: type, name: str) -> list[Any]:
        """Empty where the file has none."""
        return self._file.setting(f"tokenizer.ggml.{name}", kind, [], many=True)

    def token(self, name: str, default: int | None = None) -> int | None:
        """A token that has a role, such as bos; None where it is none of the tokens."""
        token = self.get(f"{name}_token_id", int, default)
        return token if token is not None and 0 <= token < len(self.names) else None

    def of(self, *kinds: TokenType) -> list[tuple[int, str]]:
        return [(i, self.names[i]) for i, kind in enumerate(self.types) if kind in kinds]


def vocabulary_of(file: File) -> HuggingFaceTokenizer:
    """The tokenizer; texts begin and end with the marks that the file says.

    Raises:
      UserError: the tokenizer is of another kind, or cuts texts into words in a way not known here.
    """
    settings = _Settings(file)
    kind = settings.get("model", str)
    if kind == "gpt2":
        tokenizer, begins = _byte_pairs(settings)
    elif kind == "llama":
        tokenizer, begins = _pieces(settings), True
    else:
        raise UserError(
            f"{file.path}: tokenizer.ggml.model = {kind!r} is not supported: have 'gpt2', 'llama'"
        )
    special = settings.of(TokenType.CONTROL, TokenType.UNKNOWN)
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for _, name in special]
    )
    own = settings.of(TokenType.USER_DEFINED)
    tokenizer.add_tokens([AddedToken(name, normalized=False) for _, name in own])
    first, last = (1, 2) if kind == "llama" else (None, None)
    bos, eos = settings.token("bos", first), settings.token("eos", last)
    if eos is None:
        raise UserError(f"{file.path}: tokenizer.ggml.eos_token_id is missing: convert it again")
    before = [bos] if settings.get("add_bos_token", bool, begins) and bos is not None else []
    after = [eos] if settings.get("add_eos_token", bool, False) else []
    name = settings.names.__getitem__
    tokenizer.post_processor = TemplateProcessing(
        single=[*map(name, before), "$A", *map(name, after)],
        special_tokens=[(name(i), i) for i in {*before, *after}],
    )
    named = (i for i, each in enumerate(settings.names) if each in settings.ends)
    others = map(settings.token, ("eot", "eom", *_ENDS_BY_ROLE))
    ends = dict.fromkeys([eos, *others, *named])
    marks = Marks(tuple(i for i in ends if i is not None), tuple(before), tuple(after))
    return HuggingFaceTokenizer.of(
        tokenizer=tokenizer.to_str().encode(),
        bos_token=None if bos is None else name(bos),
        eos_token=name(eos),
        marks=marks,
    )


def special_tokens_of(file: File) -> dict[str, tuple[int, str]]:
    """Tokens with other roles than bos and eos, by role: number and name.

    Marks alone: transformers makes one of any token with a role, and texts would have other tokens.

    Raises:
      UserError: the tokenizer is damaged.
    """
    settings = _Settings(file)
    marks = dict(settings.of(TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED))
    roles = {"unk_token": settings.token("unknown"), "pad_token": settings.token("padding")}
    return {role: (i, marks[i]) for role, i in roles.items() if i in marks}


def chat_template_of(file: File) -> str | None:
    """The template of chats, in Jinja; None where the file has none."""
    return file.setting("tokenizer.chat_template", str)


def _byte_pairs(settings: _Settings) -> tuple[Tokenizer, bool]:
    """Also whether texts begin with their mark, if the file does not say."""
    named = settings.get("pre", str)
    if named not in _WORDS:
        raise UserError(
            f"{settings.path}: tokenizer.ggml.pre = {named!r}: how it cuts texts into words is not "
            f"known here: have {', '.join(_WORDS)}"
        )
    words, whole, begins = _WORDS[named]
    ids, merges = _ids(settings), []
    named_merges = settings.list_of(str, "merges")
    if not named_merges:
        raise UserError(f"{settings.path}: its tokenizer has no merges: get the file again")
    for merge in named_merges:
        pair = tuple(merge.split(" ", 1))
        if len(pair) < 2 or not {*pair, "".join(pair)} <= ids.keys():
            raise UserError(
                f"{settings.path}: its merge {merge!r} is of no tokens that it has: get the file "
                "again"
            )
        merges.append(pair)
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=whole))
    tokenizer.pre_tokenizer = words()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, begins


def _ids(settings: _Settings) -> dict[str, int]:
    """Tokens that texts may become; what only fills rows is none."""
    unused = {i for i, _ in settings.of(TokenType.UNUSED)}
    return {name: i for i, name in enumerate(settings.names) if i not in unused}


def _pieces(settings: _Settings) -> Tokenizer:
    """SentencePiece's, of byte pairs: the best whole of two neighbours comes first."""
    if not settings.list_of(int, "token_type"):  # which of the pieces are bytes
        raise UserError(
            f"{settings.path}: its tokenizer has no types of tokens: get the file again"
        )
    scores = settings.list_of(float, "scores")
    if len(scores) != len(settings.names):
        raise UserError(f"{settings.path}: its tokenizer has no scores: get the file again")
    if settings.get("remove_extra_whitespaces", bool, False):
        raise UserError(f"{settings.path}: its tokenizer removes spaces, which is not supported")
    normal = {name: scores[i] for i, name in settings.of(TokenType.NORMAL)}
    merges = []
    for piece in normal:
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [pair for pair in halves if pair[0] in normal and pair[1] in normal]
    best: dict[float, str] = {}
    for whole in dict.fromkeys(map("".join, merges)):
        if (other := best.setdefault(normal[whole], whole)) != whole:
            raise UserError(
                f"{settings.path}: two pieces of its tokenizer, {other!r} and {whole!r}, have the "
                "same score, so which comes first is not known: convert the model from its own "
                "directory"
            )
    merges.sort(key=lambda pair: -normal["".join(pair)])
    unknown = settings.token("unknown", 0)
    ids = _ids(settings)
    tokenizer = Tokenizer(
        models.BPE(
            ids,
            merges,
            unk_token=None if unknown is None else settings.names[unknown],
            fuse_unk=True,
            byte_fallback=len(settings.of(TokenType.BYTE)) == 256,
        )
    )
    begins = settings.get("add_space_prefix", bool, True)
    prepended = [normalizers.Prepend(_SPACE)] if begins else []
    tokenizer.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", _SPACE)])
    stripped = [decoders.Strip(" ", 1, 0)] if begins else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    return tokenizer

"""`fot generate`: a checkpoint reads a prompt, from the command line or a file, and writes on."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterable, Iterator

import jax

from fot_jax.common.errors import UserError
from fot_jax.common.paths import path_of
from fot_jax.common.progress import bar
from fot_jax.data.vocabulary import Vocabulary
from fot_jax.inference import memory_files
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import EVERYTHING, MemoryConfig, State


def generate(
    checkpoint: str,
    prompt: str | None = None,
    prompt_file: str | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int = 0,
    last_context_length: int | None = None,
    config: MemoryConfig = EVERYTHING,
    memory: str | None = None,
    save_memory: str | None = None,
    dtype: str = "float32",
    devices: int = 1,
) -> None:
    """Prints what the model writes after a prompt, as it is written.

    Args:
      checkpoint: a workdir, a step inside it, or a Hugging Face directory.
      prompt, prompt_file: one of them: text, or a file of it in UTF-8.
      max_new_tokens: it ends earlier where the model ends its text.
      temperature, top_p, seed, last_context_length: as of LanguageModel.stream.
      config: what is kept in memory; in its directory, all of it when the prompt has been read.
      memory: a saved memory to read on from; of `config` it takes the lookup alone.
      save_memory: where to save the memory when the prompt has been read; of one in a directory,
        that directory alone, which otherwise stays as it is.
      dtype, devices: as of LanguageModel.load.

    Raises:
      UserError: no prompt, or one that is no text; as of LanguageModel.
    """
    text = _prompt(prompt, prompt_file)
    if not text:
        raise UserError("the prompt is empty: give some text")
    if memory is not None and config != MemoryConfig(lookup=config.lookup):
        raise UserError(
            f"{memory}: a saved memory keeps its size, its type and its place: leave "
            "--memory_size, --memory_dtype and --memory_directory out"
        )
    if config.directory is not None:
        if save_memory is not None:
            raise UserError("give --memory_directory or --save_memory: either saves the memory")
        save_memory = config.directory
    elif save_memory is not None:  # before hours of reading
        if memory is None:
            if config.in_segments:
                raise UserError(
                    f"{save_memory}: a memory with an index is saved where it is read into: give "
                    "--memory_directory in place of --save_memory"
                )
            memory_files.check_processes(save_memory, None)
        memory_files.check_place(save_memory, memory)
    lm = LanguageModel.load(checkpoint, dtype=dtype, devices=devices)
    if lm.vocabulary is None:
        raise UserError(
            f"{checkpoint}: has no tokenizer: put tokenizer.json or tokenizer.model into the "
            "Hugging Face directory that it is from, and convert it again"
        )
    if save_memory is not None and not lm.config.memory_layers:
        raise UserError(f"{checkpoint}: the model has no memory layers: there is no memory to save")
    state = None if memory is None else lm.load_memory(memory, config.lookup)
    if state is not None and save_memory is not None:
        memory_files.check_processes(save_memory, state)
        memory_files.place_of(save_memory, state)
        if state.segments is not None and not memory_files.is_whole(state.segments):
            raise UserError(
                f"{memory}: reading was killed after {int(state.stored.max())} tokens: give its "
                "command again, or, if that added to a memory, read on in Python (load_memory)"
            )
    elif state is not None and state.segments is not None:
        state = state.copy()  # its files stay as they are
    tokens = lm.encode(text, continues=state is not None)

    def save(state: State) -> None:
        if save_memory is not None:
            lm.save_memory(state, save_memory)
            state.closes = False  # what is written from here on is none of it

    with bar(len(tokens)) as progress:
        steps = lm.stream(
            [tokens],
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            last_context_length=last_context_length,
            memory=config if state is None else EVERYTHING,
            state=state,
            progress=progress,
            when_read=save,
        )
        first = next(steps, None)
    if first is not None:
        new = (token for (token,) in itertools.chain([first], steps) if token is not None)
        speaks = jax.process_index() == 0
        for piece in as_text(lm.vocabulary, new):
            if speaks:
                print(piece, end="", flush=True)
        if speaks:
            print()


def _prompt(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise UserError("give a prompt, with --prompt or with --prompt_file")
    if prompt is not None:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # bytes that Python's command line could not read
            raise UserError("the prompt is not UTF-8 text: correct it, or the locale") from error
        return prompt
    path = path_of(prompt_file)
    if not path.exists() or path.is_dir():
        raise UserError(f"{prompt_file}: no such file: give one with the prompt in it")
    if (
        os.path.exists(path)
        and stat.S_ISCHR(os.stat(path).st_mode)
        and not os.path.samefile(path, "/dev/stdin")
    ):
        raise UserError(f"{prompt_file}: a device, which has no end: give a file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{prompt_file}: not UTF-8 text (byte {error.start}): give a text file"
        ) from error


def as_text(vocabulary: Vocabulary, tokens: Iterable[int], context: int = 16) -> Iterator[str]:
    """The text of tokens as they come; of a character that several make, when it is whole.

    Together the pieces are the text of all tokens, as `decode` gives it.

    Args:
      context: tokens looked back on, so that spaces between pieces come out right.
    """
    kept: list[int] = []
    said = ""
    for token in tokens:
        kept.append(token)
        if not vocabulary.settled(kept):
            continue
        text = vocabulary.decode(kept)
        yield text[len(said) :]
        said = text
        if len(kept) > 4 * context:
            kept = kept[-context:]
            said = vocabulary.decode(kept)
    yield vocabulary.decode(kept)[len(said) :]

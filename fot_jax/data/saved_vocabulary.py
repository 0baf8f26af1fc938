"""A vocabulary is read from the directory that its `save` wrote, beside a checkpoint, say."""

from __future__ import annotations

from etils import epath

from fot_jax.common.errors import UserError
from fot_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer
from fot_jax.data.sentencepiece_vocabulary import SentencePiece
from fot_jax.data.vocabulary import Bytes, Symbols, Vocabulary
from fot_jax.data.vocabulary_files import DESCRIPTION, read_description

KINDS = {kind.__name__: kind for kind in (Bytes, Symbols, SentencePiece, HuggingFaceTokenizer)}


def load_vocabulary(directory: epath.PathLike) -> Vocabulary:
    """What `save` wrote.

    Raises:
      UserError: nothing there, damaged, or of a kind that this version does not know.
    """
    directory = epath.Path(directory)
    description = read_description(directory)
    kind = description.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(
            f"{directory / DESCRIPTION}: a vocabulary of unknown kind {kind!r}: written by another "
            "version of fot_jax, or damaged"
        )
    try:
        return KINDS[kind].load(directory, description)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory / DESCRIPTION}: damaged ({error}): restore it from a copy"
        ) from error

"""The formats that fot_jax saves, and their version numbers.

A reader takes its own version and those before it, back to the oldest it names, and refuses others
by number. Raise a number when readers of the version before would misread, or could not read, what
is written now, and keep files of the version before in tests/saved. Whatever has no number is of
version 1: before 0.2, fot_jax wrote none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from fot_jax.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes:
      name: what users call such a file.
      version: that is written, and the newest that is read.
      field: of the JSON object that holds the number.
      oldest: version that is read.
    """

    name: str
    version: int
    field: str = "version"
    oldest: int = 1

    @property
    def number(self) -> dict[str, int]:
        """The field to write."""
        return {self.field: self.version}

    def check(self, path: epath.PathLike, content: Mapping[str, Any]) -> None:
        """Checks that this code can read what was saved.

        Args:
          path: of the file or directory.
          content: the JSON object with the number, or without one.

        Raises:
          UserError: a newer version, one that is no longer read, or none that exists.
        """
        version = content.get(self.field, 1)
        if version in range(1, self.oldest):
            raise UserError(
                f"{path}: a {self.name} of format version {version}, and this fot_jax reads "
                f"versions from {self.oldest} on: make it anew"
            )
        if type(version) is not int or not 1 <= version <= self.version:
            raise UserError(
                f"{path}: a {self.name} of format version {version!r}, and this fot_jax reads "
                f"versions up to {self.version}: install a newer fot_jax"
            )


CHECKPOINT = Format("checkpoint", 1)
VOCABULARY = Format("vocabulary", 1)
MEMORY = Format("memory", 1)
SEGMENTS = Format("memory in segments", 3, oldest=3)  # 1 and 2 were in no release
# config.json of a converted directory has fields of other programs, too.
CONVERTED = Format("converted model", 2, field="fot_jax_format")

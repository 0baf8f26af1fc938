"""Version numbers of formats; on real files: tests/test_saved.py."""

import pytest

from fot_jax.common.errors import UserError
from fot_jax.common.formats import Format

LAMP = Format("lamp", 2)


@pytest.mark.parametrize("content", [{}, {"version": 1}, {"version": 2}, LAMP.number])
def test_its_own_version_and_older_ones_are_read(content):
    LAMP.check("a/b", content)


@pytest.mark.parametrize("version", [3, 0, -1, "2", 1.5, True, None, [1]])
def test_others_are_refused_by_number(version):
    with pytest.raises(UserError) as refused:
        LAMP.check("a/b", {"version": version})
    assert str(refused.value) == (
        f"a/b: a lamp of format version {version!r}, and this fot_jax reads versions up to 2: "
        "install a newer fot_jax"
    )

"""Sealed JSON: any damage to it is noticed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fot_jax.common.checksums import seal, unseal

CONTENT = {"step": 3, "shape": (2, 3), "names": ["a", "ü"], "none": None}


def test_sealed_content_comes_back_as_json_has_it():
    assert unseal(json.loads(json.dumps(seal(CONTENT)))) == {**CONTENT, "shape": [2, 3]}


@given(st.data())
def test_any_flipped_bit_is_noticed(data):
    text = bytearray(json.dumps(seal(CONTENT)).encode())
    text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        same = unseal(json.loads(text)) == unseal(seal(CONTENT))
    except ValueError:  # JSONDecodeError and UnicodeDecodeError are ValueErrors, too
        return
    assert same  # as another way to write a character


@pytest.mark.parametrize("sealed", [None, [], {}, {"content": 1}, {"crc32": 1, "content": 1}])
def test_what_is_not_sealed(sealed):
    with pytest.raises(ValueError):
        unseal(sealed)

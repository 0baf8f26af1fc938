"""Sizes in bytes, written and read."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fot_jax.common import units


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (1024**2 - 1, "1.00 MiB"),
        (1_000_000, "976.56 KiB"),
        (15.48 * 2**30, "15.48 GiB"),
        (1.02 * 2**40, "1.02 TiB"),
        (3 * 2**60, "3.00 EiB"),
        (2**80, "1048576.00 EiB"),
    ],
)
def test_written(size, text):
    assert units.in_bytes(size) == text


@pytest.mark.parametrize(
    "text, size",
    [
        *(("15.48G", 15.48 * 2**30), ("1.02T", 1.02 * 2**40), ("2.5P", 2.5 * 2**50)),
        *(("8.5K", 8704), ("7.0M", 7 * 2**20), ("512B", 512), ("512", 512), (" 1GiB ", 2**30)),
        *(("0", 0), ("1.5KB", 1536)),
    ],
)
def test_read(text, size):
    assert units.bytes_of(text) == round(size)


@given(st.integers(0, 2**70))
def test_what_is_written_is_read_again(size):
    text = units.in_bytes(size)
    read = units.bytes_of(re.sub(" bytes| ", "", text))
    assert abs(read - size) <= 0.005001 * size


@pytest.mark.parametrize("text", ["", "G", "some", "1.2.3G"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError):
        units.bytes_of(text)

"""What is read of a directory of weights, for tests."""

import numpy as np
import pytest

from fot_jax.common.errors import UserError
from fot_jax.hugging_face import config as configs
from fot_jax.hugging_face import tensors


def reader(directory):
    return tensors.Reader(directory, configs.read(directory))


def parameters(directory):
    """All of ours, in float32, and their type."""
    content = reader(directory)
    found = {}
    for each in tensors.of_model(content.config):
        x = content.read(each.path, each.layer)
        shape, dtype = content.arrays[each.path]
        assert (x.dtype, x.shape) == (dtype, shape if each.layer is None else shape[1:])
        found[each.name] = x.T if each.transposed else x
    return found


def expected(model):
    return {
        name: x.detach().numpy()
        for name, x in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name == "lm_head.weight")
    }


def assert_same(found, wanted):
    assert sorted(found) == sorted(wanted)
    for name, x in wanted.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), x)


def refused(directory):
    """The line that says what is wrong."""
    with pytest.raises(UserError) as error:
        reader(directory)
    return str(error.value)

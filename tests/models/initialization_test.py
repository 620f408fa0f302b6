"""Initial parameters as PyTorch draws them."""

import re

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.models import initialization


class _Network(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(64, (3, 3), name="conv")(x)
    x = nn.GroupNorm(4, name="norm")(x).reshape(x.shape[0], -1)
    return nn.Dense(7, name="dense")(x)


@pytest.fixture(scope="module")
def params():
  return _Network().init(jax.random.key(0), jnp.zeros([1, 8, 8, 5]))["params"]


def test_layers_are_uniform_within_one_over_the_root_of_the_fan_in(params):
  drawn = initialization.pytorch(jax.random.key(1), params)
  chex.assert_trees_all_equal_shapes_and_dtypes(drawn, params)
  for name, fan_in in (("conv", 3 * 3 * 5), ("dense", 8 * 8 * 64)):
    bound = fan_in**-0.5
    kernel = np.asarray(drawn[name]["kernel"], np.float64)
    # A uniform distribution has the standard deviation bound / sqrt(3); its estimate
    # from n values has the relative standard error sqrt(1 / (5 n)).
    error = np.sqrt(1 / (5 * kernel.size))
    np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=5 * error)
    assert abs(kernel).max() <= bound and abs(kernel).max() > 0.99 * bound
    bias = np.asarray(drawn[name]["bias"])
    assert abs(bias).max() <= bound and bias.std() > 0.2 * bound


def test_parameters_of_other_layers_are_kept(params):
  drawn = initialization.pytorch(jax.random.key(1), params)
  chex.assert_trees_all_equal(drawn["norm"], params["norm"])


def _largest(key, shapes):
  """The largest absolute value of each array that is drawn for these shapes."""
  drawn = initialization.pytorch(
    key, jax.tree.map(jnp.zeros, shapes, is_leaf=_is_shape)
  )
  return [float(abs(x).max()) for x in jax.tree.leaves(drawn)]


def _is_shape(x):
  return isinstance(x, tuple)


@pytest.mark.parametrize(
  ("kernel", "bias", "fan_in"),
  [
    ((16, 3, 4, 25), (3, 4, 25), 16),  # Queries, keys and values of attention.
    ((4, 16, 300), (300,), 64),  # Output of attention, or a convolution.
    ((16, 300), (300,), 16),
    ((3, 3, 2, 300), (300,), 18),
  ],
)
def test_the_fan_in_does_not_include_axes_of_the_bias(kernel, bias, fan_in):
  layer = {"layer": {"kernel": kernel, "bias": bias}}
  actual = _largest(jax.random.key(0), layer)
  np.testing.assert_allclose(actual, fan_in**-0.5, rtol=0.05)


@pytest.mark.parametrize(
  "layer",
  [
    {"kernel": (4, 16, 300), "bias": (4, 300)},
    {"kernel": (4, 16, 300)},
    {"kernel": (2, 3, 3, 16, 300)},
  ],
)
def test_stacked_layers_are_refused_and_can_be_mapped(layer):
  key = jax.random.key(0)
  bias = (
    re.escape(f"its bias {layer['bias']}.") if "bias" in layer else "it has no bias"
  )
  message = f"fan-in of layer blocks/dense is unknown: .*{bias}"
  with pytest.raises(base.InputError, match=message):
    _largest(key, {"blocks": {"dense": layer}})
  stacked = jax.tree.map(jnp.zeros, layer, is_leaf=_is_shape)
  keys = jax.random.split(key, len(stacked["kernel"]))
  drawn = jax.vmap(initialization.pytorch)(keys, stacked)
  bound = np.prod(layer["kernel"][1:-1]) ** -0.5
  np.testing.assert_allclose(abs(drawn["kernel"]).max(), bound, rtol=0.05)


def test_empty_layers_keep_their_place():
  shapes = {
    "a": {},
    "b": {"kernel": jnp.ones((0, 2))},
    "c": {"kernel": jnp.ones((2, 0))},
  }
  drawn = initialization.pytorch(jax.random.key(0), shapes)
  chex.assert_trees_all_equal_shapes(drawn, shapes)
  assert drawn["a"] == {}


def test_every_parameter_has_a_separate_key(params):
  first, second = (initialization.pytorch(jax.random.key(i), params) for i in (1, 2))
  for name in ("conv", "dense"):
    assert np.any(first[name]["kernel"] != second[name]["kernel"])
  kernel, bias = first["dense"]["kernel"], first["dense"]["bias"]
  assert not np.allclose(kernel[0], bias)


def test_the_distribution_is_that_of_torch(params):
  torch = pytest.importorskip("torch")
  torch.manual_seed(0)
  layer = torch.nn.Linear(8 * 8 * 64, 7)
  drawn = initialization.pytorch(jax.random.key(1), params)["dense"]
  for flax_array, torch_array in (
    (drawn["kernel"], layer.weight),
    (drawn["bias"], layer.bias),
  ):
    torch_array = torch_array.detach().numpy()
    np.testing.assert_allclose(abs(torch_array).max(), abs(flax_array).max(), rtol=0.5)
  np.testing.assert_allclose(
    layer.weight.detach().numpy().std(), np.std(drawn["kernel"]), rtol=0.03
  )

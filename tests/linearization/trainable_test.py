"""The trainable leaves of a pytree of parameters, and its other leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.linearization import trainable


def _params():
  return {
    "w": np.ones((2, 3), np.float32),
    "z": jnp.ones(2, jnp.complex64),
    "scale": 2.5,
    "count": jnp.int32(3),
    "mask": jnp.array([True, False]),
    "key": jax.random.key(0),
    "nothing": None,
  }


def test_partition_and_combine_are_inverse():
  params = _params()
  partition = trainable.Partition(params)
  leaves = partition.leaves(params)
  assert partition.names == ["scale", "w", "z"]
  assert [x.shape for x in leaves] == [(), (2, 3), (2,)]
  combined = partition.combine([2 * x for x in leaves])
  np.testing.assert_array_equal(combined["w"], 2 * params["w"])
  for name in ("count", "mask", "key", "nothing"):
    assert combined[name] is params[name]


def test_gradients_of_fixed_leaves_are_zeros():
  params = _params()
  partition = trainable.Partition(params)
  gradient = partition.combine_gradient(partition.leaves(params))
  assert gradient["count"] == 0 and gradient["count"].dtype == jnp.int32
  assert not gradient["mask"].any() and gradient["mask"].dtype == jnp.bool
  assert gradient["key"].dtype == jax.dtypes.float0
  # A gradient has the structure of the parameters, so that it can be split again.
  assert len(partition.leaves(gradient)) == 3


def test_optimizers_get_zeros_in_place_of_keys():
  replaced = trainable.without_keys(_params())
  assert replaced["key"].dtype == jnp.float32 and not replaced["key"].any()
  assert replaced["scale"] == 2.5
  zeros = trainable.without_keys(trainable.zero_gradient(jax.random.key(0)))
  assert zeros.dtype == jnp.float32


def test_params_without_a_trainable_leaf_are_refused():
  trainable.check(_params())
  with pytest.raises(base.InputError, match=r"no floating-point array.*: bool, int32"):
    trainable.check({"count": jnp.int32(3), "mask": jnp.array(True)})


@pytest.mark.parametrize("function", [trainable.check, trainable.Partition])
def test_leaves_that_are_not_arrays_are_refused(function):
  with pytest.raises(base.InputError, match="params contains a function, which is not"):
    function({"w": jnp.ones(2), "activation": lambda x: x})


@pytest.mark.parametrize("leaf", [jnp.float32, np.dtype("float32"), float, "f", "i4"])
@pytest.mark.parametrize("function", [trainable.check, trainable.Partition])
def test_types_and_their_names_are_refused(function, leaf):
  with pytest.raises(base.InputError, match="which is not an array"):
    function({"w": jnp.ones(2), "x": leaf})

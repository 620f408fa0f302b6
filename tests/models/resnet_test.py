"""ResNet: sizes, padding, initialization, and GroupNorm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.models import group_norm
from l2rw_jax.models import resnet


def _shapes(model, *shape):
  """Shapes of the logits and of the variables; nothing is computed."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(model.init_with_output, jax.random.key(0), x)


def _size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_resnet_32_has_the_parameters_of_the_paper():
  logits, variables = _shapes(resnet.ResNet(10), 2, 32, 32, 3)
  assert logits.shape == (2, 10)
  assert _size(variables["params"]) == 464_154
  kernels = [x for x in jax.tree.leaves(variables["params"]) if x.ndim > 1]
  assert len(kernels) == 6 * 5 + 2


def test_resnet_32_with_a_cosine_head_has_the_parameters_of_ldam():
  logits, variables = _shapes(resnet.ResNet(10, cosine=True), 2, 32, 32, 3)
  assert logits.shape == (2, 10)
  assert _size(variables["params"]) == 464_144  # A linear head has 10 more, its biases.


@pytest.mark.parametrize("size", [8, 9])
def test_widths_double_twice_for_images_of_any_size(size):
  model = resnet.ResNet(3, blocks=1, width=2)
  variables = jax.eval_shape(
    model.init, jax.random.key(0), jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
  )
  widths = [2] * 3 + [4] * 2 + [8] * 2
  result = [variables["params"][f"Conv_{i}"]["kernel"].shape[-1] for i in range(7)]
  assert result == widths


def test_group_norm_has_the_parameters_of_batch_norm_without_statistics():
  group, batch = (
    _shapes(resnet.ResNet(10, norm=norm), 1, 32, 32, 3)[1]
    for norm in group_norm.NORMS[::-1]
  )
  assert list(group) == ["params"] and set(batch) == {"params", "batch_stats"}
  renamed = {k.replace("Group", "Batch"): v for k, v in group["params"].items()}
  assert renamed == batch["params"]


@pytest.mark.ci
def test_group_norm_allows_layerwise_linearization():
  model = resnet.ResNet(3, blocks=1, width=8, norm="group")
  rng = np.random.default_rng(0)
  images = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
  # Random values from NumPy, since an initialization would have to be compiled.
  variables = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
    jax.eval_shape(model.init, jax.random.key(0), images),
  )

  def losses_fn(params, batch):
    logits = model.apply(params, batch, train=True)
    return losses.softmax_cross_entropy(logits, jnp.arange(4) % 3)

  @functools.partial(jax.jit, static_argnums=1)
  def change(variables, engine):
    linearized = linearization.linearize(losses_fn, variables, images, engine=engine)
    return linearized.directional(variables)

  changes = [change(variables, engine) for engine in ("layerwise", "forward")]
  np.testing.assert_allclose(*changes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("options", "message"),
  [({"norm": "layer"}, "norm='layer': choose"), ({"width": 12}, "a multiple of 8")],
)
def test_invalid_norms_are_refused(options, message):
  model = resnet.ResNet(3, norm="group", blocks=1).clone(**options)
  with pytest.raises(base.InputError, match=message):
    _shapes(model, 1, 32, 32, 3)


def _paddings(model):
  """Padding of every 3x3 convolution."""
  x = jnp.zeros((1, 8, 8, 3))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  return {
    equation.params["padding"]
    for equation in jax.make_jaxpr(model.apply)(variables, x).eqns
    if equation.primitive.name == "conv_general_dilated"
    and equation.invars[1].aval.shape[:2] == (3, 3)
  }


def test_padding_is_that_of_pytorch():
  assert _paddings(resnet.ResNet(3, blocks=1, width=2)) == {((1, 1), (1, 1))}


def test_initial_kernels_are_those_of_the_released_code():
  model = resnet.ResNet(10)

  @jax.jit
  def init(key):  # XLA compiles only what this kernel needs.
    return model.init(key, jnp.zeros((1, 8, 8, 3)))["params"]["Conv_30"]["kernel"]

  values = init(jax.random.key(0))
  # The kernel has 3 * 3 * 64 * 64 values, enough for this tolerance.
  assert np.std(values) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)

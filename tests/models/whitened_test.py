"""The fast network: whitened patches, sizes, GroupNorm, and invalid inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.models import whitened


def _images(*shape):
  """Random images whose neighboring pixels and channels are correlated."""
  images = np.random.default_rng(0).normal(size=shape)
  images[:, 1:] += images[:, :-1]
  images[:, :, 1:] += 0.5 * images[:, :, :-1]
  return (images + images.mean(axis=-1, keepdims=True)).astype(np.float32)


def _shapes(model, *shape):
  """Shapes of the logits and of the variables; nothing is computed."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(model.init_with_output, jax.random.key(0), x)


def _size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_filtered_patches_are_uncorrelated_and_have_unit_variance():
  images = _images(200, 9, 9, 3)
  filters = np.array(whitened.whitening_filters(images))
  assert filters.shape == (12, 24)
  np.testing.assert_array_equal(filters[:, 12:], -filters[:, :12])
  kernel = filters.reshape(2, 2, 3, 24)
  outputs = sum(
    np.einsum("nhwc,ck->nhwk", images[:, i : i + 8, j : j + 8], kernel[i, j])
    for i in range(2)
    for j in range(2)
  )
  covariance = np.cov(outputs[..., :12].reshape(-1, 12).T)
  patches = np.cov(
    np.stack([images[:, i : i + 8, j : j + 8] for i in (0, 1) for j in (0, 1)], 3)
    .reshape(-1, 12)
    .T
  )
  assert np.abs(patches - np.diag(np.diag(patches))).max() > 0.5  # Correlated.
  np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-6)
  variances = np.linalg.eigvalsh(patches)
  expected = variances / (variances + 1e-3 * variances.mean())
  np.testing.assert_allclose(np.diag(covariance), expected, rtol=2e-4)


def test_the_first_layer_applies_the_filters_and_is_not_trained():
  images = _images(4, 9, 9, 3)
  filters = whitened.whitening_filters(images)
  model = whitened.WhitenedNet(3, filters, width=8, norm="group")
  variables = _shapes(model, *images.shape)[1]
  assert set(variables["params"]["Whitening"]) == {"bias"}
  bias = np.arange(24, dtype=np.float32)
  layer = whitened.Whitening(filters)
  first = layer.apply({"params": {"bias": bias}}, images)
  patch = images[1, 2:4, 3:5].reshape(-1)
  expected = patch @ np.array(filters) + bias
  np.testing.assert_allclose(first[1, 2, 3], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("width", "parameters"), [(64, 1_972_514), (32, 497_826)])
def test_sizes_for_cifar(width, parameters):
  filters = ((0.0,) * 24,) * 12
  logits, variables = _shapes(whitened.WhitenedNet(10, filters, width), 2, 32, 32, 3)
  assert logits.shape == (2, 10)
  assert _size(variables["params"]) == parameters
  group = _shapes(whitened.WhitenedNet(10, filters, width, "group"), 2, 32, 32, 3)[1]
  assert list(group) == ["params"]
  assert _size(group["params"]) == parameters


@pytest.mark.parametrize("shape", [(9, 9, 1), (28, 28, 1), (32, 32, 3)])
def test_the_network_accepts_the_image_sets_of_the_scripts(shape):
  model = whitened.WhitenedNet(4, width=8, cosine=True)
  logits, variables = _shapes(model, 2, *shape)
  assert logits.shape == (2, 4)
  assert variables["params"]["Whitening"]["kernel"].shape[-1] == 8 * shape[-1]


def test_convolutions_copy_their_input_at_the_start():
  kernel = whitened._identity(jax.random.key(0), (3, 3, 2, 5))
  x = jnp.asarray(_images(1, 4, 4, 2))
  y = jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  np.testing.assert_array_equal(y[..., :2], x)
  assert float(jnp.std(kernel[..., 2:])) > 0.1


@pytest.mark.slow
def test_group_norm_allows_layerwise_linearization():
  images = _images(4, 9, 9, 1)
  filters = whitened.whitening_filters(images)
  model = whitened.WhitenedNet(3, filters, width=8, norm="group")
  rng = np.random.default_rng(0)
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
  ("options", "shape", "message"),
  [
    ({"norm": "layer"}, (32, 32, 3), "norm='layer': choose"),
    ({"norm": "group", "width": 12}, (32, 32, 3), "a multiple of 8"),
    ({}, (8, 32, 3), "8x32 pixels are too small"),
    ({"whitening": ((0.0,) * 8,) * 4}, (32, 32, 3), "filters of 4 numbers"),
  ],
)
def test_invalid_options_and_images_are_refused(options, shape, message):
  with pytest.raises(base.InputError, match=message):
    _shapes(whitened.WhitenedNet(3, **options), 1, *shape)


@pytest.mark.parametrize(
  ("images", "message"),
  [(np.zeros((0, 9, 9, 1)), "whitening needs"), (np.full((1, 2, 2, 1), np.nan), "NaN")],
)
def test_images_that_cannot_be_whitened_are_refused(images, message):
  with pytest.raises(base.InputError, match=message):
    whitened.whitening_filters(images)

"""The split into features and head, cosine heads, and running statistics."""

import chex
import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from l2rw_jax.models import lenet
from l2rw_jax.models import mlp
from l2rw_jax.models import preactivation_resnet
from l2rw_jax.models import resnet
from l2rw_jax.models import split
from l2rw_jax.models import wide_resnet


def _shapes(model, *shape):
  """Shapes of the logits and of the variables; nothing is computed."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(model.init_with_output, jax.random.key(0), x)


_COSINE_MODELS = {
  "mlp": (mlp.MLP(3, (7, 5), cosine=True), (2, 4, 6)),
  "lenet": (lenet.LeNet(3, cosine=True), (2, 8, 8, 1)),
  "resnet": (resnet.ResNet(3, blocks=1, width=2, cosine=True), (2, 8, 8, 1)),
  "wide_resnet": (
    wide_resnet.WideResNet(3, blocks=1, widen=1, cosine=True),
    (2, 8, 8, 1),
  ),
}


@pytest.mark.parametrize("name", _COSINE_MODELS)
def test_cosine_head_replaces_the_linear_head(name):
  model, shape = _COSINE_MODELS[name]
  _, linear = _shapes(model.clone(cosine=False), *shape)
  _, cosine = _shapes(model, *shape)
  [layer] = [k for k, v in linear["params"].items() if v != cosine["params"][k]]
  assert linear["params"].pop(layer)["kernel"].shape == (model.num_features, 3)
  kernel = cosine["params"].pop(layer)
  assert set(kernel) == {"kernel"}
  assert kernel["kernel"].shape == (model.num_features, 3)
  assert linear == cosine


def _cosine(features, kernel):
  return split.Cosine(kernel.shape[1]).apply({"params": {"kernel": kernel}}, features)


def test_cosines_match_numpy():
  rng = np.random.default_rng(0)
  features, kernel = rng.normal(size=(6, 4)), rng.normal(size=(4, 3))
  expected = [
    [f @ w / (np.linalg.norm(f) * np.linalg.norm(w)) for w in kernel.T]
    for f in features
  ]
  run = jax.jit(_cosine)
  np.testing.assert_allclose(run(features, kernel), expected, atol=1e-6)
  # Lengths do not matter, even if their squares overflow or underflow.
  for scale in (1e-10, 1e38):
    np.testing.assert_allclose(run(scale * features, kernel), expected, atol=1e-6)
    np.testing.assert_allclose(run(features, scale * kernel), expected, atol=1e-6)
  np.testing.assert_allclose(np.diag(run(kernel.T, kernel)), 1, rtol=1e-6)
  half = run(jnp.asarray(features, jnp.bfloat16), kernel.astype(np.float32))
  assert half.dtype == np.float32
  np.testing.assert_allclose(half, expected, atol=0.02)


@pytest.mark.usefixtures("x64")
def test_cosine_gradients_match_finite_differences():
  rng = np.random.default_rng(1)
  inputs = rng.normal(size=(2, 4)), rng.normal(size=(4, 3))
  check_grads(jax.jit(_cosine), inputs, order=1, modes=("fwd", "rev"))


def test_zero_features_have_zero_cosines_and_finite_gradients():
  features = jnp.array([[0.0, 0.0], [1e-30, 0.0], [3.0, 4.0]])
  kernel = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])

  def total(features, kernel):
    cosines = _cosine(features, kernel)
    return jnp.sum(cosines), cosines

  gradients, cosines = jax.jit(jax.grad(total, (0, 1), has_aux=True))(features, kernel)
  np.testing.assert_allclose(cosines, [[0, 0, 0], [0, 0, 0], [0.6, 0.8, 0]], atol=1e-6)
  for gradient in gradients:
    assert np.isfinite(gradient).all() and np.abs(gradient).max() < 10
  assert np.isnan(_cosine(features.at[0, 0].set(jnp.nan), kernel)[0]).all()


def test_weights_are_in_float32_even_under_x64(x64):
  features = jnp.ones((2, 4), jnp.bfloat16)
  cosines, variables = split.Cosine(3).init_with_output(jax.random.key(0), features)
  assert cosines.dtype == variables["params"]["kernel"].dtype == jnp.float32


def test_initial_cosine_weights_are_unit_columns():
  model = split.Cosine(50)
  params = model.init(jax.random.key(0), jnp.zeros((1, 40)))["params"]
  kernel = np.asarray(params["kernel"])
  np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1, rtol=1e-5)
  assert abs(kernel.mean()) < 0.02 and kernel.min() < 0 < kernel.max()
  # Before normalization they are uniform, not normal: there are no outliers.
  assert np.abs(kernel).max() / kernel.std() < 2.3


_BATCH_NORM_MODELS = [
  resnet.ResNet(3, blocks=1, width=2),
  preactivation_resnet.PreActivationResNet(
    3, blocks=2, widths=(2, 4, 8), stem=2, dropout=0.3, full_first_stage=True
  ),
  preactivation_resnet.LeakyWideResNet(3, blocks=1, widths=(2, 4, 8), stem=2),
  wide_resnet.WideResNet(3, blocks=1, widen=1, dropout=0.3),
]


@pytest.mark.slow("PreActivationResNet", "WideResNet", "LeakyWideResNet")
@pytest.mark.parametrize("model", _BATCH_NORM_MODELS, ids=lambda m: type(m).__name__)
def test_running_statistics_change_only_in_training(model):
  x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
  variables = jax.jit(model.init)(jax.random.key(0), x)

  def run(train):
    rngs = {"dropout": jax.random.key(2)}
    apply = jax.jit(
      lambda v: model.apply(v, x, train=train, mutable=["batch_stats"], rngs=rngs)
    )
    return apply(variables)

  logits, state = run(train=False)
  assert np.isfinite(logits).all()
  chex.assert_trees_all_equal(state["batch_stats"], variables["batch_stats"])
  trained_logits, state = run(train=True)
  assert (np.abs(trained_logits - logits) > 1e-3).any()
  changed = jax.tree.map(
    lambda a, b: bool((a != b).any()), state["batch_stats"], variables["batch_stats"]
  )
  assert all(jax.tree.leaves(changed))


@pytest.mark.slow(unless=("ResNet",))
@pytest.mark.parametrize("model", _BATCH_NORM_MODELS, ids=lambda m: type(m).__name__)
def test_logits_are_the_head_of_the_features(model):
  x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
  variables = jax.jit(model.init)(jax.random.key(0), x)
  features = model.apply(variables, x, method="features")
  assert features.shape == (4, model.num_features)
  np.testing.assert_array_equal(
    model.apply(variables, features, method="head"), model.apply(variables, x)
  )

"""The benchmark of rules that turn L2RW's scores into weights."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import weight_rules
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("clipped", [0.25, 0, 0.75]),
    ("mask", [0.5, 0, 0.5]),
    # The root mean square of the scores is 2.
    ("tempered_1", np.exp([0.5, -0.707107, 1.5]) / np.exp([0.5, -0.707107, 1.5]).sum()),
  ],
)
def test_rules_by_hand(name, expected):
  scores = jnp.array([1, -np.sqrt(2), 3], jnp.float32)
  weights = weight_rules.RULES[name].weights(scores)
  np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_clean_batches_grow_and_have_100_images_on_average():
  parts = weight_rules._meta_rows(weight_rules._GROWING, 300, 8, seed=0)
  assert [part.shape for part in parts] == [(2, n) for n in (25, 50, 125, 200)]
  assert all(len(np.unique(row)) == len(row) for part in parts for row in part)
  assert np.mean(weight_rules._GROWING) == weight_rules._CONSTANT[0]


@pytest.mark.parametrize("clean_factor", [0, 0.5])
def test_steps_minimize_the_weighted_loss(clean_factor):
  rng = np.random.default_rng(0)
  train, meta = (
    {
      "image": rng.normal(size=(size, 5)).astype(np.float32),
      "label": rng.integers(3, size=size).astype(np.int32),
    }
    for size in (20, 6)
  )
  model = classifier.Classifier(mlp.MLP(3, (4,)), 3)
  problem = model.problem(class_counts=jnp.ones(3), num_examples=20, num_steps=2)
  params, model_state = model.init(jax.random.key(0), meta)
  losses_fn = problem.losses_fn(model_state, jax.random.key(0))
  rows, meta_rows = rng.permutation(20)[:16].reshape(2, 8), np.array([[0, 1], [4, 2]])
  rule = weight_rules.RULES["mask"]._replace(clean_factor=clean_factor)
  trainer = weight_rules.make_trainer(problem, rule, optax.sgd(0.5))
  arguments = (params, optax.sgd(0.5).init(params)), model_state, train, meta
  (result, _), weights = trainer(*arguments, rows, meta_rows)

  def flat_gradients(params, part, chosen):
    batch = {name: values[chosen] for name, values in part.items()}
    jacobian = jax.jacobian(lambda p: losses_fn(p, batch)[0])(params)
    return jax.vmap(lambda g: jax.flatten_util.ravel_pytree(g)[0])(jacobian)

  flat, unravel = jax.flatten_util.ravel_pytree(params)
  for step in range(2):
    gradients = flat_gradients(unravel(flat), train, rows[step])
    clean = flat_gradients(unravel(flat), meta, meta_rows[step]).mean(0)
    is_positive = np.asarray(gradients @ clean > 0)
    expected = is_positive / is_positive.sum()
    np.testing.assert_allclose(weights[step], expected, rtol=1e-5)
    flat -= 0.5 * (expected @ gradients + clean_factor * clean)
  np.testing.assert_allclose(
    jax.flatten_util.ravel_pytree(result)[0], flat, rtol=1e-4, atol=1e-6
  )

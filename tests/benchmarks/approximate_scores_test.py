"""The benchmark of approximate scores: the scores that it compares."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import approximate_scores
from l2rw_jax.methods import l2rw
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp


def _examples(size, seed):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.normal(size=(size, 5)).astype(np.float32),
    "label": rng.integers(3, size=size).astype(np.int32),
    "index": np.arange(size, dtype=np.int32),
  }


def test_scores_are_compared_with_exact_ones_of_the_same_step():
  model = classifier.Classifier(mlp.MLP(3, (4,)), 3)
  problem = model.problem(class_counts=jnp.ones(3), num_examples=20, num_steps=15)
  train, meta = _examples(20, 0), _examples(6, 1)
  params, model_state = model.init(jax.random.key(0), meta)
  rows = np.random.default_rng(2).integers(20, size=(15, 8), dtype=np.int32)
  # The clean gradient is new in steps 0 and 14, and outdated in step 7.
  method = l2rw.l2rw(refresh_every=14)
  trainer = approximate_scores.make_trainer(problem, method, optax.sgd(0.5))
  updated, scores = trainer(params, model_state, train, meta, rows)
  actual, exact = (np.asarray(array)[::7] for array in scores)
  np.testing.assert_allclose(actual[[0, 2]], exact[[0, 2]], rtol=1e-4, atol=1e-6)
  assert np.abs(actual[1] - exact[1]).max() > 1e-3
  # The steps train the parameters.
  change = np.abs(updated["Dense_0"]["kernel"] - params["Dense_0"]["kernel"])
  assert change.max() > 1e-3
  result = approximate_scores.correlations(actual[[0, 2]], exact[[0, 2]])
  assert result["spearman_least"] == pytest.approx(1)


def test_spearman_of_reversed_and_equal_scores():
  exact = np.arange(5.0)
  result = approximate_scores.correlations(
    np.stack([exact, -exact]), np.stack([exact] * 2)
  )
  assert result["spearman_median"] == pytest.approx(0)
  assert result["spearman_least"] == pytest.approx(-1)

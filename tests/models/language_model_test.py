"""The language model as a problem: its loss of a sequence, and its checks."""

import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.models import gpt
from l2rw_jax.models import language_model

_V = 7


def _model():
  return language_model.LanguageModel(gpt.GPT(_V, 8, depth=1, num_heads=2), _V)


def test_the_loss_is_the_mean_over_the_tokens_that_count():
  logits = np.random.default_rng(2).normal(size=(2, 3, _V)).astype(np.float32)
  labels = np.array([[1, 2, -1], [-1, -1, -1]], np.int32)
  actual = _model().loss(jnp.asarray(logits), {"label": jnp.asarray(labels)})
  log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  expected = -(log_p[0, 0, 1] + log_p[0, 1, 2]) / 2
  np.testing.assert_allclose(actual, [expected, 0], rtol=1e-5)


def test_bytes_of_255_are_not_padding():
  logits = jnp.asarray(np.random.default_rng(2).normal(size=(1, 3, 256)), jnp.float32)
  labels = jnp.array([[255, 255, 1]])
  expected = _model().loss(logits, {"label": labels})
  actual = _model().loss(logits, {"label": labels.astype(jnp.uint8)})
  np.testing.assert_array_equal(actual, expected)


def test_long_sequences_in_half_precision_do_not_overflow():
  logits = jnp.zeros((1, 40_000, _V), jnp.float16)
  actual = _model().loss(logits, {"label": jnp.zeros((1, 40_000), int)})
  assert actual.dtype == jnp.float16
  np.testing.assert_allclose(actual, np.log(_V), rtol=1e-3)


def test_another_vocabulary_size_is_refused():
  batch = {"image": np.zeros((2, 3), np.uint8)}
  with pytest.raises(base.InputError, match=r"of 7 classes .* fit data of 256"):
    _model().check(batch, 256)
  _model().check(batch, _V)


def test_the_problem_has_no_features():
  """Features are per token, but methods that use them need one vector per example."""
  problem = _model().problem(class_counts=jnp.ones(_V), num_examples=2, num_steps=1)
  assert problem.features is None

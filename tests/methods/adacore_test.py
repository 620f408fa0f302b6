"""AdaCore: golden averages, curvature, CRAIG as its special case, exact resumption."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.methods import adacore
from l2rw_jax.methods import adacore_table

_LOGITS = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
_LABELS = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 15))


def _losses(logits, labels=_LABELS):
  own = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
  return -own[:, 0]


@pytest.mark.parametrize("labels", [_LABELS[:, None], np.eye(4)[_LABELS], _LABELS[:1]])
def test_proxies_refuse_labels_that_would_be_broadcast(labels):
  with pytest.raises(base.InputError, match="labels must be"):
    adacore.gradient_proxies(_LOGITS, labels)


def test_proxies_are_the_gradient_at_the_logits():
  expected = jax.grad(lambda z: _losses(z).sum())(_LOGITS)
  found = adacore.gradient_proxies(_LOGITS, _LABELS)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  sure = adacore.gradient_proxies(
    jnp.array([[1e4, 0.0], [0.0, 1e4]]), jnp.zeros(2, int)
  )
  np.testing.assert_allclose(sure, [[0, 0], [-1, 1]])


def test_averages_golden():
  # D = 2, -4, 3 and g = 1, 0.5, -1: `reference`, C.6.
  averages = adacore.Averages(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), int))
  found = []
  for curvature, gradient in ((2.0, 1.0), (-4.0, 0.5), (3.0, -1.0)):
    averages = adacore.update_averages(averages, jnp.array(gradient), curvature)
    found.append(adacore.corrected(averages, epsilon=0.0))
  np.testing.assert_allclose(found, np.array(_GOLDEN), rtol=2e-5)
  _, off = adacore.corrected(averages, power=0.0, epsilon=0.0)
  assert off == 1


_GOLDEN = [(1, 2), (0.736842, 3.162752), (0.095941, 3.109394)]


def test_hutchinson_finds_the_diagonal_of_the_cross_entropy():
  logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
  found = adacore_table.hessian_diagonal(
    jax.random.key(0), lambda z: _losses(z, np.zeros(1, int)).sum(), logits, 4000
  )
  np.testing.assert_allclose(found, [[0.21, 0.16, 0.09]], atol=6e-3)


def test_one_probe_is_exact_for_a_diagonal_hessian_of_any_pytree():
  scales = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0]])}

  def loss(x):
    return sum(jnp.sum(scales[name] * v**2) / 2 for name, v in x.items())

  found = adacore_table.hessian_diagonal(jax.random.key(0), loss, scales)
  chex.assert_trees_all_close(found, scales)


def test_labels_of_another_shape_or_class():
  logits = jnp.zeros((3, 4))
  for labels in (jnp.zeros((3, 1), int), jnp.zeros((3, 4), int)):
    with pytest.raises(base.InputError, match=r"integers of shape \[B\]"):
      adacore.gradient_proxies(logits, labels)
  found = adacore.gradient_proxies(logits, jnp.array([-1, 0, 4]))
  np.testing.assert_array_equal(np.isnan(found).all(axis=1), [True, False, True])

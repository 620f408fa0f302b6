"""ABSGD in the training loop: on any loss, in two stages."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import changed_loss
from l2rw_jax import losses as losses_lib
from l2rw_jax.methods import absgd
from l2rw_jax.methods import ldam_drw
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

pytestmark = pytest.mark.usefixtures("quick_compilation")

_COUNTS = jnp.array([30, 10])
_NET = mlp.MLP(2, (4,))


def _task():
  return classifier.Classifier(_NET, 2).problem(
    class_counts=_COUNTS, num_examples=40, num_steps=10
  )


@functools.cache
def _inputs():
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.normal(size=(6, 3)).astype(np.float32),
    "label": np.array([0, 1, 1, 0, 0, 1], np.int32),
    "index": np.arange(6),
  }
  params = _NET.init(jax.random.key(0), batch["image"])["params"]
  step = jnp.zeros((), int)
  return base.Inputs(params, {}, (), batch, None, step, jax.random.key(1))


def _state(method, epoch=0):
  state = method.init(jax.random.key(2), _task(), _inputs().params)
  return method.refresh(state, _task(), types.SimpleNamespace(epoch=epoch))


def _step(method, state):
  return method.gradients(state, _task(), _inputs())


def _base_losses(params, loss):
  batch = _inputs().batch
  outputs = _NET.apply({"params": params}, batch["image"])
  return loss(outputs, batch, _COUNTS)


def _cross_entropy(outputs, batch, class_counts):
  del class_counts
  return losses_lib.softmax_cross_entropy(outputs, batch["label"])


def _class_weighted(outputs, batch, class_counts):
  rarity = jnp.max(class_counts) / class_counts
  return rarity[batch["label"]] * _cross_entropy(outputs, batch, class_counts)


def _on_labels(loss):
  return lambda outputs, batch, class_counts: loss(outputs, batch["label"])


_LOSSES_UNDER_ABSGD = {
  "cross_entropy": _cross_entropy,
  "class_weighted": _class_weighted,
  "ldam": ldam_drw.loss(scale=3.0),
  "focal": _on_labels(losses_lib.focal),
  "symmetric": _on_labels(losses_lib.symmetric_cross_entropy),
  "truncated": _on_labels(
    functools.partial(losses_lib.generalized_cross_entropy, threshold=0.5)
  ),
}
_FOR_NOISE = ("symmetric", "truncated")


@pytest.mark.parametrize("name", _LOSSES_UNDER_ABSGD)
def test_step_on_any_loss(name):
  loss, lam = _LOSSES_UNDER_ABSGD[name], -2.0 if name in _FOR_NOISE else 2.0
  method = changed_loss.changed_loss(absgd.absgd(lam, gamma=0.5), loss)
  state = _state(method)
  for _ in range(2):
    memory = state.inner.log_normalizer
    result, state = _step(method, state)
    values = _base_losses(_inputs().params, loss)
    np.testing.assert_allclose(result.losses, values, rtol=1e-5)
    weights, memory = absgd.example_weights(values, memory, lam, gamma=0.5)
    np.testing.assert_allclose(result.weights, weights, rtol=1e-5)
    np.testing.assert_allclose(result.metrics["log_normalizer"], memory, rtol=1e-5)
    np.testing.assert_allclose(result.metrics["total_weight"], weights.sum(), 1e-5)
    expected = jax.grad(lambda p, w=weights: w @ _base_losses(p, loss))(
      _inputs().params
    )
    chex.assert_trees_all_close(result.grads, expected, rtol=1e-4, atol=1e-7)


def test_two_stage_is_uniform_and_then_absgd():
  method = absgd.absgd(absgd.two_stage(-5.0, 3), gamma=0.5, add_uniform=True)
  state = _state(method, epoch=2)
  result, after = _step(method, state)
  np.testing.assert_allclose(result.weights, np.full(6, 1 / 6), rtol=1e-6)
  assert result.metrics["log_normalizer"] == 0
  chex.assert_trees_all_equal(after, state)
  state = method.refresh(after, _task(), types.SimpleNamespace(epoch=3))
  result, _ = _step(method, state)
  # 1 / gamma from the first step of ABSGD, and 1 from the uniform weights.
  np.testing.assert_allclose(result.metrics["total_weight"], 3, rtol=1e-5)


def test_normalizer_is_reset_only_when_lambda_changes():
  method = absgd.absgd(lambda epoch: 2.0 if epoch < 2 else 4.0)
  _, state = _step(method, _state(method))
  assert np.isfinite(state.log_normalizer) and state.lam == 2
  kept = method.refresh(state, _task(), types.SimpleNamespace(epoch=1))
  chex.assert_trees_all_equal(kept, state)
  new = method.refresh(kept, _task(), types.SimpleNamespace(epoch=2))
  assert new.log_normalizer == -np.inf and new.lam == 4
  # A checkpoint needs shapes and types that never change.
  chex.assert_trees_all_equal_shapes_and_dtypes(new, state, _state(method))
  assert all(x.dtype == np.float32 for x in new)


def test_schedule_that_reaches_zero_is_refused():
  method = absgd.absgd(lambda epoch: 2.0 - epoch)
  with pytest.raises(base.InputError, match=r"lam=0\.0 must not be 0"):
    _state(method, epoch=2)

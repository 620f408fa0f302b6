"""Other losses as methods: the mean of what `losses` says, and its gradient."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import class_balance
from l2rw_jax import losses
from l2rw_jax.methods import loss_baselines
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

_CLASSES = 3
_NET = mlp.MLP(_CLASSES, ())
_LABELS = np.array([0, 0, 0, 1, 0, 2], np.int32)
_IMAGES = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
_BATCH = {"image": _IMAGES, "label": _LABELS, "index": np.arange(6)}
_PARAMS = _NET.init(jax.random.key(0), _IMAGES)["params"]
_TASK = classifier.Classifier(_NET, _CLASSES).problem(
  class_counts=np.array([60, 30, 10]), num_examples=100, num_steps=10
)


def _logits(params):
  return _NET.apply({"params": params}, _IMAGES)


def _run(method, epoch=0):
  step = jnp.zeros((), int)
  inputs = base.Inputs(_PARAMS, {}, (), _BATCH, None, step, jax.random.key(1))
  state = method.init(jax.random.key(0), _TASK, _PARAMS)
  state = method.refresh(state, _TASK, types.SimpleNamespace(epoch=epoch))
  return jax.jit(lambda state: method.gradients(state, _TASK, inputs)[0])(state)


_ON_OTHER_LOSSES = {
  "focal": (loss_baselines.focal(1.5), functools.partial(losses.focal, gamma=1.5)),
  "soft": (loss_baselines.bootstrapping("soft"), losses.bootstrapping_soft),
  "hard": (
    loss_baselines.bootstrapping("hard", 0.6),
    functools.partial(losses.bootstrapping_hard, beta=0.6),
  ),
  "sce": (
    loss_baselines.symmetric_cross_entropy(0.2, 0.5),
    functools.partial(losses.symmetric_cross_entropy, alpha=0.2, beta=0.5),
  ),
  "gce": (
    loss_baselines.generalized_cross_entropy(0.5, 0.3),
    functools.partial(losses.generalized_cross_entropy, q=0.5, threshold=0.3),
  ),
}


@pytest.mark.parametrize("name", _ON_OTHER_LOSSES)
def test_the_mean_of_another_loss(name):
  method, loss_fn = _ON_OTHER_LOSSES[name]

  @jax.jit
  def expected(params):
    values = loss_fn(_logits(params), _LABELS)
    return jnp.mean(values), values

  found = _run(method)
  slope, values = jax.grad(expected, has_aux=True)(_PARAMS)
  np.testing.assert_allclose(found.losses, values, rtol=1e-5)
  for ours, theirs in zip(*map(jax.tree.leaves, (found.grads, slope)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found.weights, np.full(6, 1 / 6), rtol=1e-6)


def test_class_balanced_focal_defers_only_its_weights():
  method = loss_baselines.class_balanced_focal(1.0, 0.9, 3)
  expected = losses.focal(_logits(_PARAMS), _LABELS, 1.0)
  for epoch in (2, 3):
    found = _run(method, epoch=epoch)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)
    per_class = class_balance.effective_number(_TASK.class_counts, 0.9)
    own = np.asarray(per_class)[_LABELS] if epoch == 3 else np.ones(6)
    np.testing.assert_allclose(found.weights, own / own.sum(), rtol=1e-5)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: loss_baselines.focal(-1.0), "focal: gamma=-1.0 must be at least 0"),
    (lambda: loss_baselines.class_balanced_focal(-1.0), "focal: gamma=-1.0"),
    (lambda: loss_baselines.class_balanced_focal(1.0, -0.5), "beta=-0.5 of the"),
    (lambda: loss_baselines.bootstrapping("firm"), "kind='firm'; choose 'soft' or"),
    (lambda: loss_baselines.bootstrapping("soft", 2.0), "bootstrapping_soft: beta=2.0"),
    (lambda: loss_baselines.symmetric_cross_entropy(-1.0), "alpha=-1.0, beta=1.0 must"),
    (lambda: loss_baselines.generalized_cross_entropy(1.5), "q=1.5 must be in"),
    (lambda: loss_baselines.generalized_cross_entropy(0.7, 0.0), "threshold=0.0 must"),
  ],
)
def test_settings_out_of_range_are_told_at_once(make, message):
  with pytest.raises(base.InputError, match=message):
    make()

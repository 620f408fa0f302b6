"""Changing a method's loss, from the start or from a later epoch on."""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import changed_loss
from l2rw_jax import losses
from l2rw_jax.methods import baselines
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

_COUNTS = jnp.array([30, 10])


def _problem():
  return classifier.Classifier(mlp.MLP(2, (4,)), 2).problem(
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
  init = jax.jit(mlp.MLP(2, (4,)).init)
  params = init(jax.random.key(0), batch["image"])["params"]
  inputs = base.Inputs(
    params, {}, (), batch, None, jnp.zeros((), int), jax.random.key(1)
  )
  return params, inputs


def _rarity_weighted(outputs, batch, class_counts):
  values = losses.softmax_cross_entropy(outputs, batch["label"])
  return values * 30 / class_counts[batch["label"]].astype(values.dtype)


def _run(method, epoch=0, engine="auto"):
  problem = _problem()
  linearize = functools.partial(problem.linearize, engine=engine)
  problem = dataclasses.replace(problem, linearize=linearize)
  params, inputs = _inputs()
  state = method.init(jax.random.key(2), problem, params)
  state = method.refresh(state, problem, types.SimpleNamespace(epoch=epoch))
  return jax.jit(lambda state, inputs: method.gradients(state, problem, inputs)[0])(
    state, inputs
  )


def test_losses_and_gradients_are_those_of_the_new_loss():
  plain = _run(baselines.uniform())
  params, inputs = _inputs()
  batch = inputs.batch
  rare = np.where(batch["label"] == 1, np.float32(3), np.float32(1))
  result = _run(changed_loss.changed_loss(baselines.uniform(), _rarity_weighted))
  np.testing.assert_allclose(result.losses, rare * np.asarray(plain.losses), rtol=1e-6)

  @jax.jit
  @jax.grad
  def gradient(params):
    outputs = mlp.MLP(2, (4,)).apply({"params": params}, batch["image"])
    return jnp.mean(rare * losses.softmax_cross_entropy(outputs, batch["label"]))

  expected = gradient(params)
  chex.assert_trees_all_close(result.grads, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("epoch", "is_new"), [(0, False), (2, False), (3, True), (9, True)]
)
def test_the_loss_changes_at_its_epoch(epoch, is_new):
  method = changed_loss.changed_loss(
    baselines.uniform(), _rarity_weighted, from_epoch=3
  )
  always = changed_loss.changed_loss(baselines.uniform(), _rarity_weighted)
  expected = _run(always if is_new else baselines.uniform())
  chex.assert_trees_all_close(_run(method, epoch), expected, rtol=1e-6)


@pytest.mark.parametrize("engine", ["layerwise", "forward"])
def test_the_loss_that_is_not_used_has_no_influence(engine):
  def with_infinite_derivative(outputs, batch, class_counts):
    del class_counts
    values = losses.softmax_cross_entropy(outputs, batch["label"])
    return jnp.sqrt(jnp.maximum(values - 9, 0))

  method = changed_loss.changed_loss(
    baselines.uniform(), with_infinite_derivative, from_epoch=np.uint8(3)
  )
  expected = _run(baselines.uniform(), engine=engine)
  chex.assert_trees_all_close(_run(method, 2, engine), expected, rtol=1e-6)


def test_losses_may_have_other_types():
  def in_bfloat16(outputs, batch, class_counts):
    return _rarity_weighted(outputs, batch, class_counts).astype(jnp.bfloat16)

  method = changed_loss.changed_loss(baselines.uniform(), in_bfloat16, from_epoch=3)
  chex.assert_trees_all_close(_run(method), _run(baselines.uniform()), rtol=1e-6)


def test_wrapping_twice_changes_the_loss_twice():
  def plain_zero(outputs, batch, class_counts):
    del batch, class_counts
    return jnp.sum(0 * outputs, axis=1)

  inner = changed_loss.changed_loss(baselines.uniform(), _rarity_weighted, from_epoch=2)
  method = changed_loss.changed_loss(inner, plain_zero)
  assert not np.any(_run(method, epoch=1).losses)
  always = changed_loss.changed_loss(baselines.uniform(), _rarity_weighted)
  chex.assert_trees_all_close(_run(method, epoch=2), _run(always), rtol=1e-6)


def test_sampling_is_that_of_the_wrapped_method():
  changed = changed_loss.changed_loss(baselines.resampling(), _rarity_weighted)
  train = {"label": np.array([0] * 9 + [1]), "index": np.arange(10)}
  state = changed.init(jax.random.key(0), _problem(), {})
  rows = changed.sample(state, _problem(), train, np.random.default_rng(0))
  assert (train["label"][rows] == 1).sum() == 5
  plain = changed_loss.changed_loss(baselines.uniform(), _rarity_weighted)
  assert plain.sample is base.permutation


@pytest.mark.parametrize("epoch", [-1, float("nan"), 1.5])
def test_an_epoch_is_a_whole_number(epoch):
  with pytest.raises(base.InputError, match=f"from_epoch={epoch} must be"):
    changed_loss.changed_loss(baselines.uniform(), _rarity_weighted, from_epoch=epoch)

"""L2RW with networks of several libraries.

Each network has BatchNorm in training mode where its library has one, and is
compared with the literal derivative through the unrolled step.
"""

from typing import Any, NamedTuple

import chex
import equinox as eqx
from flax import linen
from flax import nnx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import hypergradient
from l2rw_jax import losses
from l2rw_jax.methods import l2rw

_B, _M, _INPUTS, _WIDTH, _CLASSES = 8, 6, 4, 5, 3


class _Case(NamedTuple):
  """A user's function `(params, batch) -> (losses, new state)`, and the parameters."""

  losses_fn: Any
  params: Any


def _examples(seed, size):
  rng = np.random.default_rng(seed)
  return {
    "x": rng.normal(size=(size, _INPUTS)).astype(np.float32),
    "label": rng.integers(_CLASSES, size=size, dtype=np.int32),
  }


_BATCH, _META = _examples(0, _B), _examples(1, _M)
_cross_entropy = losses.softmax_cross_entropy


def _plain():
  rng = np.random.default_rng(2)
  params = [
    {"w": rng.normal(size=(m, n)).astype(np.float32), "b": np.zeros(n, np.float32)}
    for m, n in [(_INPUTS, _WIDTH), (_WIDTH, _CLASSES)]
  ]

  def loss_fn(params, example):
    first, last = params
    hidden = jnp.tanh(example["x"] @ first["w"] + first["b"])
    logits = hidden @ last["w"] + last["b"]
    return -jax.nn.log_softmax(logits)[example["label"]]

  losses_fn = jax.vmap(loss_fn, in_axes=(None, 0))
  return _Case(lambda params, batch: (losses_fn(params, batch), None), params)


class _LinenNet(linen.Module):
  @linen.compact
  def __call__(self, x):
    x = linen.BatchNorm(use_running_average=False)(linen.Dense(_WIDTH)(x))
    return linen.Dense(_CLASSES)(linen.tanh(x))


def _linen():
  model = _LinenNet()
  variables = jax.jit(model.init)(jax.random.key(0), _BATCH["x"])
  params = variables.pop("params")

  def losses_fn(params, batch):
    logits, new_state = model.apply(
      {"params": params, **variables}, batch["x"], mutable="batch_stats"
    )
    return _cross_entropy(logits, batch["label"]), new_state

  return _Case(losses_fn, params)


class _NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(_INPUTS, _WIDTH, rngs=rngs)
    self.norm = nnx.BatchNorm(_WIDTH, rngs=rngs)
    self.last = nnx.Linear(_WIDTH, _CLASSES, rngs=rngs)

  def __call__(self, x):
    return self.last(nnx.tanh(self.norm(self.first(x))))


def _nnx():
  graphdef, params, rest = nnx.split(_NnxNet(nnx.Rngs(0)), nnx.Param, ...)

  def losses_fn(params, batch):
    model = nnx.merge(graphdef, params, rest, copy=True)
    values = _cross_entropy(model(batch["x"]), batch["label"])
    return values, nnx.state(model, nnx.BatchStat)

  return _Case(losses_fn, params)


def _haiku():
  def forward(x):
    x = hk.Linear(_WIDTH)(x)
    x = hk.BatchNorm(True, True, decay_rate=0.9)(x, is_training=True)
    return hk.Linear(_CLASSES)(jnp.tanh(x))

  model = hk.transform_with_state(forward)
  params, state = jax.jit(model.init)(jax.random.key(0), _BATCH["x"])

  def losses_fn(params, batch):
    logits, new_state = model.apply(params, state, None, batch["x"])
    return _cross_entropy(logits, batch["label"]), new_state

  return _Case(losses_fn, params)


class _EquinoxNet(eqx.Module):
  first: eqx.nn.Linear
  norm: eqx.nn.BatchNorm
  last: eqx.nn.Linear
  activation: Any  # Not an array: `partition` has to separate it.

  def __init__(self, key):
    first, last = jax.random.split(key)
    self.first = eqx.nn.Linear(_INPUTS, _WIDTH, key=first)
    self.norm = eqx.nn.BatchNorm(_WIDTH, axis_name="batch", mode="batch")
    self.last = eqx.nn.Linear(_WIDTH, _CLASSES, key=last)
    self.activation = jnp.tanh

  def __call__(self, x, state):
    x, state = self.norm(self.first(x), state)
    return self.last(self.activation(x)), state


def _equinox():
  model, state = eqx.nn.make_with_state(_EquinoxNet)(jax.random.key(0))
  params, static = eqx.partition(model, eqx.is_inexact_array)

  def losses_fn(params, batch):
    model = eqx.combine(params, static)
    logits, new_state = jax.vmap(
      model, in_axes=(0, None), out_axes=(0, None), axis_name="batch"
    )(batch["x"], state)
    return _cross_entropy(logits, batch["label"]), new_state

  return _Case(losses_fn, params)


_LIBRARIES = {
  "plain": _plain,
  "linen": _linen,
  "nnx": _nnx,
  "haiku": _haiku,
  "equinox": _equinox,
}


@pytest.mark.ci
@pytest.mark.slow("haiku", "equinox")
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(
      "haiku", marks=pytest.mark.promotes("haiku's averages mix float32 with int32")
    ),
    *sorted(set(_LIBRARIES) - {"haiku"}),
  ],
)
def test_scores_equal_the_unrolled_step(name):
  case = _LIBRARIES[name]()
  optimizer = optax.sgd(0.1, momentum=0.9)
  opt_state = optimizer.init(case.params)

  def losses_of(params, batch):
    return case.losses_fn(params, batch)[0]

  @jax.jit
  def both(params):
    drop_in = l2rw.weighted_value_and_grad(
      case.losses_fn, optimizer=optimizer, has_aux=True
    )
    (loss, info), grads = drop_in(params, _BATCH, _META, opt_state)
    unrolled = -hypergradient.unrolled_weight_gradient(
      losses_of,
      losses_of,
      params,
      _BATCH,
      _META,
      jnp.zeros(_B),
      optimizer=optimizer,
      opt_state=opt_state,
    )
    expected = jax.value_and_grad(
      lambda p: jnp.sum(info.weights * losses_of(p, _BATCH))
    )(params)
    return (loss, grads), expected, info, unrolled, case.losses_fn(params, _BATCH)[1]

  actual, expected, info, unrolled, aux = both(case.params)
  scale = np.abs(unrolled).max()
  assert scale > 1e-4
  np.testing.assert_allclose(info.scores / scale, unrolled / scale, atol=2e-5)
  chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_close(info.aux, aux, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(info.weights.sum(), 1, rtol=1e-5)


@pytest.mark.slow("equinox")
@pytest.mark.parametrize("name", ["nnx", "equinox"])
def test_gradients_are_applied_to_the_parameters_of_a_module(name):
  case = _LIBRARIES[name]()
  run = jax.jit(l2rw.weighted_value_and_grad(case.losses_fn, has_aux=True))
  (loss, _), grads = run(case.params, _BATCH, _META)
  optimizer = optax.sgd(0.1)
  updates, _ = optimizer.update(grads, optimizer.init(case.params), case.params)
  apply_updates = eqx.apply_updates if name == "equinox" else optax.apply_updates
  params = apply_updates(case.params, updates)
  chex.assert_trees_all_equal_structs(params, case.params)
  assert np.isfinite(loss)
  assert float(optax.tree.norm(grads)) > 0

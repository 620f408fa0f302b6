"""The advisor network: its gate, its meta gradient, and its constant inputs."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax import losses as losses_lib
from l2rw_jax.methods import advisor
from l2rw_jax.methods import baselines
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

_B, _M, _C, _D, _RATE = 6, 5, 3, 4, 0.4
_MODEL = classifier.Classifier(mlp.MLP(_C, (6, _D)), _C)
_NET = advisor.AdvisorNet(_D, hidden=5)


def _examples(rng, size):
  return {
    "image": rng.normal(size=(size, 5)),
    "label": rng.integers(_C, size=size).astype(np.int32),
    "index": np.arange(size, dtype=np.int32),
  }


@functools.cache
def _inputs():
  rng = np.random.default_rng(0)
  batch, meta_batch = _examples(rng, _B), _examples(rng, _M)
  single = {**batch, "image": batch["image"].astype(np.float32)}
  params, model_state = jax.jit(_MODEL.init)(jax.random.key(0), single)
  params = jax.tree.map(lambda x: np.asarray(x, float) + 0.1, params)
  return base.Inputs(
    params, model_state, (), batch, meta_batch, jnp.int32(0), jax.random.key(2)
  )


def _problem():
  return _MODEL.problem(class_counts=jnp.ones(_C), num_examples=_B, num_steps=10)


def _loss(params, psi, batch, constants=None):
  """Mean gated loss; the gate uses `constants` in place of params if given."""
  gate_params = params if constants is None else constants
  features = _MODEL.features(params, {}, batch, jax.random.key(2), True)[0]
  gate_features = _MODEL.features(gate_params, {}, batch, jax.random.key(2), True)[0]
  before = losses_lib.softmax_cross_entropy(
    _MODEL.head(gate_params, gate_features), batch["label"]
  )
  gate = _NET.apply(psi, *jax.lax.stop_gradient((gate_features, before)))
  logits = _MODEL.head(params, features * gate)
  return losses_lib.softmax_cross_entropy(logits, batch["label"]).mean()


def _unrolled(psi, inputs):
  """The meta loss after the virtual step. Its gradient is reverse over reverse."""
  gradient = jax.grad(_loss)(inputs.params, psi, inputs.batch)
  optimizer = optax.sgd(_RATE)
  ahead = hypergradient.lookahead_params(
    inputs.params, gradient, optimizer, optimizer.init(inputs.params)
  )
  logits = _MODEL.forward(ahead, {}, inputs.meta_batch, inputs.key, True)[0]
  return losses_lib.softmax_cross_entropy(logits, inputs.meta_batch["label"]).mean()


@jax.jit
def _advised(psi, inputs, learning_rate=_RATE):
  """One step of the method from psi: (meta gradient of psi, gradients, state)."""
  method = advisor.advisor(learning_rate, hidden=5, optimizer=optax.sgd(1.0), every=2)
  state = method.init(jax.random.key(1), _problem(), inputs.params)
  result, after = method.gradients(state._replace(params=psi), _problem(), inputs)
  return jax.tree.map(jnp.subtract, psi, after.params), result, after


def _psi():
  rng = np.random.default_rng(3)
  psi = jax.eval_shape(_NET.init, jax.random.key(0), np.zeros((1, _D)), np.zeros(1))
  return jax.tree.map(lambda x: rng.normal(size=x.shape), psi)


@pytest.mark.ci
def test_meta_gradient_equals_the_unrolled_step_and_finite_differences(x64):
  inputs, psi = _inputs(), _psi()
  gradient, _, after = _advised(psi, inputs)
  unrolled = jax.jit(jax.value_and_grad(_unrolled))
  value, literal = unrolled(psi, inputs)
  np.testing.assert_allclose(after.meta_loss, value, rtol=1e-12)
  assert optax.tree.norm(literal) > 1e-5
  chex.assert_trees_all_close(gradient, literal, rtol=1e-9, atol=1e-14)
  rng = np.random.default_rng(1)
  along = jax.tree.map(lambda x: rng.normal(size=x.shape), psi)

  def at(step):  # Uses the program that is already compiled.
    return unrolled(jax.tree.map(lambda x, d: x + step * d, psi, along), inputs)[0]

  slope = (at(1e-5) - at(-1e-5)) / 2e-5
  np.testing.assert_allclose(optax.tree.vdot(gradient, along), slope, rtol=1e-7)


def test_real_step_uses_the_new_gate_as_a_constant(x64):
  inputs, psi = _inputs(), _psi()
  _, result, after = _advised(psi, inputs)
  gradient = jax.jit(jax.grad(_loss))
  expected = gradient(inputs.params, after.params, inputs.batch)
  chex.assert_trees_all_close(result.grads, expected, rtol=1e-9)
  # No gradient flows to the parameters through the advisor's inputs.
  fixed = gradient(inputs.params, after.params, inputs.batch, inputs.params)
  chex.assert_trees_all_close(result.grads, fixed, rtol=1e-9)
  np.testing.assert_allclose(result.metrics["gate"], result.weights.sum(), rtol=1e-9)


def test_advisor_is_updated_every_second_step(x64):
  psi = _psi()
  gradient, *_ = _advised(psi, _inputs()._replace(step=jnp.int32(1)))
  assert not optax.tree.norm(gradient)
  gradient, *_ = _advised(psi, _inputs()._replace(step=jnp.int32(2)))
  assert optax.tree.norm(gradient) > 1e-5


def test_open_gate_is_uniform_training(x64):
  inputs, psi = _inputs(), _psi()
  last = psi["params"]["Dense_2"]
  open_psi = {
    "params": {**psi["params"], "Dense_2": jax.tree.map(jnp.zeros_like, last)}
  }
  open_psi["params"]["Dense_2"]["bias"] = jnp.full(_D, 500.0)
  _, result, _ = _advised(open_psi, inputs)
  plain = jax.jit(lambda i: baselines.uniform().gradients((), _problem(), i)[0])(inputs)
  chex.assert_trees_all_close(result.grads, plain.grads, rtol=1e-9)
  np.testing.assert_allclose(result.weights, np.full(_B, 1 / _B))
  np.testing.assert_allclose(result.losses, plain.losses)


def test_zero_learning_rate_gives_a_zero_meta_gradient(x64):
  gradient, *_ = _advised(_psi(), _inputs(), learning_rate=0.0)
  assert all(not x.any() for x in jax.tree.leaves(gradient))


def test_network_has_the_released_size_and_initialization():
  net = advisor.AdvisorNet(2048)
  shapes = jax.eval_shape(
    net.init, jax.random.key(0), jnp.zeros((1, 2048)), jnp.zeros(1)
  )
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 616_748
  net = advisor.AdvisorNet(64)
  psi = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 64)), jnp.zeros(1))
  gate = advisor.gate(net, psi, jnp.ones((8, 64)), jnp.linspace(0, 5, 8))
  assert gate.shape == (8, 64) and 0.4 < gate.mean() < 0.6
  # These eight examples differ only in their losses.
  assert not np.allclose(gate[0], gate[-1])


def test_network_without_features_is_refused():
  class Whole(mlp.MLP):
    num_features = None

  model = classifier.Classifier(Whole(_C, (4,)), _C)
  problem = model.problem(class_counts=jnp.ones(_C), num_examples=_B, num_steps=10)
  with pytest.raises(base.InputError, match="the methods features and head"):
    advisor.advisor(0.1).init(jax.random.key(0), problem, {})

"""The mentor's network: compared with NumPy, and its weights for extreme losses."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax.methods import mentornet
from l2rw_jax.methods.mentornet import network as mentornet_network

_LOSSES = np.array([0.0, 0.7, 3.0], np.float32)
_DIFFERENCES = np.array([-1.2, 0.1, 2.0], np.float32)
_LABELS = np.array([0, 1, 1], np.int32)
_EPOCHS = np.array([0, 50, 99], np.int32)


@functools.cache
def _init(compat, history=1, seed=0):
  network = mentornet_network.MentorNetwork(compat=compat)
  shape = (3,) if history == 1 else (3, history)
  inputs = (jnp.zeros(shape), jnp.zeros(shape), _LABELS, _EPOCHS)
  return network, jax.jit(network.init)(jax.random.key(seed), *inputs)


@pytest.mark.ci
@pytest.mark.parametrize("compat", mentornet_network.COMPAT)
def test_parameters_do_not_depend_on_x64(compat):
  expected = _init(compat)[1]
  network = mentornet_network.MentorNetwork(compat=compat)
  with jax.enable_x64(True):
    inputs = (jnp.zeros(3), jnp.zeros(3), _LABELS, _EPOCHS)
    logits, actual = jax.jit(network.init_with_output)(jax.random.key(0), *inputs)
  assert logits.dtype == jnp.float32
  chex.assert_trees_all_equal_dtypes(actual, expected)
  chex.assert_trees_all_close(actual, expected, atol=1e-6)


def _count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_number_of_parameters_matches_the_release():
  _, variables = _init("official_code")
  assert {k: _count(v) for k, v in variables.items()} == {"params": 257, "frozen": 500}
  _, variables = _init("paper")
  assert {k: _count(v) for k, v in variables.items()} == {"params": 757}


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _lstm(params, steps):
  """Cell and hidden state of one unit after `steps` [k, 2]; the forget bias is 0."""
  cell = hidden = 0.0
  for step in steps:
    gate = {
      g: step @ params[f"i{g}"]["kernel"][:, 0]
      + hidden * params[f"h{g}"]["kernel"][0, 0]
      + params[f"h{g}"]["bias"][0]
      for g in "ifgo"
    }
    cell = _sigmoid(gate["f"]) * cell + _sigmoid(gate["i"]) * np.tanh(gate["g"])
    hidden = _sigmoid(gate["o"]) * np.tanh(cell)
  return cell, hidden


def _reference(variables, compat, losses, differences, labels=_LABELS, epochs=_EPOCHS):
  params = variables["params"]
  epoch_embedding = variables.get("frozen", params)["epoch_embedding"]
  # The features are the cells in the released code, the hidden states in the paper.
  output = 0 if compat == "official_code" else 1
  logits = []
  for i in range(3):
    steps = np.stack([np.atleast_1d(losses[i]), np.atleast_1d(differences[i])], axis=-1)
    features = np.concatenate(
      [
        params["label_embedding"][labels[i]],
        epoch_embedding[epochs[i]],
        [_lstm(params["forward"], steps)[output]],
        [_lstm(params["backward"], steps[::-1])[output]],
      ]
    )
    dense = params["hidden"]
    hidden = np.tanh(features @ dense["kernel"] + dense["bias"])
    kernel, bias = params["output_kernel"][:, 0], params["output_bias"][0]
    if compat == "official_code":
      logits.append(hidden @ (kernel + bias))
    else:
      logits.append(hidden @ kernel + bias)
  return logits


@pytest.mark.slow(unless=("paper-3", "official_code-3"))
@pytest.mark.parametrize("history", [1, 3])
@pytest.mark.parametrize("compat", mentornet_network.COMPAT)
def test_network_equals_numpy(compat, history):
  network, variables = _init(compat, history)
  # With biases of 0 the test would not notice where they are added.
  leaves, structure = jax.tree.flatten(jax.device_get(variables))
  rng = np.random.default_rng(5)
  leaves = [rng.normal(size=x.shape).astype(np.float32) for x in leaves]
  variables = jax.tree.unflatten(structure, leaves)
  losses, differences = _LOSSES, _DIFFERENCES
  if history > 1:
    losses, differences = (rng.normal(size=(3, history)) for _ in range(2))
  result = jax.jit(network.apply)(variables, losses, differences, _LABELS, _EPOCHS)
  expected = _reference(variables, compat, losses, differences)
  assert result.shape == (3,)
  np.testing.assert_allclose(result, expected, rtol=2e-5, atol=1e-5)


def test_epoch_is_a_scalar_or_per_example():
  network, variables = _init("official_code")
  apply = jax.jit(network.apply)
  given = (variables, _LOSSES, _DIFFERENCES, _LABELS)
  np.testing.assert_array_equal(apply(*given, 50), apply(*given, np.full(3, 50)))
  assert not np.array_equal(apply(*given, 50), apply(*given, 51))


@pytest.mark.parametrize("compat", mentornet_network.COMPAT)
def test_weights_of_extreme_losses_lie_between_0_and_1(compat):
  network, variables = _init(compat)
  mentor = mentornet_network.Mentor("pd", network, variables)
  # With variables that are ten times as large, inf - inf would occur without clipping.
  large = jax.tree.map(lambda x: np.float32(10) * np.asarray(x), variables)
  large_mentor = mentornet_network.Mentor("pd", network, large)
  cases = (jax.jit(mentor), 1), (jax.jit(large_mentor), -1)
  for loss in (0.0, 1e4, 3.4e38):
    losses = np.full(3, loss, np.float32)
    for weights_fn, sign in cases:
      weights = np.asarray(weights_fn(losses, sign * losses, None, 3))
      assert ((weights >= 0) & (weights <= 1)).all()
  # A NaN loss gives a NaN weight.
  nan = np.full(3, np.nan, np.float32)
  assert np.isnan(cases[0][0](nan, losses, None, 3)).all()


def test_mentor_without_classes_replaces_labels_by_0():
  network, variables = _init("official_code")
  plain = mentornet_network.Mentor("pd", network, variables)
  given = (_LOSSES, _DIFFERENCES)
  result = plain(*given, np.array([5, 9, 2]), 40)
  np.testing.assert_array_equal(result, plain(*given, np.zeros(3, int), 40))
  with_classes = mentornet_network.Mentor("dd", network, variables, num_classes=2)
  assert not np.array_equal(with_classes(*given, _LABELS, 40), result)


def test_a_mentor_is_a_curriculum():
  network, variables = _init("official_code")
  mentor = mentornet_network.Mentor("pd", network, variables)
  problem = base.Problem(
    forward=lambda params, state, batch, key, train: (params * batch["x"], state),
    loss=lambda outputs, batch: outputs,
    linearize=linearization.linearize,
    linearize_outputs=linearization.linearize_outputs,
    num_classes=2,
    class_counts=jnp.array([1, 2]),
    num_examples=3,
    num_steps=100,
  )
  batch = {"x": _LOSSES, "label": _LABELS, "index": np.arange(3)}
  inputs = base.Inputs(
    jnp.array(1.0), {}, (), batch, None, jnp.int32(40), jax.random.key(0)
  )
  method = mentornet.mentornet(mentor, percentile=50, decay=0.0)
  result, percentile = method.gradients(jnp.array(0.0), problem, inputs)
  np.testing.assert_allclose(percentile, 0.7)
  # A mentor without classes gets label 0. The step is at 40% of the run.
  differences, labels, epochs = _LOSSES - 0.7, np.zeros(3, int), np.full(3, 40)
  expected = _sigmoid(
    np.array(
      _reference(variables, "official_code", _LOSSES, differences, labels, epochs)
    )
  )
  assert np.ptp(expected) > 1e-3
  np.testing.assert_allclose(result.weights, expected / 3, rtol=1e-4)
  np.testing.assert_allclose(result.grads, result.weights @ _LOSSES, rtol=1e-5)


def test_unknown_compat_is_refused():
  with pytest.raises(base.InputError, match="compat='keras': choose among"):
    _init("keras")

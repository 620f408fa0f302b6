"""BARE: precomputed values, a literal form of both statistics, edge cases."""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import losses
from l2rw_jax.methods import bare
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

_LOGITS = jnp.array(
  [[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [1, 0, 0], [2, 0, 0], [0, 1, 0]]
)
_LABELS = jnp.array([0, 1, 2, 0, 1, 1])


# One program per shape instead of one per operation.
_STATIC = ("kappa", "statistics")
_select = jax.jit(bare.select, static_argnames=_STATIC)
_example_weights = jax.jit(bare.example_weights, static_argnames=_STATIC)


def test_selection_weights_and_loss_equal_precomputed_values():
  kept = _select(_LOGITS, _LABELS)
  np.testing.assert_array_equal(kept, [True, True, True, False, False, False])
  weights = _example_weights(_LOGITS, _LABELS)
  np.testing.assert_allclose(weights, np.array([1, 1, 1, 0, 0, 0]) / 3, rtol=1e-6)
  values = jax.jit(losses.softmax_cross_entropy)(_LOGITS, _LABELS)
  loss = np.sum(np.asarray(weights) * np.asarray(values))
  np.testing.assert_allclose(loss, 0.239545, atol=1e-6)


def _literal(logits, labels, kappa, statistics):
  """The selection in NumPy, one example and one class at a time."""
  exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
  p = np.clip(exponentials / exponentials.sum(axis=1, keepdims=True), 1e-8, 1 - 1e-8)
  kept = []
  for i, label in enumerate(labels):
    if statistics == "own_label":
      values, ddof = p[labels == label, label], 0
    else:
      values, ddof = p[:, label], 1
    # With one or two examples of a class, one can be on the threshold. Without the
    # tolerance, rounding would decide whether it is selected.
    threshold = values.mean() + kappa * values.std(ddof=ddof)
    kept.append(p[i, label] >= threshold - 1e-15 * values.mean())
  return np.array(kept)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("statistics", bare.STATISTICS)
@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0])
def test_selection_equals_the_literal_rule(statistics, kappa):
  rng = np.random.default_rng(0)
  for _ in range(20):
    logits, labels = rng.normal(0, 3, (40, 4)), rng.integers(4, size=40)
    result = _select(logits, labels, kappa=kappa, statistics=statistics)
    expected = _literal(logits, labels, kappa, statistics)
    np.testing.assert_array_equal(result, expected)
    assert 0 < expected.sum() < 40


def _batch_of_a_good_network(noise, rng):
  """Correct logits with confidence 0.95, and a share `noise` of wrong labels."""
  truth = rng.integers(10, size=128)
  logits = rng.normal(0, 0.3, (128, 10)) + 5.2 * np.eye(10)[truth]
  wrong = rng.random(128) < noise
  labels = np.where(wrong, (truth + rng.integers(1, 10, 128)) % 10, truth)
  return jnp.asarray(logits), jnp.asarray(labels), labels == truth


@pytest.mark.parametrize("noise", [0.2, 0.5, 0.7])
def test_default_statistic_keeps_clean_examples(noise):
  rng = np.random.default_rng(1)
  recall = {name: [] for name in bare.STATISTICS}
  for _ in range(20):
    logits, labels, clean = _batch_of_a_good_network(noise, rng)
    for name in bare.STATISTICS:
      kept = np.asarray(_select(logits, labels, statistics=name))
      recall[name].append(kept[clean].mean())
      if name == "batch_column":
        assert not kept[~clean].any()
  assert np.mean(recall["batch_column"]) > 0.98
  if noise < 0.6:  # At 0.7, the threshold is below the probabilities of clean labels.
    assert np.mean(recall["own_label"]) < 0.6


def test_weights_are_equal_among_selected_examples_and_not_differentiated():
  weights = _example_weights(_LOGITS, _LABELS, kappa=0.5)
  kept = np.asarray(_select(_LOGITS, _LABELS, kappa=0.5))
  np.testing.assert_allclose(weights, kept / kept.sum(), rtol=1e-6)
  gradient = jax.jit(jax.grad(lambda z: bare.example_weights(z, _LABELS)[0]))(_LOGITS)
  assert not gradient.any()


@pytest.mark.parametrize("kappa", [1.0, 1e9])
def test_a_selection_of_all_or_none_gives_uniform_weights(kappa):
  logits = jnp.zeros((4, 3)) if kappa == 1.0 else _LOGITS[:4]
  # With equal logits every example is on the threshold, and all are selected. With
  # kappa=1e9 none is selected.
  weights = _example_weights(logits, _LABELS[:4], kappa=kappa)
  np.testing.assert_allclose(weights, 0.25)


@pytest.mark.parametrize("statistics", bare.STATISTICS)
def test_equal_probabilities_are_all_selected_on_any_number_of_devices(statistics):
  rng = np.random.default_rng(0)
  labels = jnp.asarray(rng.integers(10, size=96))
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("devices",))
  split = PartitionSpec("devices")
  options = {"statistics": statistics}
  alone = jax.jit(functools.partial(bare.select, **options))
  sharded = jax.jit(
    jax.shard_map(
      functools.partial(bare.select, **options, axis_name="devices"),
      mesh=mesh,
      in_specs=(split, split),
      out_specs=split,
    )
  )
  for scale in (0.1, 1.0, 3.0, 10.0, 100.0):
    logits = jnp.tile(scale * rng.normal(size=10).astype(np.float32), (96, 1))
    assert alone(logits, labels).all() and sharded(logits, labels).all()
    # The same probabilities, except for rounding, since the sums have another order.
    others = jnp.asarray(rng.permuted(logits[:, 1:], axis=1))
    shuffled = jnp.concatenate([logits[:, :1], others], axis=1)
    assert alone(shuffled, 0 * labels).all()


@pytest.mark.parametrize("statistics", bare.STATISTICS)
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_weights_of_one_example_and_of_extreme_logits_are_finite(statistics, scale):
  for size in (1, 2, 6):
    weights = _example_weights(
      scale * _LOGITS[:size], _LABELS[:size], statistics=statistics
    )
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)


def test_batch_of_one_selects_nothing():
  assert not _select(_LOGITS[:1], _LABELS[:1]).any()


def test_one_logit_means_two_classes():
  logits = jnp.array([[2.0], [-1.0], [0.5], [-3.0], [1.0]])
  labels = jnp.array([1, 0, 0, 0, 1])
  both = jnp.concatenate([jnp.zeros_like(logits), logits], axis=1)
  expected = _select(both, labels)
  np.testing.assert_array_equal(_select(logits, labels), expected)
  assert 0 < expected.sum() < 5


def test_half_precision_is_computed_in_float32():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(0, 3, (60, 4)), jnp.bfloat16)
  labels = jnp.asarray(rng.integers(4, size=60))
  expected = _select(logits.astype(jnp.float32), labels)
  np.testing.assert_array_equal(_select(logits, labels), expected)
  assert _example_weights(logits, labels).dtype == jnp.bfloat16


def test_vmap_under_jit():
  both = jnp.stack([_LOGITS, _LOGITS[::-1]])
  labels = jnp.stack([_LABELS, _LABELS[::-1]])
  result = jax.jit(jax.vmap(bare.example_weights))(both, labels)
  np.testing.assert_allclose(result[0], result[1][::-1])


@pytest.mark.ci
@pytest.mark.parametrize(
  ("size", "settings"),
  [(1, {}), (6, {"kappa": 0.0}), (6, {"statistics": "own_label"})],
  ids=["one", "kappa", "statistics"],
)
def test_step_uses_the_selected_examples(size, settings):
  model = classifier.Classifier(mlp.MLP(3, (8,)), 3)
  problem = model.problem(class_counts=jnp.ones(3), num_examples=9, num_steps=2)
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.normal(size=(size, 5)).astype(np.float32),
    "label": np.asarray(_LABELS[:size]),
    "index": np.arange(size),
  }
  method = bare.bare(**settings)
  one = jax.tree.map(lambda x: x[:1], batch)  # The same program for both sizes.
  params, _ = jax.jit(model.init)(jax.random.key(0), one)
  inputs = base.Inputs(
    params, {}, (), batch, None, jnp.zeros((), int), jax.random.key(1)
  )
  result, _ = jax.jit(lambda i: method.gradients((), problem, i))(inputs)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradient_and_kept(p):
    logits, _ = problem.forward(p, {}, batch, None, False)
    values = losses.softmax_cross_entropy(logits, batch["label"])
    weights = bare.example_weights(logits, batch["label"], **settings)
    kept = bare.select(logits, batch["label"], **settings)
    return jnp.sum(weights * values), (weights, kept)

  gradient, (weights, kept) = gradient_and_kept(params)
  np.testing.assert_allclose(result.weights, weights, rtol=1e-6)
  chex.assert_trees_all_close(result.grads, gradient, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(result.metrics["kept_share"], kept.mean())
  if size == 1:  # Nothing is selected, so all examples are used.
    assert result.metrics["kept_share"] == 0 and result.weights == 1


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"statistics": "mine"}, "statistics='mine': choose 'batch_column'"),
    ({"kappa": -1.0}, "kappa=-1.0 must be at least 0"),
    ({"kappa": float("nan")}, "kappa=nan must be at least 0"),
    ({"kappa": float("inf")}, "kappa=inf must be at least 0, and finite"),
  ],
)
def test_bad_settings_are_refused(given, message):
  for function in (bare.bare, lambda **g: bare.select(_LOGITS, _LABELS, **g)):
    with pytest.raises(base.InputError, match=message):
      function(**given)


def test_mismatched_shapes_are_refused():
  with pytest.raises(base.InputError, match=r"labels must be integers of shape"):
    bare.select(_LOGITS, _LABELS[:3])


def test_nan_logits_and_invalid_labels_give_nan_weights():
  logits = jnp.eye(4, 3)
  good = jnp.array([0, 1, 2, 0])
  for bad in (jnp.nan, jnp.inf):  # The softmax of an infinite logit is NaN.
    assert np.isnan(bare.example_weights(logits.at[1, 0].set(bad), good)).all()
  excluded = bare.example_weights(logits.at[1, 0].set(-jnp.inf), good)
  assert np.isfinite(excluded).all()
  single = bare.example_weights(jnp.array([[jnp.inf], [0.0]]), good[:2])
  assert np.isfinite(single).all()
  for label in (-1, 3):
    assert np.isnan(bare.example_weights(logits, good.at[2].set(label))).all()


def test_an_empty_batch_is_refused():
  with pytest.raises(base.InputError, match="logits is empty"):
    bare.example_weights(jnp.zeros((0, 3)), jnp.zeros(0, jnp.int32))

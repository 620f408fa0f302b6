"""Group DRO: its two steps, absent groups, and long runs."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.methods import group_dro
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

_LOSSES = np.array([1.0, 3.0, 5.0, 0.5, 2.5, 0.1])
_GROUPS = np.array([0, 0, 1, 3, 1, 3])  # Group 2 is absent.

_weights = jax.jit(group_dro.example_weights)


def _uniform(size=4):
  return np.full(size, -np.log(size), np.float32)


def _published(losses, groups, q, eta, adjustments=0.0):
  """The published algorithm in NumPy, one group at a time."""
  q, weights = np.array(q, float), np.zeros(len(losses))
  adjustments = np.broadcast_to(adjustments, q.shape)
  for g in np.unique(groups):
    q[g] *= np.exp(eta * (losses[groups == g].mean() + adjustments[g]))
  q /= q.sum()
  for i, g in enumerate(groups):
    weights[i] = q[g] / (groups == g).sum()
  return weights, q


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("adjustments", [0.0, np.array([0.1, 0.2, 0.9, 0.4])])
@pytest.mark.parametrize("eta", [0.01, 0.7])
def test_weights_equal_the_published_algorithm(eta, adjustments):
  rng = np.random.default_rng(0)
  q = [0.1, 0.2, 0.3, 0.4]
  log_q = np.log(q)
  for _ in range(4):
    losses, groups = rng.exponential(size=6), rng.integers(4, size=6)
    expected, q = _published(losses, groups, q, eta, adjustments)
    result, log_q = _weights(losses, groups, log_q, eta, adjustments=adjustments)
    np.testing.assert_allclose(result, expected, rtol=1e-12)
    np.testing.assert_allclose(np.exp(log_q), q, rtol=1e-12)


def test_without_a_step_groups_of_any_size_count_equally():
  weights, log_q = _weights(_LOSSES, _GROUPS, _uniform(), 0.0)
  np.testing.assert_allclose(np.exp(log_q), np.full(4, 0.25), rtol=1e-6)
  np.testing.assert_allclose(weights, np.full(6, 0.125), rtol=1e-6)
  means = [_LOSSES[g == _GROUPS].mean() for g in (0, 1, 3)]
  np.testing.assert_allclose(np.vdot(weights, _LOSSES), sum(means) / 4, rtol=1e-6)


def test_only_the_normalizer_changes_an_absent_group():
  q = np.array([0.1, 0.2, 0.3, 0.4])
  weights, log_q = _weights(_LOSSES, _GROUPS, np.log(q), 0.1, adjustments=5.0)
  result = np.exp(log_q)
  np.testing.assert_allclose(weights.sum(), 1 - result[2], rtol=1e-6)
  # Neither the loss of the absent group, which is unknown, nor its adjustment has an
  # effect: the shares of the other groups grow relative to its share.
  grown = 0.1 * (np.array([2.0, 3.75, 0.3]) + 5.0)
  present = [0, 1, 3]
  np.testing.assert_allclose(
    np.log(result[present] / result[2]) - np.log(q[present] / q[2]), grown, rtol=1e-5
  )


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_gives_the_same_result(check_vma):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("devices",))
  whole, split = PartitionSpec(), PartitionSpec("devices")
  step = functools.partial(group_dro.example_weights, axis_name="devices")
  result = jax.jit(
    jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(split, split, whole, whole),
      out_specs=(split, whole),
      check_vma=check_vma,
    )
  )(_LOSSES, _GROUPS, _uniform(), 0.7)
  expected = _weights(_LOSSES, _GROUPS, _uniform(), 0.7)
  for actual, desired in zip(result, expected, strict=True):
    np.testing.assert_allclose(actual, desired, rtol=1e-6)


def test_nonexistent_group_is_refused_or_gives_nan():
  groups = np.array([0, 0, 1, -1, 1, 4])
  with pytest.raises(base.InputError, match="the group of row 3 does not exist"):
    group_dro.example_weights(_LOSSES, groups, _uniform(), 0.1)
  weights, log_q = _weights(_LOSSES, groups, _uniform(), 0.1)
  assert np.isnan(np.asarray(weights)[[3, 5]]).all()
  expected, _ = _published(_LOSSES[[0, 1, 2, 4]], groups[[0, 1, 2, 4]], [0.25] * 4, 0.1)
  np.testing.assert_allclose(np.asarray(weights)[[0, 1, 2, 4]], expected, rtol=1e-6)
  np.testing.assert_allclose(log_q[2], log_q[3])


def test_worst_group_dominates_and_a_small_one_recovers():
  losses, groups = np.array([0.2, 2.0, 1.9], np.float32), np.arange(3)
  log_q = _uniform(3)
  for _ in range(1000):
    weights, log_q = _weights(losses, groups, log_q, 1.0)
  np.testing.assert_allclose(weights, [0, 1, 0], atol=1e-6)
  for _ in range(1100):
    weights, log_q = _weights(losses[[1, 0, 0]], groups, log_q, 1.0)
  np.testing.assert_allclose(weights, [1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.01, 100.0, 1e30])
@pytest.mark.parametrize(
  ("losses", "groups"),
  [
    ([0.0, 0.0], [0, 1]),
    ([1e30, 0.0], [0, 1]),
    ([1e30, 1e30], [1, 1]),
    ([1e38, 2e38], [0, 1]),
    ([3e38, 3e38], [1, 1]),
    ([-3e38, 3e38], [0, 2]),
    ([5.0], [2]),
  ],
)
def test_weights_of_extreme_losses_are_finite(eta, losses, groups):
  losses, log_q = np.array(losses, np.float32), _uniform(3)
  for _ in range(3):
    weights, log_q = jax.device_get(_weights(losses, np.array(groups), log_q, eta))
    assert np.isfinite(weights).all() and np.isfinite(log_q).all()
    assert (weights >= 0).all() and weights.sum() <= 1.00001


def test_worst_of_huge_losses_is_identified():
  losses = np.array([1e38, 2e38, 0.0], np.float32)
  weights, _ = _weights(losses, np.arange(3), _uniform(3), 1e3)
  np.testing.assert_array_equal(weights, [0, 1, 0])


@pytest.mark.filterwarnings("error")
def test_groups_log_q_and_adjustments_may_be_lists():
  losses, lists = jnp.array([1.0, 2.0, 3.0]), ([0, 1, 1], [0.0, -1.0], [0.5, 0.25])

  def run(groups, log_q, adjustments):
    return group_dro.example_weights(
      losses, groups, log_q, 0.5, adjustments=adjustments
    )

  chex.assert_trees_all_equal(run(*lists), run(*map(jnp.array, lists)))


def test_nan_loss_gives_nan_weights():
  weights, log_q = _weights(np.array([1.0, np.nan]), np.arange(2), _uniform(2), 0.1)
  assert np.isnan(weights).all() and np.isnan(log_q).all()


def test_half_precision_is_computed_in_float32():
  losses = jnp.asarray(_LOSSES, jnp.bfloat16)
  weights, log_q = _weights(losses, _GROUPS, _uniform(), 0.7)
  assert weights.dtype == jnp.bfloat16 and log_q.dtype == jnp.float32
  expected, _ = _weights(_LOSSES, _GROUPS, _uniform(), 0.7)
  np.testing.assert_allclose(weights.astype(float), expected, rtol=1e-2)


def test_weights_are_constant_and_support_vmap():
  def total(losses, log_q):
    weights, log_q = group_dro.example_weights(losses, jnp.array(_GROUPS), log_q, 0.5)
    return jnp.sum(weights**2) + jnp.sum(log_q**2)

  gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(_LOSSES, _uniform())
  assert not any(np.any(x) for x in gradients)
  rates = np.array([0.0, 0.5])
  result = jax.device_get(
    jax.vmap(lambda eta: _weights(_LOSSES, _GROUPS, _uniform(), eta))(rates)
  )
  for row, eta in enumerate(rates):
    alone = _weights(_LOSSES, _GROUPS, _uniform(), eta)
    chex.assert_trees_all_close(jax.tree.map(lambda x, r=row: x[r], result), alone)


_NET = mlp.MLP(3, (4,))


def _problem():
  return classifier.Classifier(_NET, 3).problem(
    class_counts=jnp.array([4, 2, 3]), num_examples=9, num_steps=10
  )


@functools.cache
def _inputs():
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.normal(size=(5, 3)).astype(np.float32),
    "label": np.array([0, 1, 1, 2, 0], np.int32),
    "group": np.array([1, 0, 0, 0, 0], np.int32),
    "index": np.arange(5),
  }
  params = jax.jit(_NET.init)(jax.random.key(0), batch["image"])["params"]
  step = jnp.zeros((), int)
  return base.Inputs(params, {}, (), batch, None, step, jax.random.key(1))


def _step(method, state):
  step = jax.jit(lambda s, inputs: method.gradients(s, _problem(), inputs))
  return step(state, _inputs())


def _refreshed(method, epoch=0, **train):
  train = {"label": np.repeat([0, 1, 2], [4, 2, 3]), **train}
  state = method.init(jax.random.key(2), _problem(), _inputs().params)
  view = types.SimpleNamespace(epoch=epoch, train=train)
  return method.refresh(state, _problem(), view)


@pytest.mark.parametrize(("key", "num_groups"), [("label", None), ("group", 2)])
def test_step_of_the_method(key, num_groups):
  method = group_dro.group_dro(num_groups, 0.5, key)
  state = _refreshed(method, group=np.arange(9) % 2)
  result, after = _step(method, state)
  groups, size = _inputs().batch[key], num_groups or 3
  weights, q = _published(np.asarray(result.losses), groups, [1 / size] * size, 0.5)
  np.testing.assert_allclose(result.weights, weights, rtol=1e-5)
  np.testing.assert_allclose(result.metrics["largest_q"], q.max(), rtol=1e-5)
  np.testing.assert_allclose(result.metrics["total_weight"], 1, rtol=1e-5)
  np.testing.assert_allclose(np.exp(after.log_q), q, rtol=1e-5)
  chex.assert_trees_all_equal_shapes_and_dtypes(after, state)

  @jax.jit
  @jax.grad
  def gradient(params, weights):
    outputs = _NET.apply({"params": params}, _inputs().batch["image"])
    return weights @ _problem().loss(outputs, _inputs().batch)

  expected = gradient(_inputs().params, np.float32(weights))
  chex.assert_trees_all_close(result.grads, expected, rtol=1e-4, atol=1e-7)


def test_adjustment_favors_small_groups():
  method = group_dro.group_dro(step_size=0.5, adjustment=2.0)
  state = _refreshed(method)
  np.testing.assert_allclose(state.adjustments, 2 / np.sqrt([4, 2, 3]), rtol=1e-6)
  result, after = _step(method, state)
  labels = _inputs().batch["label"]
  _, q = _published(
    np.asarray(result.losses), labels, [1 / 3] * 3, 0.5, state.adjustments
  )
  np.testing.assert_allclose(np.exp(after.log_q), q, rtol=1e-5)
  later = method.refresh(after, _problem(), types.SimpleNamespace(epoch=1))
  chex.assert_trees_all_equal(later, after)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: group_dro.group_dro(step_size=-1), "step_size=-1 must be at least 0"),
    (lambda: group_dro.group_dro(step_size=np.nan), "step_size=nan must be"),
    (lambda: group_dro.group_dro(adjustment=-1), "adjustment=-1 must be at least 0"),
    (
      lambda: group_dro.group_dro(num_groups=0),
      "num_groups=0 must be an integer of at least 1",
    ),
    (
      lambda: _refreshed(group_dro.group_dro(4)),
      "group 3 has no member in the training set",
    ),
    (
      lambda: _refreshed(group_dro.group_dro(2)),
      "the training set has group 2, but groups are 0 to 1",
    ),
    (
      lambda: _refreshed(group_dro.group_dro(key="sex")),
      r"no 'sex', .*\['label'\]: choose another key",
    ),
    (
      lambda: group_dro.example_weights(
        jnp.ones(2), jnp.zeros(3, int), jnp.zeros(2), 0.1
      ),
      "groups must be one integer per example",
    ),
    (
      lambda: group_dro.example_weights(
        jnp.ones(2), np.array([0, 1.7]), jnp.zeros(2), 0.1
      ),
      "must be integers; got float64",
    ),
    (
      lambda: group_dro.example_weights(
        jnp.ones(2, int), jnp.zeros(2, int), jnp.zeros(2), 0.1
      ),
      "losses must be floating-point numbers",
    ),
    (
      lambda: group_dro.example_weights(
        jnp.ones(2), jnp.zeros(2, int), jnp.zeros((2, 1)), 0.1
      ),
      "log_q must be one number per group",
    ),
    (
      lambda: group_dro.example_weights(
        jnp.ones(3),
        jnp.arange(3),
        jnp.zeros(3),
        0.1,
        adjustments=jnp.array([[1.0], [2.0], [3.0]]),
      ),
      r"adjustments must be .* shape \(3,\); got \(3, 1\)",
    ),
    (
      lambda: group_dro.example_weights([0.0], [0], [0.0], 0.1),
      "losses must be an array",
    ),
    (
      lambda: group_dro.example_weights(
        jnp.ones(2), jnp.zeros(2, int), jnp.zeros(2), -1.0
      ),
      "step_size=-1.0 must be at least 0",
    ),
  ],
)
def test_bad_arguments_are_refused(make, message):
  with pytest.raises(base.InputError, match=message):
    make()

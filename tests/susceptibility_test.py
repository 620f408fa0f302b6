"""Susceptibility, compared with values and optimizer steps computed by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax import losses
from l2rw_jax import susceptibility

_X = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
_W = np.array([[0.5, -0.5], [-0.25, 0.25]])
_RANDOM_LABELS = np.array([1, 0, 1])


def _losses_of(params, batch):
  return losses.softmax_cross_entropy(batch["x"] @ params, batch["label"])


def _numpy_loss_and_gradient(w, x, labels):
  """Mean cross-entropy of a linear softmax and its gradient, written out."""
  logits = x @ w
  p = np.exp(logits - logits.max(axis=1, keepdims=True))
  p /= p.sum(axis=1, keepdims=True)
  one_hot = np.eye(w.shape[1])[labels]
  loss = -np.log((p * one_hot).sum(axis=1)).mean()
  return loss, x.T @ (p - one_hot) / len(labels)


def _drop(optimizer, opt_state=None, params=_W, losses_fn=_losses_of, **options):
  """The loss before a step on the random labels, the loss after it, and the drop."""
  batch = {"x": _X, "label": _RANDOM_LABELS}
  state = optimizer.init(params) if opt_state is None else opt_state
  actual = susceptibility.loss_drop(
    losses_fn, params, batch, optimizer=optimizer, opt_state=state, **options
  )
  assert actual.finite
  return [float(x) for x in actual[:3]]


@pytest.mark.parametrize(
  ("rate", "after", "drop", "first_order"),
  [(0.1, 1.047019, 0.0401197, 0.0407113), (0.01, 1.083073, 0.00406527, 0.00407113)],
)
def test_loss_drop_equals_reference_values(x64, rate, after, drop, first_order):
  del x64
  actual = _drop(optax.sgd(rate))
  np.testing.assert_allclose(actual, [1.087139, after, drop], rtol=2e-6)
  _, gradient = _numpy_loss_and_gradient(_W, _X, _RANDOM_LABELS)
  np.testing.assert_allclose(rate * (gradient**2).sum(), first_order, rtol=2e-6)
  assert actual[2] == actual[0] - actual[1]


def test_the_drop_of_losses_in_half_precision_is_not_rounded_away():
  # In bfloat16, numbers close to 1.1 are multiples of 1/128.
  def half(params, batch):
    return _losses_of(params, batch).astype(jnp.bfloat16)

  def mean(params):
    return half(params, batch).astype(jnp.float32).mean()

  rng = np.random.default_rng(0)
  batch = {
    "x": rng.normal(size=(500, 2)).astype(np.float32),
    "label": rng.integers(2, size=500),
  }
  params, optimizer = jnp.asarray(_W, jnp.float32), optax.sgd(0.1)
  actual = susceptibility.loss_drop(
    half, params, batch, optimizer=optimizer, opt_state=optimizer.init(params)
  )
  before, gradient = jax.value_and_grad(mean)(params)
  expected = before - mean(params - 0.1 * gradient)
  assert actual.drop.dtype == jnp.float32 and 1e-4 < expected < 0.1
  np.testing.assert_allclose(actual.drop, expected, rtol=1e-3)


def test_a_small_step_lowers_the_loss_by_rate_times_squared_gradient(x64):
  del x64
  _, gradient = _numpy_loss_and_gradient(_W, _X, _RANDOM_LABELS)
  for rate in (1e-4, 1e-6):
    drop = _drop(optax.sgd(rate))[2]
    assert drop == pytest.approx(rate * (gradient**2).sum(), rel=rate)


def test_the_step_has_the_momentum_schedule_and_decay_of_training(x64):
  del x64
  rates = [0.3, 0.2, 0.1]
  optimizer = optax.chain(
    optax.add_decayed_weights(0.01),
    optax.sgd(lambda count: jnp.array(rates)[count], momentum=0.9),
  )
  # Two steps of training on other labels, then the probe: rate 0.1, old momentum.
  w, trace, state = _W, np.zeros_like(_W), optimizer.init(_W)
  params = jnp.array(_W)
  for rate in rates[:2]:
    _, gradient = _numpy_loss_and_gradient(w, _X, 1 - _RANDOM_LABELS)
    trace = gradient + 0.01 * w + 0.9 * trace
    w = w - rate * trace
    batch = {"x": _X, "label": 1 - _RANDOM_LABELS}
    gradient = jax.grad(lambda p, b=batch: _losses_of(p, b).mean())(params)
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  before, gradient = _numpy_loss_and_gradient(w, _X, _RANDOM_LABELS)
  stepped = w - 0.1 * (gradient + 0.01 * w + 0.9 * trace)
  after, _ = _numpy_loss_and_gradient(stepped, _X, _RANDOM_LABELS)
  actual = _drop(optimizer, state, params)
  np.testing.assert_allclose(actual, [before, after, before - after], rtol=1e-9)
  # Momentum toward the other labels cancels more than half of a plain step's drop.
  assert 0 < actual[2] < 0.5 * _drop(optax.sgd(0.1), params=params)[2]


def test_the_value_of_the_optimizer_is_the_loss_before_the_step(x64):
  del x64
  before, gradient = _numpy_loss_and_gradient(_W, _X, _RANDOM_LABELS)
  # Polyak's step size is the loss divided by the squared norm of the gradient.
  rate = before / (gradient**2).sum()
  after, _ = _numpy_loss_and_gradient(_W - rate * gradient, _X, _RANDOM_LABELS)
  actual = _drop(optax.polyak_sgd(max_learning_rate=100.0))
  np.testing.assert_allclose(actual[:2], [before, after], rtol=1e-7)


def test_aux_does_not_change_the_drop():
  def with_aux(params, batch):
    return _losses_of(params, batch), "anything"

  optimizer = optax.sgd(0.1)
  assert _drop(optimizer, losses_fn=with_aux, has_aux=True) == _drop(optimizer)
  with pytest.raises(base.InputError, match="pass has_aux=True"):
    _drop(optimizer, losses_fn=with_aux)
  with pytest.raises(base.InputError, match=r"one number per example, shape \[B\]"):
    _drop(optimizer, losses_fn=lambda p, b: _losses_of(p, b).mean())


def test_leaves_that_cannot_be_trained_do_not_change_the_drop():
  optimizer = optax.sgd(0.1, momentum=0.9)
  params = {"w": jnp.array(_W), "key": jax.random.key(0), "count": jnp.int32(3)}
  actual = _drop(
    optimizer,
    hypergradient.init_optimizer(optimizer, params),
    params,
    lambda params, batch: _losses_of(params["w"], batch),
  )
  np.testing.assert_allclose(actual, _drop(optimizer, params=jnp.array(_W)), rtol=1e-6)


def test_the_row_of_a_loss_that_is_not_finite_is_named():
  batch = {"x": _X, "label": np.array([1, 2, 0])}
  optimizer = optax.sgd(0.1)
  with pytest.raises(FloatingPointError, match=r"1 of 3 losses .* first in row 1"):
    susceptibility.loss_drop(
      _losses_of, _W, batch, optimizer=optimizer, opt_state=optimizer.init(_W)
    )


def _random_batch(rng, size=16):
  return {
    "x": rng.normal(size=(size, 2)),
    "label": rng.integers(2, size=size),
  }


@pytest.mark.slow("pmap")
@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_eight_devices_give_the_same_drop_as_one(how):
  optimizer = optax.sgd(0.1, momentum=0.9)
  batch = _random_batch(np.random.default_rng(0))
  state = optimizer.init(jnp.array(_W))
  drop = functools.partial(
    susceptibility.loss_drop, _losses_of, optimizer=optimizer, opt_state=state
  )
  expected = drop(jnp.array(_W), batch)
  sharded_drop = functools.partial(drop, axis_name="d")
  if how == "pmap":
    shards = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    actual = jax.pmap(sharded_drop, axis_name="d", in_axes=(None, 0))(
      jnp.array(_W), shards
    )
    actual = jax.tree.map(lambda x: x[3], actual)
  else:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    mapped = jax.shard_map(
      sharded_drop, mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec()
    )
    actual = jax.jit(mapped)(jnp.array(_W), batch)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_vmap_over_models_equals_each_model_alone():
  optimizer = optax.sgd(0.1)
  models = np.random.default_rng(1).normal(size=(3, 2, 2))

  def drop(w):
    batch = {"x": _X, "label": _RANDOM_LABELS}
    state = optimizer.init(w)
    return susceptibility.loss_drop(
      _losses_of, w, batch, optimizer=optimizer, opt_state=state
    )

  together = jax.jit(jax.vmap(drop))(models)
  for i, w in enumerate(models):
    np.testing.assert_allclose([x[i] for x in together], drop(w), rtol=1e-5)


def test_random_labels_depend_on_the_seed_and_cover_every_class():
  actual = susceptibility.random_labels(3, 10_000, 10)
  assert actual.dtype == np.int32 and actual.shape == (10_000,)
  np.testing.assert_array_equal(actual, susceptibility.random_labels(3, 10_000, 10))
  assert (actual != susceptibility.random_labels(4, 10_000, 10)).mean() > 0.85
  counts = np.bincount(actual)
  # Five standard deviations of a binomial count with n = 10,000 and p = 0.1.
  assert len(counts) == 10 and abs(counts - 1000).max() < 150


@pytest.mark.parametrize(
  ("size", "classes", "match"),
  [
    (0, 10, "the unlabeled set is empty"),
    (2.5, 10, r"num_examples=2\.5 must be an integer"),
    (5, 1, "num_classes=1 must be an integer of at least 2"),
    (5, 2.5, r"num_classes=2\.5 must be an integer of at least 2"),
  ],
)
def test_random_labels_need_examples_and_two_classes(size, classes, match):
  with pytest.raises(base.InputError, match=match):
    susceptibility.random_labels(0, size, classes)
  with pytest.raises(base.InputError, match="seed=-1 must be an integer of at least 0"):
    susceptibility.random_labels(-1, 5, 2)


def test_running_average_by_hand():
  drops = [[4.0, 1.0, 1.0, 6.0], [0.0, -2.0, 2.0, 0.0]]
  actual = susceptibility.running_average(drops)
  assert actual.tolist() == [[4, 2.5, 2, 3], [0, -1, 0, 0]]
  # (r_1 + ... + r_{t-1}) / t at t = 1, 2, 3.
  actual = susceptibility.running_average(drops, compat=True)
  assert actual.tolist() == [[0, 1 / 2, 2 / 3], [0, -2 / 2, 0]]
  assert susceptibility.running_average([7.0]).tolist() == [7]


@pytest.mark.parametrize(
  ("drops", "compat", "match"),
  [
    ([], False, "at least 1 probe"),
    (3.0, False, "at least 1 probe"),
    ([1.0], True, "at least 2 probe"),
    ([1.0, np.nan, np.inf], False, "2 of drops are NaN or infinite, the first at.* 1;"),
    ([[1.0, 2.0], [3.0, -np.inf]], False, "the first at index 1, 1; leave"),
  ],
)
def test_invalid_drops_are_refused(drops, compat, match):
  with pytest.raises(base.InputError, match=match):
    susceptibility.running_average(drops, compat)


def test_regions_by_hand():
  zeta = [0.0, 1.0, 0.0, 1.0, 0.5, 0.5]
  accuracy = [1.0, 1.0, 0.0, 0.0, 0.5, 0.4]
  # The means are 0.5 and 0.4833. The last two models have a zeta equal to the mean,
  # which counts as low.
  actual = susceptibility.regions(zeta, accuracy)
  assert actual.tolist() == [1, 2, 3, 4, 1, 3]
  assert susceptibility.selected(zeta, accuracy).tolist() == [0, 4]
  assert susceptibility.boundaries(zeta, accuracy) == (0.5, pytest.approx(2.9 / 6))


@pytest.mark.parametrize("value", [0.1, 1.0, 1 / 3])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_models_are_all_in_region_1(value, count):
  # In floating point, the mean of three values of 0.1 is more than 0.1.
  actual = susceptibility.regions([value] * count, [value] * count)
  assert actual.tolist() == [1] * count


def test_the_selection_may_be_empty():
  assert susceptibility.selected([0.0, 1.0], [0.0, 1.0]).tolist() == []


def test_rank_correlation_depends_on_ranks_only():
  assert susceptibility.rank_correlation([1, 2, 3], [1, 10, 1000]) == pytest.approx(1)
  # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 0, 1, 1, 0.
  actual = susceptibility.rank_correlation([1, 2, 3, 4], [5, 7, 6, 9])
  assert actual == pytest.approx(1 - 6 * 2 / (4 * 15))
  assert susceptibility.rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_an_empty_batch_is_refused():
  optimizer, params = optax.sgd(0.1), jnp.ones(2)
  drop = functools.partial(
    susceptibility.loss_drop,
    lambda p, x: x @ p,
    optimizer=optimizer,
    opt_state=optimizer.init(params),
  )
  with pytest.raises(base.InputError, match="losses is empty"):
    jax.eval_shape(drop, params, jnp.zeros((0, 2)))


_COMPARE = [
  susceptibility.regions,
  susceptibility.selected,
  susceptibility.boundaries,
  susceptibility.rank_correlation,
]


@pytest.mark.parametrize("compare", _COMPARE)
@pytest.mark.parametrize(
  ("one", "other", "match"),
  [
    ([1.0], [1.0], r"1 model\(s\) cannot be compared; give at least 2"),
    ([], [], r"0 model\(s\) cannot"),
    ([1.0, 2.0], [1.0], "lengths must be equal: 2 of .* and 1 of"),
    ([1.0, np.nan], [1.0, 2.0], "1 of .* NaN or infinite, the first at index 1"),
    ([1.0, 2.0], [np.inf, 2.0], "NaN or infinite, the first at index 0"),
    ([[1.0, 2.0]], [1.0, 2.0], r"shape \[n\]; got shape \(1, 2\)"),
  ],
)
def test_models_that_cannot_be_compared_are_refused(compare, one, other, match):
  with pytest.raises(base.InputError, match=match):
    compare(one, other)

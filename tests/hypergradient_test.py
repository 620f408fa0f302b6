"""Derivatives of the meta loss through one optimizer step.

They are compared with the unrolled derivative, finite differences and a closed form.
"""

import functools

import chex
from flax import linen as nn
import jax
from jax.experimental import checkify
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax import linearization
from l2rw_jax import losses

pytestmark = pytest.mark.usefixtures("x64")

_B, _M, _CLASSES = 5, 4, 2
_DECAY = 0.1


def _examples(rng, size):
  return {
    "x": rng.normal(size=(size, 3)),
    "label": rng.integers(_CLASSES, size=size),
  }


@functools.cache
def _data():
  rng = np.random.default_rng(0)
  return _examples(rng, _B), _examples(rng, _M)


def _params():
  rng = np.random.default_rng(1)
  shapes = {"w1": (3, 4), "b1": (4,), "w2": (4, _CLASSES)}
  return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def _losses_fn(params, batch):
  hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"][None])
  return losses.softmax_cross_entropy(hidden @ params["w2"], batch["label"])


def _decayed_losses_fn(params, batch):
  return _losses_fn(params, batch) + _DECAY / 2 * optax.tree.norm(params, squared=True)


def _weight_gradient(
  losses_fn, params, batch, meta_batch, weights, optimizer, opt_state
):
  linearized = linearization.linearize(losses_fn, params, batch)
  direction = hypergradient.direction(
    losses_fn,
    params,
    meta_batch,
    linearized.weighted_gradient(weights),
    optimizer=optimizer,
    opt_state=opt_state,
  )
  return hypergradient.weight_gradient(linearized, direction)


def _meta_loss(losses_fn, params, batch, meta_batch, weights, optimizer, opt_state):
  gradient = jax.grad(lambda p: jnp.sum(weights * losses_fn(p, batch)))(params)
  ahead = hypergradient.lookahead_params(params, gradient, optimizer, opt_state)
  return jnp.mean(losses_fn(ahead, meta_batch))


def _finite_differences(meta_loss_of, weights, step=1e-5):
  moved = step * jnp.eye(weights.size)
  up, down = (jax.vmap(meta_loss_of)(weights[None] + s * moved) for s in (1, -1))
  return (up - down) / (2 * step)


def _three_ways(losses_fn, optimizer):
  """Jitted `(opt_state, weights) -> (weight gradient, unrolled, differences)`."""
  batch, meta_batch = _data()
  params = _params()

  def three_ways(opt_state, weights):
    data = (losses_fn, params, batch, meta_batch)
    unrolled = hypergradient.unrolled_weight_gradient(
      losses_fn, *data, weights, optimizer=optimizer, opt_state=opt_state
    )

    def meta_loss_of(w):
      return _meta_loss(*data, w, optimizer, opt_state)

    actual = _weight_gradient(*data, weights, optimizer, opt_state)
    return actual, unrolled, _finite_differences(meta_loss_of, weights)

  return jax.jit(three_ways)


def _warm(optimizer, params, num_updates=3):
  """The state after a few updates, as in the middle of a run."""
  state = hypergradient.init_optimizer(optimizer, params)
  for i in range(num_updates):
    gradient = jax.tree.map(lambda p, i=i: np.cos(3 * p + i), params)
    with base.implicit_promotion():
      _, state = optimizer.update(gradient, state, params)
  return state


_SCHEDULE = optax.cosine_decay_schedule(0.3, 10)
_OPTIMIZERS = {
  "sgd": optax.sgd(0.3),
  "momentum": optax.sgd(0.3, momentum=0.9),
  "nesterov": optax.sgd(0.3, momentum=0.9, nesterov=True),
  "decay_in_the_optimizer": optax.chain(
    optax.add_decayed_weights(_DECAY), optax.sgd(0.3, momentum=0.9)
  ),
  "adam": optax.adam(0.1, eps_root=1e-3),
  "adamw": optax.adamw(0.1, eps_root=1e-3, weight_decay=0.1),
  "injected": optax.inject_hyperparams(optax.sgd)(_SCHEDULE, momentum=0.5),
  "partition": optax.partition(
    {
      "a": optax.adam(0.1, eps_root=1e-3),
      "s": optax.sgd(0.3),
      "z": optax.set_to_zero(),
    },
    {"w1": "a", "b1": "z", "w2": "s"},
  ),
}


def _assert_close(actual, expected, tolerance):
  """Compares relative to the largest entry, because only ratios of scores matter."""
  scale = np.abs(expected).max()
  assert scale > 1e-6
  np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_weight_gradient_equals_the_unrolled_step_and_finite_differences(name):
  optimizer = _OPTIMIZERS[name]
  three_ways = _three_ways(_losses_fn, optimizer)
  fresh = hypergradient.init_optimizer(optimizer, _params())
  for state in (fresh, _warm(optimizer, _params())):
    for weights in (jnp.zeros(_B), jnp.full(_B, 1 / _B)):
      actual, unrolled, differences = three_ways(state, weights)
      _assert_close(actual, unrolled, 1e-12)
      _assert_close(actual, differences, 1e-6)


def test_decay_in_the_loss_equals_the_unrolled_step():
  three_ways = _three_ways(_decayed_losses_fn, optax.sgd(0.3))
  state = optax.sgd(0.3).init(_params())
  actual, unrolled, differences = three_ways(state, jnp.full(_B, 1 / _B))
  _assert_close(actual, unrolled, 1e-12)
  _assert_close(actual, differences, 1e-6)


def test_the_default_inner_gradient_is_zero():
  batch, meta_batch = _data()
  optimizer = optax.sgd(0.1)

  @jax.jit
  def both(params):
    state = optimizer.init(params)
    direction = hypergradient.direction(
      _losses_fn, params, meta_batch, optimizer=optimizer, opt_state=state
    )
    linearized = linearization.linearize(_losses_fn, params, batch)
    actual = hypergradient.weight_gradient(linearized, direction)
    expected = _weight_gradient(
      _losses_fn, params, batch, meta_batch, jnp.zeros(_B), optimizer, state
    )
    meta_loss = _losses_fn(params, meta_batch).mean()
    return (actual, direction.meta_loss), (expected, meta_loss)

  chex.assert_trees_all_close(*both(_params()), rtol=1e-13)


def test_ridge_regression_in_closed_form():
  rng = np.random.default_rng(2)
  x, y, z, t = (rng.normal(size=s) for s in [(_B, 3), _B, (_M, 3), _M])
  p, weights, rate = rng.normal(size=3), rng.uniform(size=_B), 0.2

  def losses_fn(params, batch):
    inputs, targets = batch
    return (inputs @ params - targets) ** 2 / 2 + _DECAY / 2 * params @ params

  gradients = x * (x @ p - y)[:, None] + _DECAY * p
  ahead = p - rate * weights @ gradients
  meta_gradient = z.T @ (z @ ahead - t) / _M + _DECAY * ahead
  expected = -rate * gradients @ meta_gradient
  optimizer = optax.sgd(rate)
  actual = _weight_gradient(
    losses_fn, p, (x, y), (z, t), jnp.asarray(weights), optimizer, optimizer.init(p)
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-12)


class _Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, param_dtype=float)(x)
    x = nn.BatchNorm(use_running_average=False, param_dtype=float)(x)
    return nn.Dense(_CLASSES, param_dtype=float)(nn.tanh(x))


@pytest.mark.promotes("flax keeps running statistics in float32, here next to float64")
def test_weight_gradient_through_batch_statistics():
  batch, meta_batch = _data()
  variables = jax.jit(_Net().init)(jax.random.key(0), batch["x"])
  params = variables.pop("params")

  def losses_fn(params, batch):
    logits, _ = _Net().apply(
      {"params": params, **variables}, batch["x"], mutable="batch_stats"
    )
    return losses.softmax_cross_entropy(logits, batch["label"])

  optimizer = optax.sgd(0.3, momentum=0.9)
  data = (losses_fn, params, batch, meta_batch)
  options = {"optimizer": optimizer, "opt_state": _warm(optimizer, params)}

  @jax.jit
  def both(weights):
    expected = hypergradient.unrolled_weight_gradient(
      losses_fn, *data, weights, **options
    )
    return _weight_gradient(*data, weights, **options), expected

  for weights in (jnp.zeros(_B), jnp.full(_B, 1 / _B)):
    _assert_close(*both(weights), 1e-12)


def test_fixed_leaves_do_not_change_the_weight_gradient():
  batch, meta_batch = _data()
  fixed = {"count": jnp.int32(2**24 + 1), "mask": jnp.array([True, False]), "no": None}
  optimizer = optax.sgd(0.3)

  def losses_fn(params, batch):
    scale = (params["count"] - 2**24).astype(float)
    return _losses_fn(params["net"], batch) * scale

  params = {"net": _params(), **fixed}

  @jax.jit
  def run(weights):
    state = optimizer.init(params)
    data = (batch, meta_batch, weights, optimizer, state)
    direction = hypergradient.direction(
      losses_fn, params, meta_batch, optimizer=optimizer, opt_state=state
    )
    actual = _weight_gradient(losses_fn, params, *data)
    return actual, _weight_gradient(_losses_fn, _params(), *data), direction.vector

  actual, expected, vector = run(jnp.full(_B, 1 / _B))
  np.testing.assert_allclose(actual, expected, rtol=1e-13)
  chex.assert_trees_all_equal_shapes_and_dtypes(vector, params)
  assert not vector["mask"].any()


def test_network_gradient_is_the_gradient_of_the_unrolled_meta_loss():
  batch, meta_batch = _data()
  params, optimizer = _params(), optax.sgd(0.3, momentum=0.9)
  state = _warm(optimizer, params)
  rng = np.random.default_rng(4)
  phi = {"hidden": rng.normal(size=(1, 3)), "out": rng.normal(size=3)}
  constants = jax.jit(_losses_fn)(params, batch)

  def weights_fn(phi):
    return (
      jax.nn.sigmoid(jnp.tanh(constants[:, None] @ phi["hidden"]) @ phi["out"]) / _B
    )

  def meta_loss(phi):
    return _meta_loss(
      _losses_fn, params, batch, meta_batch, weights_fn(phi), optimizer, state
    )

  @jax.jit
  def both(phi):
    weight_gradient = _weight_gradient(
      _losses_fn, params, batch, meta_batch, weights_fn(phi), optimizer, state
    )
    actual = hypergradient.network_gradient(weights_fn, phi, weight_gradient)
    return actual, jax.grad(meta_loss)(phi)

  actual, expected = both(phi)
  assert optax.tree.norm(expected) > 1e-3
  chex.assert_trees_all_close(actual, expected, rtol=1e-11)


def _direction(optimizer, meta_batch, params=None):
  params = _params() if params is None else params
  return hypergradient.direction(
    _losses_fn,
    params,
    meta_batch,
    optimizer=optimizer,
    opt_state=optimizer.init(params),
  )


_TRAPS = {
  "adam": optax.adam(0.1),
  "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", _TRAPS)
def test_an_optimizer_without_a_derivative_at_zero_is_reported(name):
  _, meta_batch = _data()
  with pytest.raises(FloatingPointError, match=r"meta gradient is finite.*adam"):
    _direction(_TRAPS[name], meta_batch)
  checked = checkify.checkify(
    jax.jit(lambda batch: _direction(_TRAPS[name], batch).finite)
  )
  error, finite = checked(meta_batch)
  assert not finite
  assert "adam with eps_root > 0" in error.get()
  assert not jax.jit(lambda batch: _direction(_TRAPS[name], batch).finite)(meta_batch)


def test_a_nan_meta_batch_is_not_blamed_on_the_optimizer():
  _, meta_batch = _data()
  meta_batch = {**meta_batch, "x": meta_batch["x"] * np.nan}
  with pytest.raises(FloatingPointError, match="check meta_batch"):
    _direction(optax.sgd(0.1), meta_batch)
  checked = checkify.checkify(
    jax.jit(lambda batch: _direction(optax.adam(0.1), batch).finite)
  )
  error, finite = checked(meta_batch)
  assert not finite
  assert "check meta_batch" in error.get()
  assert "eps_root" not in error.get()


def test_checkify_reports_no_error_for_a_finite_direction():
  _, meta_batch = _data()
  checked = checkify.checkify(
    jax.jit(lambda batch: _direction(optax.sgd(0.1), batch).finite)
  )
  error, finite = checked(meta_batch)
  error.throw()
  assert finite


_ZERO_SLOPE = {
  "lion": optax.lion(0.1),
  "sign_sgd": optax.sign_sgd(0.1),
  "accumulating": optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
  "apply_every": optax.chain(optax.apply_every(2), optax.sgd(0.1)),
  "warm_up": optax.sgd(optax.linear_schedule(0.0, 0.1, 5)),
}


@pytest.mark.parametrize("name", _ZERO_SLOPE)
def test_a_step_that_ignores_the_gradient_is_reported(name):
  _, meta_batch = _data()
  with pytest.raises(base.InputError, match="step does not change with the gradient"):
    _direction(_ZERO_SLOPE[name], meta_batch)
  result = jax.jit(lambda batch: _direction(_ZERO_SLOPE[name], batch))(meta_batch)
  assert result.finite and result.zero_slope
  assert not _direction(optax.sgd(0.1), meta_batch).zero_slope


def test_an_optimizer_that_uses_a_value_gets_one():
  _, meta_batch = _data()
  optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
  result, plain = (_direction(o, meta_batch) for o in (optimizer, optax.sgd(0.1)))
  chex.assert_trees_all_close(result.vector, plain.vector)


def test_a_line_search_is_refused():
  with pytest.raises(base.InputError, match=r"also needs .*value_fn.*optax.sgd"):
    _direction(optax.lbfgs(), _data()[1])


def _partly_nan(params, batch):
  # Like a gather that fills with NaN: the loss is NaN and its gradient zero.
  return jnp.where(jnp.arange(_M) >= 2, jnp.nan, _losses_fn(params, batch))


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_a_nan_loss_with_a_finite_gradient_is_reported(microbatch_size):
  if microbatch_size:
    losses_fn = lambda p, b: jnp.where(b["x"][:, 0] > -9, jnp.nan, _losses_fn(p, b))  # noqa: E731
  else:
    losses_fn = _partly_nan
  optimizer = optax.sgd(0.1)

  def run(meta_batch):
    return hypergradient.direction(
      losses_fn,
      _params(),
      meta_batch,
      optimizer=optimizer,
      opt_state=optimizer.init(_params()),
      microbatch_size=microbatch_size,
    )

  with pytest.raises(FloatingPointError, match=r"of 4 meta losses .* first in row"):
    run(_data()[1])
  result = jax.jit(run)(_data()[1])
  assert not result.finite and result.fault == base.Fault.META_LOSSES
  assert base.all_finite(result.vector)


@pytest.mark.parametrize(
  ("loss_fn", "optimizer", "fault", "message"),
  [
    (jnp.sqrt, optax.sgd(0.1), "META_GRADIENT", "their gradient is NaN or infinite"),
    (lambda p: 1e150 * p, optax.sgd(1e200), "OPTIMIZER_STEP", "it overflows"),
  ],
)
def test_overflow_is_reported_without_advice_on_adam(
  loss_fn, optimizer, fault, message
):
  def losses_fn(p, x):
    return loss_fn(p) * jnp.ones(2)

  def run(p):
    return hypergradient.direction(
      losses_fn, p, jnp.ones(2), optimizer=optimizer, opt_state=optimizer.init(p)
    )

  p = jnp.float64(0.0)
  with pytest.raises(FloatingPointError, match=message) as error:
    run(p)
  assert "adam" not in str(error.value)
  assert jax.jit(run)(p).fault == base.Fault[fault]


@pytest.mark.parametrize(
  ("result", "has_aux", "message"),
  [
    (jnp.ones(3), True, "must return two values"),
    (jnp.ones(3, int), False, "must be floating-point numbers"),
  ],
)
def test_meta_losses_without_aux_or_gradient_are_refused(result, has_aux, message):
  with pytest.raises(base.InputError, match=message):
    hypergradient.direction(
      lambda p, b: result,
      jnp.ones(2),
      None,
      optimizer=optax.sgd(1.0),
      opt_state=optax.sgd(1.0).init(jnp.ones(2)),
      has_aux=has_aux,
    )


def test_meta_losses_must_be_one_number_per_example():
  optimizer = optax.sgd(0.1)
  with pytest.raises(ValueError, match=r"meta_losses_fn's result .*got shape \(\)"):
    hypergradient.direction(
      lambda params, batch: _losses_fn(params, batch).mean(),
      _params(),
      _data()[1],
      optimizer=optimizer,
      opt_state=optimizer.init(_params()),
    )


def _regression():
  rng = np.random.default_rng(0)
  return [
    {"x": rng.normal(size=(size, 3)), "y": rng.normal(size=size)} for size in (_B, _M)
  ]


def _regression_params():
  rng = np.random.default_rng(1)
  return {"w": rng.normal(size=(3, 4)), "out": rng.normal(size=4)}


def _squared_losses_fn(params, batch):
  return (jnp.tanh(batch["x"] @ params["w"]) @ params["out"] - batch["y"]) ** 2


def _peaked(values):
  """An objective whose gradient in one loss depends on all losses."""
  return jax.nn.logsumexp(3 * values) / 3 + (values[0] - values[-1]) ** 2


def test_objectives_other_than_the_mean_equal_the_unrolled_step():
  batch, meta_batch = _regression()
  optimizer, weights = optax.sgd(0.3), jnp.full(_B, 1 / _B)
  options = {"optimizer": optimizer, "opt_state": optimizer.init(_regression_params())}
  options["objective"] = _peaked

  @jax.jit
  def both(params):
    linearized = linearization.linearize(_squared_losses_fn, params, batch)
    gradient = linearized.weighted_gradient(weights)
    direction = hypergradient.direction(
      _squared_losses_fn, params, meta_batch, gradient, **options
    )
    unrolled = hypergradient.unrolled_weight_gradient(
      _squared_losses_fn,
      _squared_losses_fn,
      params,
      batch,
      meta_batch,
      weights,
      **options,
    )
    ahead = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
    value = _peaked(_squared_losses_fn(ahead, meta_batch))
    actual = hypergradient.weight_gradient(linearized, direction)
    return (actual, direction.meta_loss), (unrolled, value)

  actual, expected = both(_regression_params())
  assert np.abs(expected[0]).max() > 1e-3
  np.testing.assert_allclose(actual[0], expected[0], rtol=1e-10, atol=1e-14)
  np.testing.assert_allclose(actual[1], expected[1], rtol=1e-13)


def _shard_map(check_vma):
  def wrap(fun, axis_name):
    mesh = jax.make_mesh(
      (2,),
      (axis_name,),
      axis_types=(jax.sharding.AxisType.Auto,),
      devices=jax.devices()[:2],
    )
    split, whole = jax.sharding.PartitionSpec(axis_name), jax.sharding.PartitionSpec()
    return jax.shard_map(
      fun, mesh=mesh, in_specs=(whole, split), out_specs=whole, check_vma=check_vma
    )

  return wrap


def _stacked(map_fn):
  def wrap(fun, axis_name):
    mapped = map_fn(fun, axis_name=axis_name, in_axes=(None, 0))

    def run(params, meta_batch):
      shards = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), meta_batch)
      results = mapped(params, shards)
      first, second = (jax.tree.map(lambda x, i=i: x[i], results) for i in (0, 1))
      chex.assert_trees_all_close(second, first, rtol=1e-13)
      return first

    return run

  return wrap


@pytest.mark.parametrize(
  "wrap",
  [_stacked(jax.pmap), _stacked(jax.vmap), _shard_map(True), _shard_map(False)],
  ids=["pmap", "vmap", "shard_map", "shard_map_unchecked"],
)
@pytest.mark.parametrize("objective", [None, _peaked], ids=["mean", "peaked"])
def test_objectives_use_the_losses_of_all_devices(wrap, objective):
  optimizer = optax.sgd(0.3)

  def run(axis_name):
    def direction(params, meta_batch):
      result = hypergradient.direction(
        _squared_losses_fn,
        params,
        meta_batch,
        optimizer=optimizer,
        opt_state=optimizer.init(params),
        objective=objective,
        axis_name=axis_name,
      )
      return result.vector, result.meta_loss

    return direction

  meta_batch = _regression()[1]
  expected = jax.jit(run(None))(_regression_params(), meta_batch)
  actual = wrap(run("devices"), "devices")(_regression_params(), meta_batch)
  chex.assert_trees_all_close(actual, expected, rtol=1e-12)

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


@functools.partial(jax.jit, static_argnums=0)
def _inner_gradients(losses_fn, weights):
  """The gradient of the weighted loss for each row of `weights`."""

  def gradient(weights):
    return jax.grad(lambda p: jnp.sum(weights * losses_fn(p, _data()[0])))(_params())

  return jax.vmap(gradient)(weights)


@functools.partial(jax.jit, static_argnums=0)
def _meta_losses(losses_fn, ahead):
  return jax.vmap(lambda params: jnp.mean(losses_fn(params, _data()[1])))(ahead)


def _three_ways(losses_fn, optimizer):
  """`(opt_state, weights) -> (weight gradient, unrolled, finite differences)`."""
  batch, meta_batch = _data()
  params = _params()

  @jax.jit
  def two_ways(opt_state, weights):
    data = (losses_fn, params, batch, meta_batch)
    unrolled = hypergradient.unrolled_weight_gradient(
      losses_fn, *data, weights, optimizer=optimizer, opt_state=opt_state
    )
    return _weight_gradient(*data, weights, optimizer, opt_state), unrolled

  @jax.jit
  def steps(opt_state, gradients):
    return jax.vmap(
      lambda g: hypergradient.lookahead_params(params, g, optimizer, opt_state)
    )(gradients)

  def three_ways(opt_state, weights, step=1e-5):
    perturbed = weights[None] + step * np.concatenate([np.eye(_B), -np.eye(_B)])
    ahead = steps(opt_state, _inner_gradients(losses_fn, perturbed))
    up, down = np.asarray(_meta_losses(losses_fn, ahead)).reshape(2, _B)
    return *two_ways(opt_state, weights), (up - down) / (2 * step)

  return three_ways


def _warm(optimizer, params):
  """An optimizer state as in the middle of a run."""
  rng = np.random.default_rng(3)

  def fill(x):
    if jnp.issubdtype(x.dtype, jnp.inexact):
      return rng.uniform(0.1, 1, size=x.shape).astype(x.dtype)
    return np.full(x.shape, 3, x.dtype)

  init = functools.partial(hypergradient.init_optimizer, optimizer)
  return jax.tree.map(fill, jax.eval_shape(init, params))


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
      "adam": optax.adam(0.1, eps_root=1e-3),
      "sgd": optax.sgd(0.3),
      "fixed": optax.set_to_zero(),
    },
    {"w1": "adam", "b1": "fixed", "w2": "sgd"},
  ),
}


def _assert_close(actual, expected, tolerance):
  """Compares relative to the largest entry, because only ratios of scores matter."""
  scale = np.abs(expected).max()
  assert scale > 1e-6
  np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.slow(unless=("adamw", "momentum", "sgd"))
@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_weight_gradient_equals_the_unrolled_step_and_finite_differences(name):
  optimizer = _OPTIMIZERS[name]
  three_ways = _three_ways(_losses_fn, optimizer)
  fresh = hypergradient.init_optimizer(optimizer, _params())
  for state in (fresh, _warm(optimizer, _params())):
    for weights in (np.zeros(_B), np.full(_B, 1 / _B)):
      actual, unrolled, differences = three_ways(state, weights)
      _assert_close(actual, unrolled, 1e-12)
      _assert_close(actual, differences, 1e-6)


def test_decay_in_the_loss_equals_the_unrolled_step():
  three_ways = _three_ways(_decayed_losses_fn, optax.sgd(0.3))
  state = optax.sgd(0.3).init(_params())
  actual, unrolled, differences = three_ways(state, np.full(_B, 1 / _B))
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


@pytest.mark.slow(unless=("None-2",))
@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("objective", [None, jnp.max])
def test_no_optimizer_is_a_step_of_sgd_with_a_learning_rate_of_one(
  objective, microbatch_size
):
  batch, meta_batch = _data()
  sgd = optax.sgd(1.0)

  @jax.jit
  def both(params):
    gradient = jax.grad(lambda p: _losses_fn(p, batch).mean())(params)
    direction = functools.partial(
      hypergradient.direction,
      *(_losses_fn, params, meta_batch, gradient),
      objective=objective,
      microbatch_size=microbatch_size,
    )
    return direction(), direction(optimizer=sgd, opt_state=sgd.init(params))

  actual, expected = both(_params())
  assert actual.finite and not actual.zero_slope and actual.fault == 0
  assert actual.value_slope is None and expected.value_slope == 0
  expected = expected._replace(value_slope=None)
  chex.assert_trees_all_close(actual, expected, rtol=1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("optimizer", [None, optax.sgd(0.3, momentum=0.9)])
def test_complex_parameters_equal_their_real_and_imaginary_parts(optimizer):
  def losses_fn(params, batch):
    if isinstance(params, dict):
      params = jax.lax.complex(params["real"], params["imaginary"])
    outputs = batch["x"] @ params
    return jnp.abs(outputs - batch["y"]) ** 2 + jnp.real(outputs**2)

  def normal(*shape):
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)

  rng = np.random.default_rng(6)
  batch, meta_batch = ({"x": normal(n, 3), "y": normal(n)} for n in (_B, _M))
  params, weights = jnp.asarray(normal(3)), jnp.arange(_B) / _B
  parts = {"real": params.real, "imaginary": params.imag}

  @jax.jit
  def scores(params):
    linearized = linearization.linearize(losses_fn, params, batch)
    direction = hypergradient.direction(
      *(losses_fn, params, meta_batch, linearized.weighted_gradient(weights)),
      optimizer=optimizer,
    )
    return hypergradient.weight_gradient(linearized, direction)

  np.testing.assert_allclose(scores(params), scores(parts), rtol=1e-12)


def test_ridge_regression_in_closed_form():
  rng = np.random.default_rng(2)
  x, y, meta_x, meta_y = (rng.normal(size=s) for s in [(_B, 3), _B, (_M, 3), _M])
  p, weights, rate = rng.normal(size=3), rng.uniform(size=_B), 0.2

  def losses_fn(params, batch):
    inputs, targets = batch
    return (inputs @ params - targets) ** 2 / 2 + _DECAY / 2 * params @ params

  gradients = x * (x @ p - y)[:, None] + _DECAY * p
  ahead = p - rate * weights @ gradients
  meta_gradient = meta_x.T @ (meta_x @ ahead - meta_y) / _M + _DECAY * ahead
  expected = -rate * gradients @ meta_gradient
  optimizer = optax.sgd(rate)

  @jax.jit
  def run(p, weights):
    state = optimizer.init(p)
    meta_batch = meta_x, meta_y
    return _weight_gradient(losses_fn, p, (x, y), meta_batch, weights, optimizer, state)

  np.testing.assert_allclose(run(p, weights), expected, rtol=1e-12)


class _Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, param_dtype=float)(x)
    x = nn.BatchNorm(use_running_average=False, param_dtype=float)(x)
    return nn.Dense(_CLASSES, param_dtype=float)(nn.tanh(x))


@pytest.mark.ci
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
  loss_values = jax.jit(_losses_fn)(params, batch)

  def weights_fn(phi):
    return (
      jax.nn.sigmoid(jnp.tanh(loss_values[:, None] @ phi["hidden"]) @ phi["out"]) / _B
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


# Outside `jit`, every operation and shape is compiled separately. The tests of fault
# reports therefore use the smallest problem: one parameter vector and squared losses.


def _targets():
  return np.arange(1.0, _M + 1)


def _faulty_losses_fn(params, targets):
  return (params.sum() - targets) ** 2


def _direction(optimizer, targets, losses_fn=_faulty_losses_fn, **options):
  params = jnp.ones(2)
  return hypergradient.direction(
    losses_fn,
    params,
    targets,
    optimizer=optimizer,
    opt_state=optimizer.init(params),
    **options,
  )


_TRAPS = {
  "adam": optax.adam(0.1),
  "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", _TRAPS)
def test_an_optimizer_without_a_derivative_at_zero_is_reported(name):
  with pytest.raises(FloatingPointError, match=r"meta gradient is finite.*adam"):
    _direction(_TRAPS[name], _targets())
  run = jax.jit(lambda targets: _direction(_TRAPS[name], targets).finite)
  error, finite = checkify.checkify(run)(_targets())
  assert not finite
  assert "adam with eps_root > 0" in error.get()
  assert not run(_targets())


def test_nan_meta_examples_are_not_blamed_on_the_optimizer():
  targets = _targets() * np.nan
  with pytest.raises(FloatingPointError, match="check meta_batch"):
    _direction(optax.sgd(0.1), targets)
  checked = checkify.checkify(
    jax.jit(lambda targets: _direction(optax.adam(0.1), targets).finite)
  )
  error, finite = checked(targets)
  assert not finite
  assert "check meta_batch" in error.get()
  assert "eps_root" not in error.get()


def test_checkify_reports_no_error_for_a_finite_direction():
  checked = checkify.checkify(
    jax.jit(lambda targets: _direction(optax.sgd(0.1), targets).finite)
  )
  error, finite = checked(_targets())
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
  with pytest.raises(base.InputError, match="step does not change with the gradient"):
    _direction(_ZERO_SLOPE[name], _targets())
  result = jax.jit(lambda targets: _direction(_ZERO_SLOPE[name], targets))(_targets())
  assert result.finite and result.zero_slope
  assert not _direction(optax.sgd(0.1), _targets()).zero_slope


def test_an_optimizer_that_requires_value_receives_a_default():
  optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
  result, plain = (_direction(o, _targets()) for o in (optimizer, optax.sgd(0.1)))
  chex.assert_trees_all_close(result.vector, plain.vector)


def test_a_function_that_makes_an_optimizer_is_refused():
  with pytest.raises(base.InputError, match="optimizer must be an optax optimizer"):
    hypergradient.init_optimizer(optax.sgd, {"w": jnp.zeros(2)})


def test_a_missing_opt_state_is_initialized_and_a_given_one_needs_its_optimizer():
  given = _direction(optax.sgd(0.1, momentum=0.9), _targets())
  params, adam = jnp.ones(2), optax.adam(0.1)
  direction = functools.partial(
    hypergradient.direction, _faulty_losses_fn, params, _targets()
  )
  new = direction(optimizer=optax.sgd(0.1, momentum=0.9))
  chex.assert_trees_all_equal(new, given)
  with pytest.raises(base.InputError, match="opt_state without optimizer"):
    direction(opt_state=adam.init(params))


@pytest.mark.parametrize("gradient", [np.ones(1), 1.0, np.ones((2, 3))])
@pytest.mark.parametrize("optimizer", [None, optax.sgd(0.1)])
def test_an_inner_gradient_of_another_shape_is_refused(gradient, optimizer):
  with pytest.raises(base.InputError, match="inner_gradient must have the shapes"):
    hypergradient.direction(
      lambda p, x: x @ p, np.ones(3), np.ones((4, 3)), gradient, optimizer=optimizer
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_inner_gradient_keeps_its_precision(dtype):
  params, x = jnp.array([0.5, -0.25]), jnp.array([[1.0, 2.0], [-1.0, 1.0]])
  gradient = jnp.array([1e5, -3e4], jnp.float32)  # The first is infinite in float16.
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))

  def direction(dtype):
    return hypergradient.direction(
      lambda p, x: (x.astype(p.dtype) @ p) ** 2,
      *(params.astype(dtype), x, gradient),
      optimizer=optimizer,
    ).vector

  expected = direction("float32")
  np.testing.assert_allclose(direction(dtype).astype(float), expected, rtol=0.02)


def test_the_inner_loss_is_one_number():
  call = functools.partial(
    hypergradient.direction,
    *(lambda p, x: x @ p, np.ones(3), np.ones((4, 3))),
    optimizer=optax.sgd(0.1),
  )
  np.testing.assert_allclose(call(value=2).vector, call(value=2.0).vector)
  with pytest.raises(base.InputError, match=r"value must be one number; got shape"):
    call(value=np.ones(1))


def test_parameters_that_cannot_be_trained_are_refused():
  with pytest.raises(base.InputError, match="nothing can be trained"):
    hypergradient.direction(lambda p, x: x @ p, np.arange(3), np.ones((4, 3)))


@pytest.mark.parametrize("shape", [(_B, 1), ()])
def test_weights_of_another_shape_are_refused(shape):
  with pytest.raises(base.InputError, match=r"for each weight gradient, shape \(5,\)"):
    hypergradient.network_gradient(
      lambda phi: phi * jnp.ones(shape), jnp.ones(()), np.ones(_B)
    )


@pytest.mark.parametrize(
  ("reshape", "weights", "message"),
  [
    (lambda x: x[:, None], np.ones(4), "must be one number per example"),
    (jnp.mean, np.ones(4), "must be one number per example"),
    (lambda x: x, np.ones(1), "weights must be one number per loss"),
  ],
)
def test_the_unrolled_step_refuses_other_shapes(reshape, weights, message):
  optimizer, params = optax.sgd(0.1), jnp.ones(3)
  with pytest.raises(base.InputError, match=message):
    hypergradient.unrolled_weight_gradient(
      lambda p, x: reshape(x @ p),
      lambda p, x: x @ p,
      params,
      np.ones((4, 3)),
      np.ones((4, 3)),
      weights,
      optimizer=optimizer,
      opt_state=optimizer.init(params),
    )


@pytest.mark.parametrize("objective", [jnp.argmax, lambda x: (x.sum(), 1)])
def test_an_objective_that_is_not_a_number_is_refused(objective):
  with pytest.raises(base.InputError, match="must return one floating-point number"):
    hypergradient.direction(
      lambda p, x: x @ p, np.ones(3), np.ones((4, 3)), objective=objective
    )


def test_sharpness_aware_minimization_is_refused():
  sam = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1))
  with pytest.raises(base.InputError, match="does not accept value"):
    hypergradient.direction(
      lambda p, x: x @ p, np.ones(3), np.ones((4, 3)), optimizer=sam
    )


@pytest.mark.ci
@pytest.mark.parametrize("optimizer", [optax.polyak_sgd(1e6), optax.sgd(0.1)])
def test_the_derivative_includes_the_inner_loss_that_an_optimizer_uses(optimizer):
  batch, meta_batch = _data()
  params, weights = _params(), np.array([0.3, 0.1, 0.2, 0.4, 0.05])
  opt_state = optimizer.init(params)
  arguments = (_losses_fn, params, batch, meta_batch, weights)
  linearized = linearization.linearize(_losses_fn, params, batch)
  direction = hypergradient.direction(
    _losses_fn,
    params,
    meta_batch,
    linearized.weighted_gradient(weights),
    optimizer=optimizer,
    opt_state=opt_state,
    value=weights @ linearized.losses,
  )

  def unrolled(weights):
    value, gradient = jax.value_and_grad(lambda p: weights @ _losses_fn(p, batch))(
      params
    )
    update = optax.with_extra_args_support(optimizer).update
    updates, _ = update(gradient, opt_state, params, value=value)
    return _losses_fn(optax.apply_updates(params, updates), meta_batch).mean()

  expected = jax.grad(unrolled)(weights)
  actual = hypergradient.weight_gradient(linearized, direction)
  np.testing.assert_allclose(actual, expected, rtol=1e-9)
  reference = hypergradient.unrolled_weight_gradient(
    arguments[0], *arguments, optimizer=optimizer, opt_state=opt_state
  )
  np.testing.assert_allclose(reference, expected, rtol=1e-9)


def test_a_line_search_is_refused():
  with pytest.raises(base.InputError, match=r"also needs .*value_fn.*optax.sgd"):
    jax.eval_shape(functools.partial(_direction, optax.lbfgs()), _targets())


@pytest.mark.parametrize("is_pair", [False, True])
def test_optax_lookahead_is_refused(is_pair):
  params, optimizer = jnp.zeros(2), optax.lookahead(optax.sgd(0.1), 2, 0.5)
  params = optax.LookaheadParams.init_synced(params) if is_pair else params
  with pytest.raises(base.InputError, match=r"fast optimizer, with params\.fast"):
    hypergradient.lookahead_params(params, params, optimizer, optimizer.init(params))


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_a_nan_loss_with_a_finite_gradient_is_reported(microbatch_size):
  def losses_fn(params, targets):
    # Like a gather that fills with NaN: the loss is NaN and its gradient zero.
    faulty_losses = _faulty_losses_fn(params, targets)
    return jnp.where(targets >= 3, jnp.nan, faulty_losses)

  def run(targets):
    return _direction(
      optax.sgd(0.1), targets, losses_fn, microbatch_size=microbatch_size
    )

  with pytest.raises(FloatingPointError, match=r"of 4 meta losses .* first in row"):
    run(_targets())
  result = jax.jit(run)(_targets())
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
  def losses_fn(params, targets):
    return _faulty_losses_fn(params, targets).mean()

  with pytest.raises(ValueError, match=r"meta_losses_fn's result .*got shape \(\)"):
    _direction(optax.sgd(0.1), _targets(), losses_fn)


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
  """An objective whose derivative with respect to each loss depends on all losses."""
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
    mapped = jax.shard_map(
      fun, mesh=mesh, in_specs=(whole, split), out_specs=whole, check_vma=check_vma
    )
    return jax.jit(mapped)

  return wrap


def _stacked(map_fn):
  def wrap(fun, axis_name):
    mapped = map_fn(fun, axis_name=axis_name, in_axes=(None, 0))

    def run(params, meta_batch):
      shards = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), meta_batch)
      results = jax.device_get(mapped(params, shards))
      first, second = (jax.tree.map(lambda x, i=i: x[i], results) for i in (0, 1))
      chex.assert_trees_all_close(second, first, rtol=1e-13)
      return first

    return run

  return wrap


def _directions(axis_name, params, meta_batch):
  """The vector and the meta loss of the direction, for each of two objectives."""
  optimizer = optax.sgd(0.3)

  def direction(objective):
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

  return {"mean": direction(None), "peaked": direction(_peaked)}


@pytest.mark.parametrize(
  "wrap",
  [
    _stacked(jax.pmap),
    _stacked(lambda *args, **options: jax.jit(jax.vmap(*args, **options))),
    _shard_map(True),
    _shard_map(False),
  ],
  ids=["pmap", "vmap", "shard_map", "shard_map_unchecked"],
)
def test_objectives_use_the_losses_of_all_devices(wrap):
  data = _regression_params(), _regression()[1]
  expected = jax.jit(functools.partial(_directions, None))(*data)
  actual = wrap(functools.partial(_directions, "devices"), "devices")(*data)
  chex.assert_trees_all_close(actual, expected, rtol=1e-12)


def test_the_direction_of_half_precision_may_hold_integers():
  vector = {"w": jnp.array([3e-5, -4e-5], jnp.float16), "count": jnp.array(3)}
  scaled, length = hypergradient._unit(vector)
  assert scaled["count"] == 3 and scaled["w"].dtype == jnp.float16
  assert 0.5 <= np.linalg.norm(np.asarray(scaled["w"], float)) <= 1
  np.testing.assert_allclose(
    np.asarray(scaled["w"], float) * length, np.asarray(vector["w"], float), rtol=1e-3
  )

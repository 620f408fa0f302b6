"""FORML: its first-order identity, persistent weights, edge cases."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import group_objectives
from l2rw_jax import hypergradient
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.methods import forml
from l2rw_jax.methods import l2rw

_B, _M, _CLASSES, _N = 6, 8, 3, 20
_ALPHA, _ETA = 0.2, 0.3


def _examples(seed, size):
  rng = np.random.default_rng(seed)
  return {
    "x": rng.normal(size=(size, 4)),
    "label": rng.integers(_CLASSES, size=size),
    "index": rng.permutation(_N)[:size],
    "group": np.arange(size) % _CLASSES,
  }


_BATCH, _META = _examples(0, _B), _examples(1, _M)
_WEIGHTS = np.random.default_rng(3).uniform(0.5, 1.5, size=_B)


def _params(seed=2):
  rng = np.random.default_rng(seed)
  shapes = {"w": (4, 5), "out": (5, _CLASSES)}
  return {k: rng.normal(size=v) for k, v in shapes.items()}


def _losses_fn(params, batch):
  logits = jnp.tanh(batch["x"] @ params["w"]) @ params["out"]
  return losses.softmax_cross_entropy(logits, batch["label"])


_SETTINGS = {
  "mean": {"name": "mean"},
  "gap": {"name": "gap"},
  "gap_pure": {"name": "gap", "mean_coefficient": 0.0},
  "gap_max": {"name": "gap", "reduction": "max", "mean_coefficient": 0.5},
  "worst": {"name": "worst"},
  "worst_smooth": {"name": "worst", "temperature": 0.3},
  "soft_tpr": {"name": "soft_tpr"},
  "soft_tpr_max": {"name": "soft_tpr", "reduction": "max"},
  "soft_tpr_worst": {"name": "soft_tpr", "reduction": "worst", "temperature": 0.1},
}


@functools.cache
def _objective(setting):
  objective_fn = forml.make_objective(**_SETTINGS[setting])
  return lambda values: objective_fn(values, jnp.arange(_M) % _CLASSES, _CLASSES)


def _update(params, weights, objective, eta=_ETA, batch=_BATCH, meta_batch=_META):
  return forml.example_weights(
    _losses_fn,
    params,
    batch,
    meta_batch,
    weights,
    objective,
    weight_learning_rate=eta,
    inner_learning_rate=_ALPHA,
  )


_jitted_update = jax.jit(_update, static_argnames=("objective", "eta"))


def _run(objective, weights=_WEIGHTS, params=None, **options):
  weights = jnp.asarray(weights)
  return _jitted_update(params or _params(), weights, objective, **options)


_STEP = 1e-6


@jax.jit
def _run_and_references(number, params, weights, batch, meta_batch):
  """The update, and reference values of its parts, in one program for all settings."""
  settings = [_objective(setting) for setting in _SETTINGS]

  def objective(values):
    return jnp.stack([fair(values) for fair in settings])[number]

  def ahead(weights):
    weighted = jax.grad(lambda p: jnp.sum(weights * _losses_fn(p, batch)))(params)
    return jax.tree.map(lambda p, g: p - _ALPHA * g, params, weighted)

  def fair_loss(params):
    return objective(_losses_fn(params, meta_batch))

  result = _update(params, weights, objective, _ETA, batch, meta_batch)
  value, slope = jax.value_and_grad(fair_loss)(ahead(weights))
  jacobian = jax.jacrev(_losses_fn)(params, batch)
  perturbed = weights[None] + _STEP * jnp.concatenate([jnp.eye(_B), -jnp.eye(_B)])
  values = jax.vmap(lambda w: fair_loss(ahead(w)))(perturbed)
  return result, value, slope, jacobian, values, _losses_fn(params, batch)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("setting", _SETTINGS)
def test_first_order_identity_and_finite_differences(setting):
  weights = _WEIGHTS / _WEIGHTS.sum()
  number = list(_SETTINGS).index(setting)
  # Copies, because JAX would cache the 64-bit versions of _BATCH and _META.
  copies = jax.tree.map(np.array, (_BATCH, _META))
  result, value, slope, jacobian, values, losses_before = jax.device_get(
    _run_and_references(number, _params(), weights, *copies)
  )
  np.testing.assert_allclose(result.objective, value, rtol=1e-12)
  # dF/dw_i = -alpha <grad F(p'), grad l_i(p)>.
  products = [np.tensordot(j, slope[name], 2) for name, j in jacobian.items()]
  np.testing.assert_allclose(result.gradient, -_ALPHA * sum(products), 1e-10)
  differences = (values[:_B] - values[_B:]) / (2 * _STEP)
  np.testing.assert_allclose(result.gradient, differences, rtol=1e-5, atol=1e-8)
  expected = np.maximum(weights - _ETA * result.gradient, 0)
  np.testing.assert_allclose(result.weights, expected / expected.sum(), rtol=1e-12)
  np.testing.assert_allclose(result.losses, losses_before, rtol=1e-12)
  assert result.finite and result.aux is None


@pytest.mark.slow
def test_scale_of_the_weights_does_not_matter():
  objective = _objective("worst")
  expected, result = _run(objective), _run(objective, 50 * _WEIGHTS)
  np.testing.assert_allclose(result.weights, expected.weights, rtol=1e-5)


def test_mean_objective_from_zero_weights_is_l2rw():
  result = _run(_objective("mean"), np.zeros(_B), eta=1.0)
  run = functools.partial(l2rw.example_weights, _losses_fn)
  expected = jax.jit(run)(_params(), _BATCH, _META)
  np.testing.assert_allclose(result.weights, expected.weights, rtol=1e-4, atol=1e-6)


def _squared(params, batch):
  return (batch["x"] @ params - batch["y"]) ** 2


@functools.partial(jax.jit, static_argnames="objective")
def _two_groups_update(weights, targets, objective):
  return forml.example_weights(
    _squared,
    jnp.zeros(2),
    {"x": jnp.eye(2), "y": jnp.ones(2)},
    {"x": jnp.eye(2), "y": targets},
    weights,
    lambda values: objective(values, jnp.arange(2), 2),
    weight_learning_rate=0.1,
    inner_learning_rate=0.1,
  )


def _two_groups(targets, objective, weights=(1.0, 1.0)):
  """Two parameters, one per group: example i lowers only the loss of group i."""
  return jax.device_get(
    _two_groups_update(jnp.array(weights), jnp.array(targets), objective)
  )


def test_update_matches_hand_computed_values():
  # p' = 0 + 0.1 * 0.5 * 2 = 0.1 in both; exemplar losses 0.9^2 and 2.9^2.
  result = _two_groups([1.0, 3.0], group_objectives.worst)
  np.testing.assert_allclose(result.objective, 8.41, rtol=1e-6)
  # -0.1 * (-2 * 2.9) * (-2) = -1.16 for the example of the worse group.
  np.testing.assert_allclose(result.gradient, [0, -1.16], rtol=1e-5)
  np.testing.assert_allclose(result.weights, np.array([0.5, 0.616]) / 1.116, rtol=1e-5)
  result = _two_groups([1.0, 3.0], group_objectives.gap)
  np.testing.assert_allclose(result.gradient, [0.36, -1.16], rtol=1e-5)
  np.testing.assert_allclose(result.weights, np.array([0.464, 0.616]) / 1.08, rtol=1e-5)


@pytest.mark.parametrize("objective", [group_objectives.gap, group_objectives.worst])
def test_exchanged_groups_exchange_the_weights(objective):
  one = _two_groups([1.0, 3.0], objective)
  other = _two_groups([3.0, 1.0], objective)
  assert one.weights[1] > 0.5 > one.weights[0]
  np.testing.assert_allclose(other.weights, one.weights[::-1], rtol=1e-6)
  np.testing.assert_allclose(other.gradient, one.gradient[::-1], rtol=1e-6)


def test_gap_of_equal_groups_does_not_change_the_weights():
  result = _two_groups([3.0, 3.0], group_objectives.gap, (1.0, 1.0))
  assert not result.gradient.any()
  np.testing.assert_allclose(result.weights, [0.5, 0.5])


def test_all_zero_weights_stay_finite():
  weights, gradient = jnp.array([0.5, 0.5]), jnp.array([6.0, 9.0])
  assert not forml.update_weights(weights, gradient, 0.1).any()
  np.testing.assert_allclose(
    forml.update_weights(weights, gradient, 1 / 15), [1.0, 0.0], rtol=1e-5
  )
  # Zero weights give no look-ahead step and no NaN, and can become positive.
  result = _two_groups([1.0, 3.0], group_objectives.worst, (0.0, 0.0))
  np.testing.assert_allclose(result.weights, [0.0, 1.0])


def test_weights_before_the_update_must_not_be_negative():
  message = r"1 of 2 weights .* in row 1 \(a negative .*check the weights before"
  with jax.disable_jit(), pytest.raises(FloatingPointError, match=message):
    _two_groups([1.0, 3.0], group_objectives.worst, (1.0, -1.0))


def test_the_objective_must_return_a_scalar():
  with pytest.raises(base.InputError, match="objective must return one floating"):
    _two_groups([1.0, 3.0], lambda losses, groups, num_groups: losses)


def test_a_missing_meta_batch_is_refused():
  rates = {"weight_learning_rate": _ETA, "inner_learning_rate": _ALPHA}
  with pytest.raises(base.InputError, match="meta_batch is None: give the exemplars"):
    jax.eval_shape(
      lambda: forml.example_weights(
        _losses_fn, _params(), _BATCH, None, _WEIGHTS, jnp.mean, **rates
      )
    )


def test_no_gradient_flows_through_the_weights():
  def total(params):
    result = _update(params, jnp.asarray(_WEIGHTS), _objective("gap"))
    return jnp.sum(result.weights * jnp.arange(1.0 * _B))

  gradients = jax.jit(jax.grad(total))(_params())
  assert not any(x.any() for x in jax.tree.leaves(gradients))


def test_nan_is_reported():
  params = _params()
  params["w"] = params["w"] * np.nan
  result = _run(_objective("worst"), params=params)
  assert not result.finite
  assert np.isnan(result.weights).any()


def _problem(axis_name=None):
  def forward(params, model_state, batch, key, train):
    del key, train
    logits = jnp.tanh(batch["x"] @ params["w"]) @ params["out"]
    return logits, model_state

  return base.Problem(
    forward=forward,
    loss=lambda logits, batch: losses.softmax_cross_entropy(logits, batch["label"]),
    linearize=linearization.linearize,
    linearize_outputs=linearization.linearize_outputs,
    num_classes=_CLASSES,
    class_counts=jnp.array([10, 6, 4]),
    num_examples=_N,
    num_steps=5,
    axis_name=axis_name,
  )


def _inputs(batch, meta_batch=_META):
  key = jax.random.key(0)
  return base.Inputs(_params(), {}, (), batch, meta_batch, jnp.int32(0), key)


@pytest.mark.slow
def test_weights_are_stored_per_example_in_units_of_the_uniform_weight():
  method = forml.forml(_ETA, "worst", inner_learning_rate=_ALPHA)
  assert method.needs_meta
  state = method.init(jax.random.key(0), _problem(), _params())
  np.testing.assert_array_equal(state, np.ones(_N))
  run = jax.jit(lambda s, b: method.gradients(s, _problem(), _inputs(b)))
  result, state = run(state, _BATCH)
  expected = _run(_objective("worst"), np.ones(_B))
  np.testing.assert_allclose(result.weights, expected.weights, rtol=1e-4)
  np.testing.assert_allclose(state[_BATCH["index"]], _B * result.weights, rtol=1e-6)
  assert np.ptp(result.weights) > 0.01
  others = np.setdiff1d(np.arange(_N), _BATCH["index"])
  np.testing.assert_array_equal(state[others], np.ones(_N - _B))
  weighted = jax.jit(
    jax.grad(lambda p: jnp.sum(result.weights * _losses_fn(p, _BATCH)))
  )
  chex.assert_trees_all_close(result.grads, weighted(_params()), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(result.metrics["objective"], expected.objective, rtol=1e-5)
  # The next update starts from the stored weights.
  again, _ = run(state, _BATCH)
  expected = _run(_objective("worst"), result.weights)
  np.testing.assert_allclose(again.weights, expected.weights, rtol=1e-4)


@pytest.mark.slow(unless=("4-False",))
@pytest.mark.parametrize(("num_devices", "is_repeated"), [(2, True), (4, False)])
def test_weights_and_state_do_not_depend_on_the_number_of_devices(
  num_devices, is_repeated
):
  """Exemplars are divided among the devices, or repeated on each of them."""
  batch = _examples(5, 8)
  method = forml.forml(_ETA, "gap", inner_learning_rate=_ALPHA)

  def step(axis_name, state, batch, meta_batch):
    inputs = _inputs(batch, meta_batch)
    return method.gradients(state, _problem(axis_name), inputs)

  expected, expected_state = jax.jit(functools.partial(step, None))(
    jnp.ones(_N), batch, _META
  )
  share = functools.partial(
    jax.tree.map, lambda x: x.reshape(num_devices, -1, *x.shape[1:])
  )
  mapped = jax.pmap(
    functools.partial(step, "d"), "d", in_axes=(None, 0, None if is_repeated else 0)
  )
  meta_batch = _META if is_repeated else share(_META)
  result, state = mapped(jnp.ones(_N), share(batch), meta_batch)
  np.testing.assert_allclose(result.weights.ravel(), expected.weights, rtol=1e-4)
  for index in range(num_devices):
    np.testing.assert_allclose(state[index], expected_state, rtol=1e-4)
    on_device = jax.tree.map(lambda x, i=index: x[i], (result.grads, result.metrics))
    chex.assert_trees_all_close(
      on_device, (expected.grads, expected.metrics), rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
def test_groups_fn_defines_the_groups():
  method = forml.forml(
    _ETA,
    "worst",
    2,
    inner_learning_rate=_ALPHA,
    groups_fn=lambda batch: batch["label"] // 2,
  )
  run = jax.jit(lambda s: method.gradients(s, _problem(), _inputs(_BATCH)))
  result, _ = run(jnp.ones(_N))
  objective = functools.partial(
    group_objectives.worst, groups=jnp.asarray(_META["label"] // 2), num_groups=2
  )
  expected = _run(objective, np.ones(_B))
  np.testing.assert_allclose(result.weights, expected.weights, rtol=1e-4)


def test_exemplars_without_groups_are_refused_except_for_the_mean():
  plain = {k: v for k, v in _META.items() if k != "group"}

  def run(name):
    method = forml.forml(objective=name)
    step = jax.jit(lambda s: method.gradients(s, _problem(), _inputs(_BATCH, plain)))
    return step(jnp.ones(_N))

  for name in ("gap", "worst", "soft_tpr"):
    with pytest.raises(base.InputError, match=f"no 'group', .* objective='{name}'"):
      run(name)
  result, _ = run("mean")
  np.testing.assert_allclose(result.weights.sum(), 1, rtol=1e-5)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"objective": "fair"}, "objective='fair': choose one of"),
    ({"reduction": "sum"}, "reduction='sum': choose one of"),
    ({"objective": "worst", "temperature": -0.1}, "temperature=-0.1 must be at least"),
    ({"temperature": 0.0}, "objective='gap', temperature=0.0: it has no temperature"),
    (
      {"objective": "soft_tpr", "reduction": "worst", "mean_coefficient": 1.0},
      "reduction='worst', mean_coefficient=1.0: it has no mean_coefficient; leave it",
    ),
    (
      {"objective": "soft_tpr", "reduction": "max", "temperature": 0.1},
      "reduction='max', temperature=0.1: it has no temperature",
    ),
    ({"objective": "worst", "reduction": "mean"}, "'worst', .* it has no reduction"),
    ({"objective": "mean", "mean_coefficient": 1}, "'mean', .* it has no mean_coef"),
    ({"temprature": 0.1}, "it has no temprature"),
    (
      {"weight_learning_rate": -1.0},
      "forml: weight_learning_rate=-1.0 must be at least 0",
    ),
    ({"weight_learning_rate": float("nan")}, "learning_rate=nan must be at least 0"),
    ({"inner_learning_rate": -1.0}, "inner_learning_rate=-1.0 must be at least 0"),
    ({"num_groups": 0}, "num_groups=0 must be an integer of at least 1"),
    ({"mean_coefficient": float("nan")}, "mean_coefficient=nan must be finite"),
  ],
)
def test_settings_out_of_range_are_refused(settings, message):
  with pytest.raises(base.InputError, match=message):
    forml.forml(**settings)


def test_unrolled_weight_gradient_supports_objectives():
  objective, optimizer = _objective("worst"), optax.sgd(_ALPHA)
  expected = jax.jit(
    lambda p, w: hypergradient.unrolled_weight_gradient(
      _losses_fn,
      _losses_fn,
      p,
      _BATCH,
      _META,
      w,
      optimizer=optimizer,
      opt_state=optimizer.init(p),
      objective=objective,
    )
  )(_params(), _WEIGHTS / _WEIGHTS.sum())
  np.testing.assert_allclose(_run(objective).gradient, expected, rtol=1e-4, atol=1e-6)

"""AdaCore: averages, curvature, CRAIG as its special case, selection, sampling."""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import coresets
from l2rw_jax import losses
from l2rw_jax.methods import adacore
from l2rw_jax.methods import baselines
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

_LOGITS = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
_LABELS = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 15))


def _losses(logits, labels=_LABELS):
  log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
  return -log_p[:, 0]


@pytest.mark.parametrize(
  "labels", [_LABELS[:, None], np.eye(4, dtype=int)[_LABELS], _LABELS[:1]]
)
def test_proxies_refuse_labels_that_would_broadcast(labels):
  with pytest.raises(base.InputError, match=r"labels must be integers of shape \[B\]"):
    adacore.gradient_proxies(_LOGITS, labels)


def test_proxies_are_the_gradient_with_respect_to_the_logits():
  expected = jax.jit(jax.grad(lambda z: _losses(z).sum()))(_LOGITS)
  result = adacore.gradient_proxies(_LOGITS, _LABELS)
  np.testing.assert_allclose(result, expected, atol=1e-6)
  extreme = adacore.gradient_proxies(
    jnp.array([[1e4, 0.0], [0.0, 1e4]]), jnp.zeros(2, int)
  )
  np.testing.assert_allclose(extreme, [[0, 0], [-1, 1]])


def test_proxies_of_a_single_logit_are_the_gradient_of_its_loss():
  logits, labels = jnp.array([[0.5], [-1.0], [2.0]]), jnp.array([1, 0, 2])
  gradient = jax.jit(jax.grad(lambda z: losses.sigmoid_cross_entropy(z, labels).sum()))
  result = adacore.gradient_proxies(logits, labels)
  np.testing.assert_allclose(result[:2], gradient(logits)[:2], rtol=1e-6)
  assert np.isnan(result[2]).all()


def test_averages_of_three_updates_by_hand():
  averages = adacore.Averages(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), int))
  results = []
  for curvature, gradient in ((2.0, 1.0), (-4.0, 0.5), (3.0, -1.0)):
    averages = adacore.update_averages(averages, jnp.array(gradient), curvature)
    results.append(adacore.bias_corrected(averages, epsilon=0.0))
  # The mean of the gradients with the weights 0.9^i, and the square root of the mean of
  # the squared curvatures with the weights 0.999^i.
  expected = [(1, 2), (0.736842, 3.162752), (0.095941, 3.109394)]
  np.testing.assert_allclose(results, expected, rtol=2e-5)
  _, scale = adacore.bias_corrected(averages, power=0.0, epsilon=0.0)
  assert scale == 1


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999999, 0.99999999])
def test_the_bias_correction_of_one_update_is_exact(beta):
  averages = adacore.Averages(jnp.zeros(()), jnp.zeros(()), jnp.int32(0))
  averages = adacore.update_averages(averages, 3.0, 2.0, beta, beta)
  result = adacore.bias_corrected(averages, beta, beta, epsilon=0.0)
  np.testing.assert_allclose(result, (3, 2), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_averages_of_small_curvatures_in_half_precision_are_not_zero(dtype):
  curvature = jnp.full((1, 2), 1e-3, dtype)
  zeros = jnp.zeros((1, 2))
  averages = adacore.Averages(zeros, zeros, jnp.int32(0))
  averages = adacore.update_averages(averages, curvature, curvature)
  gradient, scale = adacore.bias_corrected(averages, epsilon=0.0)
  np.testing.assert_allclose(gradient, curvature.astype(np.float32), rtol=1e-5)
  np.testing.assert_allclose(scale, curvature.astype(np.float32), rtol=1e-5)


def test_hutchinson_estimates_the_diagonal_of_the_cross_entropy():
  logits = np.log(np.array([[0.7, 0.2, 0.1]], np.float32))
  result = jax.jit(
    lambda z: adacore.hessian_diagonal(
      jax.random.key(0), lambda z: _losses(z, np.zeros(1, int)).sum(), z, 4000
    )
  )(logits)
  np.testing.assert_allclose(result, [[0.21, 0.16, 0.09]], atol=6e-3)


def test_one_probe_is_exact_for_a_diagonal_hessian_of_any_pytree():
  scales = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0]])}

  def loss(x):
    return sum(jnp.sum(scales[name] * v**2) / 2 for name, v in x.items())

  result = jax.jit(lambda x: adacore.hessian_diagonal(jax.random.key(0), loss, x))(
    scales
  )
  chex.assert_trees_all_close(result, scales)


def test_proxies_of_labels_out_of_range_are_nan():
  result = adacore.gradient_proxies(jnp.zeros((3, 4)), jnp.array([-1, 0, 4]))
  np.testing.assert_array_equal(np.isnan(result).all(axis=1), [True, False, True])


_CLASSES = 3


def _examples(size):
  """One Gaussian blob per class."""
  rng = np.random.default_rng(7)
  label = rng.permutation(np.arange(size) % _CLASSES).astype(np.int32)
  image = rng.normal(size=(_CLASSES, 4))[label] + 0.5 * rng.normal(size=(size, 4))
  index = np.arange(size, dtype=np.int32)
  return {"image": image.astype(np.float32), "label": label, "index": index}


@functools.cache
def _setup(num_train=120, hidden=(5,)):
  model = classifier.Classifier(mlp.MLP(_CLASSES, hidden), _CLASSES)
  train = _examples(num_train)
  params, model_state = jax.jit(model.init)(jax.random.key(3), train)
  problem = model.problem(
    class_counts=np.bincount(train["label"], minlength=_CLASSES),
    num_examples=num_train,
    num_steps=10,
  )

  def view(epoch):
    rng = np.random.default_rng([5, epoch])
    return base.EpochView(0, epoch, params, model_state, train, rng)

  return problem, params, train, view


def _refreshed(method, setup, epochs=(0,), state=None):
  problem, params, _, view = setup
  if state is None:
    state = method.init(jax.random.key(0), problem, params)
  for epoch in epochs:
    state = method.refresh(state, problem, view(epoch))
  return state


def _proxies(setup):
  problem, params, train, _ = setup

  @jax.jit
  def proxies(params):
    logits, _ = problem.forward(params, {}, train, jax.random.key(0), False)
    return adacore.gradient_proxies(logits, train["label"])

  return np.asarray(proxies(params))


@pytest.mark.slow
def test_craig_selects_by_plain_gradients():
  setup = _setup()
  state = _refreshed(adacore.adacore(0.2, curvature=False), setup)
  expected = coresets.select(_proxies(setup), setup[2]["label"], 24)
  np.testing.assert_array_equal(state.rows, expected.rows)
  np.testing.assert_allclose(
    np.asarray(state.weights)[expected.rows], expected.weights / 5
  )
  assert state.weights.sum() == pytest.approx(24)
  assert state.averages is None


def test_settings_reach_the_selection(monkeypatch):
  """`coresets/selection_test.py` tests their effects."""
  setup = _setup()
  given = {"budget": "equal", "greedy": "stochastic"}
  calls = []

  def select(*arguments, **settings):
    calls.append((arguments, settings))
    return types.SimpleNamespace(rows=np.arange(10, 34), weights=np.ones(24))

  monkeypatch.setattr(coresets, "select", select)
  _refreshed(adacore.adacore(0.2, curvature=False, **given, greedy_epsilon=0.5), setup)
  [(arguments, settings)] = calls
  proxies, labels, size = arguments
  np.testing.assert_allclose(proxies, _proxies(setup), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(labels, setup[2]["label"])
  assert size == 24
  assert given.items() <= settings.items() and settings["epsilon"] == 0.5


@pytest.mark.slow("shared-True")
@pytest.mark.parametrize(
  ("scope", "last_layer"), [("shared", False), ("shared", True), ("example", False)]
)
def test_adacore_without_curvature_power_is_craig(scope, last_layer):
  setup = _setup()
  craig = adacore.adacore(0.2, curvature=False, last_layer=last_layer)
  # With these betas the bias correction has no rounding error. That matters because, in
  # exact arithmetic, two neighbors have equal gains: rounding decides between them.
  without_power = adacore.adacore(
    0.2,
    hessian_scope=scope,
    beta1=0.5,
    beta2=0.5,
    power=0.0,
    epsilon=0.0,
    last_layer=last_layer,
  )
  adacore_state, craig_state = (
    _refreshed(method, setup) for method in (without_power, craig)
  )
  np.testing.assert_array_equal(adacore_state.rows, craig_state.rows)
  np.testing.assert_array_equal(adacore_state.weights, craig_state.weights)


def test_preconditioner_is_the_curvature_of_the_scope():
  setup = _setup()
  proxies = _proxies(setup)
  probabilities = proxies + np.eye(_CLASSES)[setup[2]["label"]]
  exact = probabilities * (1 - probabilities)
  state = _refreshed(adacore.adacore(0.2, num_probes=3000), setup)
  # After one update, the averages are 1 - beta times the squares and the gradients.
  np.testing.assert_allclose(
    np.sqrt(state.averages.squares / 1e-3), exact.mean(axis=0), rtol=0.02
  )
  method = adacore.adacore(0.2, hessian_scope="example", num_probes=3000)
  state = _refreshed(method, setup)
  np.testing.assert_allclose(np.sqrt(state.averages.squares / 1e-3), exact, rtol=0.1)
  np.testing.assert_allclose(state.averages.gradients, 0.1 * proxies, rtol=1e-4)


def test_curvature_of_the_last_layer():
  setup = _setup()
  problem, params, train, view = setup
  features, _ = jax.jit(
    lambda p: problem.features(p, {}, train, jax.random.key(0), False)
  )(params)
  probabilities = _proxies(setup) + np.eye(_CLASSES)[train["label"]]
  inputs = np.concatenate([features, np.ones((120, 1))], axis=1)
  exact = probabilities * (1 - probabilities)
  exact = (exact[:, :, None] * inputs[:, None] ** 2).mean(axis=0)
  derivatives = adacore.loss_derivatives(
    problem,
    view(0),
    jax.random.key(0),
    scope="shared",
    last_layer=True,
    num_probes=3000,
  )
  np.testing.assert_allclose(derivatives.curvature, exact, rtol=0.1)
  np.testing.assert_allclose(derivatives.features, features)


@pytest.mark.parametrize(
  ("dtype", "last_layer"), [("float32", False), ("bfloat16", True)]
)
def test_loss_derivatives_of_narrow_parameters_are_float32(dtype, last_layer):
  # A mixture of types raises an error, since tests run with strict promotion.
  problem, params, train, view = _setup()
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  narrow_view = view(0)._replace(
    params=params, train={**train, "image": train["image"].astype(dtype)}
  )
  with jax.enable_x64(dtype == "float32"):
    result = adacore.loss_derivatives(
      problem,
      narrow_view,
      jax.random.key(0),
      scope="shared",
      last_layer=last_layer,
      num_probes=1,
    )
  assert result.gradients.dtype == result.curvature.dtype == jnp.float32


@pytest.mark.slow
def test_loss_derivatives_do_not_depend_on_the_batch_size(monkeypatch):
  setup = _setup()

  def derivatives():
    return adacore.loss_derivatives(
      setup[0],
      setup[3](0),
      jax.random.key(0),
      scope="shared",
      last_layer=True,
      num_probes=2,
    )

  whole = derivatives()
  monkeypatch.setattr(adacore, "_BATCH_SIZE", 50)
  chex.assert_trees_all_close(derivatives(), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_expected_gradient_is_weighted_and_approaches_the_full_gradient():
  setup = _setup()
  problem, params, train, _ = setup

  def gradient(state, rows, method):
    batch = {k: v[rows] for k, v in train.items()}
    inputs = base.Inputs(params, {}, (), batch, None, 0, jax.random.key(0))
    step = jax.jit(lambda state, inputs: method.gradients(state, problem, inputs))
    return jax.device_get(step(state, inputs)[0].grads)

  full = gradient((), np.arange(120), baselines.uniform())
  method = adacore.adacore(0.25, curvature=False)
  state = _refreshed(method, setup)
  order = method.sample(state, problem, train, np.random.default_rng(0))
  parts = [gradient(state, order[i : i + 10], method) for i in range(0, 30, 10)]
  mean = jax.tree.map(lambda *x: sum(x) / 3, *parts)
  # A batch of B of the r selected rows has the weights gamma r / (N B). The mean of the
  # r / B batch gradients is thus the sum of gamma times the gradient, divided by N.
  gammas = np.asarray(state.weights) * np.float32(120 / 30)

  @jax.jit
  @jax.grad
  def slope(p):
    outputs, _ = problem.forward(p, {}, train, jax.random.key(0), True)
    return jnp.sum(gammas * problem.loss(outputs, train)) / 120

  chex.assert_trees_all_close(mean, slope(params), atol=1e-6)

  proxies = _proxies(setup)

  def error(state, size):
    weights = np.asarray(state.weights) * np.float32(120 / size)
    return np.linalg.norm(weights @ proxies / 120 - proxies.mean(axis=0))

  all_rows = _refreshed(adacore.adacore(1.0, curvature=False), setup)
  # The full gradient has the norm 0.02, and 95% of random subsets an error above 0.03.
  assert error(state, 30) < 0.01 and error(all_rows, 120) < 1e-6
  whole = gradient(all_rows, np.arange(120), method)
  chex.assert_trees_all_close(whole, full, atol=1e-6)


def test_sample_passes_over_the_subset_after_the_warmup():
  setup = _setup()
  problem, _, train, view = setup
  method = adacore.adacore(0.1, 3, curvature=False, warmup_epochs=1)
  state = _refreshed(method, setup)
  rng = np.random.default_rng(0)
  assert sorted(method.sample(state, problem, train, rng)) == list(range(120))
  np.testing.assert_array_equal(state.weights, np.ones(120))
  state = method.refresh(state, problem, view(1))
  order = method.sample(state, problem, train, rng)
  assert len(order) == 36
  for start in (0, 12, 24):
    assert sorted(order[start : start + 12]) == state.rows.tolist()
  assert not np.array_equal(order[:12], order[12:24])


def test_refresh_keeps_shapes_and_depends_only_on_state_and_view():
  setup = _setup()
  for scope, greedy in (("shared", "stochastic"), ("example", "lazy")):
    method = adacore.adacore(0.1, hessian_scope=scope, greedy=greedy)
    before = method.init(jax.random.key(0), setup[0], setup[1])
    state = _refreshed(method, setup, (0, 1))
    chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
    halfway = jax.device_get(_refreshed(method, setup, (0,)))
    again = _refreshed(method, setup, (1,), halfway)
    chex.assert_trees_all_equal(again, state)
    assert state.num_selections == 2 and state.averages.num_updates == 2


@pytest.mark.parametrize("size", [10, 49, 98, 103, 1000])
def test_a_kept_subset_of_one_example_is_visited_n_times(size):
  method = adacore.random_subset(1 / size, None)
  rows, selections = jnp.zeros(1, jnp.int32), jnp.int32(1)
  state = adacore.State(rows, jnp.ones(size), selections, None)
  assert len(method.sample(state, None, None, np.random.default_rng(0))) == size


def test_random_subset_is_redrawn_or_kept():
  setup = _setup()
  problem, _, train, _ = setup
  redrawn, kept_method = (adacore.random_subset(0.1, every) for every in (2, None))
  first, second = (_refreshed(redrawn, setup, range(n)) for n in (1, 2))
  assert not np.array_equal(first.rows, second.rows)
  kept = [_refreshed(kept_method, setup, range(n)) for n in (1, 2)]
  chex.assert_trees_all_equal(*kept)
  assert len(set(first.rows.tolist())) == 12
  sizes = [
    len(m.sample(s, problem, train, np.random.default_rng(0)))
    for m, s in ((redrawn, first), (kept_method, kept[0]))
  ]
  assert sizes == [24, 120]
  np.testing.assert_array_equal(first.weights, np.ones(120))


@pytest.mark.slow
def test_binary_network_with_one_logit():
  train = _examples(60)
  train["label"] = train["label"] % 2
  model = classifier.Classifier(mlp.MLP(1, ()), 2)
  params, _ = jax.jit(model.init)(jax.random.key(0), train)
  problem = model.problem(class_counts=np.array([30, 30]), num_examples=60, num_steps=1)
  view = base.EpochView(0, 0, params, {}, train, np.random.default_rng(0))
  for scope in adacore.SCOPES:
    method = adacore.adacore(0.2, hessian_scope=scope)
    state = method.refresh(
      method.init(jax.random.key(0), problem, params), problem, view
    )
    assert state.weights.sum() == pytest.approx(12)
    np.testing.assert_array_equal(state.averages.gradients[:, 1], 0)


_MISTAKES = {
  "fraction=0 must be above 0": {"fraction": 0},
  "fraction=1.5 must be above 0 and at most 1": {"fraction": 1.5},
  "fraction=nan": {"fraction": float("nan")},
  "refresh_every=0 must be an integer of at least 1": {"refresh_every": 0},
  "warmup_epochs=-1 must be an integer of at least 0": {"warmup_epochs": -1},
  "greedy='fast': choose one of": {"greedy": "fast"},
  "epsilon=1.0 must lie between": {"greedy_epsilon": 1.0},
  "hessian_scope='all'": {"hessian_scope": "all"},
  "last_layer=True: choose one of": {"last_layer": True, "hessian_scope": "example"},
}


@pytest.mark.parametrize("message", _MISTAKES)
def test_settings_out_of_range_are_refused(message):
  with pytest.raises(base.InputError, match=message):
    adacore.adacore(**({"fraction": 0.1} | _MISTAKES[message]))


def test_random_subset_refuses_a_fraction_above_1():
  with pytest.raises(base.InputError, match="fraction=2"):
    adacore.random_subset(2.0)


def test_last_layer_requires_a_network_with_features():
  setup = _setup(hidden=())
  with pytest.raises(base.InputError, match="needs a network with features"):
    _refreshed(adacore.adacore(0.1, last_layer=True), setup)
  problem = dataclasses.replace(setup[0], num_features=None)
  with pytest.raises(base.InputError, match="needs a network with features"):
    adacore.adacore(0.1, last_layer=True, curvature=False).refresh(
      _refreshed(adacore.adacore(0.1, curvature=False), setup), problem, setup[3](0)
    )


def test_the_curvature_needs_a_probe():
  with pytest.raises(
    base.InputError, match="num_probes=0 must be an integer of at least 1"
  ):
    adacore.hessian_diagonal(jax.random.key(0), jnp.sum, jnp.ones(2), num_probes=0)


def test_the_fraction_of_a_subset_may_be_in_half_precision():
  # The number of examples, 100,000, is infinite in half precision.
  assert adacore.subset_size(np.float16(0.125), 100_000) == 12_500

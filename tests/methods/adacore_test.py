"""AdaCore: golden averages, curvature, CRAIG as its special case, exact resumption."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import coreset
from l2rw_jax import distances
from l2rw_jax import facility_location
from l2rw_jax.methods import adacore
from l2rw_jax.methods import adacore_table
from l2rw_jax.methods import baselines
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

pytestmark = pytest.mark.usefixtures("quick_compilation")

_LOGITS = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
_LABELS = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 15))


def _losses(logits, labels=_LABELS):
  own = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
  return -own[:, 0]


# -- formulas ----------------------------------------------------------------


def test_proxies_are_the_gradient_at_the_logits():
  expected = jax.grad(lambda z: _losses(z).sum())(_LOGITS)
  found = adacore.gradient_proxies(_LOGITS, _LABELS)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  sure = adacore.gradient_proxies(
    jnp.array([[1e4, 0.0], [0.0, 1e4]]), jnp.zeros(2, int)
  )
  np.testing.assert_allclose(sure, [[0, 0], [-1, 1]])


def test_averages_golden():
  # D = 2, -4, 3 and g = 1, 0.5, -1: `reference`, C.6.
  averages = adacore.Averages(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), int))
  found = []
  for curvature, gradient in ((2.0, 1.0), (-4.0, 0.5), (3.0, -1.0)):
    averages = adacore.update_averages(averages, jnp.array(gradient), curvature)
    found.append(adacore.corrected(averages, epsilon=0.0))
  np.testing.assert_allclose(found, np.array(_GOLDEN), rtol=2e-5)
  _, off = adacore.corrected(averages, power=0.0, epsilon=0.0)
  assert off == 1


_GOLDEN = [(1, 2), (0.736842, 3.162752), (0.095941, 3.109394)]


def test_hutchinson_finds_the_diagonal_of_the_cross_entropy():
  logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
  found = adacore_table.hessian_diagonal(
    jax.random.key(0), lambda z: _losses(z, np.zeros(1, int)).sum(), logits, 4000
  )
  np.testing.assert_allclose(found, [[0.21, 0.16, 0.09]], atol=6e-3)


def test_one_probe_is_exact_for_a_diagonal_hessian_of_any_pytree():
  scales = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0]])}

  def loss(x):
    return sum(jnp.sum(scales[name] * v**2) / 2 for name, v in x.items())

  found = adacore_table.hessian_diagonal(jax.random.key(0), loss, scales)
  chex.assert_trees_all_close(found, scales)


# -- choosing class by class -------------------------------------------------


@pytest.mark.parametrize("budget", coreset.BUDGETS)
@pytest.mark.parametrize("size", [4, 7, 30, 57, 60])
def test_budgets_are_of_the_size_and_spare_no_class(budget, size):
  counts = [30, 18, 9, 3]
  found = coreset.class_budgets(counts, size, budget)
  assert found.sum() == size
  assert (found >= 1).all() and (found <= counts).all()
  assert (np.diff(found) <= 0).all()


def test_budgets_by_hand():
  np.testing.assert_array_equal(coreset.class_budgets([60, 0, 40], 10), [6, 0, 4])
  # 97 % and three of 1 %: each of the rare takes one from the large.
  np.testing.assert_array_equal(coreset.class_budgets([97, 1, 1, 1], 5), [2, 1, 1, 1])
  found = coreset.class_budgets([50, 30, 2], 12, "equal")
  np.testing.assert_array_equal(found, [5, 5, 2])


@pytest.mark.parametrize("greedy", coreset.GREEDY)
def test_selection_is_greedy_in_each_class_and_its_weights_sum_to_n(greedy):
  proxies = np.asarray(adacore.gradient_proxies(_LOGITS, _LABELS))
  found = coreset.select(
    proxies, _LABELS, 12, greedy=greedy, epsilon=1e-9, key=jax.random.key(0)
  )
  assert found.weights.sum() == 60
  assert (np.diff(found.rows) > 0).all()
  budgets = coreset.class_budgets(np.bincount(_LABELS).tolist(), 12)
  for c, budget in enumerate(budgets):
    members = np.flatnonzero(c == _LABELS)
    own = np.isin(found.rows, members)
    assert found.weights[own].sum() == members.size
    expected = facility_location.lazy_greedy(
      distances.vectors(proxies[members]), int(budget)
    )
    if greedy == "lazy":
      rows = members[np.asarray(expected.rows)]
      order = np.argsort(rows)
      np.testing.assert_array_equal(found.rows[own], rows[order])
      np.testing.assert_array_equal(found.weights[own], expected.weights[order])
    else:  # Every candidate is among so many draws; ties aside it is greedy too.
      away = np.linalg.norm(proxies[members, None] - proxies[found.rows[own]], axis=2)
      np.testing.assert_allclose(
        away.min(axis=1).sum(), expected.distances.sum(), rtol=0.05
      )


def test_outer_products_choose_what_formed_ones_do():
  rng = np.random.default_rng(0)
  features, scale = rng.normal(size=(60, 6)), rng.uniform(0.5, 2.0, size=(4, 7))
  with_bias = np.concatenate([features, np.ones((60, 1))], axis=1)
  proxies = adacore.gradient_proxies(_LOGITS, _LABELS)
  for given in (None, scale):
    formed = np.asarray(proxies)[:, :, None] * with_bias[:, None]
    formed = formed if given is None else formed / given
    expected = coreset.select(formed.reshape(60, -1), _LABELS, 15)
    found = coreset.select(proxies, _LABELS, 15, features=features, scale=given)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.weights, expected.weights)


@pytest.mark.parametrize("scaled", [False, True])
def test_distances_of_outer_products_and_of_equal_points(scaled):
  rng = np.random.default_rng(0)
  left, right = rng.normal(size=(30, 4)), 100 * rng.normal(size=(30, 50))
  left[7], right[7] = left[3], right[3]
  scale = rng.uniform(0.5, 2.0, size=(4, 50)) if scaled else None
  formed = left[:, :, None] * right[:, None]
  formed = formed if scale is None else formed / scale
  expected = np.linalg.norm((formed[:, None] - formed).reshape(30, 30, -1), axis=2)
  points = distances.outer_products(
    left.astype(np.float32), right.astype(np.float32), scale
  )
  found = np.asarray(points.distances(jnp.arange(30)))
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3 * expected.max())
  assert found[3, 7] == found[7, 3] == 0 and (np.diag(found) == 0).all()
  # Beyond a few coordinates vectors are measured by inner products as well.
  flat = distances.vectors(formed.reshape(30, -1).astype(np.float32))
  assert flat.distances(jnp.array([3]))[0, 7] == 0


# -- the method --------------------------------------------------------------


_CLASSES = 3


def _examples(size):
  """Blobs, one a class."""
  rng = np.random.default_rng(7)
  label = rng.permutation(np.arange(size) % _CLASSES).astype(np.int32)
  image = rng.normal(size=(_CLASSES, 4))[label] + 0.5 * rng.normal(size=(size, 4))
  index = np.arange(size, dtype=np.int32)
  return {"image": image.astype(np.float32), "label": label, "index": index}


def _problem(num_train=120, hidden=(5,)):
  model = classifier.Classifier(mlp.MLP(_CLASSES, hidden), _CLASSES)
  train = _examples(num_train)
  params, model_state = model.init(jax.random.key(3), train)
  task = model.task(
    class_counts=jnp.bincount(train["label"], length=_CLASSES),
    num_examples=num_train,
    num_steps=10,
  )

  def view(epoch):
    rng = np.random.default_rng([5, epoch])
    return base.EpochView(0, epoch, params, model_state, train, rng)

  return task, params, train, view


def _refreshed(method, problem, epochs=(0,), state=None):
  task, params, _, view = problem
  if state is None:
    state = method.init(jax.random.key(0), task, params)
  for epoch in epochs:
    state = method.refresh(state, task, view(epoch))
  return state


def _proxies(problem):
  task, params, train, _ = problem
  logits, _ = task.forward(params, {}, train, jax.random.key(0), False)
  return adacore.gradient_proxies(logits, train["label"])


def test_craig_is_selection_by_plain_gradients():
  problem = _problem()
  state = _refreshed(adacore.adacore(0.2, curvature=False), problem)
  expected = coreset.select(_proxies(problem), problem[2]["label"], 24)
  np.testing.assert_array_equal(state.rows, expected.rows)
  np.testing.assert_allclose(state.weights[expected.rows], expected.weights / 5)
  assert state.weights.sum() == pytest.approx(24)
  assert state.averages is None


@pytest.mark.parametrize(
  ("scope", "last_layer"), [("shared", False), ("shared", True), ("example", False)]
)
def test_adacore_without_curvature_power_is_craig(scope, last_layer):
  problem = _problem()
  craig = adacore.adacore(0.2, curvature=False, last_layer=last_layer)
  flat = adacore.adacore(
    0.2, hessian_scope=scope, power=0.0, epsilon=0.0, last_layer=last_layer
  )
  ours, theirs = (_refreshed(method, problem) for method in (flat, craig))
  np.testing.assert_array_equal(ours.rows, theirs.rows)
  np.testing.assert_array_equal(ours.weights, theirs.weights)


def test_preconditioning_is_by_the_curvature_of_the_scope():
  problem = _problem()
  proxies = np.asarray(_proxies(problem))
  probabilities = proxies + np.eye(_CLASSES)[problem[2]["label"]]
  exact = probabilities * (1 - probabilities)
  state = _refreshed(adacore.adacore(0.2, num_probes=3000), problem)
  np.testing.assert_allclose(
    np.sqrt(state.averages.squares / 1e-3), exact.mean(axis=0), rtol=0.02
  )
  found = adacore.adacore(0.2, hessian_scope="example", num_probes=3000)
  state = _refreshed(found, problem)
  np.testing.assert_allclose(
    np.sqrt(state.averages.squares / 1e-3), exact, rtol=0.2, atol=0.01
  )
  np.testing.assert_allclose(state.averages.gradients, 0.1 * proxies, rtol=1e-4)


def test_curvature_of_the_last_layer():
  problem = _problem()
  task, params, train, view = problem
  features, _ = task.features(params, {}, train, jax.random.key(0), False)
  probabilities = np.asarray(_proxies(problem))
  probabilities = probabilities + np.eye(_CLASSES)[train["label"]]
  seen = np.concatenate([features, np.ones((120, 1))], axis=1)
  exact = probabilities * (1 - probabilities)
  exact = (exact[:, :, None] * seen[:, None] ** 2).mean(axis=0)
  table = adacore_table.look(
    task, view(0), jax.random.key(0), scope="shared", last_layer=True, num_probes=3000
  )
  np.testing.assert_allclose(table.curvature, exact, atol=0.1 * exact.max())
  np.testing.assert_allclose(table.features, features)


def test_several_batches_are_one_look(monkeypatch):
  problem = _problem()

  def look(scope):
    return adacore_table.look(
      problem[0],
      problem[3](0),
      jax.random.key(0),
      scope=scope,
      last_layer=True,
      num_probes=2,
    )

  whole = look("shared")
  monkeypatch.setattr(adacore_table, "_BATCH", 50)
  chex.assert_trees_all_close(look("shared"), whole, rtol=1e-4, atol=1e-6)


def test_the_expected_gradient_is_the_weighted_sum_and_tends_to_the_full_one():
  problem = _problem()
  task, params, train, _ = problem

  def gradient(state, rows, method):
    batch = {k: v[rows] for k, v in train.items()}
    inputs = base.Inputs(params, {}, (), batch, None, 0, jax.random.key(0))
    return method.gradients(state, task, inputs)[0].grads

  full = gradient((), np.arange(120), baselines.uniform())
  method = adacore.adacore(0.25, curvature=False)
  state = _refreshed(method, problem)
  order = method.sample(state, task, train, np.random.default_rng(0))
  parts = [gradient(state, order[i : i + 10], method) for i in range(0, 30, 10)]
  mean = jax.tree.map(lambda *x: sum(x) / 3, *parts)
  # gamma r / (N B) over batches of B: the sum of gamma grad / N.
  gammas = state.weights * 120 / 30

  def loss(p):
    outputs, _ = task.forward(p, {}, train, jax.random.key(0), True)
    return jnp.sum(gammas * task.loss(outputs, train)) / 120

  chex.assert_trees_all_close(mean, jax.grad(loss)(params), atol=1e-6)

  def error(fraction):
    state = _refreshed(adacore.adacore(fraction, curvature=False), problem)
    weights = state.weights * 120 / round(fraction * 120)
    found = weights @ _proxies(problem) / 120
    return np.linalg.norm(found - _proxies(problem).mean(axis=0))

  assert error(0.25) < 0.05 and error(1.0) < 1e-6
  everything = _refreshed(adacore.adacore(1.0, curvature=False), problem)
  whole = gradient(everything, np.arange(120), method)
  chex.assert_trees_all_close(whole, full, atol=1e-6)


def test_samples_are_passes_over_the_subset_after_a_warm_up():
  problem = _problem()
  task, _, train, view = problem
  method = adacore.adacore(0.1, 3, curvature=False, warmup_epochs=1)
  state = _refreshed(method, problem)
  rng = np.random.default_rng(0)
  assert sorted(method.sample(state, task, train, rng)) == list(range(120))
  np.testing.assert_array_equal(state.weights, np.ones(120))
  state = method.refresh(state, task, view(1))
  order = method.sample(state, task, train, rng)
  assert len(order) == 36
  for start in (0, 12, 24):
    assert sorted(order[start : start + 12]) == state.rows.tolist()
  assert not np.array_equal(order[:12], order[12:24])


def test_refresh_keeps_shapes_and_follows_state_and_view_alone():
  problem = _problem()
  for scope, greedy in (("shared", "stochastic"), ("example", "lazy")):
    method = adacore.adacore(0.1, hessian_scope=scope, greedy=greedy)
    before = method.init(jax.random.key(0), problem[0], problem[1])
    state = _refreshed(method, problem, (0, 1))
    chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
    halfway = jax.device_get(_refreshed(method, problem, (0,)))
    again = _refreshed(method, problem, (1,), halfway)
    chex.assert_trees_all_equal(again, state)
    assert state.num_selections == 2 and state.averages.num_updates == 2


def test_random_subsets_drawn_anew_and_once():
  problem = _problem()
  task, _, train, _ = problem
  anew, once = (adacore.random_subset(0.1, every) for every in (2, None))
  first, second = (_refreshed(anew, problem, range(n)) for n in (1, 2))
  assert not np.array_equal(first.rows, second.rows)
  kept = [_refreshed(once, problem, range(n)) for n in (1, 2)]
  chex.assert_trees_all_equal(*kept)
  assert len(set(first.rows.tolist())) == 12
  sizes = [
    len(m.sample(s, task, train, np.random.default_rng(0)))
    for m, s in ((anew, first), (once, kept[0]))
  ]
  assert sizes == [24, 120]
  np.testing.assert_array_equal(first.weights, np.ones(120))


def test_a_binary_network_of_one_logit():
  train = _examples(60)
  train["label"] = train["label"] % 2
  model = classifier.Classifier(mlp.MLP(1, ()), 2)
  params, _ = model.init(jax.random.key(0), train)
  task = model.task(class_counts=jnp.array([30, 30]), num_examples=60, num_steps=1)
  view = base.EpochView(0, 0, params, {}, train, np.random.default_rng(0))
  for scope in adacore_table.SCOPES:
    method = adacore.adacore(0.2, hessian_scope=scope)
    state = method.refresh(method.init(jax.random.key(0), task, params), task, view)
    assert state.weights.sum() == pytest.approx(12)
    np.testing.assert_array_equal(state.averages.gradients[:, 1], 0)


_MISTAKES = {
  "fraction=0 must be above 0": {"fraction": 0},
  "fraction=1.5 must be above 0 and at most 1": {"fraction": 1.5},
  "fraction=nan": {"fraction": float("nan")},
  "refresh_every=0 must be at least 1": {"refresh_every": 0},
  "warmup_epochs=-1 at least 0": {"warmup_epochs": -1},
  "greedy='fast': choose one of": {"greedy": "fast"},
  "epsilon=1.0 must lie between": {"greedy_epsilon": 1.0},
  "hessian_scope='all'": {"hessian_scope": "all"},
  "last_layer=True: choose one of": {"last_layer": True, "hessian_scope": "example"},
}


@pytest.mark.parametrize("complaint", _MISTAKES)
def test_a_setting_out_of_range_is_told(complaint):
  with pytest.raises(base.InputError, match=complaint):
    adacore.adacore(**({"fraction": 0.1} | _MISTAKES[complaint]))


def test_what_cannot_be_chosen_is_told():
  proxies = np.zeros((60, 4))
  with pytest.raises(base.InputError, match="size=3 of 60 examples in 4 classes"):
    coreset.select(proxies, _LABELS, 3)
  with pytest.raises(base.InputError, match="budget='fair'"):
    coreset.select(proxies, _LABELS, 10, budget="fair")
  proxies[7, 2] = np.nan
  with pytest.raises(base.InputError, match=r"1 of the proxies .* is of example 7"):
    coreset.select(proxies, _LABELS, 10)
  with pytest.raises(base.InputError, match="fraction=2"):
    adacore.random_subset(2.0)
  problem = _problem(hidden=())
  with pytest.raises(base.InputError, match="needs a network with features"):
    _refreshed(adacore.adacore(0.1, last_layer=True), problem)
  task = dataclasses.replace(problem[0], num_features=None)
  with pytest.raises(base.InputError, match="needs a network with features"):
    adacore.adacore(0.1, last_layer=True, curvature=False).refresh(
      _refreshed(adacore.adacore(0.1, curvature=False), problem), task, problem[3](0)
    )

"""LDAM-DRW: margins, losses, deferred balancing, combination with other methods."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import changed_loss
from l2rw_jax.methods import baselines
from l2rw_jax.methods import ldam_drw
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.training import evaluation

_COUNTS = np.array([81, 16, 1])
_MARGINS = np.array([1 / 6, 1 / 4, 1 / 2])  # n^(-1/4) / 2.
_B = 12


_margins = jax.jit(ldam_drw.margins)


def test_margins_for_long_tailed_cifar_10():
  counts = np.array([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
  expected = [0.1581, 0.1797, 0.2042, 0.2321, 0.2638, 0.2998, 0.3407, 0.3872, 0.4405]
  result = np.asarray(_margins(counts))
  np.testing.assert_allclose(result, [*expected, 0.5], atol=5e-5)
  np.testing.assert_allclose(ldam_drw.margins(counts, 0.3), 0.6 * result, rtol=1e-6)


def test_margins_of_classes_with_one_or_no_example():
  np.testing.assert_allclose(_margins(_COUNTS), _MARGINS, rtol=1e-6)
  np.testing.assert_allclose(_margins(np.array([0, 16, 0])), [0, 0.5, 0])
  np.testing.assert_array_equal(_margins(np.zeros(3, int)), [0, 0, 0])
  slope_fn = jax.jit(jax.grad(lambda n: ldam_drw.margins(n).sum()))
  slope = slope_fn(np.array([0.0, 16.0, 1.0]))
  assert np.isfinite(slope).all()
  assert ldam_drw.margins(np.zeros(0)).shape == (0,)


def _literal(z, label, hinge):
  """Loss of one example in double precision by the paper's formula, scale 30."""
  others = np.delete(z, label)
  label_cosine = z[label] - _MARGINS[label]
  if hinge:
    return max(others.max() - label_cosine, 0)
  return -np.log(
    np.exp(30 * label_cosine) / (np.exp(30 * label_cosine) + np.exp(30 * others).sum())
  )


def _both(cosines, labels, margins):
  """Losses [B] and the gradients of their sums, by whether the loss is the hinge."""

  def values(z):
    return {
      False: ldam_drw.ldam(z, labels, margins),
      True: ldam_drw.ldam_hinge(z, labels, margins),
    }

  gradients = jax.jacrev(lambda z: jax.tree.map(jnp.sum, values(z)))(cosines)
  return values(cosines), gradients


_run_both = jax.jit(_both)


@pytest.mark.usefixtures("x64")
def test_losses_and_gradients_match_the_formulas_and_finite_differences():
  cosines = np.random.default_rng(0).uniform(-1, 1, size=(_B, 3))
  labels = np.arange(_B) % 3
  result, gradients = _run_both(cosines, labels, _MARGINS)
  for hinge in (False, True):
    expected = [_literal(*given, hinge) for given in zip(cosines, labels, strict=True)]
    np.testing.assert_allclose(result[hinge], expected, rtol=1e-10, atol=1e-12)
  assert min(result[True]) == 0 < max(result[True])
  for column in np.eye(3):
    above, below = (
      jax.device_get(_run_both(cosines + s * column, labels, _MARGINS)[0])
      for s in (1e-6, -1e-6)
    )
    for hinge in (False, True):
      difference = (above[hinge] - below[hinge]) / 2e-6
      slope = np.asarray(gradients[hinge]) @ column
      np.testing.assert_allclose(slope, difference, atol=1e-6)


def test_losses_of_extreme_cosines_are_finite():
  rows = np.array([[1, -1, -1], [-1, 1, 1], [1, 1, 1], [1e4, -1e4, 0]], np.float32)
  labels = np.tile(np.arange(3), 4)
  result = jax.device_get(_run_both(np.repeat(rows, 3, 0), labels, _MARGINS))
  for leaf in jax.tree.leaves(result):
    assert np.isfinite(leaf).all()
  # In the first row the label is class 0. Its cosine less the margin is 2 - 1/6 above
  # the others.
  assert result[0][False][0] == pytest.approx(
    np.log1p(2 * np.exp(-30 * (2 - 1 / 6))), abs=1e-6
  )
  np.testing.assert_allclose(result[0][True][:3], [0, 2.25, 2.5], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("hinge", [False, True])
def test_losses_in_half_precision_are_rounded_only_at_the_end(hinge, dtype):
  rng = np.random.default_rng(0)
  half = jnp.asarray(rng.uniform(-1, 1, size=(300, 3)), dtype)
  wide, labels = half.astype(jnp.float32), rng.integers(3, size=300)
  actual, slope = _run_both(half, labels, _MARGINS)
  expected, expected_slope = _run_both(wide, labels, _MARGINS)
  assert actual[hinge].dtype == slope[hinge].dtype == half.dtype
  np.testing.assert_array_equal(actual[hinge], expected[hinge].astype(dtype))
  eps = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(
    slope[hinge].astype(np.float32), expected_slope[hinge], rtol=2 * eps, atol=2 * eps
  )
  losses = ldam_drw.ldam(half, labels, _MARGINS, np.float32(30))
  assert losses.dtype == half.dtype


def test_vmap_gives_the_same_losses():
  rng = np.random.default_rng(1)
  cosines = rng.uniform(-1, 1, size=(2, _B, 3)).astype(np.float32)
  labels = rng.integers(3, size=(2, _B))
  margins = np.stack([_MARGINS, _MARGINS[::-1]]).astype(np.float32)
  result = jax.device_get(jax.jit(jax.vmap(_both))(cosines, labels, margins))
  for run in range(2):
    alone = _run_both(cosines[run], labels[run], margins[run])
    chex.assert_trees_all_close(
      jax.tree.map(lambda x, i=run: x[i], result), alone, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("hinge", [False, True])
def test_examples_that_do_not_count_have_a_loss_and_slope_of_zero(hinge):
  rng = np.random.default_rng(0)
  cosines = rng.uniform(-1, 1, size=(3, 3)).astype(np.float32)
  cosines[1] = np.nan
  labels, where = np.array([0, 9, 2]), np.array([True, False, True])
  loss = ldam_drw.ldam_hinge if hinge else ldam_drw.ldam

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def total(cosines):
    losses = loss(cosines, labels, _MARGINS.astype(np.float32), where=where)
    return losses.sum(), losses

  (_, losses), slope = total(cosines)
  for i in (0, 2):
    expected = _literal(cosines[i].astype(float), labels[i], hinge)
    np.testing.assert_allclose(losses[i], expected, rtol=1e-4, atol=1e-5)
  assert losses[1] == 0 and not slope[1].any() and np.isfinite(slope).all()


# -- The method ---------------------------------------------------------------

_LABELS = np.array([0, 0, 1, 0, 2, 1], np.int32)
_EFFECTIVE = (1 - 0.9**_COUNTS) / (1 - 0.9)


@functools.cache
def _setup(cosine=True, counts=tuple(_COUNTS)):
  """A learning problem and the inputs of a step."""
  model = classifier.Classifier(mlp.MLP(3, (5,), cosine), 3)
  problem = model.problem(class_counts=np.array(counts), num_examples=98, num_steps=9)
  batch = {
    "image": np.random.default_rng(2).normal(size=(6, 4)).astype(np.float32),
    "label": _LABELS,
    "index": np.arange(6),
  }
  params, _ = jax.jit(model.init)(jax.random.key(0), batch)
  key = jax.random.key(1)
  return problem, base.Inputs(params, {}, (), batch, None, jnp.int32(0), key)


def _refreshed(method, epoch, cosine=True):
  problem, inputs = _setup(cosine)
  state = method.init(jax.random.key(2), problem, inputs.params)
  view = types.SimpleNamespace(epoch=epoch, params=inputs.params)
  return method.refresh(state, problem, view)


@functools.cache
def _step_fn(method):
  problem, _ = _setup()
  return jax.jit(lambda state, given: method.gradients(state, problem, given)[0])


def _step(method, epoch=0):
  return _step_fn(method)(_refreshed(method, epoch), _setup()[1])


def _cosines(params):
  problem, inputs = _setup()
  return problem.forward(params, {}, inputs.batch, inputs.key, True)[0]


@pytest.mark.ci
@pytest.mark.slow("True")
@pytest.mark.parametrize("hinge", [False, True])
def test_ldam_drw_reweights_from_its_epoch(hinge):
  method = ldam_drw.ldam_drw(0.3, 5.0, 0.9, 4, hinge=hinge)
  margins = (0.3 / 0.5 * _MARGINS).astype(np.float32)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def slope_and_losses(params, weights):
    if hinge:
      values = ldam_drw.ldam_hinge(_cosines(params), _LABELS, margins)
    else:
      values = ldam_drw.ldam(_cosines(params), _LABELS, margins, scale=5.0)
    return jnp.sum(values * weights), values

  for epoch, is_balanced in ((0, False), (3, False), (4, True)):
    result = _step(method, epoch)
    unnormalized = 1 / _EFFECTIVE[_LABELS] if is_balanced else np.ones(6)
    weights = (unnormalized / unnormalized.sum()).astype(np.float32)
    np.testing.assert_allclose(result.weights, weights, rtol=1e-5)
    slope, values = slope_and_losses(_setup()[1].params, weights)
    np.testing.assert_allclose(result.losses, values, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(result.grads, slope, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
  ("epoch", "drawn"), [(3, [80, 16, 1]), (4, [32, 32, 32])], ids=["before", "from"]
)
def test_ldam_drs_resamples_from_its_epoch(epoch, drawn):
  method = ldam_drw.ldam_drw(from_epoch=4, balance="resample")
  labels = np.repeat([0, 1, 2], [80, 16, 1])
  train = {"label": labels, "index": np.arange(97)}
  rng = np.random.default_rng(0)
  rows = method.sample(_refreshed(method, epoch), _setup()[0], train, rng)
  np.testing.assert_array_equal(np.bincount(labels[rows]), drawn)
  assert (np.bincount(rows, minlength=97) == 1).all() == (epoch == 3)


def test_ldam_without_balancing_and_as_a_loss_for_another_method():
  method = ldam_drw.ldam_drw(balance="none")
  assert method.sample is base.permutation
  result = _step(method, epoch=1000)
  np.testing.assert_allclose(result.weights, np.full(6, 1 / 6), rtol=1e-6)
  other = changed_loss.changed_loss(baselines.class_proportion(), ldam_drw.loss())
  np.testing.assert_allclose(_step(other).losses, result.losses, rtol=1e-5)


def test_evaluation_predicts_the_largest_cosine():
  problem, inputs = _setup()
  batch = inputs.batch
  result = evaluation.predict(problem, inputs.params, {}, batch)
  np.testing.assert_array_equal(
    result.predicted, np.argmax(jax.jit(_cosines)(inputs.params), axis=1)
  )


def test_logits_that_are_not_cosines_are_refused_before_the_first_step():
  method = ldam_drw.ldam_drw(from_epoch=1)
  _refreshed(method, 0, cosine=True)
  with pytest.raises(base.InputError, match="not cosines; build it with cosine=True"):
    _refreshed(method, 0, cosine=False)


@pytest.mark.parametrize("entry", [0, 1e-9, np.nan])
def test_linear_layers_with_zero_small_or_nan_parameters_are_refused(entry):
  method = ldam_drw.ldam_drw(from_epoch=1)
  problem, inputs = _setup(cosine=False)
  params = jax.tree.map(lambda x: jnp.full_like(x, entry), inputs.params)
  view = types.SimpleNamespace(epoch=0, params=params)
  with pytest.raises(base.InputError, match="not cosines"):
    method.refresh(method.init(jax.random.key(0), problem, params), problem, view)


def test_class_counts_of_another_length_are_refused():
  problem, inputs = _setup(counts=(5, 4))
  method = ldam_drw.ldam_drw(balance="none")
  state = method.init(jax.random.key(0), problem, inputs.params)
  with pytest.raises(base.InputError, match="each of the 3 classes"):
    jax.jit(lambda i: method.gradients(state, problem, i))(inputs)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"max_margin": -0.1}, "ldam: max_margin=-0.1 must be at least 0"),
    ({"max_margin": np.inf}, "ldam: max_margin=inf must be at least 0, and finite"),
    ({"scale": 0.0}, "ldam: scale=0.0 must be more than 0"),
    ({"beta": 1.0}, "beta=1.0 of the effective number"),
    ({"from_epoch": -1}, "from_epoch=-1 must be an integer of at least 0"),
    ({"from_epoch": None}, "from_epoch=None does not fit balance='reweight': give"),
    ({"balance": "none"}, "from_epoch=3 does not fit balance='none'"),
    ({"balance": "both"}, "balance='both'; choose one of reweight, resample, none"),
  ],
)
def test_settings_out_of_range_are_refused(settings, message):
  with pytest.raises(base.InputError, match=message):
    ldam_drw.ldam_drw(**{"from_epoch": 3, **settings})


@pytest.mark.parametrize("hinge", [False, True])
def test_bad_settings_of_the_loss_are_refused_immediately(hinge):
  with pytest.raises(base.InputError, match="max_margin=nan must be at least 0"):
    ldam_drw.loss(float("nan"), hinge=hinge)
  with pytest.raises(base.InputError, match=r"scale=-1\.0 must be more than 0"):
    ldam_drw.loss(scale=-1.0, hinge=hinge)


@pytest.mark.parametrize(
  ("cosines", "labels", "margins"),
  [
    ((4, 1), (4,), (1,)),
    ((4, 3), (4,), (2,)),
    ((4, 3), (3,), (3,)),
    ((3,), (3,), (3,)),
  ],
)
def test_mismatched_shapes_are_refused(cosines, labels, margins):
  for loss_fn in (ldam_drw.ldam, ldam_drw.ldam_hinge):
    with pytest.raises(base.InputError, match=r"(ldam: cosines|logits) must be"):
      loss_fn(np.zeros(cosines), np.zeros(labels, int), np.zeros(margins))


def test_numpy_margins_keep_their_precision_after_a_trace_in_float32():
  rng = np.random.default_rng(0)
  cosines, labels = rng.uniform(-1, 1, (5, 3)), np.array([0, 1, 2, 0, 1])
  margins = np.array([0.1, 0.2, 0.3]) / 3
  loss_fn = jax.jit(lambda z, y: ldam_drw.ldam(z, y, margins, 3.0))
  loss_fn(cosines.astype(np.float32), labels.astype(np.int32))
  z = 3 * (cosines - margins * np.eye(3)[labels])
  expected = np.log(np.exp(z).sum(axis=1)) - z[np.arange(5), labels]
  with jax.enable_x64(True):
    np.testing.assert_allclose(loss_fn(cosines, labels), expected, rtol=1e-14)

"""ABSGD: its formula, the gradient of its objective, overflow, the loop."""

import functools
import math
import types

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import changed_loss
from l2rw_jax import losses as losses_lib
from l2rw_jax.methods import absgd
from l2rw_jax.methods import ldam_drw
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

_FIRST = np.array([0.1, 0.5, 2.0, 4.0])
_SECOND = np.array([1.0, 1.0, 3.0, 0.2])


@functools.partial(jax.jit, static_argnames=("options",))
def _weights(losses, log_normalizer, lam, gamma=1.0, alpha=1.0, options=()):
  return absgd.example_weights(
    losses, log_normalizer, lam, gamma=gamma, alpha=alpha, **dict(options)
  )


def _first_weights(losses, lam, gamma=1.0, alpha=1.0, **options):
  dtype = jnp.result_type(float)
  return _weights(
    np.asarray(losses, dtype),
    np.asarray(-np.inf, dtype),
    np.asarray(lam, dtype),
    gamma,
    alpha,
    options=tuple(options.items()),
  )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("lam", "gamma", "alpha", "normalizers", "weights", "totals", "values"),
  [
    (
      2,
      0.9,
      1,
      (2.799593, 2.278927),
      [
        [0.093877, 0.114662, 0.242739, 0.659833],
        [0.180866, 0.180866, 0.491645, 0.121238],
      ],
      (1.111111, 0.974614),
      (3.191529, 1.860913),
    ),
    (
      2,
      0.5,
      0.5,
      (0.777665, 0.944101),
      [
        [0.337958, 0.412782, 0.873861, 2.375399],
        [0.436585, 0.436585, 1.186761, 0.292652],
      ],
      (4.0, 2.352582),
      (11.489505, 4.491982),
    ),
    (
      -2,
      0.5,
      0.5,
      (0.139578, 0.216103),
      [
        [1.703762, 1.394922, 0.658915, 0.242401],
        [0.701668, 0.701668, 0.258129, 1.046765],
      ],
      (4.0, 2.708230),
      (3.155271, 2.387076),
    ),
  ],
)
def test_two_batches_have_precomputed_weights(
  lam, gamma, alpha, normalizers, weights, totals, values
):
  log_u = -jnp.inf
  for step, losses in enumerate((_FIRST, _SECOND)):
    result, log_u = jax.device_get(_weights(losses, log_u, lam, gamma, alpha))
    np.testing.assert_allclose(np.exp(log_u), normalizers[step], atol=5e-7)
    np.testing.assert_allclose(result, weights[step], atol=5e-7)
    np.testing.assert_allclose(result.sum(), totals[step], atol=5e-7)
    np.testing.assert_allclose(result @ losses, values[step], atol=5e-7)


def _published(batches, lam, gamma, alpha):
  """Weights and normalizers from plain exponentials, in NumPy."""
  u, history = 0.0, []
  for losses in batches:
    e = np.exp(losses / lam)
    u = (1 - gamma) * u + gamma * alpha * e.mean()
    history.append((e / (u * len(losses)), u))
  return history


_LAMBDAS = st.floats(0.3, 50).flatmap(lambda x: st.sampled_from([x, -x]))
_LOSSES = st.lists(st.floats(0, 20), min_size=4, max_size=4).map(np.array)
_quick = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.usefixtures("x64")
@_quick
@hypothesis.given(
  batches=st.lists(_LOSSES, min_size=1, max_size=4),
  lam=_LAMBDAS,
  gamma=st.floats(0.01, 1),
  alpha=st.floats(0.1, 3),
)
def test_weights_equal_the_plain_exponentials(batches, lam, gamma, alpha):
  log_u = -jnp.inf
  for losses, (weights, u) in zip(
    batches, _published(batches, lam, gamma, alpha), strict=True
  ):
    result, log_u = jax.device_get(_weights(losses, log_u, lam, gamma, alpha))
    np.testing.assert_allclose(result, weights, rtol=1e-12)
    np.testing.assert_allclose(log_u, np.log(u), rtol=1e-12, atol=1e-12)
    # sum p = mean(e) / u is bounded, because u contains gamma alpha mean(e).
    np.testing.assert_allclose(result.sum(), np.exp(losses / lam).mean() / u, 1e-12)
    assert result.sum() <= (1 + 1e-12) / (gamma * alpha)


@jax.jit
def _slopes(lam, inputs, targets):
  """Gradients of the weighted loss and of lambda log mean exp(l / lambda)."""

  def losses_fn(params):
    return (inputs @ params - targets) ** 2

  def objective(params):
    scores = losses_fn(params) / lam
    return lam * (jax.nn.logsumexp(scores) - jnp.log(scores.size))

  def weighted(params):
    losses = losses_fn(params)
    return absgd.example_weights(losses, 0.3, lam, gamma=1.0)[0] @ losses

  params = jnp.ones(inputs.shape[1])
  return jax.grad(weighted)(params), jax.grad(objective)(params)


@pytest.mark.usefixtures("x64")
@_quick
@hypothesis.given(lam=_LAMBDAS, seed=st.integers(0, 99))
def test_step_without_an_average_is_the_gradient_of_the_objective(lam, seed):
  rng = np.random.default_rng(seed)
  result, expected = _slopes(lam, rng.normal(size=(5, 3)), rng.normal(size=5))
  np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_limits_of_lambda():
  for lam in (1e9, -1e9, math.inf, -math.inf):
    np.testing.assert_allclose(
      _first_weights(_FIRST, lam)[0], np.full(4, 0.25), atol=1e-8
    )
  np.testing.assert_allclose(_first_weights(_FIRST, 1e-3)[0], [0, 0, 0, 1], atol=1e-12)
  np.testing.assert_allclose(_first_weights(_FIRST, -1e-3)[0], [1, 0, 0, 0], atol=1e-12)
  # The objective is about mean + Var / (2 lambda): above the mean for lambda > 0, else
  # below.
  for lam in (300.0, -300.0):
    expansion = _FIRST.mean() + _FIRST.var() / (2 * lam)
    value = lam * _first_weights(_FIRST, lam)[1]
    np.testing.assert_allclose(value, expansion, atol=1e-5)
    assert np.sign(value - _FIRST.mean()) == np.sign(lam)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("gamma", "alpha"), [(0.9, 1.0), (0.1, 0.5), (1.0, 2.0)])
def test_weights_sum_to_one_over_gamma_alpha_then_one_over_alpha(gamma, alpha):
  log_u = -jnp.inf
  totals = []
  for _ in range(300):
    weights, log_u = _weights(_FIRST, log_u, 2.0, gamma, alpha)
    totals.append(weights.sum())
  np.testing.assert_allclose(totals[0], 1 / (gamma * alpha), rtol=1e-12)
  np.testing.assert_allclose(totals[-1], 1 / alpha, rtol=1e-10)


@pytest.mark.parametrize("lam", [1e-3, -1e-3, 0.5, -0.5, 1e3])
@pytest.mark.parametrize(
  "losses",
  [
    [0.0, 0.0, 0.0],
    [100.0, 90.0, 0.0],
    [1e30, 1.0, 0.0],
    [3e38, 3e38, 1e-30],
    [-1e30, 5.0, 1e30],
    [7.0],
  ],
)
def test_weights_are_finite_where_the_exponential_overflows(lam, losses):
  losses = np.array(losses, np.float32)
  gamma, alpha = 0.9, 0.5
  log_u = np.float32(-np.inf)
  # The second batch has zero losses, so that the average of the normalizer combines
  # terms of very different sizes.
  for batch in (losses, 0 * losses, losses[::-1], losses):
    weights, log_u = jax.device_get(
      _weights(batch, log_u, np.float32(lam), gamma, alpha)
    )
    assert weights.dtype == log_u.dtype == np.float32
    assert np.isfinite(weights).all() and np.isfinite(log_u)
    assert (weights >= 0).all() and weights.sum() <= 1.0001 / (gamma * alpha)


def test_first_weights_are_correct_for_huge_losses():
  # exp(1e33) dominates: the first example has the whole weight, 1 / (gamma alpha).
  weights, _ = _first_weights([1e30, 1.0, 0.0], 1e-3, 0.9)
  np.testing.assert_allclose(weights, [1 / 0.9, 0, 0], rtol=1e-6)
  weights, _ = _first_weights([1000.0, 999.0, 0.0], 1.0, 0.9)
  expected = np.array([1, np.exp(-1), 0]) / (1 + np.exp(-1)) / 0.9
  np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_weights_are_constant_and_support_vmap():
  def total(losses, log_u, lam, gamma, alpha):
    weights, log_u = absgd.example_weights(losses, log_u, lam, gamma=gamma, alpha=alpha)
    return jnp.sum(weights**2) + jnp.where(jnp.isfinite(log_u), log_u, 0)

  slopes = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3, 4)))
  gradients = slopes(jnp.array(_FIRST), -jnp.inf, 2.0, 1.0, 0.5)
  assert not any(np.any(x) for x in gradients)
  lams = np.array([2.0, -2.0, np.inf], np.float32)
  run = jax.vmap(
    lambda lam: absgd.example_weights(jnp.array(_FIRST), -jnp.inf, lam, gamma=1.0)
  )
  weights, log_u = jax.device_get(jax.jit(run)(lams))
  for row, lam in enumerate(lams):
    chex.assert_trees_all_close((weights[row], log_u[row]), _first_weights(_FIRST, lam))
  assert log_u[2] == -jnp.inf


def test_infinite_lambda_gives_uniform_weights_and_keeps_the_normalizer():
  for lam in (jnp.inf, -jnp.inf):
    weights, log_u = _weights(
      _FIRST, 1.5, lam, 0.5, 0.5, options=(("clip", 0.1), ("uniform_share", 1.0))
    )
    np.testing.assert_array_equal(weights, np.full(4, 0.25))
    assert log_u == 1.5


def test_clip_and_uniform_share():
  plain, _ = _first_weights(_FIRST, 2.0, 0.5)
  clipped, _ = _first_weights(_FIRST, 2.0, 0.5, clip=0.3)
  np.testing.assert_allclose(clipped, np.minimum(plain, 0.3))
  assert (clipped < plain).any() and (clipped == plain).any()
  both, _ = _first_weights(_FIRST, 2.0, 0.5, clip=0.3, uniform_share=1.0)
  np.testing.assert_allclose(both, clipped + 0.25, rtol=1e-6)


def test_nan_losses_and_infinite_exponentials_give_nan_weights():
  weights, log_u = _first_weights([1.0, np.nan], 2.0)
  assert np.isnan(weights).all() and np.isnan(log_u)
  for loss, lam in ((np.inf, 2.0), (-np.inf, -2.0)):
    weights, log_u = _first_weights([1.0, loss], lam)
    assert np.isnan(weights).all() and np.isnan(log_u)
  weights, log_u = _first_weights([1.0, np.inf], -2.0)  # exp(-inf) = 0
  assert weights[1] == 0 and np.isfinite(log_u)
  weights, _ = _first_weights([1.0, np.nan], math.inf)
  np.testing.assert_array_equal(weights, [0.5, 0.5])


def test_half_precision_is_computed_in_float32():
  weights, log_u = absgd.example_weights(
    jnp.asarray(_FIRST, jnp.bfloat16), -jnp.inf, 2.0, gamma=1.0
  )
  assert weights.dtype == jnp.bfloat16 and log_u.dtype == jnp.float32
  np.testing.assert_allclose(weights, _first_weights(_FIRST, 2.0)[0], rtol=1e-2)


def _eager_weights(**settings):
  return absgd.example_weights(jnp.ones(2), -jnp.inf, 1.0, **{"gamma": 1.0, **settings})


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: absgd.absgd(0.0), "lam=0.0 must be a number that is not 0"),
    (lambda: absgd.absgd(math.nan), "lam=nan must be a number that is not 0"),
    (lambda: absgd.absgd(1e-42), "lam=1e-42 must be a number that is not 0"),
    (lambda: absgd.absgd(lambda epoch: epoch), "lam=0 must be a number that is not 0"),
    (lambda: absgd.two_stage(0, 3), "lam=0 must be a number that is not 0"),
    (lambda: absgd.two_stage(2, -1), "from_epoch=-1 must be an integer of at least 0"),
    (lambda: absgd.absgd(1.0, gamma=0.0), "gamma=0.0 must be above 0"),
    (lambda: absgd.absgd(1.0, gamma=1.1), "gamma=1.1 must be above 0 and at most 1"),
    (lambda: absgd.absgd(1.0, gamma=math.nan), "gamma=nan"),
    (lambda: absgd.absgd(1.0, alpha=0), "alpha=0 must be above 0, and finite"),
    (lambda: absgd.absgd(1.0, alpha=math.inf), "alpha=inf must be above 0, and finite"),
    (lambda: absgd.absgd(1.0, clip=-1), "clip=-1 must be above 0, and finite"),
    (
      lambda: absgd.example_weights(jnp.ones(2), -jnp.inf, jnp.zeros(()), gamma=1.0),
      "lam=0.0 must be a number that is not 0",
    ),
    (
      lambda: absgd.example_weights(jnp.ones((2, 2)), -jnp.inf, 1.0, gamma=1.0),
      "losses must be one number per example",
    ),
    (
      lambda: absgd.example_weights(jnp.ones(2, int), -jnp.inf, 1.0, gamma=1.0),
      "losses must be floating-point numbers",
    ),
    (lambda: _eager_weights(gamma=0.0), "gamma=0.0 must be above 0 and at most 1"),
    (
      lambda: _eager_weights(gamma=jnp.array(2.0)),
      "gamma=2.0 must be above 0 and at most 1",
    ),
    (lambda: _eager_weights(alpha=-1.0), "alpha=-1.0 must be above 0, and finite"),
    (lambda: _eager_weights(clip=math.nan), "clip=nan must be above 0, and finite"),
    (
      lambda: _eager_weights(uniform_share=-1),
      "uniform_share=-1 must be at least 0, and finite",
    ),
  ],
)
def test_settings_out_of_range_are_refused(make, message):
  with pytest.raises(base.InputError, match=message):
    make()


def test_traced_lambda_of_zero_gives_nan():
  run = jax.jit(
    lambda lam: absgd.example_weights(jnp.ones(2), -jnp.inf, lam, gamma=1.0)
  )
  assert np.isnan(run(0.0)[0]).all() and np.isfinite(run(1.0)[0]).all()


_COUNTS = jnp.array([30, 10])
_NET = mlp.MLP(2, (4,))


def _problem(axis_name=None):
  return classifier.Classifier(_NET, 2).problem(
    class_counts=_COUNTS, num_examples=40, num_steps=10, axis_name=axis_name
  )


@functools.cache
def _inputs():
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.normal(size=(6, 3)).astype(np.float32),
    "label": np.array([0, 1, 1, 0, 0, 1], np.int32),
    "index": np.arange(6),
  }
  params = jax.jit(_NET.init)(jax.random.key(0), batch["image"])["params"]
  step = jnp.zeros((), int)
  return base.Inputs(params, {}, (), batch, None, step, jax.random.key(1))


def _state(method, epoch=0):
  state = method.init(jax.random.key(2), _problem(), _inputs().params)
  return method.refresh(state, _problem(), types.SimpleNamespace(epoch=epoch))


def _step_fn(method):
  step = jax.jit(lambda state, inputs: method.gradients(state, _problem(), inputs))
  return lambda state: step(state, _inputs())


def _base_losses(params, loss, batch):
  outputs = _NET.apply({"params": params}, batch["image"])
  return loss(outputs, batch, _COUNTS)


def _cross_entropy(outputs, batch, class_counts):
  del class_counts
  return losses_lib.softmax_cross_entropy(outputs, batch["label"])


def _class_weighted(outputs, batch, class_counts):
  rarity = jnp.max(class_counts) / class_counts
  return rarity[batch["label"]] * _cross_entropy(outputs, batch, class_counts)


def _on_labels(loss):
  return lambda outputs, batch, class_counts: loss(outputs, batch["label"])


_LOSSES_UNDER_ABSGD = {
  "cross_entropy": _cross_entropy,
  "class_weighted": _class_weighted,
  "ldam": ldam_drw.loss(scale=3.0),
  "focal": _on_labels(losses_lib.focal),
  "symmetric": _on_labels(losses_lib.symmetric_cross_entropy),
  "truncated": _on_labels(
    functools.partial(losses_lib.generalized_cross_entropy, threshold=0.5)
  ),
}
_FOR_NOISE = ("symmetric", "truncated")


@pytest.mark.slow(unless=("cross_entropy", "ldam"))
@pytest.mark.parametrize("name", _LOSSES_UNDER_ABSGD)
def test_step_equals_the_formula_for_any_loss(name):
  loss, lam = _LOSSES_UNDER_ABSGD[name], -2.0 if name in _FOR_NOISE else 2.0
  settings = {"gamma": 0.5, "alpha": 0.8, "clip": 0.45}
  method = changed_loss.changed_loss(absgd.absgd(lam, **settings), loss)
  state, step = _state(method), _step_fn(method)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def reference(params, log_u, batch):
    values = _base_losses(params, loss, batch)
    weights, log_u = absgd.example_weights(values, log_u, lam, **settings)
    return weights @ values, (values, weights, log_u)

  for _ in range(2):
    log_u = state.inner.log_normalizer
    result, state = step(state)
    expected, (values, weights, log_u) = jax.device_get(
      reference(_inputs().params, log_u, _inputs().batch)
    )
    np.testing.assert_allclose(result.losses, values, rtol=1e-5)
    np.testing.assert_allclose(result.weights, weights, rtol=1e-5)
    np.testing.assert_allclose(result.metrics["log_normalizer"], log_u, rtol=1e-5)
    np.testing.assert_allclose(result.metrics["total_weight"], weights.sum(), 1e-5)
    chex.assert_trees_all_close(result.grads, expected, rtol=1e-4, atol=1e-7)


def _step_on_two_devices(method):
  """Like `_step_fn`, with weights [2, 3]; checks that all other results are equal."""
  batch = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), _inputs().batch)

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(None, 0), axis_name="devices")
  def step(state, batch):
    inputs = _inputs()._replace(batch=batch)
    return method.gradients(state, _problem("devices"), inputs)

  def run(state):
    result, new = step(state, batch)
    same = result._replace(weights=(), losses=()), new
    jax.tree.map(lambda x: np.testing.assert_array_equal(*x), same)
    first, state = jax.tree.map(lambda x: x[0], same)
    return first._replace(weights=result.weights), state

  return run


def test_two_stage_is_uniform_and_then_absgd_on_two_devices():
  method = absgd.absgd(absgd.two_stage(-5.0, 3), gamma=0.5, add_uniform=True)
  state, step = _state(method, epoch=2), _step_on_two_devices(method)
  result, after = step(state)
  np.testing.assert_allclose(result.weights, np.full((2, 3), 1 / 6), rtol=1e-6)
  assert result.metrics["log_normalizer"] == 0
  chex.assert_trees_all_equal(after, state)
  state = method.refresh(after, _problem(), types.SimpleNamespace(epoch=3))
  result, _ = step(state)
  # 1 / gamma from the first step of ABSGD, and 1 from the uniform weights.
  np.testing.assert_allclose(result.metrics["total_weight"], 3, rtol=1e-5)


def test_normalizer_is_reset_only_when_lambda_changes():
  method = absgd.absgd(lambda epoch: 2.0 if epoch < 2 else 4.0)
  _, state = _step_fn(method)(_state(method))
  assert np.isfinite(state.log_normalizer) and state.lam == 2
  kept = method.refresh(state, _problem(), types.SimpleNamespace(epoch=1))
  chex.assert_trees_all_equal(kept, state)
  new = method.refresh(kept, _problem(), types.SimpleNamespace(epoch=2))
  assert new.log_normalizer == -np.inf and new.lam == 4
  # A checkpoint needs shapes and types that never change.
  chex.assert_trees_all_equal_shapes_and_dtypes(new, state, _state(method))
  assert all(x.dtype == np.float32 for x in new)


def test_schedule_that_reaches_zero_is_refused():
  method = absgd.absgd(lambda epoch: 2.0 - epoch)
  with pytest.raises(base.InputError, match=r"lam=0\.0 must be a number that is not 0"):
    _state(method, epoch=2)


def test_an_empty_batch_is_refused():
  with pytest.raises(base.InputError, match="losses is empty"):
    absgd.example_weights(jnp.zeros(0), 0.0, 1.0, gamma=0.5)

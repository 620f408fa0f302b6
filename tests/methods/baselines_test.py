"""The weights of each baseline against hand-computed values, and its loss."""

import dataclasses
import functools
import types

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import class_balance
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.training import step as step_lib

_CLASSES, _NUM_STEPS = 3, 10
_COUNTS = np.array([60, 30, 10])
_LABELS = np.array([0, 0, 0, 1, 0, 2])


def _examples(labels, seed=0):
  x = np.random.default_rng(seed).normal(size=(len(labels), 4)).astype(np.float32)
  return {"x": x, "label": np.asarray(labels, np.int32)}


_BATCH, _META = _examples(_LABELS), _examples([0, 1, 2, 1], seed=1)
_PARAMS = np.random.default_rng(2).normal(size=(4, _CLASSES)).astype(np.float32)


def _forward(params, model_state, batch, key, train):
  del key, train
  return batch["x"] @ params, {"seen": model_state["seen"] + batch["x"].sum()}


_PROBLEM = base.Problem(
  forward=_forward,
  loss=lambda logits, batch: losses.softmax_cross_entropy(logits, batch["label"]),
  linearize=linearization.linearize,
  linearize_outputs=linearization.linearize_outputs,
  num_classes=_CLASSES,
  class_counts=_COUNTS,
  num_examples=100,
  num_steps=_NUM_STEPS,
)


@jax.jit
def _losses_of(params, batch):
  return _PROBLEM.loss(batch["x"] @ params, batch)


@jax.jit
@jax.grad
def _weighted_slope(params, batch, weights):
  return jnp.sum(weights * _losses_of(params, batch))


@functools.cache
def _gradients_fn(method):
  return jax.jit(lambda state, inputs: method.gradients(state, _PROBLEM, inputs))


def _state(method, epoch):
  state = method.init(jax.random.key(0), _PROBLEM, _PARAMS)
  return method.refresh(state, _PROBLEM, types.SimpleNamespace(epoch=epoch))


def _run(method, batch=_BATCH, step=0, seed=0, epoch=0):
  inputs = base.Inputs(
    params=_PARAMS,
    model_state={"seen": jnp.float32(0)},
    opt_state=(),
    batch=batch,
    meta_batch=_META,
    step=jnp.int32(step),
    key=jax.random.key(seed),
  )
  state = _state(method, epoch)
  result, new_state = _gradients_fn(method)(state, inputs)
  chex.assert_trees_all_equal(new_state, state)
  return result


def _assert_is_gradient_of(result, batch, weights):
  expected = _weighted_slope(_PARAMS, batch, np.float32(weights))
  np.testing.assert_allclose(result.grads, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ("method", "weights"),
  [
    (baselines.uniform(), np.full(6, 1 / 6)),
    (baselines.resampling(), np.full(6, 1 / 6)),
    # N / (C n_y) / B = 100 / (3 * 60 * 6) for class 0, and so on.
    (
      baselines.class_proportion(),
      np.array([100 / 60, 100 / 30, 100 / 10])[_LABELS] / (3 * 6),
    ),
    (
      baselines.class_proportion("official_code"),
      np.array([0.4, 0.7, 0.9])[_LABELS],
    ),
    # Two minority examples, hence two majority examples. The released code ranks by the
    # mean loss, which is the same for all, so the first two are kept.
    (
      baselines.hard_mining("official_code"),
      np.array([1, 1, 0, 1, 0, 1]) / 4,
    ),
  ],
  ids=[
    "uniform",
    "resampling",
    "class_proportion",
    "class_proportion_code",
    "mining_code",
  ],
)
def test_weights_match_hand_computed_values(method, weights):
  result = _run(method)
  np.testing.assert_allclose(result.weights, weights, rtol=1e-6)
  np.testing.assert_allclose(result.losses, _losses_of(_PARAMS, _BATCH), rtol=1e-5)
  np.testing.assert_allclose(
    result.model_state["seen"], _BATCH["x"].sum(), rtol=1e-5, atol=1e-6
  )
  _assert_is_gradient_of(result, _BATCH, weights)
  assert not method.needs_meta


def test_random_weights_are_rectified_noise_that_sums_to_one():
  first, again, other = (_run(baselines.random(), seed=s) for s in (0, 0, 1))
  np.testing.assert_array_equal(first.weights, again.weights)
  assert (np.asarray(first.weights) != np.asarray(other.weights)).any()
  noise = np.maximum(jax.random.normal(jax.random.key(0), (6,)), 0)
  np.testing.assert_allclose(first.weights, noise / noise.sum(), rtol=1e-6)
  np.testing.assert_allclose(first.weights.sum(), 1, rtol=1e-6)
  _assert_is_gradient_of(first, _BATCH, first.weights)


def _brute_force(values, majority):
  """A mask of all minority examples and as many of the hardest majority ones."""
  kept = ~majority
  wanted = max(kept.sum(), 1)
  for i in sorted(np.flatnonzero(majority), key=lambda i: (-values[i], i))[:wanted]:
    kept = kept | (np.arange(len(values)) == i)
  return kept


_hardest = jax.jit(baselines.hardest)


@hypothesis.given(
  st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=5, max_size=5)
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_hardest_equals_brute_force(examples):
  values = np.array([v for v, _ in examples], np.float32)
  majority = np.array([m for _, m in examples])
  np.testing.assert_array_equal(
    _hardest(values, majority), _brute_force(values, majority)
  )


def test_hard_mining_keeps_the_highest_losses_of_the_largest_class():
  result = _run(baselines.hard_mining())
  kept = _brute_force(np.asarray(result.losses), _LABELS == 0)
  assert kept.sum() == 4
  np.testing.assert_allclose(result.weights, kept / 4, rtol=1e-6)
  _assert_is_gradient_of(result, _BATCH, kept / 4)


@pytest.mark.parametrize("variant", ["paper", "official_code"])
def test_hard_mining_without_a_minority_keeps_one(variant):
  result = _run(baselines.hard_mining(variant), _examples([0] * 6))
  best = np.argmax(result.losses) if variant == "paper" else 0
  np.testing.assert_array_equal(result.weights, np.arange(6) == best)


def test_hard_mining_without_a_majority_keeps_all():
  result = _run(baselines.hard_mining(), _examples([1, 2, 1, 1, 2, 2]))
  np.testing.assert_allclose(result.weights, np.full(6, 1 / 6), rtol=1e-6)


def test_clean_only_is_the_gradient_of_the_mean_meta_loss():
  method = baselines.clean_only()
  result = _run(method)
  _assert_is_gradient_of(result, _META, np.full(4, 1 / 4))
  assert not np.any(result.weights)
  np.testing.assert_allclose(result.losses, _losses_of(_PARAMS, _BATCH), rtol=1e-5)
  expected = np.mean(_losses_of(_PARAMS, _META))
  np.testing.assert_allclose(result.value, expected, rtol=1e-5)
  np.testing.assert_allclose(
    result.model_state["seen"], _META["x"].sum(), rtol=1e-5, atol=1e-6
  )
  assert method.needs_meta


@pytest.mark.ci
@pytest.mark.parametrize("first", [None, l2rw.l2rw()], ids=["uniform", "l2rw"])
def test_fine_tuning_uses_the_clean_loss_in_exactly_the_last_steps(first):
  method = baselines.fine_tuning(3, first)
  initial = _run(first or baselines.uniform())
  value = np.vdot(initial.weights, initial.losses)
  # Both phases return the same fields, because they are branches of `lax.cond`.
  healthy = {"fault": jnp.zeros((), jnp.int32), "zero_slope": jnp.array(False)}
  initial = initial._replace(metrics={}, scores=None, value=value, **healthy)
  clean = _run(baselines.clean_only())._replace(**healthy)
  for step in range(_NUM_STEPS):
    result = _run(method, step=step)
    expected = initial if step < _NUM_STEPS - 3 else clean
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-7)
  assert method.needs_meta


@pytest.mark.parametrize("num_steps", [0, 2.5, float("nan")])
def test_fine_tuning_refuses_an_invalid_number_of_steps(num_steps):
  with pytest.raises(
    base.InputError, match=f"num_steps={num_steps} must be an integer of at least 1"
  ):
    baselines.fine_tuning(num_steps)


def test_fine_tuning_keeps_the_sampling_of_its_first_phase():
  first = baselines.resampling()
  assert baselines.fine_tuning(3, first).sample is first.sample
  assert baselines.fine_tuning(3).sample is base.permutation


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_resampling_is_exactly_balanced(num_classes):
  rng = np.random.default_rng(0)
  labels = np.concatenate(
    [np.arange(num_classes), rng.geometric(0.5, size=200).clip(max=num_classes) - 1]
  )
  train = {"label": rng.permutation(labels), "index": np.arange(len(labels))}
  sample = baselines.resampling().sample
  rows = sample((), _PROBLEM, train, np.random.default_rng(1))
  rounds = train["label"][rows].reshape(-1, num_classes)
  assert len(rounds) == len(labels) // num_classes
  np.testing.assert_array_equal(
    np.sort(rounds, axis=1), np.tile(np.arange(num_classes), (len(rounds), 1))
  )
  assert (rounds != np.arange(num_classes)).any()
  again = sample((), _PROBLEM, train, np.random.default_rng(1))
  np.testing.assert_array_equal(rows, again)


@pytest.mark.parametrize(("epoch", "is_balanced"), [(0, False), (3, False), (4, True)])
def test_resampling_starts_at_its_epoch(epoch, is_balanced):
  method = baselines.resampling(4)
  labels = np.repeat([0, 1, 2], [160, 30, 10])
  train = {"label": labels, "index": np.arange(200)}
  rows = method.sample(_state(method, epoch), _PROBLEM, train, np.random.default_rng(0))
  drawn = np.bincount(labels[rows], minlength=3)
  if is_balanced:
    np.testing.assert_array_equal(drawn, [66, 66, 66])
    assert len(np.unique(rows)) < 198  # The rarest class has only ten examples.
  else:
    np.testing.assert_array_equal(np.sort(rows), np.arange(200))
    assert (rows != np.arange(200)).any()


_EFFECTIVE = (1 - 0.9 ** np.array([60, 30, 10])) / (1 - 0.9)


@pytest.mark.parametrize("from_epoch", [0, 4])
def test_class_balanced_weights_start_at_their_epoch(from_epoch):
  method = baselines.class_balanced(0.9, from_epoch)
  for epoch in (0, 3, 4):
    result = _run(method, epoch=epoch)
    unnormalized = 1 / _EFFECTIVE[_LABELS] if epoch >= from_epoch else np.ones(6)
    np.testing.assert_allclose(
      result.weights, unnormalized / unnormalized.sum(), rtol=1e-5
    )
    _assert_is_gradient_of(result, _BATCH, unnormalized / unnormalized.sum())
    np.testing.assert_allclose(result.losses, _losses_of(_PARAMS, _BATCH), rtol=1e-5)


def test_class_balanced_with_one_class_in_the_batch_is_uniform():
  result = _run(baselines.class_balanced(), _examples([2] * 6))
  np.testing.assert_allclose(result.weights, np.full(6, 1 / 6), rtol=1e-6)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: baselines.class_balanced(1.0), "beta=1.0 of the effective number"),
    (lambda: baselines.class_balanced(0.9, -1), "class_balanced: from_epoch=-1"),
    (lambda: baselines.resampling(-1), "resampling: from_epoch=-1"),
  ],
)
def test_settings_out_of_range_are_refused_immediately(make, message):
  with pytest.raises(base.InputError, match=message):
    make()


@pytest.mark.parametrize(
  "factory", [baselines.class_balanced, baselines.class_proportion]
)
def test_class_counts_of_another_length_are_refused(factory):
  problem = dataclasses.replace(_PROBLEM, class_counts=np.array([1, 2]))
  with pytest.raises(base.InputError, match="each of the 3 classes"):
    factory().gradients((), problem, types.SimpleNamespace(batch=_BATCH))


@pytest.mark.parametrize("factory", [baselines.class_proportion, baselines.hard_mining])
def test_unknown_variant_is_refused(factory):
  with pytest.raises(base.InputError, match=f"{factory.__name__}: variant='code'"):
    factory("code")


def test_hard_mining_keeps_a_nan_loss():
  values = np.array([np.nan, 1.0, 0.0, -1.0, -2.0], np.float32)
  kept = _hardest(values, np.array([True, True, False, True, True]))
  np.testing.assert_array_equal(kept, [True, False, True, False, False])


_MEAN_LOSSES = {
  "focal": (baselines.focal(1.5), functools.partial(losses.focal, gamma=1.5)),
  "soft": (baselines.bootstrapping("soft"), losses.bootstrapping_soft),
  "hard": (
    baselines.bootstrapping("hard", 0.6),
    functools.partial(losses.bootstrapping_hard, beta=0.6),
  ),
  "sce": (
    baselines.symmetric_cross_entropy(0.2, 0.5),
    functools.partial(losses.symmetric_cross_entropy, alpha=0.2, beta=0.5),
  ),
  "gce": (
    baselines.generalized_cross_entropy(0.5, 0.3),
    functools.partial(losses.generalized_cross_entropy, q=0.5, threshold=0.3),
  ),
  "balanced": (
    baselines.balanced_softmax(),
    functools.partial(losses.balanced_softmax, class_counts=_COUNTS),
  ),
  "adjusted": (
    baselines.logit_adjusted(0.5),
    functools.partial(losses.logit_adjusted, class_counts=_COUNTS, tau=0.5),
  ),
}


@pytest.mark.slow(unless=("gce", "balanced"))
@pytest.mark.parametrize("name", _MEAN_LOSSES)
def test_methods_named_after_a_loss_minimize_its_mean(name):
  method, loss_fn = _MEAN_LOSSES[name]

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def expected(params):
    values = loss_fn(_BATCH["x"] @ params, _LABELS)
    return jnp.mean(values), values

  gradients = _run(method)
  expected_grads, values = expected(_PARAMS)
  np.testing.assert_allclose(gradients.losses, values, rtol=1e-5)
  np.testing.assert_allclose(gradients.grads, expected_grads, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(gradients.weights, np.full(6, 1 / 6), rtol=1e-6)


def test_class_balanced_focal_defers_only_its_weights():
  method = baselines.class_balanced_focal(1.0, 0.9, 3)
  expected = jax.jit(lambda p: losses.focal(_BATCH["x"] @ p, _LABELS, 1.0))(_PARAMS)
  for epoch in (2, 3):
    gradients = _run(method, epoch=epoch)
    np.testing.assert_allclose(gradients.losses, expected, rtol=1e-5)
    per_class = class_balance.effective_number(_COUNTS, 0.9)
    weights = np.asarray(per_class)[_LABELS] if epoch == 3 else np.ones(6)
    np.testing.assert_allclose(gradients.weights, weights / weights.sum(), rtol=1e-5)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: baselines.focal(-1.0), "focal: gamma=-1.0 must be at least 0"),
    (lambda: baselines.class_balanced_focal(-1.0), "focal: gamma=-1.0"),
    (lambda: baselines.class_balanced_focal(1.0, -0.5), "beta=-0.5 of the"),
    (lambda: baselines.bootstrapping("firm"), "kind='firm'; choose 'soft' or"),
    (lambda: baselines.bootstrapping("soft", 2.0), "bootstrapping_soft: beta=2.0"),
    (lambda: baselines.symmetric_cross_entropy(-1.0), "alpha=-1.0, beta=1.0 must"),
    (lambda: baselines.generalized_cross_entropy(1.5), "q=1.5 must be in"),
    (lambda: baselines.generalized_cross_entropy(0.7, 0.0), "threshold=0.0 must"),
    (lambda: baselines.logit_adjusted(-1.0), "logit_adjusted: tau=-1.0 must be at"),
    (lambda: baselines.classifier_retraining(-1), "retraining: from_epoch=-1 must"),
  ],
)
def test_loss_settings_out_of_range_are_refused_when_the_method_is_made(make, message):
  with pytest.raises(base.InputError, match=message):
    make()


# Classifier re-training: a two-layer network whose last layer is inside `jax.jit`.


@jax.jit
def _head(params, features):
  return features @ params["v"] + params["b"][None]


def _features(params, model_state, batch, key, train):
  del key, train
  return jnp.tanh(batch["x"] @ params["w"]), model_state


_SPLIT = dataclasses.replace(
  _PROBLEM,
  forward=lambda params, state, *rest: (
    _head(params, _features(params, state, *rest)[0]),
    state,
  ),
  features=_features,
  head=_head,
  num_features=5,
)
_RETRAINING = baselines.classifier_retraining(2)
_MOMENTUM = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5, momentum=0.9))


@jax.jit
def _retraining_step(state):
  result = []  # `train_step` does not return the gradients.

  def gradients(*inputs):
    actual, method_state = _RETRAINING.gradients(*inputs)
    result.append(actual)
    return actual, method_state

  state, _ = step_lib.train_step(
    state,
    _BATCH,
    None,
    jax.random.key(0),
    problem=_SPLIT,
    method=_RETRAINING._replace(gradients=gradients),
    optimizer=_MOMENTUM,
  )
  return state, result[0]


def _two_layers(params):
  """Losses [6] and the gradient of their mean, by hand in double precision."""
  w, v, b = (np.asarray(params[name], np.float64) for name in "wvb")
  x = _BATCH["x"].astype(np.float64)
  hidden = np.tanh(x @ w)
  p = np.exp(hidden @ v + b)
  p /= p.sum(axis=1, keepdims=True)
  slopes = (p - np.eye(_CLASSES)[_LABELS]) / 6
  grads = {
    "w": x.T @ (slopes @ v.T * (1 - hidden**2)),
    "v": hidden.T @ slopes,
    "b": slopes.sum(axis=0),
  }
  return -np.log(p[np.arange(6), _LABELS]), grads


def test_classifier_retraining_restarts_the_last_layer_and_keeps_the_features():
  rng = np.random.default_rng(4)
  shapes = {"w": (4, 5), "v": (5, _CLASSES), "b": (_CLASSES,)}
  first = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  first = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), first)
  method_state = _RETRAINING.init(jax.random.key(0), _SPLIT, first)
  state = step_lib.init_state(first, {}, method_state, _MOMENTUM)
  for epoch in range(4):
    view = types.SimpleNamespace(epoch=epoch)
    refreshed = _RETRAINING.refresh(state.method_state, _SPLIT, view)
    state = state._replace(method_state=refreshed)
    for step in range(2):
      before = jax.device_get(state)
      state, actual = _retraining_step(state)
      losses_by_hand, grads = _two_layers(before.params)
      if epoch >= 2:
        grads["w"] = np.zeros((4, 5))
      np.testing.assert_allclose(actual.losses, losses_by_hand, rtol=1e-5)
      np.testing.assert_allclose(actual.weights, np.full(6, 1 / 6), rtol=1e-6)
      chex.assert_trees_all_close(actual.grads, grads, rtol=1e-4, atol=1e-6)
      trace = before.opt_state[1][0].trace
      expected = {
        name: x - 0.5 * (grads[name] + 0.1 * x + 0.9 * trace[name])
        for name, x in before.params.items()
      }
      if epoch >= 2:
        expected["w"] = before.params["w"]
        np.testing.assert_array_equal(state.params["w"], before.params["w"])
      if (epoch, step) == (2, 0):
        assert (before.params["v"] != first["v"]).any()
        expected |= {"v": first["v"], "b": first["b"]}
      chex.assert_trees_all_close(state.params, expected, rtol=1e-4, atol=1e-6)
  assert state.failure.step == -1


def test_classifier_retraining_balances_the_classes_from_its_epoch():
  labels = np.repeat([0, 1, 2], [16, 3, 1])
  train = {"label": labels, "index": np.arange(20)}
  for epoch, expected in ((1, [16, 3, 1]), (2, [6, 6, 6])):
    state = baselines.Retraining(jnp.int32(epoch), jnp.bool_(False), [])
    rows = _RETRAINING.sample(state, _SPLIT, train, np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(labels[rows]), expected)


def test_classifier_retraining_restarts_only_if_asked_to():
  continued = baselines.classifier_retraining(2, restart=False)
  state = baselines.Retraining(jnp.int32(1), jnp.bool_(False), [])
  for method, expected in ((_RETRAINING, [0, 0, 1, 0]), (continued, [0, 0, 0, 0])):
    views = [types.SimpleNamespace(epoch=epoch) for epoch in range(4)]
    actual = [method.refresh(state, _SPLIT, view).restarts for view in views]
    np.testing.assert_array_equal(actual, expected)


def test_classifier_retraining_needs_a_separate_last_layer():
  with pytest.raises(base.InputError, match="network with the methods features"):
    _RETRAINING.init(jax.random.key(0), _PROBLEM, _PARAMS)


def test_fine_tuning_after_classifier_retraining_is_refused():
  method = baselines.fine_tuning(3, _RETRAINING)
  params = {"w": jnp.ones((4, 5)), "v": jnp.ones((5, 3)), "b": jnp.ones(3)}
  state = method.init(jax.random.key(0), _SPLIT, params)
  inputs = base.Inputs(params, {}, (), _BATCH, _META, jnp.int32(0), jax.random.key(0))
  with pytest.raises(base.InputError, match="fine_tuning trains all parameters"):
    jax.eval_shape(lambda state: method.gradients(state, _SPLIT, inputs)[0], state)

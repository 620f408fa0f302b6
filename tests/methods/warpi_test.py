"""WarPI: precomputed values, the meta gradient, draws, and the ablation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax import linearization
from l2rw_jax import losses as losses_lib
from l2rw_jax import meta_network
from l2rw_jax.methods import warpi
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

_B, _M, _C, _S, _RATE = 6, 5, 3, 2, 0.4
_NET = warpi.RectifierNet(_C, hidden=4)


@jax.jit
@jax.value_and_grad
def _rectified_sum(logits, vectors, labels):
  return warpi.rectified_cross_entropy(logits, vectors, labels).sum()


@pytest.mark.parametrize(
  ("vector", "loss", "gradient"),
  [
    ([0.9, 0.5, 0.2], 0.24915616, [-0.19848758, 0.03907379, 0.02847884]),
    ([1.0, 1.0, 1.0], 0.24131130, [-0.21440297, 0.03911257, 0.17529039]),
    ([0.5, 0.5, 0.5], 0.52797574, [-0.20510117, 0.06580082, 0.13930034]),
  ],
)
def test_loss_and_gradient_equal_precomputed_values(x64, vector, loss, gradient):
  logits, labels = np.array([[2.0, -1.0, 0.5]]), np.array([0])
  value, actual = _rectified_sum(logits, np.array([[vector]]), labels)
  np.testing.assert_allclose(value, loss, rtol=1e-7)
  np.testing.assert_allclose(actual[0], gradient, rtol=1e-6)


def test_limits_of_the_rectifier():
  logits = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]], np.float32)
  labels = np.array([0, 2])
  cross_entropy = jax.jit(losses_lib.softmax_cross_entropy)

  def with_factor(c):
    return _rectified_sum(logits, np.full((2, 2, 3), c, np.float32), labels)

  plain = np.sum(cross_entropy(logits, labels))
  np.testing.assert_allclose(with_factor(1.0)[0], plain, rtol=1e-6)
  cooled = np.sum(cross_entropy(0.25 * logits, labels))
  np.testing.assert_allclose(with_factor(0.25)[0], cooled, rtol=1e-6)
  value, gradient = with_factor(0.0)
  np.testing.assert_allclose(value, 2 * np.log(3), rtol=1e-6)
  np.testing.assert_array_equal(gradient, 0)


def test_losses_not_probabilities_are_averaged_over_draws():
  logits, labels = jnp.array([[2.0, -1.0, 0.5]]), jnp.array([1])
  vectors = jnp.array([[[0.9, 0.5, 0.2]], [[0.1, 0.8, 0.7]]])
  each = [warpi.rectified_cross_entropy(logits, v[None], labels) for v in vectors]
  both = warpi.rectified_cross_entropy(logits, vectors, labels)
  np.testing.assert_allclose(both, (each[0] + each[1]) / 2, rtol=1e-6)


@pytest.mark.parametrize(("num_classes", "size"), [(10, 14_320), (100, 60_400)])
def test_network_has_the_released_sizes(num_classes, size):
  net = warpi.RectifierNet(num_classes)
  phi = jax.eval_shape(
    net.init,
    jax.random.key(0),
    jnp.zeros((1, num_classes)),
    jnp.zeros(1, jnp.int32),
  )
  assert sum(x.size for x in jax.tree.leaves(phi)) == size


def test_log_variance_is_clipped_and_labels_matter():
  net = warpi.RectifierNet(_C, hidden=4)
  logits = jnp.array([[1.0, 2.0, 3.0]] * 2)
  labels = jnp.array([0, 2])
  phi = jax.jit(net.init)(jax.random.key(0), logits, labels)
  apply = jax.jit(net.apply)
  mean, _ = apply(phi, logits, labels)
  assert not np.allclose(mean[0], mean[1])
  wild = jax.tree.map(lambda x: np.float32(1e4) * np.asarray(x), phi)
  mean, log_variance = apply(wild, logits, labels)
  assert jnp.abs(log_variance).max() == 10
  vectors = warpi.rectifiers(mean, log_variance, jnp.ones((_S, 2, _C)))
  assert vectors.shape == (_S, 2, _C) and jnp.isfinite(vectors).all()


def test_draws_follow_the_logistic_normal():
  noise = jax.random.normal(jax.random.key(0), (20_000, 1, 1))
  vectors = warpi.rectifiers(jnp.full((1, 1), 0.3), jnp.full((1, 1), -1.0), noise)
  before = jnp.log(vectors) - jnp.log1p(-vectors)
  np.testing.assert_allclose(before.mean(), 0.3, atol=0.02)
  np.testing.assert_allclose(before.var(), np.exp(-1.0), rtol=0.03)
  fixed = warpi.rectifiers(jnp.full((1, 1), 0.3), jnp.full((1, 1), -1.0), None)
  np.testing.assert_allclose(fixed, [[[1 / (1 + np.exp(-0.3))]]], rtol=1e-6)


def _problem():
  rng = np.random.default_rng(0)

  def examples(size):
    return {"x": rng.normal(size=(size, 4)), "label": rng.integers(_C, size=size)}

  params = {"w": rng.normal(size=(4, 5)), "v": rng.normal(size=(5, _C))}
  phi = jax.tree.map(
    lambda x: rng.normal(size=x.shape),
    jax.eval_shape(
      _NET.init, jax.random.key(0), jnp.zeros((1, _C)), jnp.zeros(1, jnp.int32)
    ),
  )
  noise = rng.normal(size=(_S, _B, _C))
  return phi, params, examples(_B), examples(_M), noise


def _logits_fn(params, batch):
  return jnp.tanh(batch["x"] @ params["w"]) @ params["v"]


def _meta_losses_fn(params, batch):
  return losses_lib.softmax_cross_entropy(_logits_fn(params, batch), batch["label"])


def _unrolled(phi, params, batch, meta_batch, noise):
  """The meta loss as in the released code; its gradient is reverse over reverse."""

  def inner(params):
    logits = _logits_fn(params, batch)
    mean, log_variance = _NET.apply(phi, jax.lax.stop_gradient(logits), batch["label"])
    vectors = jax.nn.sigmoid(mean[None] + jnp.exp(log_variance / 2)[None] * noise)
    per_draw = [
      losses_lib.softmax_cross_entropy(v * logits, batch["label"]) for v in vectors
    ]
    return jnp.mean(jnp.stack(per_draw))

  optimizer = optax.sgd(_RATE)
  ahead = hypergradient.lookahead_params(
    params, jax.grad(inner)(params), optimizer, optimizer.init(params)
  )
  return _meta_losses_fn(ahead, meta_batch).mean()


def _meta_gradient(phi, params, batch, meta_batch, noise):
  def loss_fn(logits, phi):
    return warpi.inner_loss(_NET, phi, logits, batch["label"], noise)[0].mean()

  return meta_network.meta_gradient(
    linearization.linearize_outputs(_logits_fn, params, batch),
    loss_fn,
    phi,
    _meta_losses_fn,
    params,
    meta_batch,
    optimizer=optax.sgd(_RATE),
  )


def test_meta_gradient_equals_the_unrolled_step_and_finite_differences(x64):
  phi, *rest = _problem()
  result = jax.jit(_meta_gradient)(phi, *rest)
  unrolled = jax.jit(jax.value_and_grad(_unrolled))
  value, literal = unrolled(phi, *rest)
  np.testing.assert_allclose(result.meta_loss, value, rtol=1e-12)
  chex.assert_trees_all_close(result.gradient, literal, rtol=1e-7, atol=1e-12)
  # The embedding of the labels is trained, too.
  assert optax.tree.norm(literal["params"]["Embed_0"]) > 1e-4
  rng = np.random.default_rng(1)
  along = jax.tree.map(lambda x: rng.normal(size=x.shape), phi)

  def at(step):  # Reuses the compiled program.
    return unrolled(jax.tree.map(lambda x, d: x + step * d, phi, along), *rest)[0]

  slope = (at(1e-5) - at(-1e-5)) / 2e-5
  np.testing.assert_allclose(optax.tree.vdot(result.gradient, along), slope, rtol=1e-5)


def _step(method, seed=0, outputs=_C, details=False):
  rng = np.random.default_rng(seed)
  model = classifier.Classifier(mlp.MLP(outputs, (4,)), _C)

  def examples(size):
    return {
      "image": rng.normal(size=(size, 5)).astype(np.float32),
      "label": rng.integers(_C, size=size).astype(np.int32),
      "index": np.arange(size, dtype=np.int32),
    }

  batch, meta_batch = examples(_B), examples(_M)
  problem = model.problem(class_counts=jnp.ones(_C), num_examples=_B, num_steps=10)
  params, model_state = jax.jit(model.init)(jax.random.key(0), batch)
  init = jax.jit(lambda key, params: method.init(key, problem, params))
  state = init(jax.random.key(1), params)

  @jax.jit
  def run(key):
    inputs = base.Inputs(
      params, model_state, (), batch, meta_batch, jnp.int32(0), jax.random.key(key)
    )
    return method.gradients(state, problem, inputs)

  return (run, params, batch, state) if details else run


def _written_out(phi, params, batch, noise):
  """The mean rectified loss in `_step`; the inputs of the network phi are constant."""
  model = classifier.Classifier(mlp.MLP(_C, (4,)), _C)
  logits, _ = model.forward(params, {}, batch, jax.random.key(0), True)
  net = warpi.RectifierNet(_C, hidden=5)
  mean, log_variance = net.apply(phi, jax.lax.stop_gradient(logits), batch["label"])
  vectors = jax.nn.sigmoid(mean[None] + jnp.exp(log_variance / 2)[None] * noise)
  per_draw = [
    losses_lib.softmax_cross_entropy(v * logits, batch["label"]) for v in vectors
  ]
  return jnp.mean(jnp.stack(per_draw))


@pytest.mark.slow
def test_real_step_uses_the_new_network_and_new_draws():
  method = warpi.warpi(0.1, num_samples=2, hidden=5, optimizer=optax.sgd(20.0))
  run, params, batch, before = _step(method, details=True)
  result, after = run(0)
  key = jax.random.fold_in(jax.random.key(0), warpi._NOISE_KEY)
  virtual, real = (
    jax.random.normal(k, (_B, 2, _C)).swapaxes(0, 1) for k in jax.random.split(key)
  )
  gradient = jax.jit(jax.grad(_written_out, argnums=1))
  expected = gradient(after.params, params, batch, real)
  chex.assert_trees_all_close(result.grads, expected, rtol=1e-4, atol=1e-6)
  for phi, noise in ((before.params, real), (after.params, virtual)):
    other = gradient(phi, params, batch, noise)
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, other, result.grads))
    assert difference > 1e-4


def test_settings_reach_the_meta_step_and_metrics_are_means(monkeypatch):
  """`meta_network_test.py` and `advisor_test.py` run the meta step left out here."""
  given = {}

  def iterate(state, problem, inputs, *_, **settings):
    given.update(settings)
    return inputs.params, state

  monkeypatch.setattr(meta_network, "iterate", iterate)
  method = warpi.warpi(0.1, hidden=5, deterministic=True, every=2)
  run, params, batch, state = _step(method, details=True)
  result, _ = run(0)
  assert given["every"] == 2 and given["learning_rate"] == 0.1

  @jax.jit
  def vectors(params, phi):
    model = classifier.Classifier(mlp.MLP(_C, (4,)), _C)
    logits, _ = model.forward(params, {}, batch, jax.random.key(0), True)
    net = warpi.RectifierNet(_C, hidden=5)
    return jax.nn.sigmoid(net.apply(phi, logits, batch["label"])[0])

  expected = np.asarray(vectors(params, state.params))
  of_label = expected[np.arange(_B), batch["label"]]
  np.testing.assert_allclose(result.weights, of_label / _B, rtol=1e-5)
  means = expected.mean(), of_label.mean()
  actual = result.metrics["rectifier"], result.metrics["rectifier_of_label"]
  np.testing.assert_allclose(actual, means, rtol=1e-5)


@pytest.mark.slow
def test_every_step_has_new_draws_except_in_the_ablation():
  run = _step(warpi.warpi(0.1))
  (one, _), (other, _) = run(0), run(1)
  assert not np.allclose(one.weights, other.weights)
  run = _step(warpi.warpi(0.1, deterministic=True))
  (one, state), (other, _) = run(0), run(1)
  chex.assert_trees_all_close(one.grads, other.grads)
  fixed = warpi.warpi(0.1, noise_fn=lambda key, shape, dtype: jnp.zeros(shape, dtype))
  chex.assert_trees_all_close(_step(fixed)(0)[0].grads, one.grads, rtol=1e-5)
  assert ((one.weights > 0) & (one.weights < 1 / _B)).all()
  assert state.finite and np.isfinite(state.meta_loss)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"num_samples": 0}, "num_samples=0 must be an integer of at least 1"),
    ({"num_samples": 1.5}, "num_samples=1.5 must be an integer of at least 1"),
    ({"every": float("nan")}, "every=nan must be an integer of at least 1"),
    ({"every": -1}, "every=-1 must be an integer of at least 1"),
  ],
)
def test_bad_settings_are_refused(arguments, message):
  with pytest.raises(base.InputError, match=message):
    warpi.warpi(0.1, **arguments)


def test_a_single_logit_is_refused():
  with pytest.raises(base.InputError, match="one logit per class"):
    _step(warpi.warpi(0.1), outputs=1)(0)


@pytest.mark.parametrize("labels", [np.array([True, False]), np.eye(2, dtype=int)])
def test_labels_may_be_booleans_and_other_labels_are_refused(labels):
  model = classifier.Classifier(mlp.MLP(2, (3,)), 2)
  batch = {"image": np.ones((2, 3), np.float32), "label": labels}
  problem = model.problem(class_counts=jnp.ones(2), num_examples=2, num_steps=1)
  method = warpi.warpi(0.1)

  def weights():
    params, model_state = model.init(jax.random.key(0), batch)
    inputs = base.Inputs(
      params, model_state, (), batch, batch, jnp.int32(0), jax.random.key(1)
    )
    state = method.init(jax.random.key(2), problem, params)
    return method.gradients(state, problem, inputs)[0].weights

  if labels.ndim == 1:
    assert jax.eval_shape(weights).shape == (2,)
  else:
    with pytest.raises(base.InputError, match=r"integers of shape \[B\]"):
      jax.eval_shape(weights)

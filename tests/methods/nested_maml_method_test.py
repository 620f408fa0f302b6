"""NestedMAML as a method of the loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax.methods import baselines
from l2rw_jax.methods import nested_maml
from l2rw_jax.models import few_shot

_CLASSES, _ITEMS, _TASKS, _N = 3, 4, 8, 12
_ETA = 0.05
# The mean over the labels of each task.
_loss = few_shot.Learner(None, _CLASSES, 1).loss


def _forward(params, model_state, batch, key, train):
  """Logits [T, Q, C] without adaptation, which other tests cover."""
  del key, train
  return jnp.tanh(batch["x"] @ params["w"]) @ params["v"], model_state


def _examples(seed, index):
  rng = np.random.default_rng(seed)
  number = len(index)
  return {
    "x": rng.normal(size=(number, _ITEMS, 3)).astype(np.float32),
    "label": rng.integers(_CLASSES, size=(number, _ITEMS)).astype(np.int32),
    "index": np.asarray(index, np.int32),
    "group": (np.asarray(index) % 3).astype(np.int32),
  }


_BATCH = _examples(0, [3, 1, 4, 0, 5, 9, 2, 6])
_VALIDATION = _examples(1, range(8))


def _task(axis_name=None):
  return base.Problem(
    forward=_forward,
    loss=_loss,
    linearize=linearization.linearize,
    linearize_outputs=linearization.linearize_outputs,
    num_classes=_CLASSES,
    class_counts=jnp.ones(_CLASSES),
    num_examples=_N,
    num_steps=9,
    axis_name=axis_name,
  )


def _params():
  rng = np.random.default_rng(2)
  shapes = {"w": (3, 5), "v": (5, _CLASSES)}
  return {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}


def _inputs(batch, validation, step=0):
  return base.Inputs(
    _params(), {}, (), batch, validation, jnp.array(step), jax.random.key(1)
  )


def _once(method, state=None, step=0):
  if state is None:
    state = method.init(jax.random.key(2), _task(), _params())
  run = jax.jit(lambda s, b, v: method.gradients(s, _task(), _inputs(b, v, step)))
  return run(state, _BATCH, _VALIDATION)


def _losses(params, batch):
  return jnp.mean(_item_losses(params, batch), axis=1)


def _item_losses(params, batch, scale=1.0):
  logits = scale * _forward(params, {}, batch, None, True)[0]
  chosen = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(chosen, batch["label"][..., None], -1)[..., 0]


def _gradient(losses_fn, weights, meta_losses_fn=_losses):
  """dM/dw at weights shaped like the losses, by `jax.grad` of the unrolled step."""

  def validation_loss(w):
    slope = jax.grad(lambda p: jnp.mean(w * losses_fn(p, _BATCH)))(_params())
    ahead = jax.tree.map(lambda p, g: p - _ETA * g, _params(), slope)
    return jnp.mean(meta_losses_fn(ahead, _VALIDATION))

  return jax.jit(jax.grad(validation_loss))(weights)


_SHARES = {
  "task": {},
  "cluster": {"num_clusters": 3},
  "item": {"num_items": _ITEMS},
}
_GAMMA = 300.0


def _method(share="task", gamma=_GAMMA, **settings):
  return nested_maml.nested_maml(gamma, _ETA, share, **_SHARES[share], **settings)


def test_zero_weight_learning_rate_is_maml():
  expected, _ = _once(baselines.uniform())
  for share in ("cluster", "item"):
    result, _ = _once(_method(share, gamma=0.0))
    np.testing.assert_allclose(result.weights, expected.weights, rtol=1e-6)
    np.testing.assert_allclose(result.losses, expected.losses, rtol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
      result.grads,
      expected.grads,
    )


def test_weights_per_task():
  result, state = _once(_method())
  gradient = _gradient(_losses, jnp.ones(_TASKS))
  assert state.weights.shape == (_N,)
  expected = np.ones(_N)
  expected[_BATCH["index"]] = np.maximum(1 - _GAMMA * gradient, 0)
  assert np.ptp(expected) > 0.1
  np.testing.assert_allclose(state.weights, expected, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(result.weights, state.weights[_BATCH["index"]] / _TASKS)


def test_gradients_are_summed_within_clusters():
  result, state = _once(_method("cluster"))
  gradient = _gradient(_losses, jnp.ones(_TASKS))
  sums = [gradient[_BATCH["group"] == c].sum() for c in range(3)]
  expected = np.maximum(1 - _GAMMA * np.array(sums), 0)
  np.testing.assert_allclose(state.weights, expected, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(result.weights, expected[_BATCH["group"]] / _TASKS, 1e-3)


def test_weights_per_query_sum_to_the_task_weight():
  result, state = _once(_method("item", gamma=1000.0))
  gradient = _gradient(_item_losses, jnp.ones((_TASKS, _ITEMS)))
  assert state.weights.shape == (_N, _ITEMS)
  weights = np.maximum(1 - 1000.0 * gradient, 0)
  batch_weights = state.weights[_BATCH["index"]]
  np.testing.assert_allclose(batch_weights, weights, rtol=1e-3, atol=2e-3)
  np.testing.assert_allclose(
    result.weights, batch_weights.sum(1) / (_TASKS * _ITEMS), rtol=1e-5
  )

  def weighted(params):
    return jnp.mean(batch_weights * _item_losses(params, _BATCH))

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
    result.grads,
    jax.grad(weighted)(_params()),
  )


def test_meta_forward_is_used_for_validation_tasks():
  def doubled(*given):
    logits, state = _forward(*given)
    return 2 * logits, state

  _, state = _once(_method(meta_forward=doubled))
  meta_losses_fn = functools.partial(_item_losses, scale=2.0)
  gradient = _gradient(_losses, jnp.ones(_TASKS), meta_losses_fn)
  expected = np.maximum(1 - _GAMMA * gradient, 0)
  batch_weights = state.weights[_BATCH["index"]]
  np.testing.assert_allclose(batch_weights, expected, rtol=1e-3, atol=1e-3)
  expected_loss = _once(_method(gamma=0.0, meta_forward=doubled))[1].meta_loss
  np.testing.assert_allclose(state.meta_loss, expected_loss, rtol=1e-6)
  assert state.finite


def test_weights_are_updated_every_so_many_steps():
  method = _method(every=2)
  _, first = _once(method, step=0)
  _, second = _once(method, first, step=1)
  np.testing.assert_array_equal(first.weights, second.weights)
  _, third = _once(method, second, step=2)
  assert np.abs(third.weights - second.weights).max() > 1e-3


@pytest.mark.parametrize("share", ["cluster", "item"])
def test_eight_devices_equal_one(share):
  method = _method(share)
  expected, state = _once(method)
  shards = [
    {k: v.reshape(8, -1, *v.shape[1:]) for k, v in b.items()}
    for b in (_BATCH, _VALIDATION)
  ]
  step = jax.pmap(
    lambda s, b, v: method.gradients(s, _task("d"), _inputs(b, v)),
    "d",
    in_axes=(None, 0, 0),
  )
  start = method.init(jax.random.key(2), _task(), _params())
  result, states = step(start, *shards)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  for device in (0, 7):
    on_device = jax.tree.map(lambda x, i=device: x[i], (states.weights, result.grads))
    jax.tree.map(close, on_device, (state.weights, expected.grads))
  close(result.weights.ravel(), expected.weights)
  close(result.losses.ravel(), expected.losses)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"share": "class"}, r"share='class': choose one of \('task', 'cluster', 'item'\)"),
    ({"share": "cluster"}, "share='cluster' with num_clusters=None"),
    ({"share": "item", "num_items": 0}, "share='item' with num_items=0"),
    ({"num_clusters": 3}, "share='task' with num_clusters=3"),
    ({"weight_learning_rate": -1.0}, "weight_learning_rate=-1.0 must be at least 0"),
    ({"lookahead_learning_rate": np.nan}, "lookahead_learning_rate=nan must be"),
    ({"clip": -1.0}, "clip=-1.0 must be at least 0"),
    ({"initial": 0.1, "floor": 0.5}, "initial=0.1 is below floor=0.5"),
    ({"every": 0}, "every=0 must be at least 1 step"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  given = {"weight_learning_rate": 1.0, "lookahead_learning_rate": 1.0, **settings}
  with pytest.raises(base.InputError, match=message):
    nested_maml.nested_maml(**given)


def test_mismatched_labels_and_clusters_are_refused():
  with pytest.raises(base.InputError, match=r"num_items=3 needs labels of shape"):
    _once(nested_maml.nested_maml(1.0, 1.0, "item", num_items=3))
  method = _method("cluster")
  view = base.EpochView(0, 0, None, {}, {"group": np.array([0, 3])}, None)
  with pytest.raises(base.InputError, match="0 to 2; got \\(2,\\) of 0 to 3"):
    method.refresh("state", _task(), view)
  fine = view._replace(train={"group": np.array([0, 2])})
  assert method.refresh("state", _task(), fine) == "state"

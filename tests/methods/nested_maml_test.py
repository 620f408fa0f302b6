"""NestedMAML: the published equations, shared weights, the method in the loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax import linearization
from l2rw_jax.methods import baselines
from l2rw_jax.methods import nested_maml
from l2rw_jax.models import few_shot

# Learning rates of the adaptation and of the look-ahead step, as in `nested_maml`.
_ALPHA, _ETA = 0.1, 0.05


def _quadratic(first_order=False, alpha=_ALPHA):
  """Scalar tasks (a, s, b, q): adapt on a (p - s)^2 / 2, loss b (p - q)^2 / 2."""

  def losses_fn(params, tasks):
    def loss(a, s, b, q):
      def support_fn(p, _):
        return 0.5 * a * (p - s) ** 2

      adapted = few_shot.adapt(
        support_fn, params, None, learning_rate=alpha, first_order=first_order
      )
      return 0.5 * b * (adapted - q) ** 2

    return jax.vmap(loss)(*tasks)

  return losses_fn


_TRAIN = tuple(np.array(x) for x in ([1.0, 2.0], [0.5, -1.0], [1.0, 1.5], [1.0, -2.0]))
_META = tuple(np.array(x) for x in ([1.0, 0.5], [0.8, 1.2], [1.0, 2.0], [1.1, 0.9]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("first_order", "gradient", "weights"),
  [
    (False, (-0.02732427, 0.06902974), (0.52732427, 0.43097026)),
    (True, (-0.02934440, 0.07413323), (0.52934440, 0.42586677)),
  ],
)
def test_equation_8_in_the_scalar_case(first_order, gradient, weights):
  before = jnp.array([0.5, 0.5])
  slopes_fn = functools.partial(
    nested_maml.weight_gradient,
    _quadratic(),
    lookahead_learning_rate=_ETA,
    meta_losses_fn=_quadratic(first_order),
  )
  result = jax.jit(slopes_fn)(jnp.zeros(()), _TRAIN, _META, before)
  np.testing.assert_allclose(result.gradient, gradient, atol=5e-9)
  np.testing.assert_allclose(result.meta_loss, 0.63357877, atol=5e-9)
  after = nested_maml.update_weights(before, result.gradient, 1.0)
  np.testing.assert_allclose(after, weights, atol=5e-9)
  assert result.finite and result.aux is None


def test_integer_weights_have_a_gradient_that_is_not_rounded():
  @jax.jit
  def gradient_of_each(*several):
    return [
      nested_maml.weight_gradient(
        _quadratic(), 0.0, _TRAIN, _META, weights, lookahead_learning_rate=_ETA
      ).gradient
      for weights in several
    ]

  gradients = gradient_of_each(jnp.ones(2, int), jnp.ones(2))
  assert gradients[1].all()
  np.testing.assert_array_equal(*gradients)


def _net_item_losses(params, x, y):
  return 0.5 * (jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2


def _net_losses(first_order=False, num_steps=1):
  """Losses of a small network on tasks {"x": [T, 2, n, d], "y": [T, 2, n]}.

  Along the axis of size 2, the support set comes before the query set.
  """

  def losses_fn(params, tasks):
    def loss(x, y):
      adapted = few_shot.adapt(
        lambda p, _: _net_item_losses(p, x[0], y[0]),
        params,
        None,
        learning_rate=_ALPHA,
        num_steps=num_steps,
        first_order=first_order,
      )
      return jnp.mean(_net_item_losses(adapted, x[1], y[1]))

    return jax.vmap(loss)(tasks["x"], tasks["y"])

  return losses_fn


def _net_tasks(seed, number):
  rng = np.random.default_rng(seed)
  return {
    "x": rng.normal(size=(number, 2, 4, 3)),
    "y": rng.normal(size=(number, 2, 4)),
  }


def _net_params():
  rng = np.random.default_rng(9)
  return {"w": rng.normal(size=(3, 5)), "v": rng.normal(size=5)}


@jax.jit
def _literal_equation_8(params, tasks, meta_tasks, weights):
  """-(eta / mn) sum_j grad_phi L_Vj . (g_i - alpha H_j g_i), with explicit Hessians.

  g_i is the gradient of the loss of training task i of m, after adaptation. For
  validation task j of n, L_Vj is the loss at the adapted parameters phi, and H_j is the
  Hessian of the support loss.

  Returns the value without the Hessians, then the value with them.
  """
  flat, unflatten = jax.flatten_util.ravel_pytree(params)

  def support(p, tasks, i):
    return jnp.mean(_net_item_losses(unflatten(p), tasks["x"][i, 0], tasks["y"][i, 0]))

  def query(p, tasks, i):
    return jnp.mean(_net_item_losses(unflatten(p), tasks["x"][i, 1], tasks["y"][i, 1]))

  def adapted_loss(p, i):
    return query(p - _ALPHA * jax.grad(support)(p, tasks, i), tasks, i)

  m, n = len(tasks["x"]), len(meta_tasks["x"])
  g = jax.vmap(lambda i: jax.grad(adapted_loss)(flat, i))(jnp.arange(m))
  ahead = flat - _ETA / m * weights @ g

  def per_meta_task(j):
    phi = ahead - _ALPHA * jax.grad(support)(ahead, meta_tasks, j)
    slope = jax.grad(query)(phi, meta_tasks, j)
    hessian = jax.hessian(support)(ahead, meta_tasks, j)
    return g @ slope, (g - _ALPHA * g @ hessian) @ slope

  totals = [x.sum(axis=0) for x in jax.vmap(per_meta_task)(jnp.arange(n))]
  return [-_ETA / (m * n) * total for total in totals]


@pytest.mark.slow("False")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("first_order", [False, True])
def test_equation_8_with_explicit_hessians_or_without(first_order):
  params, weights = _net_params(), np.array([0.5, 1.0, 2.0])
  tasks, meta_tasks = _net_tasks(0, 3), _net_tasks(1, 2)
  slopes_fn = functools.partial(
    nested_maml.weight_gradient,
    _net_losses(),
    lookahead_learning_rate=_ETA,
    meta_losses_fn=_net_losses(first_order),
  )
  result = jax.jit(slopes_fn)(params, tasks, meta_tasks, weights)
  without, with_hessians = _literal_equation_8(params, tasks, meta_tasks, weights)
  expected, other = (
    (without, with_hessians) if first_order else (with_hessians, without)
  )
  np.testing.assert_allclose(result.gradient, expected, rtol=1e-9)
  assert np.abs(other / expected - 1).max() > 1e-3


@pytest.mark.usefixtures("x64")
def test_several_inner_steps_equal_the_unrolled_step_and_finite_differences():
  losses_fn = _net_losses(num_steps=2)
  params, weights = _net_params(), np.array([0.5, 1.0, 2.0])
  tasks, meta_tasks = _net_tasks(0, 3), _net_tasks(1, 2)
  optimizer = optax.sgd(_ETA)

  @jax.jit
  def slopes_both_ways(weights):
    given = params, tasks, meta_tasks
    computed = nested_maml.weight_gradient(
      losses_fn, *given, weights, lookahead_learning_rate=_ETA
    )
    unrolled = hypergradient.unrolled_weight_gradient(
      losses_fn,
      losses_fn,
      *given,
      weights / 3,
      optimizer=optimizer,
      opt_state=optimizer.init(params),
    )
    return computed, unrolled

  result, unrolled = slopes_both_ways(weights)
  np.testing.assert_allclose(result.gradient, unrolled / 3, rtol=1e-9)

  @jax.jit
  @jax.vmap
  def validation_loss(weights):
    slope = jax.grad(lambda p: jnp.mean(weights * losses_fn(p, tasks)))(params)
    ahead = jax.tree.map(lambda p, g: p - _ETA * g, params, slope)
    return jnp.mean(losses_fn(ahead, meta_tasks))

  perturbations = 1e-4 * np.concatenate([np.eye(3), -np.eye(3), np.zeros((1, 3))])
  values = np.asarray(validation_loss(weights + perturbations))
  differences = (values[:3] - values[3:6]) / 2e-4
  np.testing.assert_allclose(result.gradient, differences, rtol=1e-6)
  np.testing.assert_allclose(result.meta_loss, values[6], rtol=1e-12)


def test_weights_are_clipped_and_floored():
  weights, gradient = jnp.array([1.0, 1.0, 1.0]), jnp.array([-9.0, 9.0, 0.3])
  update = functools.partial(nested_maml.update_weights, weights, gradient, 0.5)
  np.testing.assert_allclose(update(), [5.5, 0.0, 0.85])
  np.testing.assert_allclose(update(clip=0.5), [1.25, 0.75, 0.85])
  np.testing.assert_allclose(update(floor=0.9), [5.5, 0.9, 0.9])
  np.testing.assert_allclose(update(floor=-np.inf), [5.5, -3.5, 0.85])


# -- in the loop -------------------------------------------------------------


# Numbers of classes, items of a task, tasks in a batch and tasks in the training set.
_CLASSES, _ITEMS, _TASKS, _N = 3, 4, 8, 12
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
_DATA = _BATCH, _VALIDATION


def _problem(axis_name=None):
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
    _params(), {}, (), batch, validation, jnp.asarray(step), jax.random.key(1)
  )


def _initial_state(method):
  return jax.jit(lambda: method.init(jax.random.key(2), _problem(), _params()))()


def _step_fn(method):
  return jax.jit(lambda s, step: method.gradients(s, _problem(), _inputs(*_DATA, step)))


@functools.cache  # Tests with the same method share one program.
def _first_step(method):
  return _step_fn(method)(_initial_state(method), 0)


def _losses(params, batch):
  return jnp.mean(_item_losses(params, batch), axis=1)


def _item_losses(params, batch, scale=1.0):
  logits = scale * _forward(params, {}, batch, None, True)[0]
  chosen = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(chosen, batch["label"][..., None], -1)[..., 0]


@functools.cache
def _value_and_gradient(losses_fn, *shape, meta_losses_fn=_losses):
  """The meta loss and its gradient [*shape] at weights of one, by an unrolled step."""

  def validation_loss(w):
    slope = jax.grad(lambda p: jnp.mean(w * losses_fn(p, _BATCH)))(_params())
    ahead = jax.tree.map(lambda p, g: p - _ETA * g, _params(), slope)
    return jnp.mean(meta_losses_fn(ahead, _VALIDATION))

  return jax.jit(jax.value_and_grad(validation_loss))(jnp.ones(shape))


_SHARES = {
  "task": {},
  "cluster": {"num_clusters": 3},
  "item": {"num_items": _ITEMS},
}
_GAMMA = 300.0


@functools.cache
def _method(share="task", gamma=_GAMMA, **settings):
  return nested_maml.nested_maml(gamma, _ETA, share, **_SHARES[share], **settings)


def test_an_integer_initial_weight_is_not_rounded_later():
  expected, _ = _first_step(_method())
  actual, _ = _step_fn(_method(initial=1))(_initial_state(_method(initial=1)), 0)
  np.testing.assert_array_equal(actual.weights, expected.weights)


def test_the_value_for_the_optimizer_is_the_weighted_loss_of_all_items():
  method = _method("item")
  result, state = _first_step(method)
  losses = np.asarray(_item_losses(_inputs(*_DATA, 0).params, _inputs(*_DATA, 0).batch))
  weights = np.asarray(state.weights)[_inputs(*_DATA, 0).batch["index"]]
  np.testing.assert_allclose(result.value, (weights * losses).mean(), rtol=1e-5)


@pytest.mark.slow
def test_zero_weight_learning_rate_is_maml():
  expected, _ = _first_step(baselines.uniform())
  for share in ("cluster", "item"):
    result, _ = _first_step(_method(share, gamma=0.0))
    np.testing.assert_allclose(result.weights, expected.weights, rtol=1e-6)
    np.testing.assert_allclose(result.losses, expected.losses, rtol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
      result.grads,
      expected.grads,
    )


@pytest.mark.slow
def test_task_weights_follow_the_unrolled_gradient():
  result, state = _first_step(_method())
  _, gradient = _value_and_gradient(_losses, _TASKS)
  assert state.weights.shape == (_N,)
  expected = np.ones(_N)
  expected[_BATCH["index"]] = np.maximum(1 - _GAMMA * gradient, 0)
  assert np.ptp(expected) > 0.1
  np.testing.assert_allclose(state.weights, expected, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(result.weights, state.weights[_BATCH["index"]] / _TASKS)


def test_gradients_are_summed_within_clusters():
  result, state = _first_step(_method("cluster"))
  _, gradient = _value_and_gradient(_losses, _TASKS)
  sums = [gradient[_BATCH["group"] == c].sum() for c in range(3)]
  expected = np.maximum(1 - _GAMMA * np.array(sums), 0)
  np.testing.assert_allclose(state.weights, expected, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(result.weights, expected[_BATCH["group"]] / _TASKS, 1e-3)


@pytest.mark.slow
def test_item_weights_sum_to_the_task_weight():
  result, state = _first_step(_method("item", gamma=1000.0))
  _, gradient = _value_and_gradient(_item_losses, _TASKS, _ITEMS)
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
    jax.jit(jax.grad(weighted))(_params()),
  )


def test_meta_forward_is_used_for_validation_tasks_and_weights_have_bounds():
  scale = np.array([[[2, -2, 1]]], np.float32)  # The gradients have both signs.

  def scaled(*given):
    logits, state = _forward(*given)
    return scale * logits, state

  clip, floor = 0.002, 0.95
  _, state = _first_step(_method(meta_forward=scaled, clip=clip, floor=floor))
  meta_losses_fn = functools.partial(_item_losses, scale=scale)
  expected_loss, gradient = _value_and_gradient(
    _losses, _TASKS, meta_losses_fn=meta_losses_fn
  )
  unbounded = 1 - _GAMMA * np.clip(gradient, -clip, clip)
  expected = np.maximum(unbounded, floor)
  for bound in (np.abs(gradient) > clip, unbounded < floor):
    assert bound.any() and not bound.all()
  batch_weights = state.weights[_BATCH["index"]]
  np.testing.assert_allclose(batch_weights, expected, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(state.meta_loss, expected_loss, rtol=1e-6)
  assert state.finite


def test_weights_are_updated_every_second_step():
  method = _method(every=2)
  run = _step_fn(method)
  _, first = run(_initial_state(method), 0)
  _, second = run(first, 1)
  np.testing.assert_array_equal(first.weights, second.weights)
  _, third = run(second, 2)
  assert np.abs(third.weights - second.weights).max() > 1e-3


@pytest.mark.slow("cluster")
@pytest.mark.parametrize("share", ["cluster", "item"])
def test_eight_devices_equal_one(share):
  method = _method(share)
  expected, state = _first_step(method)
  shards = [
    {k: v.reshape(8, -1, *v.shape[1:]) for k, v in b.items()}
    for b in (_BATCH, _VALIDATION)
  ]
  step = jax.pmap(
    lambda s, b, v: method.gradients(s, _problem("d"), _inputs(b, v)),
    "d",
    in_axes=(None, 0, 0),
  )
  result, states = step(_initial_state(method), *shards)
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
    ({"every": 0}, "every=0 must be an integer of at least 1"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  given = {"weight_learning_rate": 1.0, "lookahead_learning_rate": 1.0, **settings}
  with pytest.raises(base.InputError, match=message):
    nested_maml.nested_maml(**given)


def test_missing_validation_tasks_are_refused():
  with pytest.raises(base.InputError, match="meta_tasks is None: give the validation"):
    jax.eval_shape(
      lambda: nested_maml.weight_gradient(
        _quadratic(), 0.0, _TRAIN, None, jnp.ones(2), lookahead_learning_rate=_ETA
      )
    )


def test_mismatched_labels_and_clusters_are_refused():
  with pytest.raises(base.InputError, match=r"num_items=3 needs labels of shape"):
    _first_step(nested_maml.nested_maml(1.0, 1.0, "item", num_items=3))
  method = _method("cluster")
  view = base.EpochView(0, 0, None, {}, {"group": np.array([0, 3])}, None)
  with pytest.raises(base.InputError, match=r"0 to 2; got shape \(2,\) with 0 to 3"):
    method.refresh("state", _problem(), view)
  valid = view._replace(train={"group": np.array([0, 2])})
  assert method.refresh("state", _problem(), valid) == "state"

"""The few-shot learner: MAML's equations, labels, and errors."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import losses
from l2rw_jax.models import conv4
from l2rw_jax.models import few_shot

_WAYS, _SHOTS, _QUERIES = 3, 2, 4


class _Net(nn.Module):
  """A smooth network, for finite differences."""

  num_outputs: int = _WAYS

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.tanh(nn.Dense(4, param_dtype=x.dtype)(x.reshape(len(x), -1)))
    return nn.Dense(self.num_outputs, param_dtype=x.dtype)(x)


def _batch(seed=0, num_tasks=2, dtype=np.float32):
  rng = np.random.default_rng(seed)
  shape = (num_tasks, _WAYS, _SHOTS + _QUERIES, 2, 2, 1)
  labels = np.repeat(np.arange(_WAYS), _QUERIES)
  return {
    "image": rng.normal(size=shape).astype(dtype),
    "label": np.tile(labels, (num_tasks, 1)),
    "index": np.arange(num_tasks),
  }


def _learner(**settings):
  return few_shot.Learner(
    _Net(), _WAYS, _SHOTS, **{"inner_learning_rate": 0.5, **settings}
  )


def _losses(learner, params, batch, train=True):
  outputs, state = learner.forward(params, {}, batch, jax.random.key(0), train)
  assert state == {}
  return learner.loss(outputs, batch)


def _literal(params, images, num_steps, rate, first_order=False):
  """MAML's loss of one task, as a literal transcription of its equations."""
  net = _Net()
  support = [(images[w, i], w) for w in range(_WAYS) for i in range(_SHOTS)]
  query = [(images[w, _SHOTS + i], w) for w in range(_WAYS) for i in range(_QUERIES)]

  def mean_loss(p, examples):
    x = jnp.stack([image for image, _ in examples])
    y = jnp.array([label for _, label in examples])
    return jnp.mean(losses.softmax_cross_entropy(net.apply({"params": p}, x), y))

  adapted = params
  for _ in range(num_steps):
    slope = jax.grad(mean_loss)(adapted, support)
    if first_order:
      slope = jax.lax.stop_gradient(slope)
    adapted = jax.tree.map(lambda p, g: p - rate * g, adapted, slope)
  return mean_loss(adapted, query)


def _task_by_task(one_task, params, batch):
  """Results of `one_task(params, images)`, compiled once, for each task."""
  one_task = jax.jit(one_task)
  tasks = [one_task(params, images) for images in batch["image"]]
  return jax.tree.map(lambda *x: np.stack(x), *tasks)


# `test_equation_8_with_explicit_hessians_or_without` of NestedMAML tests the gradient
# through one step.
@pytest.mark.ci
@pytest.mark.slow(unless=("2-True",))
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("num_steps", "first_order"), [(0, False), (2, True), (2, False)]
)
def test_losses_and_gradients_equal_maml(num_steps, first_order):
  batch = _batch(dtype=np.float64)
  learner = _learner(num_inner_steps=num_steps, first_order=first_order)
  params, state = jax.jit(learner.init)(jax.random.key(1), batch)
  assert state == {}
  learner_losses = functools.partial(_losses, learner, batch=batch)
  literal = functools.partial(
    _literal, num_steps=num_steps, rate=0.5, first_order=first_order
  )

  @jax.jit
  def numbers(params):
    jacobians = jax.jacrev(learner_losses)(params), jax.jacfwd(learner_losses)(params)
    return learner_losses(params), jacobians

  result, jacobians = numbers(params)
  expected, jacobian = _task_by_task(jax.value_and_grad(literal), params, batch)
  np.testing.assert_allclose(result, expected, rtol=1e-12)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
  for one in jacobians:
    jax.tree.map(close, one, jacobian)


@pytest.mark.ci
@pytest.mark.usefixtures("x64")
def test_second_order_gradient_equals_finite_differences():
  batch = _batch(dtype=np.float64)
  learner = _learner(num_inner_steps=2)
  params, _ = jax.jit(learner.init)(jax.random.key(1), batch)
  along = jax.tree.map(np.cos, params)
  first_order = learner._replace(first_order=True)

  def at(t):
    moved = jax.tree.map(lambda p, a: p + t * a, params, along)
    return _losses(learner, moved, batch).mean()

  @jax.jit
  def numbers(t):
    slope = jax.grad(lambda p: _losses(first_order, p, batch).mean())(params)
    return *jax.value_and_grad(at)(t), optax.tree.vdot(slope, along)

  difference = (numbers(1e-6)[0] - numbers(-1e-6)[0]) / 2e-6
  _, slope, product = numbers(0.0)
  np.testing.assert_allclose(slope, difference, rtol=1e-7)
  # The gradient of the first-order approximation is different.
  assert abs(product - difference) > 1e-4 * abs(difference)


@pytest.mark.ci
def test_evaluation_uses_its_number_of_steps_for_any_number_of_tasks():
  # 23 tasks do not fit in an evaluation batch of 20, and are not a multiple of it.
  batch = _batch(num_tasks=23)
  learner = _learner(num_inner_steps=1, num_test_steps=2)
  params, _ = jax.jit(learner.init)(jax.random.key(1), batch)
  result = jax.jit(lambda p, b: _losses(learner, p, b, train=False))(params, batch)
  literal = functools.partial(_literal, num_steps=2, rate=0.5)
  np.testing.assert_allclose(result, _task_by_task(literal, params, batch), rtol=1e-4)


def test_more_steps_lower_the_task_loss():
  rng = np.random.default_rng(0)
  centers = rng.normal(size=(1, _WAYS, 1, 2, 2, 1))
  batch = _batch(num_tasks=1)
  batch["image"] = (centers + 0.1 * batch["image"]).astype(np.float32)
  learner = _learner()
  params, _ = jax.jit(learner.init)(jax.random.key(0), batch)
  result = jax.jit(
    lambda p, b: [
      _losses(learner._replace(num_inner_steps=n), p, b)[0] for n in (0, 5, 50)
    ]
  )(params, batch)
  assert result[0] > result[1] > result[2] and result[2] < 0.2


def test_adapt_of_any_pytree():
  def losses_fn(params, x):
    return 0.5 * (params["a"] * x + params["b"][0]) ** 2

  params = {"a": jnp.array(1.0), "b": [jnp.array(2.0)]}
  result = few_shot.adapt(losses_fn, params, jnp.array([1.0, -1.0]), learning_rate=0.5)
  # The gradients are the means of (x + 2) x and of x + 2, which are 1 and 2.
  assert float(result["a"]) == 0.5 and float(result["b"][0]) == 1.0


def test_adapt_of_complex_parameters_descends():
  result = few_shot.adapt(
    lambda p, x: jnp.abs(p - x) ** 2, 0j, jnp.array([1j, 3j]), learning_rate=0.5
  )
  np.testing.assert_allclose(result, 2j)


@pytest.mark.parametrize("rate", [np.float32(0.5), np.float64(0.5), 0.5])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_adapted_parameters_keep_their_type(rate, num_steps):
  params, x = jnp.ones((), jnp.bfloat16), jnp.zeros(2, jnp.bfloat16)
  with jax.numpy_dtype_promotion("standard"):
    result = few_shot.adapt(
      lambda p, x: 0.5 * (p - x) ** 2,
      params,
      x,
      learning_rate=rate,
      num_steps=num_steps,
    )
  assert result == 0.5**num_steps and result.dtype == jnp.bfloat16


@pytest.mark.ci
def test_uint8_pixels_are_scaled():
  batch = _batch()
  pixels = np.random.default_rng(0).integers(256, size=batch["image"].shape)
  learner = _learner()
  scaled = {**batch, "image": (pixels / 255).astype(np.float32)}
  raw = {**batch, "image": pixels.astype(np.uint8)}
  with_preprocess = learner._replace(preprocess=lambda x: jnp.float32(x) / 255)

  @jax.jit
  def numbers(scaled, raw):
    params, _ = learner.init(jax.random.key(0), scaled)
    cases = (learner, scaled), (learner, raw), (with_preprocess, raw)
    return [_losses(case, params, batch) for case, batch in cases]

  expected, *others = numbers(scaled, raw)
  for result in others:
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_bools_are_refused_and_int32_pixels_are_not_scaled():
  batch, learner = _batch(), _learner()

  def logits(images):
    tasks = {**batch, "image": images}
    params, state = learner.init(jax.random.key(0), batch)
    return learner.forward(params, state, tasks, jax.random.key(0), False)[0]

  with pytest.raises(base.InputError, match="pixels must be numbers, not bools"):
    jax.eval_shape(logits, batch["image"] > 0)
  integers = np.asarray(256 * batch["image"]).astype(np.int32)
  actual, expected = jax.jit(lambda *x: [logits(i) for i in x])(
    integers, integers.astype(np.float32)
  )
  np.testing.assert_array_equal(actual, expected)


def test_learner_is_hashable():
  settings = (conv4.Conv4(5), 5, 1)
  assert few_shot.Learner(*settings) == few_shot.Learner(*settings)
  assert len({few_shot.Learner(*settings), few_shot.Learner(*settings)}) == 1


class _Stateful(nn.Module):
  """A network with running statistics, with which tasks would share a state."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train)(x.reshape(len(x), -1))
    return nn.Dense(_WAYS)(x)


def _with(name, value):
  return {**_batch(), name: value}


_IMAGES = _batch()["image"]


@pytest.mark.parametrize(
  ("settings", "batch", "num_classes", "message"),
  [
    ({"num_ways": 4}, _batch(), 4, "of 4 ways does not fit tasks of 3 ways and 4 cl"),
    ({}, _batch(), 5, "of 3 ways does not fit tasks of 3 ways and 5 cl"),
    ({"num_shots": 6}, _batch(), 3, "more than num_shots=6 of each way"),
    ({}, _with("image", _IMAGES[:, 0]), 3, "tasks need images"),
    ({}, _with("label", _batch()["label"][:, ::-1]), 3, "the label of a way is its"),
    ({}, _with("label", _batch()["label"][:, 1:]), 3, "the label of a way is its"),
    ({"network": _Net(4)}, _batch(), 3, "a network of 4 logits does not fit 3 ways"),
    ({"network": _Stateful()}, _batch(), 3, "the network has the state batch_stats"),
    ({"inner_learning_rate": -1.0}, _batch(), 3, "inner_learning_rate=-1.0 must be"),
    ({"inner_learning_rate": np.nan}, _batch(), 3, "inner_learning_rate=nan must be"),
    ({"num_shots": 0}, _batch(), 3, "num_shots=0 must be an integer of at least 1"),
    (
      {"num_inner_steps": -1},
      _batch(),
      3,
      "num_inner_steps=-1 must be an integer of at least 0",
    ),
  ],
)
def test_mismatched_tasks_are_refused(settings, batch, num_classes, message):
  learner = _learner()._replace(**settings)
  with pytest.raises(base.InputError, match=message) as caught:
    learner.check(batch, num_classes)
  assert "\n" not in str(caught.value)
  _learner().check(_batch(), _WAYS)

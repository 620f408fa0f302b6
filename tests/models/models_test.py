"""The shipped networks: sizes, shapes, pooling, batch statistics."""

import functools

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from l2rw_jax.models import dropout
from l2rw_jax.models import lenet
from l2rw_jax.models import mlp
from l2rw_jax.models import pooling
from l2rw_jax.models import preactivation_resnet
from l2rw_jax.models import resnet
from l2rw_jax.models import split
from l2rw_jax.models import wide_resnet


def _shapes(model, *shape):
  """Shapes of the logits and of the variables; nothing is computed."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(model.init_with_output, jax.random.key(0), x)


def _size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def _full(model):
  return functools.partial(model, full_first_stage=True)


def test_lenet_has_the_parameters_of_the_released_code():
  logits, variables = _shapes(lenet.LeNet(1), 5, 28, 28, 1)
  assert logits.shape == (5, 1)
  assert _size(variables) == 167_113
  assert variables["params"]["Conv_0"]["kernel"].shape == (5, 5, 1, 16)
  assert variables["params"]["Dense_0"]["kernel"].shape == (4 * 4 * 64, 100)


def test_lenet_starts_with_truncated_weights_and_zero_biases():
  params = jax.jit(lenet.LeNet(2).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  for layer in params["params"].values():
    assert not layer["bias"].any()
    assert np.abs(layer["kernel"]).max() < 0.1 * 2 / 0.87  # What truncation leaves.


def test_resnet_32_has_the_parameters_of_the_paper():
  logits, variables = _shapes(resnet.ResNet(10), 2, 32, 32, 3)
  assert logits.shape == (2, 10)
  assert _size(variables["params"]) == 464_154
  kernels = [x for x in jax.tree.leaves(variables["params"]) if x.ndim > 1]
  assert len(kernels) == 6 * 5 + 2


def test_resnet_32_has_the_parameters_of_ldam_with_its_cosine_head():
  logits, variables = _shapes(resnet.ResNet(10, cosine=True), 2, 32, 32, 3)
  assert logits.shape == (2, 10)
  assert _size(variables["params"]) == 464_144  # A linear head's but 10 biases.


_COSINE_MODELS = {
  "mlp": (mlp.MLP(3, (7, 5), cosine=True), (2, 4, 6)),
  "lenet": (lenet.LeNet(3, cosine=True), (2, 8, 8, 1)),
  "resnet": (resnet.ResNet(3, blocks=1, width=2, cosine=True), (2, 8, 8, 1)),
  "wide_resnet": (
    wide_resnet.WideResNet(3, blocks=1, widen=1, cosine=True),
    (2, 8, 8, 1),
  ),
}


@pytest.mark.parametrize("name", _COSINE_MODELS)
def test_a_cosine_head_in_place_of_the_linear_one(name):
  model, shape = _COSINE_MODELS[name]
  _, linear = _shapes(model.clone(cosine=False), *shape)
  _, cosine = _shapes(model, *shape)
  [layer] = [k for k, v in linear["params"].items() if v != cosine["params"][k]]
  assert linear["params"].pop(layer)["kernel"].shape == (model.num_features, 3)
  kernel = cosine["params"].pop(layer)
  assert set(kernel) == {"kernel"}
  assert kernel["kernel"].shape == (model.num_features, 3)
  assert linear == cosine


def _cosine(features, kernel):
  return split.Cosine(kernel.shape[1]).apply({"params": {"kernel": kernel}}, features)


def test_cosines_are_those_of_the_angles():
  rng = np.random.default_rng(0)
  features, kernel = rng.normal(size=(6, 4)), rng.normal(size=(4, 3))
  expected = [
    [f @ w / (np.linalg.norm(f) * np.linalg.norm(w)) for w in kernel.T]
    for f in features
  ]
  run = jax.jit(_cosine)
  np.testing.assert_allclose(run(features, kernel), expected, atol=1e-6)
  # Lengths do not matter, be their squares too large or too small for a float.
  for far in (1e-10, 1e30):
    np.testing.assert_allclose(run(far * features, kernel), expected, atol=1e-6)
    np.testing.assert_allclose(run(features, far * kernel), expected, atol=1e-6)
  np.testing.assert_allclose(np.diag(run(kernel.T, kernel)), 1, rtol=1e-6)
  half = run(jnp.asarray(features, jnp.bfloat16), kernel.astype(np.float32))
  assert half.dtype == np.float32
  np.testing.assert_allclose(half, expected, atol=0.02)


@pytest.mark.usefixtures("x64")
def test_slopes_of_cosines_are_finite_differences():
  rng = np.random.default_rng(1)
  given = rng.normal(size=(2, 4)), rng.normal(size=(4, 3))
  check_grads(jax.jit(_cosine), given, order=1, modes=("fwd", "rev"))


def test_zero_features_have_zero_cosines_and_finite_slopes():
  features = jnp.array([[0.0, 0.0], [1e-30, 0.0], [3.0, 4.0]])
  kernel = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])

  def total(features, kernel):
    cosines = _cosine(features, kernel)
    return jnp.sum(cosines), cosines

  slopes, cosines = jax.jit(jax.grad(total, (0, 1), has_aux=True))(features, kernel)
  np.testing.assert_allclose(cosines, [[0, 0, 0], [0, 0, 0], [0.6, 0.8, 0]], atol=1e-6)
  for slope in slopes:
    assert np.isfinite(slope).all() and np.abs(slope).max() < 10
  assert np.isnan(_cosine(features.at[0, 0].set(jnp.nan), kernel)[0]).all()


def test_the_weights_of_a_cosine_head_start_as_unit_columns():
  model = split.Cosine(50)
  params = model.init(jax.random.key(0), jnp.zeros((1, 40)))["params"]
  kernel = np.asarray(params["kernel"])
  np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1, rtol=1e-5)
  assert abs(kernel.mean()) < 0.02 and kernel.min() < 0 < kernel.max()
  # Uniform, not normal, before they were scaled: none is far from the rest.
  assert np.abs(kernel).max() / kernel.std() < 2.3


@pytest.mark.parametrize("size", [8, 9])
def test_resnet_takes_images_of_any_size_and_halves_them_twice(size):
  model = resnet.ResNet(3, blocks=1, width=2)
  variables = jax.eval_shape(
    model.init, jax.random.key(0), jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
  )
  widths = [2] * 3 + [4] * 2 + [8] * 2
  found = [variables["params"][f"Conv_{i}"]["kernel"].shape[-1] for i in range(7)]
  assert found == widths


@pytest.mark.parametrize(
  ("model", "classes", "size"),
  [
    # By hand, ResNet-32: convolutions 461,232, output 650, BN shifts 1,072; the
    # first stage's other four BNs are 64 more.
    (preactivation_resnet.resnet_32, 10, 462_954),
    (_full(preactivation_resnet.resnet_32), 10, 463_018),
    (preactivation_resnet.wrn_28_10, 10, 36_211_178),
    (preactivation_resnet.wrn_28_10, 100, 36_268_868),
    # By hand: convolutions 84,580,272, output 6,410, BatchNorm 40,352.
    (preactivation_resnet.LeakyWideResNet, 10, 84_627_034),
    # As PyTorch counts them.
    (wide_resnet.WideResNet, 10, 36_479_194),
    (wide_resnet.WideResNet, 100, 36_536_884),
  ],
)
def test_parameters_of_the_released_networks(model, classes, size):
  logits, variables = _shapes(model(classes), 2, 32, 32, 3)
  assert logits.shape == (2, classes)
  assert _size(variables["params"]) == size


def test_l2rw_networks_shift_and_do_not_scale():
  _, variables = _shapes(preactivation_resnet.resnet_32(10), 2, 32, 32, 3)
  norms = [v for k, v in variables["params"].items() if k.startswith("BatchNorm")]
  # One in each of the 5 units of the first stage, two in the others, stem, end.
  assert len(norms) == 5 + 2 * 10 + 2
  assert all(set(norm) == {"bias"} for norm in norms)
  _, variables = _shapes(wide_resnet.WideResNet(10, widen=1), 2, 32, 32, 3)
  assert set(variables["params"]["BatchNorm_0"]) == {"bias", "scale"}


def test_l2rw_shortcut_by_hand():
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  found = preactivation_resnet._shortcut(x, 3, 2)
  np.testing.assert_array_equal(found[0, :, :, 1], [[2.5, 4.5], [10.5, 12.5]])
  assert not found[..., 0].any() and not found[..., 2].any()
  np.testing.assert_array_equal(preactivation_resnet._shortcut(x, 1, 1), x)


def _paddings(model):
  """Padding of every 3x3 convolution."""
  x = jnp.zeros((1, 8, 8, 3))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  return {
    equation.params["padding"]
    for equation in jax.make_jaxpr(model.apply)(variables, x).eqns
    if equation.primitive.name == "conv_general_dilated"
    and equation.invars[1].aval.shape[:2] == (3, 3)
  }


def test_padding_is_that_of_the_framework_it_comes_from():
  both = ((1, 1), (1, 1))
  assert _paddings(resnet.ResNet(3, blocks=1, width=2)) == {both}
  assert _paddings(wide_resnet.WideResNet(3, blocks=1, widen=1)) == {both}
  # TensorFlow pads a stride of 2 behind only.
  small = preactivation_resnet.PreActivationResNet(
    3, blocks=1, widths=(2, 4, 8), stem=2
  )
  assert _paddings(small) == {both, ((0, 1), (0, 1))}


@pytest.mark.parametrize(
  ("model", "kernel", "spread"),
  [
    (preactivation_resnet.resnet_32(10), "Conv_30", (2 / (9 * 64)) ** 0.5 * 0.88),
    (resnet.ResNet(10), "Conv_30", (2 / (9 * 64)) ** 0.5),
    (wide_resnet.WideResNet(10, widen=2), "Conv_27", (2 / (9 * 128)) ** 0.5),
  ],
)
def test_kernels_start_as_in_the_released_code(model, kernel, spread):
  init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 8, 8, 3)))["params"])
  values = init(jax.random.key(0))[kernel]["kernel"]
  # Some 37,000 values or more; truncation at two deviations leaves 0.88 of one.
  assert np.std(values) == pytest.approx(spread, rel=0.02)


BATCH_NORM_MODELS = [
  resnet.ResNet(3, blocks=1, width=2),
  preactivation_resnet.PreActivationResNet(
    3, blocks=2, widths=(2, 4, 8), stem=2, dropout=0.3, full_first_stage=True
  ),
  preactivation_resnet.LeakyWideResNet(3, blocks=1, widths=(2, 4, 8), stem=2),
  wide_resnet.WideResNet(3, blocks=1, widen=1, dropout=0.3),
]


@pytest.mark.parametrize("model", BATCH_NORM_MODELS, ids=lambda m: type(m).__name__)
def test_running_statistics_move_only_in_training(model):
  x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
  variables = jax.jit(model.init)(jax.random.key(0), x)

  def run(train):
    rngs = {"dropout": jax.random.key(2)}
    apply = jax.jit(
      lambda v: model.apply(v, x, train=train, mutable=["batch_stats"], rngs=rngs)
    )
    return apply(variables)

  logits, state = run(train=False)
  assert np.isfinite(logits).all()
  chex.assert_trees_all_equal(state["batch_stats"], variables["batch_stats"])
  trained_logits, state = run(train=True)
  assert (np.abs(trained_logits - logits) > 1e-3).any()
  moved = jax.tree.map(
    lambda a, b: bool((a != b).any()), state["batch_stats"], variables["batch_stats"]
  )
  assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("model", BATCH_NORM_MODELS, ids=lambda m: type(m).__name__)
def test_logits_are_the_head_of_the_features(model):
  x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
  variables = jax.jit(model.init)(jax.random.key(0), x)
  features = model.apply(variables, x, method="features")
  assert features.shape == (4, model.num_features)
  np.testing.assert_array_equal(
    model.apply(variables, features, method="head"), model.apply(variables, x)
  )


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_networks_do_not_depend_on_the_number_of_devices(devices):
  """Statistics of the global batch, and dropout masks by place in it."""
  model = preactivation_resnet.PreActivationResNet(
    3, blocks=2, widths=(2, 4, 8), stem=2, dropout=0.5, full_first_stage=True
  )
  x = jax.random.normal(jax.random.key(1), (16, 8, 8, 3))
  variables = jax.jit(model.init)(jax.random.key(0), x)

  def apply(model, x):
    rngs = {"dropout": jax.random.key(2)}
    return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)

  expected, expected_state = jax.jit(lambda x: apply(model, x))(x)
  shared = model.clone(axis_name="devices")
  shards = x.reshape(devices, -1, *x.shape[1:])
  found, state = jax.pmap(lambda x: apply(shared, x), "devices")(shards)
  np.testing.assert_allclose(found.reshape(16, 3), expected, atol=1e-5)
  first = jax.tree.map(lambda x: x[0], state)
  chex.assert_trees_all_close(first, expected_state, atol=1e-5)


def test_dropout_keeps_the_mean_and_differs_between_examples():
  layer = dropout.Dropout(0.3)
  x = jnp.full((50, 1000), 2.0)
  found = layer.apply({}, x, True, rngs={"dropout": jax.random.key(0)})
  kept = found > 0
  np.testing.assert_allclose(found[kept], 2 / 0.7, rtol=1e-6)
  # Four standard deviations of 50,000 coins.
  assert np.mean(kept) == pytest.approx(0.7, abs=0.0083)
  assert len({row.tobytes() for row in np.asarray(kept)}) == 50
  np.testing.assert_array_equal(layer.apply({}, x, False), x)


def test_mlp_flattens_and_counts():
  logits, variables = _shapes(mlp.MLP(3, hidden=(7, 5)), 2, 4, 6)
  assert logits.shape == (2, 3)
  assert _size(variables) == (24 * 7 + 7) + (7 * 5 + 5) + (5 * 3 + 3)
  logits, variables = _shapes(mlp.MLP(3, hidden=()), 2, 4)
  assert logits.shape == (2, 3)
  assert _size(variables) == 4 * 3 + 3


def _reference(x, window, stride):
  return nn.max_pool(x, (window, window), (stride, stride), "SAME")


@pytest.mark.parametrize("shape", [(28, 28), (7, 7), (6, 5), (1, 2)])
@pytest.mark.parametrize(("window", "stride"), [(3, 2), (2, 2), (2, 3), (3, 1)])
def test_max_pool_is_that_of_flax(shape, window, stride):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, *shape, 3)).astype(np.float32)

  def both(x):
    expected, expected_vjp = jax.vjp(lambda x: _reference(x, window, stride), x)
    actual, vjp = jax.vjp(lambda x: pooling.max_pool(x, window, stride), x)
    cotangent = jnp.cos(jnp.arange(expected.size, dtype=float)).reshape(expected.shape)
    return (actual, *vjp(cotangent)), (expected, *expected_vjp(cotangent))

  actual, expected = jax.jit(both)(x)
  np.testing.assert_array_equal(actual[0], expected[0])
  np.testing.assert_allclose(actual[1], expected[1], rtol=1e-6, atol=1e-6)


def test_max_pool_hands_on_nan():
  for i in range(5):
    x = jnp.zeros((1, 5, 5, 1)).at[0, i, 2, 0].set(jnp.nan)
    np.testing.assert_array_equal(pooling.max_pool(x, 3, 2), _reference(x, 3, 2))


def test_max_pool_does_not_lose_gradient_to_ties():
  x = jnp.zeros((1, 4, 4, 1))
  gradient = jax.grad(lambda x: pooling.max_pool(x, 2, 2).sum())(x)
  np.testing.assert_array_equal(
    gradient.reshape(2, 2, 2, 2).sum((1, 3)), np.ones((2, 2))
  )

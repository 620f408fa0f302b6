"""The layerwise engine equals forward mode if examples are independent."""

import contextlib
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.models import augmentation
from l2rw_jax.models import classifier
from l2rw_jax.models import dropout
from l2rw_jax.models import lenet
from l2rw_jax.models import mlp

_B = 6
_FLAX_IN_FLOAT64 = pytest.mark.promotes("flax's layers mix float64 with float32")


class _Residual(nn.Module):
  """A residual network of two stages with group normalization."""

  @nn.compact
  def __call__(self, x, train=False):
    conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
    x = conv(8)(x)
    for width, strides in ((8, (1, 1)), (16, (2, 2))):
      y = nn.relu(nn.GroupNorm(4)(conv(width, strides=strides)(x)))
      y = nn.GroupNorm(4)(conv(width)(y))
      if x.shape != y.shape:
        x = nn.Conv(width, (1, 1), strides, use_bias=False)(x)
      x = nn.relu(x + y)
    return nn.Dense(10)(x.mean((1, 2)))


class _VisionTransformer(nn.Module):
  """A network whose class token and positions are parameters outside any layer."""

  @nn.compact
  def __call__(self, x, train=False):
    h = nn.Conv(16, (4, 4), (4, 4))(x)
    h = h.reshape(h.shape[0], -1, 16)
    token = self.param("token", nn.initializers.normal(), (1, 1, 16))
    h = jnp.concatenate([jnp.broadcast_to(token, (h.shape[0], 1, 16)), h], 1)
    h += self.param("positions", nn.initializers.normal(), (1, h.shape[1], 16))
    h += nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(h))
    h += nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(h))))
    return nn.Dense(10)(h[:, 0])


class _Text(nn.Module):
  """A network with tied embedding and output layers, and two kinds of dropout."""

  @nn.compact
  def __call__(self, ids, train=False):
    table = nn.Embed(30, 16)
    h = table(ids)
    h += nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(h))
    h = nn.Dropout(0.3)(h, deterministic=not train)
    h = dropout.Dropout(0.3)(h, train)
    h += nn.DenseGeneral(16)(nn.silu(nn.DenseGeneral(32)(nn.RMSNorm()(h))))
    return table.attend(h)[:, -1]


def _images(*shape):
  return np.random.default_rng(0).normal(size=(_B, *shape))


_NETWORKS = {
  "mlp": (mlp.MLP(10, (8,)), lambda: _images(5)),
  "lenet": (lenet.LeNet(10), lambda: _images(28, 28, 1)),
  "residual": (_Residual(), lambda: _images(8, 8, 3)),
  "vision_transformer": (_VisionTransformer(), lambda: _images(12, 12, 3)),
  "text": (_Text(), lambda: np.random.default_rng(0).integers(30, size=(_B, 7))),
}


def _like(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def _random(shapes, dtype="float32"):
  """Parameters from NumPy, since an initialization would have to be compiled."""
  rng = np.random.default_rng(2)
  return jax.tree.map(
    lambda x: jnp.asarray(0.1 + 0.3 * rng.normal(size=x.shape), dtype), shapes
  )


def _results(losses_fn, params, batch, engine, **options):
  """Losses, J v, J^T w and aux, from one compiled function; J is their Jacobian."""
  vector, weights = _like(params, 1), jnp.linspace(-1, 2, _B)

  @jax.jit
  def run(params, batch):
    linearized = linearization.linearize(
      losses_fn, params, batch, engine=engine, **options
    )
    return (
      linearized.losses,
      linearized.directional(vector),
      linearized.weighted_gradient(weights.astype(linearized.losses.dtype)),
      linearized.aux,
    )

  return run(params, batch)


def _network(name, dtype):
  net, make_inputs = _NETWORKS[name]
  x = jnp.asarray(make_inputs())
  x = x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
  params = _random(jax.eval_shape(net.init, jax.random.key(0), x), dtype)

  def losses_fn(params, batch):
    logits = net.apply(
      params, batch["x"], train=True, rngs={"dropout": jax.random.key(3)}
    )
    return losses.softmax_cross_entropy(logits, batch["label"])

  return losses_fn, params, {"x": x, "label": jnp.arange(_B)}


def _error(actual, expected):
  """The largest difference, relative to the largest entry of `expected`."""
  actual, expected = jax.device_get((actual, expected))
  pairs = list(zip(*map(jax.tree.leaves, (actual, expected)), strict=True))
  scale = max(np.abs(x).max() for _, x in pairs)
  return max(np.abs(x - y).max() for x, y in pairs) / scale


@pytest.mark.slow("vision_transformer-float64", "lenet-float64", "text-float64")
@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    *(
      pytest.param(name, "float64", marks=_FLAX_IN_FLOAT64)
      for name in _NETWORKS
      if name != "mlp"
    ),
    ("mlp", "float32"),
  ],
)
def test_layerwise_equals_forward_mode(name, dtype):
  tolerance = 2e-6 if dtype == "float32" else 1e-12
  with jax.enable_x64(dtype == "float64"):
    problem = _network(name, dtype)
    actual = _results(*problem, "layerwise")
    expected = _results(*problem, "forward")
    for a, e in zip(actual, expected, strict=True):
      assert a is None or _error(a, e) < tolerance


@pytest.mark.usefixtures("x64")
def test_shared_and_cast_parameters_are_supported():
  def losses_fn(params, x):
    kernel = params["v"] / jnp.linalg.norm(params["v"], axis=0, keepdims=True)
    kernel = kernel * params["g"][None]
    h = jnp.tanh(x @ kernel) @ params["v"].T
    h = jax.jit(lambda h: jnp.where(h > params["g"][0], h, params["g"][1]))(h)
    decay = 0.1 * jnp.sum(params["v"] ** 2)
    half = (x.astype(jnp.float32) @ params["v"].astype(jnp.float32)).sum(1)
    half = half.astype(x.dtype) ** 2 / (1 + params["g"][2] ** 2)
    return jnp.sum(jax.nn.relu(h) ** 2, 1) + decay + half

  params = {"v": jnp.asarray(_images(4)[:3].T), "g": jnp.array([0.3, -0.2, 0.5])}
  x = jnp.asarray(_images(4))
  actual = _results(losses_fn, params, x, "layerwise")
  expected = _results(losses_fn, params, x, "forward")
  for a, e in zip(actual, expected, strict=True):
    assert a is None or _error(a, e) < 1e-6  # One product is computed in float32.


@pytest.mark.usefixtures("x64")
def test_a_barrier_of_examples_and_parameters_is_supported():
  def losses_fn(params, x):
    h, kernel = jax.lax.optimization_barrier((jnp.tanh(x @ params), params))
    return (h @ kernel.T).sum(1) ** 2

  params, x = jnp.asarray(_images(4)[:4]), jnp.asarray(_images(4))
  actual = _results(losses_fn, params, x, "layerwise")
  expected = _results(losses_fn, params, x, "forward")
  for a, e in zip(actual, expected, strict=True):
    assert a is None or _error(a, e) < 1e-12


def test_augmentation_with_a_key_per_example_is_supported():
  crop = augmentation.Preprocess(pad=2, flip=True)
  model = classifier.Classifier(mlp.MLP(10, (8,)), 10, crop)
  batch = {
    "image": jnp.asarray(_images(8, 8, 3), jnp.float32),
    "label": jnp.arange(_B),
    "index": jnp.arange(_B) + 40,
  }
  params, _ = jax.eval_shape(model.init, jax.random.key(0), batch)
  params = _random(params)

  def losses_fn(params, batch):
    logits, _ = model.forward(params, {}, batch, jax.random.key(5), True)
    return model.loss(logits, batch)

  actual = _results(losses_fn, params, batch, "layerwise")
  expected = _results(losses_fn, params, batch, "forward")
  for a, e in zip(actual, expected, strict=True):
    assert a is None or _error(a, e) < 1e-5


def test_aux_is_returned():
  def losses_fn(params, x):
    logits = x @ params
    return logits.sum(1), {"logits": logits, "mask": x[:, 0] > 0, "step": jnp.int32(3)}

  x = jnp.asarray(_images(4), jnp.float32)
  params = jnp.ones((4, 2))
  *_, aux = _results(losses_fn, params, x, "layerwise", has_aux=True)
  expected = losses_fn(params, x)[1]
  for name, value in expected.items():
    np.testing.assert_allclose(aux[name], value, rtol=1e-6)


def _centered(params, x):
  """The mean over the batch is subtracted, as in BatchNorm."""
  h = x @ params
  return jnp.sum((h - h.mean(0, keepdims=True)) ** 2, 1)


def _neighbors(params, x):
  h = x @ params
  return jnp.sum(h - jnp.roll(h, 1, axis=0), 1)


def _scan_over_examples(params, x):
  def step(carry, row):
    carry = jnp.tanh(carry + row @ params.sum(1))
    return carry, carry

  return jax.lax.scan(step, jnp.zeros(()), x)[1]


def _scan_with_transposed_carry(params, x):
  def step(carry, _):
    return jnp.sin(carry.T * params.sum()), None

  wide = (x @ params[:, :1]) * jnp.ones((1, _B))
  return jax.lax.scan(step, wide, None, 2)[0].sum(1)


def _while(params, x):
  def step(state):
    return state[0] * params.sum(), state[1] + 1

  return jax.lax.while_loop(lambda state: state[1] < 2, step, (x[:, 0], 0))[0]


def _padded(params, x):
  h = jnp.pad(x @ params, ((0, 0), (1, 1)), constant_values=params[0, 0])
  return jnp.sin(h).sum(1)


_MIXING = {
  "mean": (_centered, "reduce_sum, which mixes examples"),
  "roll": (_neighbors, "which mixes examples"),
  "sort": (lambda p, x: jnp.sort(x @ p, axis=0).sum(1), "sort, which mixes"),
  "cumsum": (lambda p, x: jnp.cumsum((x @ p)[:, 0]), "cumsum, which mixes"),
  "attention": (
    lambda p, x: jax.nn.softmax((x @ p) @ (x @ p).T).sum(1),
    "dot_general, which mixes",
  ),
  "transpose": (lambda p, x: (x @ p).reshape(2, _B).T.sum(1), "reshape, which"),
  "scan": (_scan_over_examples, "scan, which iterates over the examples"),
  "scan, transposed": (_scan_with_transposed_carry, "scan that moves the batch axis"),
  "cond": (
    lambda p, x: jax.lax.cond(p[0, 0] > 0, lambda h: h, jnp.sin, x @ p).sum(1),
    "cond, which is not known to keep",
  ),
  "fortran": (
    lambda p, x: jnp.tanh(jnp.reshape(x @ jnp.tile(p, 3), (_B, _B), order="F")).sum(0),
    "reshape, which mixes",
  ),
  "padding": (_padded, "pad whose padding value is a parameter"),
  "rule": (lambda p, x: _coupled(x @ p).sum(1) * 2, "which mixes"),
  "no batch": (lambda p, x: jnp.ones((_B, 4)) @ p.sum(1), "row by row"),
}


@pytest.mark.parametrize("name", _MIXING)
def test_models_that_mix_examples_are_refused(name):
  losses_fn, reason = _MIXING[name]
  params, x = jnp.ones((4, 2)), jnp.asarray(_images(4), jnp.float32)
  with pytest.raises(base.InputError, match="engine='layerwise' does not fit") as error:
    linearization.linearize(losses_fn, params, x, engine="layerwise")
  assert reason in str(error.value) and "\n" not in str(error.value)
  actual = _results(losses_fn, params, x, "auto")
  expected = _results(losses_fn, params, x, "forward")
  for a, e in zip(actual, expected, strict=True):
    assert a is None or _error(a, e) < 1e-6


def test_the_error_names_the_layer_that_mixes_examples():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.BatchNorm(use_running_average=False)(nn.Dense(3, name="Dense_1")(x))
      return nn.Dense(2, name="Dense_2")(x)

  net, x = Net(), jnp.asarray(_images(4), jnp.float32)
  variables = _random(jax.eval_shape(net.init, jax.random.key(0), x))

  def losses_fn(params, x):
    both = {**variables, "params": params}
    return net.apply(both, x, mutable=["batch_stats"])[0].sum(1)

  with pytest.raises(
    base.InputError, match=r"\(in .*BatchNorm_0, after parameter Dense_1/bias\)"
  ):
    linearization.linearize(losses_fn, variables["params"], x, engine="layerwise")


def _loss_of_one(params, example):
  hidden = jnp.tanh(example @ params["kernel"])
  return (jnp.mean(hidden) * params["factor"] - 1) ** 2


def _heads(params, x):
  def head(kernel, x):
    h = x @ kernel
    return params["factor"] * (h - h.mean(-1, keepdims=True)) / (h.std(-1)[:, None] + 1)

  kernels = jnp.stack([params["kernel"], params["kernel"] ** 2])
  return (jax.vmap(head, (0, None))(kernels, x).sum(0) ** 2).sum(1)


def _broadcast(params, x):
  wide = jax.lax.broadcast_in_dim(x[:, 0], (_B, 2), np.array([0]))
  return jnp.sum(jnp.sin(wide * params["kernel"][:1] * params["factor"]), 1)


@pytest.mark.parametrize(
  "losses_fn", [jax.vmap(_loss_of_one, in_axes=(None, 0)), _heads, _broadcast]
)
def test_axes_may_be_numpy_integers(losses_fn):
  # In the programs of the first two, `jax.vmap` shifts axes with NumPy.
  params = {"kernel": _like(jnp.ones((4, 2)), 4), "factor": jnp.float32(0.7)}
  x = jnp.asarray(_images(4), jnp.float32)
  actual = _results(losses_fn, params, x, "layerwise")
  expected = _results(losses_fn, params, x, "forward")
  pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  for a, e in pairs:
    assert _error(a, e) < 1e-5


@pytest.mark.parametrize("compiled", [True, False])
def test_aux_may_mix_examples(compiled):
  def losses_fn(params, x):
    h = x @ params
    unused = jnp.sort(h, axis=0) * params.sum()
    mean = h.mean(0)
    aux = {"mean": mean, "scaled": mean * params[0], "kernel": _kernel(params.sum())}
    del unused
    return jnp.sum(jnp.tanh(h), 1), aux

  params, x = jnp.ones((4, 2)), jnp.asarray(_images(4), jnp.float32)
  with contextlib.nullcontext() if compiled else jax.disable_jit():
    actual = _results(losses_fn, params, x, "layerwise", has_aux=True)
  expected = _results(losses_fn, params, x, "reverse", has_aux=True)
  pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  for a, e in pairs:
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


@jax.custom_vjp
def _kernel(x):
  return jnp.sin(x)


_kernel.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


@jax.custom_vjp
def _times_kernel(x, kernel):
  return x @ kernel


_times_kernel.defvjp(
  lambda x, kernel: (x @ kernel, (x, kernel)),
  lambda saved, g: (g @ saved[1].T, saved[0].T @ g),
)


@pytest.mark.parametrize(
  ("losses_fn", "name"),
  [
    (lambda p, x: (_kernel(p.sum()) * x).sum(1), "custom_vjp"),
    (lambda p, x: (x @ jax.jit(_kernel)(p)).sum(1), "custom_vjp"),
    (lambda p, x: _times_kernel(x, p).sum(1), "custom_vjp"),
    (lambda p, x: jax.checkpoint(_times_kernel)(x, p).sum(1), "custom_vjp"),
    (_while, "while"),
  ],
)
def test_operations_that_take_parameters_are_refused_by_name(losses_fn, name):
  params, x = jnp.ones((4, 2)), jnp.asarray(_images(4), jnp.float32)
  with pytest.raises(base.InputError, match=name):
    linearization.linearize(losses_fn, params, x, engine="layerwise")


@jax.custom_jvp
def _coupled(x):
  return jnp.sin(x)


_coupled.defjvp(lambda x, t: (jnp.sin(x[0]), t[0] - t[0].mean(0, keepdims=True)))


@pytest.mark.parametrize("compiled", [False, True])
def test_python_numbers_in_a_batch_are_supported(compiled):
  def losses_fn(params, batch):
    return batch["scale"] * (batch["x"] @ params).sum(1) ** batch["power"]

  def derivatives(params):
    batch = {"x": jnp.eye(4), "power": 2, "scale": 0.5, "unused": True}
    linearized = linearization.linearize(losses_fn, params, batch)
    assert linearized.engine == "layerwise"
    weights = jnp.arange(4.0)
    return linearized.directional(params), linearized.weighted_gradient(weights)

  derivatives = jax.jit(derivatives) if compiled else derivatives
  along, gradient = derivatives(jnp.ones((4, 2)))
  np.testing.assert_allclose(along, 4.0)
  np.testing.assert_allclose(gradient, 2 * np.arange(4.0)[:, None] * np.ones((4, 2)))


def test_a_batch_with_values_that_are_not_arrays_uses_forward_mode():
  def losses_fn(params, batch):
    assert batch["name"] == "training"
    return (batch["x"] @ params).sum(1) if batch["train"] else None

  batch = {"x": jnp.asarray(_images(4)), "name": "training", "train": True}
  linearized = linearization.linearize(losses_fn, jnp.ones((4, 2)), batch)
  np.testing.assert_allclose(linearized.losses, 2 * batch["x"].sum(1), rtol=1e-5)
  assert linearized.engine == "forward"

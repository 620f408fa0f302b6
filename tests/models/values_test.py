"""The outputs of the networks, compared with their definitions in NumPy.

NumPy computes in double precision. Normalization layers use running statistics, except
in Conv4. `transformer_test.py` has the transformer.
"""

import types

import jax
import numpy as np
import pytest

from l2rw_jax.models import conv4
from l2rw_jax.models import lenet
from l2rw_jax.models import mlp
from l2rw_jax.models import preactivation_resnet
from l2rw_jax.models import resnet
from l2rw_jax.models import whitened
from l2rw_jax.models import wide_resnet

_WIDTHS = (2, 3, 5)


def _images(size, channels=2):
  rng = np.random.default_rng(1)
  return rng.normal(size=(2, size, size, channels)).astype(np.float32)


def _variables(model, images):
  """Random variables; those with one axis are positive, like variances."""
  rng = np.random.default_rng(0)

  def draw(x):
    if len(x.shape) == 1:
      return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
    deviation = np.prod(x.shape[:-1]) ** -0.5
    return (deviation * rng.normal(size=x.shape)).astype(np.float32)

  return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), images))


def _relu(x):
  return np.maximum(x, 0)


def _gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _windows(x, size, stride):
  """Windows [B, H, W, C, size, size]."""
  windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
  return windows[:, ::stride, ::stride]


def _same(x, size, stride, value=0.0):
  """Pads images as TensorFlow does: an odd pixel of padding is added at the end."""
  total = (-(-x.shape[1] // stride) - 1) * stride + size - x.shape[1]
  both = (total // 2, total - total // 2)
  return np.pad(x, ((0, 0), both, both, (0, 0)), constant_values=value)


def _pool(x, size, stride):
  return _windows(x, size, stride).max(axis=(4, 5))


def _average(x):
  """Averages of 2x2 pixels."""
  return _windows(x, 2, 2).mean(axis=(4, 5))


def _layers(variables, epsilon=1e-5):
  """Layers with given variables; each call of `conv` or `norm` uses the next layer."""
  params, statistics = variables["params"], variables.get("batch_stats", {})
  used = {"Conv": 0, "BatchNorm": 0}

  def take(kind):
    used[kind] += 1
    return f"{kind}_{used[kind] - 1}"

  def conv(x, stride=1, padding=None, name=None):
    layer = params[name or take("Conv")]
    size = len(layer["kernel"])
    if padding is None:
      x = _same(x, size, stride)
    else:
      x = np.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    windows = _windows(x.astype(np.float64), size, stride)
    axes = ([4, 5, 3], [0, 1, 2])
    return np.tensordot(windows, layer["kernel"], axes) + layer.get("bias", 0)

  def norm(x):
    name = take("BatchNorm")
    if statistics:
      mean, variance = statistics[name]["mean"], statistics[name]["var"]
    else:
      mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    x = (x - mean) / np.sqrt(variance + epsilon)
    return x * params[name].get("scale", 1) + params[name]["bias"]

  def dense(x, name="Dense_0"):
    return x @ params[name]["kernel"] + params[name]["bias"]

  return types.SimpleNamespace(conv=conv, norm=norm, dense=dense)


def _assert_equal(model, variables, images, expected):
  actual = jax.jit(model.apply)(variables, images)
  largest = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * largest)


def test_mlp():
  images, model = _images(2), mlp.MLP(3, (4, 5))
  variables = _variables(model, images)
  net = _layers(variables)
  x = _relu(net.dense(images.reshape(2, -1).astype(float)))
  expected = net.dense(_relu(net.dense(x, "Dense_1")), "Dense_2")
  _assert_equal(model, variables, images, expected)


def test_lenet():
  images, model = _images(9), lenet.LeNet(3)
  variables = _variables(model, images)
  # With positive biases, a missing ReLU would hardly change anything.
  for layer in variables["params"].values():
    layer["bias"] -= 1
  net, x = _layers(variables), images
  for _ in range(3):
    x = _relu(_pool(_same(net.conv(x), 3, 2, -np.inf), 3, 2))
  x = _relu(net.dense(x.reshape(2, -1)))
  _assert_equal(model, variables, images, net.dense(x, "Dense_1"))


def _replace_dropout(monkeypatch, module):
  """Replaces dropout by the addition of its rate, which shows where it is applied."""
  monkeypatch.setattr(
    module.dropout_lib, "Dropout", lambda rate, _: lambda x, train: x + rate
  )


def _widened(x, width, stride):
  """The shortcut of the pre-activation networks."""
  x = _average(x) if stride == 2 else x
  extra = width - x.shape[-1]
  return np.pad(x, [(0, 0)] * 3 + [(extra // 2, extra - extra // 2)])


def _units(blocks):
  """Stage, block, width and stride of each unit."""
  for stage, width in enumerate(_WIDTHS):
    for block in range(blocks):
      yield stage, block, width, 2 if stage and not block else 1


# For False, `make test` compares only the number of parameters, in
# `preactivation_resnet_test.py`.
@pytest.mark.slow("False")
@pytest.mark.parametrize("full_first_stage", [False, True])
def test_preactivation_resnet(monkeypatch, full_first_stage):
  _replace_dropout(monkeypatch, preactivation_resnet)
  images = _images(8)
  model = preactivation_resnet.PreActivationResNet(
    3, 2, _WIDTHS, stem=2, dropout=0.3, full_first_stage=full_first_stage
  )
  variables = _variables(model, images)
  net = _layers(variables, epsilon=1e-3)
  x = _relu(net.norm(net.conv(images)))
  for stage, block, width, stride in _units(blocks=2):
    y = x
    if stage or (full_first_stage and block):
      y = _relu(net.norm(x)) + 0.3
    y = _relu(net.norm(net.conv(y, stride)))
    x = _widened(x, width, stride) + net.conv(y)
  expected = net.dense(_relu(net.norm(x)).mean((1, 2)))
  _assert_equal(model, variables, images, expected)


def test_leaky_wide_resnet():
  images = _images(8)
  model = preactivation_resnet.LeakyWideResNet(3, 1, _WIDTHS, stem=2, slope=0.4)
  variables = _variables(model, images)
  net = _layers(variables, epsilon=1e-3)

  def leaky(x):
    return np.where(x > 0, x, 0.4 * x)

  x = net.conv(images)
  for stage, _, width, stride in _units(blocks=1):
    if stage == 0:
      x = y = net.norm(leaky(x))
    else:
      y = leaky(net.norm(x))
    y = leaky(net.norm(net.conv(y, stride)))
    x = _widened(x, width, stride) + net.conv(y)
  expected = net.dense(leaky(net.norm(x)).mean((1, 2)))
  _assert_equal(model, variables, images, expected)


def test_wide_resnet(monkeypatch):
  _replace_dropout(monkeypatch, wide_resnet)
  images, model = _images(8), wide_resnet.WideResNet(3, 1, widen=1, dropout=0.3)
  variables = _variables(model, images)
  net = _layers(variables)
  x = net.conv(images, padding=1)
  for stride in (1, 2, 2):
    y = _relu(net.norm(x))
    if stride == 2:
      x = net.conv(y, stride, padding=0)
    y = _relu(net.norm(net.conv(y, stride, padding=1))) + 0.3
    x = x + net.conv(y, padding=1)
  expected = net.dense(_relu(net.norm(x)).mean((1, 2)))
  _assert_equal(model, variables, images, expected)


def test_resnet():
  images, model = _images(8), resnet.ResNet(3, 1, width=2)
  variables = _variables(model, images)
  net = _layers(variables)
  x = _relu(net.norm(net.conv(images, padding=1)))
  for stride in (1, 2, 2):
    y = _relu(net.norm(net.conv(x, stride, padding=1)))
    y = net.norm(net.conv(y, padding=1))
    if stride == 2:
      extra = x.shape[-1] // 2
      x = np.pad(x[:, ::2, ::2], [(0, 0)] * 3 + [(extra, extra)])
    x = _relu(x + y)
  _assert_equal(model, variables, images, net.dense(x.mean((1, 2))))


@pytest.mark.parametrize("pool", [False, True])
def test_conv4(pool):
  images, model = _images(8), conv4.Conv4(3, width=4, pool=pool)
  variables = _variables(model, images)
  net, x = _layers(variables), images
  for _ in range(4):
    x = _relu(net.norm(net.conv(x, 1 if pool else 2)))
    x = _pool(x, 2, 2) if pool and x.shape[1] > 1 else x
  _assert_equal(model, variables, images, net.dense(x.reshape(2, -1)))


def test_whitened():
  # The sizes are 18, 17, 8, 4 and 2, so the maximum is over several positions.
  images, model = _images(18), whitened.WhitenedNet(3, width=2)
  variables = _variables(model, images)
  net = _layers(variables)
  x = _gelu(net.conv(images, padding=0, name="Whitening"))
  for _ in range(3):
    x = _gelu(net.norm(_pool(net.conv(x), 2, 2)))
    x = _gelu(net.norm(net.conv(x)))
  _assert_equal(model, variables, images, net.dense(x.max((1, 2)) / 9))


@pytest.mark.parametrize(
  ("model", "momentum"),
  [
    (preactivation_resnet.PreActivationResNet(3, 1, _WIDTHS, stem=2), 0.999),
    (preactivation_resnet.LeakyWideResNet(3, 1, _WIDTHS, stem=2), 0.9),
    (wide_resnet.WideResNet(3, 1, widen=1), 0.9),
    (resnet.ResNet(3, 1, width=2), 0.9),
    (whitened.WhitenedNet(3, width=2), 0.9),
  ],
  ids=["preactivation_resnet", "leaky", "wide_resnet", "resnet", "whitened"],
)
def test_momentum_of_the_running_mean(model, momentum):
  images = _images(9)
  variables = _variables(model, images)

  @jax.jit
  def updated(before):  # Only what the first normalization needs is compiled.
    statistics = variables["batch_stats"]
    statistics = {**statistics, "BatchNorm_0": {**statistics["BatchNorm_0"], **before}}
    _, new = model.apply(
      {**variables, "batch_stats": statistics}, images, True, mutable=["batch_stats"]
    )
    return new["batch_stats"]["BatchNorm_0"]["mean"]

  mean = variables["batch_stats"]["BatchNorm_0"]["mean"]
  of_batch = updated({"mean": 0 * mean})
  assert np.abs(of_batch).min() > 0
  np.testing.assert_allclose(updated({"mean": mean}) - of_batch, momentum * mean, 1e-5)

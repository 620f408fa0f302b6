"""The benchmark's PyTorch steps: the same networks and weights as those of l2rw_jax."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import _networks
from benchmarks import _steps
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.models import classifier
from l2rw_jax.models import resnet
from l2rw_jax.models import wide_resnet

torch = pytest.importorskip("torch", reason="PyTorch is an extra of the benchmarks")
peer = importlib.import_module("benchmarks._torch_steps")
peer_networks = importlib.import_module("benchmarks._torch_networks")

_B, _M = 6, 3


@pytest.mark.parametrize("name", _networks.NETWORKS)
def test_networks_have_as_many_parameters_as_in_flax(name):
  model = _networks.module(name, "float32")
  image = jax.ShapeDtypeStruct((1, *_networks.NETWORKS[name].shape), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  with torch.device("meta"):
    torch_model = peer_networks.NETWORKS[name]()
  num_in_torch = sum(p.numel() for p in torch_model.parameters())
  assert num_in_torch == _steps.num_parameters(params)


_KINDS = {
  torch.nn.Conv2d: "Conv",
  torch.nn.Linear: "Dense",
  torch.nn.GroupNorm: "GroupNorm",
  torch.nn.BatchNorm2d: "BatchNorm",
}
_PARTS = {"weight": ("kernel", "scale"), "bias": ("bias",)}


def _by_order(model):
  """Maps PyTorch's layer names to those of flax, which numbers them by kind."""
  counts = dict.fromkeys(_KINDS.values(), 0)
  names = {}
  for name, module in model.named_modules():
    if type(module) in _KINDS:
      kind = _KINDS[type(module)]
      names[name] = (f"{kind}_{counts[kind]}",)
      counts[kind] += 1
  return names


def _by_name(model):
  """Maps PyTorch's layer names to those of flax, for equal names of layers."""
  names = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
  return {
    name: tuple(name.replace("blocks.", "block_").split(".")) for name in names if name
  }


def _copy(params, model, places):
  """Copies parameters of a flax network into the PyTorch network `model`.

  `places` has the keys in `params` of each PyTorch layer.
  """
  for name, tensor in model.named_parameters():
    *layer, part = name.split(".")
    layer_params = params
    for key in places.get(".".join(layer), ()) if layer else ():
      layer_params = layer_params[key]
    keys = [k for k in _PARTS.get(part, (part,)) if k in layer_params]
    value = np.asarray(layer_params[keys[0]])
    if keys == ["kernel"] and tensor.ndim == 4:
      value = value.transpose(3, 2, 0, 1)
    elif keys == ["kernel"]:
      value = value.reshape(tensor.shape[::-1]).T
    with torch.no_grad():
      tensor.copy_(torch.tensor(value.reshape(tensor.shape)))


def _transpose_flattened(params):
  """Reorders the first dense layer of LeNet for features flattened channels first."""
  kernel = np.asarray(params["Dense_0"]["kernel"]).reshape(4, 4, 64, 100)
  kernel = kernel.transpose(2, 0, 1, 3).reshape(1024, 100)
  return {**params, "Dense_0": {**params["Dense_0"], "kernel": kernel}}


def _residual(norm, torch_norm):
  model = resnet.ResNet(10, blocks=1, width=8, norm=norm)
  return model, lambda: peer_networks.ResNet(torch_norm, blocks=1, width=8)


_PAIRS = {
  "mlp": (_networks.module("mlp", "float32"), peer_networks.MLP),
  "lenet": (_networks.module("lenet", "float32"), peer_networks.LeNet),
  "resnet32_gn": _residual("group", peer_networks.group_norm),
  "resnet32_bn": _residual("batch", torch.nn.BatchNorm2d),
  "transformer": (
    dataclasses.replace(_networks.module("transformer", "float32"), depth=1),
    lambda: peer_networks.VisionTransformer(depth=1),
  ),
  "wrn_28_10": (
    wide_resnet.WideResNet(10, blocks=1, widen=1),
    lambda: peer_networks.WideResNet(blocks=1, widen=1),
  ),
}


def _problem(name):
  """Losses function, params and batches in JAX, and network and batches in PyTorch."""
  module, make = _PAIRS[name]
  model, torch_model = classifier.Classifier(module, 10), make()
  setting = _networks.Setting(name, "float32", _B, _M)
  batch, meta_batch = setting.batches()
  params, model_state = jax.jit(model.init)(jax.random.key(0), batch)
  named = _transpose_flattened(params) if name == "lenet" else params
  places = _by_name(torch_model) if name == "transformer" else _by_order(torch_model)
  _copy(named, torch_model, places)
  problem = model.problem(class_counts=jnp.full(10, 10), num_examples=100, num_steps=1)
  losses_fn = problem.losses_fn(model_state, jax.random.key(0))
  where = torch.device("cpu")
  data = peer.batch(batch, where), peer.batch(meta_batch, where)
  return (
    (lambda p, b: losses_fn(p, b)[0], params, batch, meta_batch),
    (torch_model, *data),
  )


@pytest.mark.parametrize("name", _PAIRS)
def test_example_weights_equal_those_of_l2rw_jax(name):
  arguments, (model, *data) = _problem(name)
  expected = jax.jit(l2rw.example_weights, static_argnums=0)(*arguments)
  eager = peer.Eager(model, 0.1)
  losses = peer.losses(model, data[0])
  np.testing.assert_allclose(losses.detach(), expected.losses, rtol=1e-4, atol=1e-4)
  weights = eager.example_weights(*data)
  assert weights.sum() == pytest.approx(1, abs=1e-5)
  np.testing.assert_allclose(weights, expected.weights, atol=1e-4)
  assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["mlp", "resnet32_bn", "transformer"])
def test_the_form_for_the_compiler_equals_the_eager_form(name):
  _, (model, *data) = _problem(name)
  eager, traced = peer.Eager(model, 0.1), peer.Traced(model, 0.1)
  # Run the form for the compiler without compiling it.
  traced.model, traced.weight_gradient_fn = model, traced.weight_gradient
  weights = eager.example_weights(*data)
  np.testing.assert_allclose(traced.example_weights(*data), weights, atol=1e-6)
  traced.weight_net = eager.weight_net
  both = eager.network_gradient(*data), traced.network_gradient(*data)
  for actual, expected in zip(*reversed(both), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-7)


def test_network_gradient_of_meta_weight_net_equals_that_of_l2rw_jax():
  (losses_fn, *rest), (model, *data) = _problem("mlp")
  eager = peer.Eager(model, 0.1)
  first, _, second, _ = eager.weight_net
  phi = {
    "params": {
      f"Dense_{i}": {
        "kernel": jnp.asarray(layer.weight.detach().numpy().T),
        "bias": jnp.asarray(layer.bias.detach().numpy()),
      }
      for i, layer in enumerate((first, second))
    }
  }
  net = meta_weight_net.WeightNet()

  @jax.jit
  def meta_gradient_fn(phi, *rest):
    return meta_weight_net.network_gradient(
      net.apply, phi, losses_fn, *rest, optimizer=optax.sgd(0.1)
    )

  gradient = meta_gradient_fn(phi, *rest).gradient["params"]
  expected = [gradient[f"Dense_{i}"][k].T for i in range(2) for k in ("kernel", "bias")]
  for x, y in zip(eager.network_gradient(*data), expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("method", peer.METHODS)
def test_training_steps_lower_the_loss(method):
  torch.manual_seed(0)
  setting = _networks.Setting("mlp", "float32", _B, _M)
  implementation = peer.implementation(setting, method, 0.1, torch.device("cpu"))
  losses = [implementation.run(1) for _ in range(30)]
  assert losses[-1] < losses[0]
  assert implementation.info["num_parameters"] == 203_530

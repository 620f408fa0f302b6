"""The networks whose training steps are timed, and their batches."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax.models import gpt
from l2rw_jax.models import lenet
from l2rw_jax.models import mlp
from l2rw_jax.models import resnet
from l2rw_jax.models import transformer
from l2rw_jax.models import wide_resnet

NUM_CLASSES = 10
_MNIST, _CIFAR = (28, 28, 1), (32, 32, 3)
_NUM_BYTES, _SEQUENCE = 256, (64,)
_GPT: dict[str, Any] = {
  "width": 128,
  "depth": 6,
  "scan": True,
  "tied": False,
  "last_only": True,
}


class Network(NamedTuple):
  """A network of the benchmark.

  Attributes:
    make: returns the module. It takes the option `cosine` and, if
      `supports_bfloat16`, the option `dtype`.
    shape: the shape of an example: an image, [H, W, C], or a sequence of tokens, [T].
    num_classes: the number of classes, or the size of the vocabulary.
    batch_size: the default batch size on accelerators.
    cpu_batch_size: the default batch size on a CPU.
    supports_bfloat16: whether the network can compute in bfloat16.
    mixes_examples: whether the output for one example depends on the other examples
      of the batch (BatchNorm), which rules out the layerwise engine.
    slow_on_cpu: whether a step on a CPU takes so long that only L2RW, Meta-Weight-Net
      and plain training are timed by default.
    default_on_cpu: whether the network is timed on a CPU if --networks is not given.
    has_peer: whether the benchmark also has the network in PyTorch.
    in_loop: whether the blocks are in a loop. The compiler counts the operations of the
      body of a loop only once.
  """

  make: Callable[..., nn.Module]
  shape: tuple[int, ...]
  num_classes: int = NUM_CLASSES
  batch_size: int = 100
  cpu_batch_size: int = 100
  supports_bfloat16: bool = True
  mixes_examples: bool = False
  slow_on_cpu: bool = False
  default_on_cpu: bool = True
  has_peer: bool = True
  in_loop: bool = False


NETWORKS = {
  "mlp": Network(
    lambda **options: mlp.MLP(NUM_CLASSES, (256,), **options),
    _MNIST,
    supports_bfloat16=False,
  ),
  "lenet": Network(
    lambda **options: lenet.LeNet(NUM_CLASSES, **options),
    _MNIST,
    supports_bfloat16=False,
  ),
  "resnet32_gn": Network(
    lambda **options: resnet.ResNet(NUM_CLASSES, norm="group", **options),
    _CIFAR,
    slow_on_cpu=True,
  ),
  "resnet32_bn": Network(
    lambda **options: resnet.ResNet(NUM_CLASSES, **options),
    _CIFAR,
    mixes_examples=True,
    slow_on_cpu=True,
  ),
  "transformer": Network(
    lambda **options: transformer.VisionTransformer(NUM_CLASSES, **options),
    _CIFAR,
    slow_on_cpu=True,
  ),
  "wrn_28_10": Network(
    lambda **options: wide_resnet.WideResNet(NUM_CLASSES, **options),
    _CIFAR,
    cpu_batch_size=10,
    mixes_examples=True,
    slow_on_cpu=True,
    default_on_cpu=False,
  ),
  # Blocks in a `jax.lax.scan`, without and with `jax.checkpoint`.
  **{
    name: Network(
      functools.partial(gpt.GPT, _NUM_BYTES, **_GPT, remat=remat),
      _SEQUENCE,
      num_classes=_NUM_BYTES,
      cpu_batch_size=32,
      slow_on_cpu=True,
      default_on_cpu=False,
      has_peer=False,
      in_loop=True,
    )
    for name, remat in (("gpt_scan", False), ("gpt_scan_remat", True))
  },
}


def module(name: str, dtype: str, cosine: bool = False) -> nn.Module:
  """Returns the module of a network.

  Args:
    name: a key of `NETWORKS`.
    dtype: the type of the computation, which networks without `supports_bfloat16`
      ignore.
    cosine: whether the last layer is a cosine classifier; see `models.split`.
  """
  network = NETWORKS[name]
  options = {"dtype": jnp.dtype(dtype)} if network.supports_bfloat16 else {}
  return network.make(cosine=cosine, **options)


def batch(name: str, size: int, seed: int) -> dict[str, np.ndarray]:
  """Returns a batch of Gaussian-noise images, or random tokens, with random labels."""
  rng, network = np.random.default_rng(seed), NETWORKS[name]
  shape = (size, *network.shape)
  if network.shape == _SEQUENCE:
    images = rng.integers(network.num_classes, size=shape).astype(np.int32)
  else:
    images = rng.normal(size=shape).astype(np.float32)
  labels = rng.integers(network.num_classes, size=size).astype(np.int32)
  return {"image": images, "label": labels, "index": np.arange(size, dtype=np.int32)}


class Setting(NamedTuple):
  """The settings that the timed implementations of one group share.

  Attributes:
    network: the name of the network, a key of `NETWORKS`.
    dtype: the type of the computation.
    batch_size: the number of training examples in a step, B.
    meta_size: the number of meta examples in a step, M. None for methods without a
      meta batch.
  """

  network: str
  dtype: str
  batch_size: int
  meta_size: int | None

  def batches(self) -> tuple[base.Batch, base.Batch | None]:
    """Returns the training batch and the meta batch, which may be None."""
    train = batch(self.network, self.batch_size, 0)
    if self.meta_size is None:
      return train, None
    return train, batch(self.network, self.meta_size, 1)

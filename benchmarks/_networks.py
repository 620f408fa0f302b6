"""The networks whose steps are timed, and the batches that they are shown."""

from collections.abc import Callable
from typing import NamedTuple

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax.models import lenet
from l2rw_jax.models import mlp
from l2rw_jax.models import resnet
from l2rw_jax.models import transformer
from l2rw_jax.models import wide_resnet

NUM_CLASSES = 10
_MNIST, _CIFAR = (28, 28, 1), (32, 32, 3)


class Network(NamedTuple):
  """One of them.

  Attributes:
    make: the module, of options `cosine` and, where `half` says so, `dtype`.
    shape: of an image, [H, W, C].
    batch_size: on an accelerator.
    cpu_batch_size: on a CPU.
    half: whether it can compute in bfloat16.
    mixes: whether examples see each other (BatchNorm), which rules out the
      layerwise engine.
    large: whether a step takes so long on a CPU that, unless others are asked for,
      only the methods are timed that this benchmark is about.
  """

  make: Callable[..., nn.Module]
  shape: tuple[int, int, int]
  batch_size: int = 100
  cpu_batch_size: int = 100
  half: bool = True
  mixes: bool = False
  large: bool = False


NETWORKS = {
  "mlp": Network(
    lambda **options: mlp.MLP(NUM_CLASSES, (256,), **options), _MNIST, half=False
  ),
  "lenet": Network(
    lambda **options: lenet.LeNet(NUM_CLASSES, **options), _MNIST, half=False
  ),
  "resnet32_gn": Network(
    lambda **options: resnet.ResNet(NUM_CLASSES, norm="group", **options),
    _CIFAR,
    large=True,
  ),
  "resnet32_bn": Network(
    lambda **options: resnet.ResNet(NUM_CLASSES, **options),
    _CIFAR,
    mixes=True,
    large=True,
  ),
  "transformer": Network(
    lambda **options: transformer.VisionTransformer(NUM_CLASSES, **options),
    _CIFAR,
    large=True,
  ),
  "wrn_28_10": Network(
    lambda **options: wide_resnet.WideResNet(NUM_CLASSES, **options),
    _CIFAR,
    cpu_batch_size=10,
    mixes=True,
    large=True,
  ),
}


def module(name: str, dtype: str, cosine: bool = False) -> nn.Module:
  """The network, computing in `dtype`; `cosine` as in `models.split`."""
  network = NETWORKS[name]
  options = {"dtype": jnp.dtype(dtype)} if network.half else {}
  return network.make(cosine=cosine, **options)


def batch(name: str, size: int, seed: int) -> dict[str, np.ndarray]:
  """Images of white noise with labels at random: nothing to be learned of them."""
  rng = np.random.default_rng(seed)
  images = rng.normal(size=(size, *NETWORKS[name].shape)).astype(np.float32)
  labels = rng.integers(NUM_CLASSES, size=size).astype(np.int32)
  return {"image": images, "label": labels, "index": np.arange(size, dtype=np.int32)}


class Setting(NamedTuple):
  """What the contestants of one group share.

  Attributes:
    network: its name.
    dtype: of the computation.
    batch_size: B.
    meta_size: M, or None for what needs no clean batch.
  """

  network: str
  dtype: str
  batch_size: int
  meta_size: int | None

  def batches(self) -> tuple[base.Batch, base.Batch | None]:
    """The training batch and, if there is one, the clean batch."""
    train = batch(self.network, self.batch_size, 0)
    if self.meta_size is None:
      return train, None
    return train, batch(self.network, self.meta_size, 1)

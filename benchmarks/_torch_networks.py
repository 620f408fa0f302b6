"""The networks of `benchmarks.step_time`, written in idiomatic PyTorch.

Images have the layout NCHW. The layers are in the order in which flax numbers them and
use the epsilons of flax, so that parameters can be copied between the frameworks.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

_CLASSES = 10
# The default of flax for LayerNorm and GroupNorm; PyTorch's default is 1e-5. For
# BatchNorm, the default is 1e-5 in both.
_NORM_EPSILON = 1e-6


class MLP(nn.Module):
  """A multilayer perceptron with 784, 256 and 10 units."""

  def __init__(self) -> None:
    super().__init__()
    self.hidden = nn.Linear(784, 256)
    self.head = nn.Linear(256, _CLASSES)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns the logits of images."""
    return self.head(functional.relu(self.hidden(x.flatten(1))))


class LeNet(nn.Module):
  """LeNet: three 5x5 convolutions and 3x3 max poolings (stride 2), padded as SAME."""

  def __init__(self) -> None:
    super().__init__()
    sizes = ((1, 16), (16, 32), (32, 64))
    self.convolutions = nn.ModuleList(nn.Conv2d(*s, 5, padding=2) for s in sizes)
    self.hidden = nn.Linear(1024, 100)
    self.head = nn.Linear(100, _CLASSES)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns the logits of images."""
    for convolution in self.convolutions:
      x = convolution(x)
      # As in TensorFlow, SAME pads both ends of an odd side, but only the far end of
      # an even one.
      odd = x.shape[-1] % 2
      x = functional.relu(functional.max_pool2d(x, 3, 2, odd, ceil_mode=not odd))
    return self.head(functional.relu(self.hidden(x.flatten(1))))


class ResNet(nn.Module):
  """ResNet-32 for CIFAR with option-A shortcuts.

  Args:
    norm: returns a normalization layer for a number of features.
    blocks: the number of blocks per stage.
    width: the number of features of the first stage.
  """

  def __init__(
    self, norm: Callable[[int], nn.Module], blocks: int = 5, width: int = 16
  ) -> None:
    super().__init__()
    self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
    self.norm = norm(width)
    stages, size = [], width
    for stage in range(3):
      for block in range(blocks):
        stride = 2 if stage > 0 and block == 0 else 1
        stages.append(_Block(size, width * 2**stage, stride, norm))
        size = width * 2**stage
    self.stages = nn.Sequential(*stages)
    self.head = nn.Linear(size, _CLASSES)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns the logits of images."""
    x = self.stages(functional.relu(self.norm(self.stem(x))))
    return self.head(x.mean((2, 3)))


class _Block(nn.Module):
  def __init__(self, size, width, stride, norm):
    super().__init__()
    self.first = nn.Conv2d(size, width, 3, stride, padding=1, bias=False)
    self.first_norm = norm(width)
    self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
    self.second_norm = norm(width)
    self.stride, self.extra = stride, (width - size) // 2

  def forward(self, x):
    y = functional.relu(self.first_norm(self.first(x)))
    y = self.second_norm(self.second(y))
    x = x[:, :, :: self.stride, :: self.stride]
    x = functional.pad(x, (0, 0, 0, 0, self.extra, self.extra))
    return functional.relu(x + y)


def group_norm(width: int) -> nn.Module:
  """Group normalization with 8 groups."""
  return nn.GroupNorm(8, width, eps=_NORM_EPSILON)


class WideResNet(nn.Module):
  """WRN-28-10 without dropout.

  Args:
    blocks: the number of blocks per stage.
    widen: the widening factor.
  """

  def __init__(self, blocks: int = 4, widen: int = 10) -> None:
    super().__init__()
    self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    stages, size = [], 16
    for stage in range(3):
      width = 16 * widen * 2**stage
      for block in range(blocks):
        stages.append(_WideBlock(size, width, 2 if stage > 0 and block == 0 else 1))
        size = width
    self.stages = nn.Sequential(*stages)
    self.norm = nn.BatchNorm2d(size)
    self.head = nn.Linear(size, _CLASSES)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns the logits of images."""
    x = functional.relu(self.norm(self.stages(self.stem(x))))
    return self.head(x.mean((2, 3)))


class _WideBlock(nn.Module):
  def __init__(self, size, width, stride):
    super().__init__()
    self.first_norm = nn.BatchNorm2d(size)
    self.shortcut = None
    if size != width:
      self.shortcut = nn.Conv2d(size, width, 1, stride, bias=False)
    self.first = nn.Conv2d(size, width, 3, stride, padding=1, bias=False)
    self.second_norm = nn.BatchNorm2d(width)
    self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)

  def forward(self, x):
    y = functional.relu(self.first_norm(x))
    if self.shortcut is not None:
      x = self.shortcut(y)
    y = functional.relu(self.second_norm(self.first(y)))
    return x + self.second(y)


class VisionTransformer(nn.Module):
  """A vision transformer: 4x4 patches, learned position embeddings, mean pooling.

  Args:
    width: the number of features.
    depth: the number of blocks.
    heads: the number of attention heads.
  """

  def __init__(self, width: int = 128, depth: int = 4, heads: int = 4) -> None:
    super().__init__()
    self.patches = nn.Conv2d(3, width, 4, 4)
    self.positions = nn.Parameter(0.02 * torch.randn(1, 64, width))
    self.blocks = nn.Sequential(
      *(_TransformerBlock(width, heads) for _ in range(depth))
    )
    self.norm = nn.LayerNorm(width, eps=_NORM_EPSILON)
    self.head = nn.Linear(width, _CLASSES)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns the logits of images."""
    x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
    return self.head(self.norm(self.blocks(x)).mean(1))


class _TransformerBlock(nn.Module):
  """Self-attention, then two dense layers."""

  def __init__(self, width, heads):
    super().__init__()
    self.norm_before_attention = nn.LayerNorm(width, eps=_NORM_EPSILON)
    self.qkv = nn.Linear(width, 3 * width)
    self.out = nn.Linear(width, width)
    self.norm_before_dense = nn.LayerNorm(width, eps=_NORM_EPSILON)
    self.expand = nn.Linear(width, 4 * width)
    self.contract = nn.Linear(4 * width, width)
    self.heads = heads

  def forward(self, x):
    joined = self.qkv(self.norm_before_attention(x))
    query, key, value = joined.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(query, key, value)
    x = x + self.out(mixed.transpose(1, 2).flatten(2))
    hidden = self.expand(self.norm_before_dense(x))
    return x + self.contract(functional.gelu(hidden, approximate="tanh"))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
  "mlp": MLP,
  "lenet": LeNet,
  "resnet32_gn": lambda: ResNet(group_norm),
  "resnet32_bn": lambda: ResNet(nn.BatchNorm2d),
  "transformer": VisionTransformer,
  "wrn_28_10": WideResNet,
}

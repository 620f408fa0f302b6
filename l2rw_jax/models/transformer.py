"""A small vision transformer."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.models import split


class VisionTransformer(split.SplitNetwork):
  """Transformer on patches of an image (Dosovitskiy et al., 2021), without dropout.

  Learned position embeddings are added to the embedded patches. Each of the `depth`
  blocks consists of LayerNorm and attention, then LayerNorm and an MLP whose hidden
  GELU layer has `expansion` times the width, both with a residual connection. A final
  LayerNorm and the mean over patches follow, as in "Better plain ViT baselines for
  ImageNet-1k" (Beyer et al., 2022), in place of a class token. The output of an example
  does not depend on the other examples of the batch. There are 809,098 parameters for
  CIFAR-10.

  Attributes:
    num_outputs: number of logits per example.
    patch: side of a patch; must divide the height and width of the images.
    width: number of features of a patch.
    depth: number of blocks.
    num_heads: number of attention heads; must divide `width`.
    expansion: hidden width of a block divided by `width`.
    dtype: floating-point type of the computation.
    cosine: whether the logits are cosines, as LDAM needs: `split.Cosine`.

  Raises:
    InputError: when the network is initialized or applied, if `patch` does not divide
      the height and width of the images or `num_heads` does not divide `width`.

  References:
    Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image
    Recognition at Scale", ICLR 2021, arXiv:2010.11929, equations 1 to 4.
  """

  num_outputs: int
  patch: int = 4
  width: int = 128
  depth: int = 4
  num_heads: int = 4
  expansion: int = 4
  dtype: Any = jnp.float32
  cosine: bool = False

  def setup(self) -> None:
    """Creates the output layer."""
    self.output = split.output_layer(
      self.num_outputs, self.cosine, dtype=self.dtype, name="head"
    )

  @property
  def num_features(self) -> int:
    """Width of the penultimate layer."""
    return self.width

  @nn.compact
  def features(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] to features [B, width].

    Raises:
      InputError: `patch` does not divide the height and the width, or `num_heads` does
        not divide `width`.
    """
    del train
    if x.shape[1] % self.patch or x.shape[2] % self.patch:
      raise base.InputError(
        f"patch={self.patch} does not divide images of {x.shape[1]} x {x.shape[2]}."
      )
    sides = (self.patch, self.patch)
    x = nn.Conv(self.width, sides, sides, dtype=self.dtype, name="patches")(x)
    x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], self.width)
    initializer = nn.initializers.normal(0.02)
    positions = self.param("positions", initializer, (1, x.shape[1], self.width))
    x = x + positions.astype(x.dtype)
    for i in range(self.depth):
      block = Block(self.num_heads, self.expansion, self.dtype, name=f"block_{i}")
      x = block(x)
    return norm("norm", self.dtype, x).mean(axis=1)


def norm(name: str, dtype: Any, x: jax.Array) -> jax.Array:
  """LayerNorm, computed in float32 or wider and returned in `dtype`."""
  wide = x.astype(base.accumulator_dtype(x.dtype))
  with base.implicit_promotion():  # In float64, flax mixes types.
    return nn.LayerNorm(name=name)(wide).astype(dtype)


class Block(nn.Module):
  """Attention and a two-layer MLP, both with LayerNorm and a residual connection.

  Attributes:
    num_heads: number of attention heads; must divide the width of the input.
    expansion: width of the hidden layer of the MLP divided by that of the input.
    dtype: floating-point type of the computation.
    causal: whether a position attends only to itself and to those before it.
  """

  num_heads: int
  expansion: int
  dtype: Any
  causal: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, T, d] to [B, T, d]."""
    width = x.shape[-1]
    x = x + self._attend(norm("norm_before_attention", self.dtype, x))
    y = norm("norm_before_dense", self.dtype, x)
    y = nn.Dense(self.expansion * width, dtype=self.dtype, name="expand")(y)
    return x + nn.Dense(width, dtype=self.dtype, name="contract")(nn.gelu(y))

  def _attend(self, x):
    width = x.shape[-1]
    if width % self.num_heads:
      raise base.InputError(
        f"num_heads={self.num_heads} does not divide width={width}."
      )
    # One matrix product computes queries, keys and values.
    shape = (3, self.num_heads, width // self.num_heads)
    qkv = nn.DenseGeneral(shape, dtype=self.dtype, name="qkv")(x)
    query, key, value = (qkv[:, :, i] for i in range(3))
    mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
    mixed = nn.dot_product_attention(query, key, value, mask=mask, dtype=self.dtype)
    out = nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")
    return out(mixed)

"""A small language model whose blocks are computed in a loop."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2rw_jax.models import split
from l2rw_jax.models import transformer


class GPT(split.SplitNetwork):
  """A decoder-only transformer that predicts the token after a sequence.

  It consists of token embeddings and learned positions, `depth` blocks with causal
  attention and LayerNorm before each part (Radford et al., 2019), a last LayerNorm, and
  a linear layer on the last position. The blocks are computed in one `jax.lax.scan`
  over their stacked parameters, so that compile time does not depend on `depth`.
  Examples are treated separately.

  Attributes:
    num_outputs: number of tokens, which is also the number of logits.
    width: number of features of a token.
    depth: number of blocks.
    num_heads: number of attention heads; must divide `width`.
    expansion: hidden width of a block divided by `width`.
    remat: whether activations within a block are recomputed in the backward pass
      instead of stored (`jax.checkpoint`).
    unroll: number of blocks in one iteration of the compiled loop.
    dtype: floating-point type of the computation.
    cosine: whether the logits are cosines, as LDAM needs: `split.Cosine`.

  Raises:
    InputError: when it is initialized or applied, if `num_heads` does not divide
      `width`.

  References:
    Radford, Wu, Child, Luan, Amodei, Sutskever, "Language Models are Unsupervised
    Multitask Learners", 2019, section 2.3.
  """

  num_outputs: int
  width: int = 128
  depth: int = 6
  num_heads: int = 4
  expansion: int = 4
  remat: bool = False
  unroll: int = 1
  dtype: Any = jnp.float32
  cosine: bool = False

  def setup(self) -> None:
    """The output layer."""
    self.output = split.output_layer(
      self.num_outputs, self.cosine, dtype=self.dtype, name="head"
    )

  @property
  def num_features(self) -> int:
    """Width of the penultimate layer."""
    return self.width

  @nn.compact
  def features(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps tokens [B, T] to features of the last position [B, width].

    Tokens may be floating-point numbers, to which `Classifier` casts integers.
    """
    del train
    x = x.astype(jnp.int32)
    start = nn.initializers.normal(0.02)
    embed = nn.Embed(
      self.num_outputs, self.width, embedding_init=start, dtype=self.dtype, name="embed"
    )
    positions = self.param("positions", start, (1, x.shape[1], self.width))
    h = embed(x) + positions.astype(self.dtype)
    block = transformer.Block
    if self.remat:
      # In a loop, XLA does not merge the two computations, so no barrier is needed.
      block = nn.remat(block, prevent_cse=self.unroll > 1)
    h, _ = nn.scan(
      lambda block, h, _: (block(h), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.depth,
      unroll=self.unroll,
    )(
      block(self.num_heads, self.expansion, self.dtype, causal=True, name="blocks"),
      h,
      None,
    )
    return transformer.norm("norm", self.dtype, h[:, -1])

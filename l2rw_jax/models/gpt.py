"""A small language model: a decoder-only transformer."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.models import split
from l2rw_jax.models import transformer


class GPT(split.SplitNetwork):
  """Decoder-only transformer with learned positions, without dropout.

  The blocks are those of `transformer.VisionTransformer`, with a causal mask. A final
  LayerNorm and the output layer follow. The output of an example does not depend on the
  other examples of the batch.

  Attributes:
    vocabulary: V, number of distinct tokens.
    width: number of features of a token.
    depth: number of blocks.
    num_heads: number of attention heads; must divide `width`.
    expansion: hidden width of a block divided by `width`.
    scan: whether the blocks run in one `lax.scan` over stacked parameters, so that the
      program of a block is compiled once instead of `depth` times.
    unroll: number of blocks in one iteration of the compiled loop.
    remat: whether the activations in a block are recomputed in the backward pass
      instead of stored.
    tied: whether the embedding of the tokens is also the output layer. Otherwise, the
      output layer is a linear layer with a separate kernel and bias.
    last_only: whether only the token after the sequence is predicted, as a class of a
      `classifier.Classifier`.
    dtype: floating-point type of the computation; logits are float32 or wider.
    cosine: whether the logits are cosines, as LDAM needs. `split.Cosine` then replaces
      the linear output layer. This has no effect if `tied`.

  Raises:
    InputError: when the network is initialized or applied, if `num_heads` does not
      divide `width`.

  References:
    Radford, Wu, Child, Luan, Amodei, Sutskever, "Language Models are Unsupervised
    Multitask Learners", 2019, section 2.3.
  """

  takes_tokens = True  # `Classifier` must not scale uint8 tokens like pixels.

  vocabulary: int = 256
  width: int = 64
  depth: int = 2
  num_heads: int = 4
  expansion: int = 4
  scan: bool = False
  unroll: int = 1
  remat: bool = False
  tied: bool = True
  last_only: bool = False
  dtype: Any = jnp.float32
  cosine: bool = False

  def setup(self) -> None:
    """The embedding of the tokens and the output layer."""
    self.embed = nn.Embed(
      self.vocabulary,
      self.width,
      embedding_init=_initializer,
      dtype=self.dtype,
      name="tokens",
    )
    if not self.tied:
      self.output = split.output_layer(
        self.vocabulary, self.cosine, dtype=self.dtype, name="head"
      )

  @property
  def num_features(self) -> int | None:
    """Width of the penultimate layer; None if there are features for every token."""
    return self.width if self.last_only else None

  def head(self, features: jax.Array) -> jax.Array:
    """Maps features [..., width] to logits [..., V]."""
    logits = self.embed.attend(features) if self.tied else self.output(features)
    return logits.astype(base.accumulator_dtype(logits.dtype))

  @nn.compact
  def features(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps tokens [B, T] to features [B, T, width].

    If `last_only`, the result is the features [B, width] of the last token. Tokens are
    integers of any type, from 0 to V - 1. If a sequence has another token, all of its
    features are NaN. T is the number of tokens with which the network was initialized.

    Raises:
      InputError: the tokens are not integers, or `num_heads` does not divide `width`.
      flax.errors.ScopeParamShapeError: the sequences have another length T.
    """
    del train
    if not jnp.issubdtype(x.dtype, jnp.integer):
      raise base.InputError(f"GPT: tokens must be integers; got {x.dtype}.")
    # An embedding would count negative tokens from the end; it gives NaN for V.
    x = base.wide_integers(x, self.vocabulary)
    h = self.embed(jnp.where(x < 0, self.vocabulary, x))
    positions = self.param("positions", _initializer, (1, x.shape[1], self.width))
    h = h + positions.astype(h.dtype)
    # XLA cannot merge the recomputation with the forward pass if they are in two loops.
    prevent_cse = not self.scan or self.unroll > 1
    layer = nn.remat(_Layer, prevent_cse=prevent_cse) if self.remat else _Layer
    options = (self.num_heads, self.expansion, self.dtype)
    if self.scan:
      layers = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=self.depth,
        unroll=self.unroll,
      )
      h, _ = layers(*options, name="blocks")(h, None)
    else:
      for i in range(self.depth):
        h, _ = layer(*options, name=f"block_{i}")(h, None)
    return transformer.norm("norm", self.dtype, h[:, -1] if self.last_only else h)


_initializer = nn.initializers.normal(0.02)


class _Layer(nn.Module):
  """A causal block, with the signature that `nn.scan` needs."""

  num_heads: int
  expansion: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
    """Maps x [B, T, d] to (output [B, T, d], None)."""
    options = (self.num_heads, self.expansion, self.dtype)
    return transformer.Block(*options, causal=True, name="block")(x), None

"""A small language model: a decoder-only transformer, and the loss of a sequence."""

from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.models import transformer


class GPT(nn.Module):
  """Decoder-only transformer with learned positions, without dropout.

  Each block is that of `transformer.VisionTransformer` with a causal mask. The
  embedding of the tokens is also the output layer.

  Attributes:
    vocabulary: V, number of tokens.
    width: number of features of a token.
    depth: number of blocks.
    num_heads: number of attention heads; must divide `width`.
    expansion: hidden width of a block divided by `width`.
    scan: whether the blocks are one `lax.scan` over stacked parameters, which is
      compiled once instead of once per block.
    remat: whether the activations in a block are recomputed in the backward pass
      instead of stored.
    dtype: floating-point type of the computation; logits are float32 or wider.

  References:
    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
  """

  vocabulary: int = 256
  width: int = 64
  depth: int = 2
  num_heads: int = 4
  expansion: int = 4
  scan: bool = False
  remat: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
    """Maps tokens [B, T] to logits [B, T, V] of the next token."""
    del train
    start = nn.initializers.normal(0.02)
    embed = nn.Embed(
      self.vocabulary, self.width, embedding_init=start, dtype=self.dtype, name="tokens"
    )
    x = embed(tokens.astype(jnp.int32))
    positions = self.param("positions", start, (1, tokens.shape[1], self.width))
    x = x + positions.astype(x.dtype)
    layer = nn.remat(_Layer, prevent_cse=not self.scan) if self.remat else _Layer
    options = (self.num_heads, self.expansion, self.dtype)
    if self.scan:
      layers = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=self.depth,
      )
      x, _ = layers(*options, name="blocks")(x, None)
    else:
      for i in range(self.depth):
        x, _ = layer(*options, name=f"block_{i}")(x, None)
    x = transformer.norm("norm", self.dtype, x)
    return embed.attend(x).astype(base.accumulator_dtype(x.dtype))


class _Layer(nn.Module):
  """A causal block, with the signature that `nn.scan` needs."""

  num_heads: int
  expansion: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
    """Maps [B, T, d] to [B, T, d], and None."""
    options = (self.num_heads, self.expansion, self.dtype)
    return transformer.Block(*options, causal=True, name="block")(x), None


class LanguageModel(NamedTuple):
  """A network on tokens as the pure functions of a `base.Problem`.

  An example is a sequence: `batch["image"]` contains its tokens [B, T], and
  `batch["label"]` contains the next token for each of them, [B, T]. A label of -1,
  which marks the end of a shorter sequence, does not count.

  Attributes:
    model: module with `__call__(tokens [B, T], train) -> logits [B, T, V]`.
    vocabulary: V.
  """

  model: nn.Module
  vocabulary: int

  def check(self, batch: base.Batch, num_classes: int) -> None:
    """Raises InputError unless the network has a logit for every token."""
    if self.vocabulary != num_classes:
      raise base.InputError(
        f"a language model of {self.vocabulary} tokens does not fit data of"
        f" {num_classes}."
      )

  def init(self, key: base.Array, batch: base.Batch) -> tuple[base.PyTree, base.PyTree]:
    """Initial `(params, model_state)` for sequences of this length."""
    variables = dict(self.model.init(key, batch["image"][:1]))
    return variables.pop("params"), variables

  def forward(
    self,
    params: base.PyTree,
    model_state: base.PyTree,
    batch: base.Batch,
    key: base.Array,
    train: bool,
  ) -> tuple[Any, base.PyTree]:
    """`(logits [B, T, V], model_state)`, see `base.Problem.forward`."""
    del key
    variables = {"params": params, **model_state}
    return self.model.apply(variables, batch["image"], train=train), model_state

  def loss(self, outputs: base.Array, batch: base.Batch) -> base.Array:
    """Mean cross-entropy of the tokens of each sequence, [B], in nats."""
    size, length, vocabulary = outputs.shape
    labels = batch["label"]
    counts = labels != -1
    per_token = losses.softmax_cross_entropy(
      outputs.reshape(-1, vocabulary), labels.reshape(-1), where=counts.reshape(-1)
    ).reshape(size, length)
    number = jnp.maximum(counts.sum(axis=1), 1).astype(per_token.dtype)
    return per_token.sum(axis=1) / number

  def problem(
    self,
    *,
    class_counts: base.Array,
    num_examples: int,
    num_steps: int,
    axis_name: base.AxisName = None,
  ) -> base.Problem:
    """The learning problem of this model; arguments as in `base.Problem`."""
    return base.Problem(
      forward=self.forward,
      loss=self.loss,
      linearize=linearization.linearize,
      linearize_outputs=linearization.linearize_outputs,
      num_classes=self.vocabulary,
      class_counts=class_counts,
      num_examples=num_examples,
      num_steps=num_steps,
      axis_name=axis_name,
    )

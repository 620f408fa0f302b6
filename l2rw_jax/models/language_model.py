"""The learning problem of a language model: a sequence is an example."""

import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax import losses
from l2rw_jax.models import classifier


class LanguageModel(classifier.Classifier):
  """A classifier of the token that follows each token of a sequence.

  `batch["image"]` contains the tokens [B, T] of the sequences, and `batch["label"]` the
  token after each of them, [B, T]. Labels of -1, such as those after the end of a
  shorter sequence, are ignored. The network maps tokens to logits [B, T, V], as
  `gpt.GPT` does, and the number of classes is V.
  """

  def _images(self, batch: base.Batch, key: base.Array, train: bool) -> base.Array:
    """The tokens, unchanged: tokens of type uint8 are not pixels to be scaled."""
    del key, train
    return batch["image"]

  def loss(self, outputs: base.Array, batch: base.Batch) -> base.Array:
    """Mean cross-entropy of the tokens of each sequence, [B], in nats."""
    labels = batch["label"].astype(jnp.int32)  # An unsigned type does not have -1.
    is_used = labels != -1
    # The layerwise engine needs a separate axis of examples, so the loss is mapped over
    # this axis, which is not merged with the axis of the tokens.
    per_token = jax.vmap(losses.softmax_cross_entropy)(outputs, labels, where=is_used)
    wide = base.accumulator_dtype(per_token.dtype)
    number = jnp.maximum(is_used.sum(axis=1), 1).astype(wide)
    mean = per_token.astype(wide).sum(axis=1) / number
    return mean.astype(per_token.dtype)

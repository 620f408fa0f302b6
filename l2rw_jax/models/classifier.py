"""A flax module and a loss, as the pure functions that a `base.Task` is made of."""

from typing import Any, NamedTuple

from flax import linen as nn
import jax

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses


class Classifier(NamedTuple):
  """A linen network that maps `batch["image"]` to logits.

  Attributes:
    model: module with `__call__(images, train) -> logits [B, C or 1]`.
    num_classes: C; a model with one output is a binary classifier, C = 2.
  """

  model: nn.Module
  num_classes: int

  def check(self, batch: base.Batch, num_classes: int) -> None:
    """Raises InputError unless the network has the data's number of classes."""

    def logits(key):
      params, model_state = self.init(key, batch)
      return self.forward(params, model_state, batch, key, False)[0]

    width = jax.eval_shape(logits, jax.random.key(0)).shape[-1]
    allowed = {1, 2} if num_classes == 2 else {num_classes}
    if self.num_classes != num_classes or width not in allowed:
      raise base.InputError(
        f"a classifier of {self.num_classes} classes with {width} logits does not fit"
        f" data of {num_classes} classes."
      )

  def init(self, key: base.Array, batch: base.Batch) -> tuple[base.PyTree, base.PyTree]:
    """Fresh `(params, model_state)` for images of this batch's shape."""
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
    """`(outputs, model_state)`, see `base.Task.forward`."""
    variables = {"params": params, **model_state}
    if not train:
      return self.model.apply(variables, batch["image"]), model_state
    outputs, changed = self.model.apply(
      variables,
      batch["image"],
      train=True,
      mutable=list(model_state),
      rngs={"dropout": jax.random.fold_in(key, 0)},
    )
    return outputs, {**model_state, **changed}

  def loss(self, outputs: base.Array, batch: base.Batch) -> base.Array:
    """Cross-entropy [B], in nats."""
    if outputs.shape[-1] == 1:
      return losses.sigmoid_cross_entropy(outputs, batch["label"])
    return losses.softmax_cross_entropy(outputs, batch["label"])

  def task(
    self,
    *,
    class_counts: base.Array,
    num_examples: int,
    num_steps: int,
    axis_name: base.AxisName = None,
  ) -> base.Task:
    """The learning problem of this classifier; arguments as in `base.Task`."""
    return base.Task(
      forward=self.forward,
      loss=self.loss,
      linearize=linearization.linearize,
      num_classes=self.num_classes,
      class_counts=class_counts,
      num_examples=num_examples,
      num_steps=num_steps,
      axis_name=axis_name,
    )

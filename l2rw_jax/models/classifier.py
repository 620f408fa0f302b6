"""A flax module and a loss, as the pure functions of a `base.Problem`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import linen as nn
import jax

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.models import augmentation


class Classifier(NamedTuple):
  """A linen network that maps `batch["image"]` to logits.

  Attributes:
    model: module with `__call__(images, train) -> logits [B, C or 1]`. If it also has
      `num_features`, its output is `head(features(images, train))`, and methods that
      act on features, such as `advisor`, can be used.
    num_classes: C; a model with one output is a binary classifier, C = 2.
    preprocess: `(images, keys, train) -> images`, a function that scales images and
      augments them in training. `keys` [B] has one key per example (None in
      evaluation). The keys are derived from the "index" of the examples, so the result
      does not depend on the number of devices. If it is None, uint8 pixels are scaled
      to [0, 1] and floats are unchanged (`augmentation.to_float`); inputs of a module
      whose attribute `takes_tokens` is True, such as `gpt.GPT`, are unchanged, too.
    initialize: `(key, params) -> params`, a function that draws the initial parameters
      in place of the module's initializers, such as `initialization.pytorch`.
  """

  model: nn.Module
  num_classes: int
  preprocess: Callable[..., Any] | None = None
  initialize: Callable[..., Any] | None = None

  def check(self, batch: base.Batch, num_classes: int) -> None:
    """Raises InputError unless the network has the number of classes of the data."""

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
    """Initial `(params, model_state)` for images of this batch's shape."""
    variables = dict(self.model.init(key, self._images(batch, None, False)[:1]))
    params = variables.pop("params")
    if self.initialize is not None:
      params = self.initialize(key, params)
    return params, variables

  def forward(
    self,
    params: base.PyTree,
    model_state: base.PyTree,
    batch: base.Batch,
    key: base.Array,
    train: bool,
  ) -> tuple[Any, base.PyTree]:
    """`(outputs, model_state)`, see `base.Problem.forward`."""
    return self._apply("__call__", params, model_state, batch, key, train)

  def features(
    self,
    params: base.PyTree,
    model_state: base.PyTree,
    batch: base.Batch,
    key: base.Array,
    train: bool,
  ) -> tuple[base.Array, base.PyTree]:
    """`(features [B, d], model_state)`; the features are the input of `head`."""
    return self._apply("features", params, model_state, batch, key, train)

  def head(self, params: base.PyTree, features: base.Array) -> base.Array:
    """Maps features [B, d] to logits [B, C]."""
    logits: Any = self.model.apply({"params": params}, features, method="head")
    return logits

  def _apply(self, method, params, model_state, batch, key, train):
    variables = {"params": params, **model_state}
    images = self._images(batch, key, train)
    if not train:
      return self.model.apply(variables, images, method=method), model_state
    outputs, changed = self.model.apply(
      variables,
      images,
      train=True,
      mutable=list(model_state),
      rngs={"dropout": jax.random.fold_in(key, 0)},
      method=method,
    )
    return outputs, {**model_state, **changed}

  def _images(self, batch, key, train):
    if self.preprocess is None:
      if getattr(self.model, "takes_tokens", False):
        return batch["image"]
      return augmentation.to_float(batch["image"])
    keys = None
    if train:
      fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
      keys = fold(jax.random.fold_in(key, 1), batch["index"])
    return self.preprocess(batch["image"], keys, train)

  def loss(self, outputs: base.Array, batch: base.Batch) -> base.Array:
    """Cross-entropy [B], in nats."""
    if outputs.shape[-1] == 1:
      return losses.sigmoid_cross_entropy(outputs, batch["label"])
    return losses.softmax_cross_entropy(outputs, batch["label"])

  def problem(
    self,
    *,
    class_counts: base.Array,
    num_examples: int,
    num_steps: int,
    axis_name: base.AxisName = None,
  ) -> base.Problem:
    """The learning problem of this classifier; arguments as in `base.Problem`."""
    num_features = getattr(self.model, "num_features", None)
    return base.Problem(
      forward=self.forward,
      loss=self.loss,
      features=None if num_features is None else self.features,
      head=None if num_features is None else self.head,
      num_features=num_features,
      linearize=linearization.linearize,
      linearize_outputs=linearization.linearize_outputs,
      num_classes=self.num_classes,
      class_counts=class_counts,
      num_examples=num_examples,
      num_steps=num_steps,
      axis_name=axis_name,
    )

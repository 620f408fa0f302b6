"""Few-shot learning, in which a network is adapted to each task.

The examples are tasks, and a batch consists of T tasks. A task has support examples and
query examples. It corresponds to an image of `classifier.Classifier`: it has one loss,
the loss of its queries after the network has been adapted to its supports. Methods that
weight examples therefore weight tasks: training with `methods.baselines.uniform` is
MAML, and `methods.l2rw` is L2RW on tasks.

Reference: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of
Deep Networks", ICML 2017 (https://arxiv.org/abs/1703.03400), Algorithm 2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.linearization import control_flow
from l2rw_jax.linearization import trainable
from l2rw_jax.models import augmentation

# Number of tasks that are adapted in parallel in evaluation; bounds the memory.
_EVALUATION_BATCH_SIZE = 20


def adapt(
  losses_fn: base.LossesFn,
  params: base.PyTree,
  support: Any,
  *,
  learning_rate: float,
  num_steps: int = 1,
  first_order: bool = False,
) -> base.PyTree:
  """Parameters after `num_steps` of plain gradient descent on a task's supports.

  Args:
    losses_fn: `(params, support) -> losses`, whose mean is minimized.
    params: any pytree of floating-point arrays.
    support: the supports of the task, in the form that `losses_fn` takes.
    learning_rate: alpha.
    num_steps: number of steps; 0 returns `params`.
    first_order: whether the inner gradient is held constant when the result is
      differentiated (FOMAML), which avoids second derivatives.

  Returns:
    The adapted parameters, shaped like `params`.

  Example:
    >>> import jax
    >>> losses_fn = lambda p, x: 0.5 * (p - x) ** 2
    >>> def query_loss(p, first_order):
    ...   adapted = adapt(losses_fn, p, jax.numpy.ones(2), learning_rate=0.1,
    ...     first_order=first_order)
    ...   return 0.5 * adapted**2
    >>> print([round(float(jax.grad(query_loss)(2.0, f)), 2) for f in (False, True)])
    [1.71, 1.9]
  """

  def step(_, params):
    gradient = jax.grad(lambda p: jnp.mean(losses_fn(p, support)))(params)
    gradient = trainable.conjugated(gradient)
    if first_order:
      gradient = jax.lax.stop_gradient(gradient)
    # A NumPy scalar would change the type of parameters in half precision.
    return jax.tree.map(
      lambda p, g: (p - learning_rate * g).astype(jnp.result_type(p)), params, gradient
    )

  if num_steps == 1:
    return step(0, params)
  return jax.lax.fori_loop(0, num_steps, control_flow.channels_last(step), params)


class Learner(NamedTuple):
  """A linen network that is adapted to tasks of N ways (classes) and k shots.

  A task is a row of `batch["image"]` [T, ways, shots + queries, H, W, channels]: the
  first `num_shots` images of each way are its supports, and the others are its queries.
  The label of a way is its position, so each row of `batch["label"]`
  [T, ways * queries] contains 0 to ways - 1, each `queries` times. The order of the
  classes must be random in each task. Pixels stay uint8 until they are used.

  Attributes:
    network: module with `__call__(images, train) -> logits [B, num_ways]`, without
      model state, such as `conv4.Conv4`.
    num_ways: N.
    num_shots: k.
    inner_learning_rate: alpha of the plain gradient descent on the supports.
    num_inner_steps: number of steps of this gradient descent in training.
    num_test_steps: number of steps of this gradient descent in evaluation.
    first_order: see `adapt`.
    preprocess: maps images [..., H, W, channels] to the network's input; None is
      `augmentation.to_float`, which scales uint8 pixels to [0, 1].
  """

  network: nn.Module
  num_ways: int
  num_shots: int
  inner_learning_rate: float = 0.4
  num_inner_steps: int = 1
  num_test_steps: int = 3
  first_order: bool = False
  preprocess: Callable[[Any], Any] | None = None

  def check(self, batch: base.Batch, num_classes: int) -> None:
    """Raises InputError unless the settings, the network and `batch` fit together."""
    _check_settings(self)
    image, label = np.shape(batch["image"]), np.shape(batch["label"])
    if len(image) != 6 or image[2] <= self.num_shots:
      raise base.InputError(
        "tasks need images [T, ways, shots + queries, H, W, channels], with more than"
        f" num_shots={self.num_shots} of each way; got shape {image}."
      )
    if not num_classes == self.num_ways == image[1]:
      raise base.InputError(
        f"a learner of {self.num_ways} ways does not fit tasks of {image[1]} ways and"
        f" {num_classes} classes: all three numbers must be equal."
      )
    num_queries = image[2] - self.num_shots
    expected = np.repeat(np.arange(self.num_ways), num_queries)
    if label[1:] != expected.shape or np.any(batch["label"] != expected):
      raise base.InputError(
        "the label of a way is its position: label must be [T, ways * queries]"
        f" with every row {expected.tolist()}; reorder the images, not the labels."
      )
    key = jax.random.key(0)
    params, state = jax.eval_shape(lambda: self.init(key, _first(batch)))
    if jax.tree.leaves(state):
      raise base.InputError(
        f"the network has the state {', '.join(state)}; a learner needs a network"
        " without state, such as conv4.Conv4, whose BatchNorm has no running"
        " statistics."
      )
    logits = jax.eval_shape(
      lambda p: self.forward(p, {}, _first(batch), key, False)[0], params
    )
    if logits.shape[-1] != self.num_ways:
      raise base.InputError(
        f"a network of {logits.shape[-1]} logits does not fit {self.num_ways} ways."
      )

  def init(self, key: base.Array, batch: base.Batch) -> tuple[base.PyTree, base.PyTree]:
    """Initial `(params, model_state)` for tasks of this batch's shape."""
    images = self._pixels(batch["image"])
    variables = dict(self.network.init(key, images[0, 0, :1], False))
    return variables.pop("params"), variables

  def forward(
    self,
    params: base.PyTree,
    model_state: base.PyTree,
    batch: base.Batch,
    key: base.Array,
    train: bool,
  ) -> tuple[base.Array, base.PyTree]:
    """`(logits [T, ways * queries, ways], model_state)`, see `base.Problem.forward`.

    The logits of a task's queries are computed by the network that is adapted to the
    supports of the task.
    """
    del key
    labels = jnp.repeat(jnp.arange(self.num_ways), self.num_shots)

    def support_losses(params, support):
      return losses.softmax_cross_entropy(self._logits(params, support, train), labels)

    def query_logits(images):
      images = self._pixels(images)
      support = _merge_ways(images[:, : self.num_shots])
      query = _merge_ways(images[:, self.num_shots :])
      adapted = adapt(
        support_losses,
        params,
        support,
        learning_rate=self.inner_learning_rate,
        num_steps=self.num_inner_steps if train else self.num_test_steps,
        first_order=self.first_order or not train,
      )
      return self._logits(adapted, query, train)

    if train:
      return jax.vmap(query_logits)(batch["image"]), model_state
    images = jnp.asarray(batch["image"])
    logits = jax.lax.map(
      control_flow.channels_last(query_logits),
      images,
      batch_size=_EVALUATION_BATCH_SIZE,
    )
    return logits, model_state

  def loss(self, outputs: base.Array, batch: base.Batch) -> base.Array:
    """Mean cross-entropy of each task's queries, [T], in nats."""
    labels = batch["label"]
    logits = outputs.reshape(-1, outputs.shape[-1])
    query_losses = losses.softmax_cross_entropy(logits, labels.reshape(-1))
    return jnp.mean(query_losses.reshape(labels.shape), axis=1)

  def problem(
    self,
    *,
    class_counts: base.Array,
    num_examples: int,
    num_steps: int,
    axis_name: base.AxisName = None,
  ) -> base.Problem:
    """The learning problem of this learner; arguments as in `base.Problem`."""
    return base.Problem(
      forward=self.forward,
      loss=self.loss,
      linearize=linearization.linearize,
      linearize_outputs=linearization.linearize_outputs,
      num_classes=self.num_ways,
      class_counts=class_counts,
      num_examples=num_examples,
      num_steps=num_steps,
      axis_name=axis_name,
    )

  def _logits(self, params, images, train):
    return self.network.apply({"params": params}, images, train)

  def _pixels(self, images):
    if self.preprocess is not None:
      return self.preprocess(images)
    return augmentation.to_float(images)


def _merge_ways(images):
  """Reshapes [ways, n, ...] to [ways * n, ...]."""
  return images.reshape(-1, *images.shape[2:])


def _first(batch):
  return {name: column[:1] for name, column in batch.items()}


def _check_settings(learner: Learner) -> None:
  if not learner.inner_learning_rate >= 0:  # Also refuses NaN.
    raise base.InputError(
      f"inner_learning_rate={learner.inner_learning_rate} must be at least 0."
    )
  least_of = {"num_ways": 2, "num_shots": 1, "num_inner_steps": 0, "num_test_steps": 0}
  for name, least in least_of.items():
    base.check_integer(name, getattr(learner, name), least)

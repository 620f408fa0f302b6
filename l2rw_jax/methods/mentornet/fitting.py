"""Fitting a mentor, and the rows that it is fitted to.

MentorNet-PD imitates a predefined curriculum on a grid of losses; MentorNet-DD learns
from the recorded losses of a student (the trained classifier) which labels were right.

References:
  Jiang, Zhou, Leung, Li, Fei-Fei, "MentorNet: Learning Data-Driven Curriculum
  for Very Deep Neural Networks on Corrupted Labels", ICML 2018, section 3. The
  defaults of `fit` are the released code's, except for the number of starts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2rw_jax import base
from l2rw_jax.methods import mentornet
from l2rw_jax.methods.mentornet import network as mentornet_network


class Rows(NamedTuple):
  """N rows of inputs and target weights for a mentor, as NumPy arrays.

  Attributes:
    losses: float32 [N].
    differences: loss minus percentile, float32 [N].
    labels: int32 [N].
    epochs: epoch percents, int32 [N].
    targets: target weights, float32 [N].
  """

  losses: np.ndarray
  differences: np.ndarray
  labels: np.ndarray
  epochs: np.ndarray
  targets: np.ndarray


def pd_rows(curriculum: str, *, num_rows: int | None = 100_000, seed: int = 0) -> Rows:
  """Random rows of the released grid, with the weights of a predefined curriculum.

  The grid has 1.2 million rows: losses 0, 0.1, .. 9.9, 10, 11, .. 29; differences
  -5, -4.9, .. 4.9; epochs 0 .. 99; label 0.

  Args:
    curriculum: a key of `mentornet.CURRICULA`.
    num_rows: number of rows to keep; None is all.
    seed: seed of the random choice of rows.

  Raises:
    InputError: the curriculum is unknown, `num_rows` is less than 2, or the grid has
      fewer rows.
  """
  if curriculum not in mentornet.CURRICULA:
    names = ", ".join(mentornet.CURRICULA)
    raise base.InputError(f"pd_rows: curriculum={curriculum!r}: choose among {names}.")
  tenths = np.arange(100) / 10
  axes = (np.concatenate([tenths, np.arange(10.0, 30.0)]), tenths - 5, np.arange(100))
  shape = tuple(len(axis) for axis in axes)
  size = int(np.prod(shape))
  if num_rows is not None:
    num_rows = base.check_integer("pd_rows: num_rows", num_rows, 2)
    if num_rows > size:
      raise base.InputError(f"pd_rows: num_rows={num_rows} must be at most {size}.")
  # The rows are shuffled even if all are kept, because `split` takes test rows from the
  # end.
  rng = np.random.default_rng(seed)
  chosen = rng.permutation(size)[:num_rows]
  places = np.unravel_index(chosen, shape)
  losses, differences, epochs = (a[p] for a, p in zip(axes, places, strict=True))
  differences = np.round(differences, 1).astype(np.float32)
  labels = np.zeros(len(chosen), np.int32)
  features = (losses.astype(np.float32), differences, labels, epochs.astype(np.int32))
  targets = np.asarray(mentornet.CURRICULA[curriculum](*features), np.float32)
  return Rows(*features, targets)


def dd_rows(
  losses: np.ndarray,
  labels: np.ndarray,
  true_labels: np.ndarray,
  epochs: np.ndarray,
  *,
  percentile: float,
  use_labels: bool = False,
  seed: int = 0,
) -> Rows:
  """Rows of a student's recorded losses; the target weight is 1 for correct labels.

  Args:
    losses: [N].
    labels: labels that the student was trained on, [N].
    true_labels: [N].
    epochs: epoch percents, [N].
    percentile: percentile of all recorded losses together, from 0 to 100, as in the
      released code. The differences are the losses minus this percentile.
    use_labels: whether the mentor gets the labels; in the released code, it gets 0 in
      place of every label.
    seed: seed of the order of the rows.

  Raises:
    InputError: the shapes differ, `percentile` is out of range, a loss is not finite,
      an epoch percent is outside 0 to 99, or all labels are right (or all wrong), so
      that there is nothing to learn.
  """
  mentornet.check_percentile(percentile)
  losses, labels, true_labels, epochs = columns = [
    np.asarray(x) for x in (losses, labels, true_labels, epochs)
  ]
  if any(x.shape != (losses.size,) for x in columns):
    raise base.InputError(
      "losses, labels, true_labels and epochs must have shape [N]; got"
      f" {', '.join(str(x.shape) for x in columns)}."
    )
  if not np.isfinite(losses).all():
    raise base.InputError("dd_rows: losses contain NaN or infinity; record them again.")
  if not ((epochs >= 0) & (epochs <= 99)).all():
    raise base.InputError("dd_rows: epochs must be percents from 0 to 99.")
  targets = labels == true_labels
  if targets.all() or not targets.any():
    kind = "right" if targets.all() else "wrong"
    raise base.InputError(
      f"dd_rows: all {len(labels)} labels are {kind}; record a student on data with"
      " both right and wrong labels."
    )
  order = np.random.default_rng(seed).permutation(len(losses))
  shown = labels if use_labels else np.zeros_like(labels)
  return Rows(
    losses[order].astype(np.float32),
    (losses - np.percentile(losses, percentile))[order].astype(np.float32),
    shown[order].astype(np.int32),
    epochs[order].astype(np.int32),
    targets[order].astype(np.float32),
  )


def split(rows: Rows, share: float = 0.8) -> tuple[Rows, Rows]:
  """Splits rows that are in random order into the first `share` and the others.

  Raises:
    InputError: `share` is not between 0 and 1.
  """
  if not 0 < share < 1:
    raise base.InputError(f"share={share} must be more than 0 and less than 1.")
  cut = int(share * len(rows.losses))
  return Rows(*(x[:cut] for x in rows)), Rows(*(x[cut:] for x in rows))


def is_binary(targets: np.ndarray) -> bool:
  """Whether every target is 0 or 1, so that fitting the mentor is classification."""
  return bool(np.isin(targets, (0, 1)).all())


def imitation_losses(logits: Any, targets: Any, is_binary: bool) -> base.Array:
  """Sigmoid cross-entropy if all targets are 0 or 1, otherwise squared error; [B]."""
  if is_binary:
    return optax.sigmoid_binary_cross_entropy(logits, targets)
  return (jax.nn.sigmoid(logits) - targets) ** 2


def fit(
  network: mentornet_network.MentorNetwork,
  rows: Rows,
  *,
  num_steps: int = 30_000,
  batch_size: int = 32,
  learning_rate: float = 0.1,
  restarts: int = 8,
  seed: int = 0,
) -> base.PyTree:
  """Fits a mentor with the released settings from several starts; deterministic.

  The optimizer is Adam. Its learning rate is multiplied by 0.9 every 1,000 steps, and
  gradients are clipped to norm 5; batches are drawn with replacement. At this learning
  rate, about half of the starts of the released network never learn to use the epoch.
  Unlike the released code, this function therefore keeps the best of several starts.

  Args:
    network: the network to fit.
    rows: inputs and targets.
    num_steps: number of updates.
    batch_size: rows per update.
    learning_rate: initial learning rate.
    restarts: number of starts, which are fitted one after the other; the one with the
      lowest loss over all rows is kept. 1 is the released procedure.
    seed: seed of the initialization and the batches. The result of a start does not
      depend on the number of starts.

  Returns:
    The network's variables as NumPy arrays.

  Raises:
    InputError: the network has no embedding for a label, `num_steps` is negative,
      `batch_size` or `restarts` is below 1, or every start diverged.
  """
  num_steps = base.check_integer("fit: num_steps", num_steps, 0)
  batch_size = base.check_integer("fit: batch_size", batch_size)
  restarts = base.check_integer("fit: restarts", restarts)
  if rows.labels.min() < 0 or rows.labels.max() >= network.num_labels:
    raise base.InputError(
      f"labels must lie between 0 and {network.num_labels - 1}; got"
      f" {rows.labels.min()} to {rows.labels.max()}."
    )
  key = jax.random.key(seed)
  arrays = jax.tree.map(jnp.asarray, rows)
  # The starts do not share one `vmap`, because rounding in XLA would then depend on the
  # number of starts, and fitting amplifies rounding errors.
  starts = [
    _fit_one(
      network,
      batch_size,
      is_binary(rows.targets),
      jax.random.fold_in(key, start),
      arrays,
      num_steps,
      learning_rate,
    )
    for start in range(restarts)
  ]
  variables, losses = zip(*jax.device_get(starts), strict=True)
  if not np.isfinite(losses).any():
    raise base.InputError("the mentor's fit diverged: lower learning_rate.")
  return variables[np.nanargmin(losses)]


# One program runs all steps, because a dispatch takes longer than such a step.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fit_one(network, batch_size, is_binary, key, rows, num_steps, learning_rate):
  """`(variables, mean loss over all rows)` of the start with this key."""
  init_key, batch_key = jax.random.split(key)
  variables = dict(network.init(init_key, *(x[:1] for x in rows[:4])))
  params = variables.pop("params")

  def schedule(count):
    return learning_rate * 0.9 ** (count // 1000)

  tx = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(schedule))

  def mean_loss(params, batch):
    logits = network.apply({"params": params, **variables}, *batch[:4])
    return imitation_losses(logits, batch.targets, is_binary).mean()

  def step(i, carry):
    params, opt_state = carry
    key = jax.random.fold_in(batch_key, i)
    chosen = jax.random.randint(key, (batch_size,), 0, len(rows.losses))
    grads = jax.grad(mean_loss)(params, Rows(*(x[chosen] for x in rows)))
    with base.implicit_promotion():
      updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  params, _ = jax.lax.fori_loop(0, num_steps, step, (params, tx.init(params)))
  return {"params": params, **variables}, mean_loss(params, rows)


def imitation_errors(mentor: mentornet_network.Mentor, rows: Rows) -> dict[str, float]:
  """Errors of a mentor's weights with respect to the targets.

  Returns:
    "mse", the mean squared error of the weights, and "accuracy", the share of rows
    whose weight and target are on the same side of 1/2.
  """
  weights = np.asarray(
    mentornet_network.weights_of(mentor.network, mentor.variables, *rows[:4])
  )
  right = (weights > 0.5) == (rows.targets > 0.5)
  return {
    "mse": float(np.mean((weights - rows.targets) ** 2)),
    "accuracy": float(right.mean()),
  }

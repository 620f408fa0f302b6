"""Statistics of training for every example.

A network fits right labels early and wrong labels late, so its predictions for an
example during training are evidence about the label. `update` needs no additional
forward passes: the statistics are sums over the logits that a training step computes
anyway.

    update = jax.jit(audit.update, donate_argnums=0)
    state = audit.init(num_examples, num_classes)
    state = update(state, batch["index"], logits, batch["label"])  # every step
    stats = audit.summarize(state)

Numerics: every sum is compensated (Neumaier). It is a pair of float32 arrays, the
second of which contains the rounding error of the first, so that the millionth step
counts as much as the first step. Counts are int32. A state takes 8 C + 65 bytes per
example.

In the average of the predicted distributions, the weight of a step is its mean loss.
Once a network has memorized its training set, it predicts every given label, wrong or
right, so steps with a loss near 0 give no information about labels. Without these
weights, such steps would outnumber the informative early steps of a long run.

References:
  Pleiss, Zhang, Elenberg, Weinberger, "Identifying Mislabeled Data using the Area
  Under the Margin Ranking", NeurIPS 2020 (the margin).
  Toneva, Sordoni, Tachet des Combes, Trischler, Bengio, Gordon, "An Empirical Study of
  Example Forgetting during Deep Neural Network Learning", ICLR 2019.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax import losses as losses_lib

_LEAST_WEIGHT = 1e-20


class Sum(NamedTuple):
  """A compensated sum: the exact sum is close to `total` + `error`.

  Attributes:
    total: float32 [N] or [N, C].
    error: the rounding error of `total`, of the same shape and type.
  """

  total: base.Array
  error: base.Array


class State(NamedTuple):
  """The statistics so far of N examples in C classes; a pytree of arrays.

  Attributes:
    seen: number of presentations (rows of batches in which the example occurred), int32
      [N].
    wrong: number of presentations whose predicted class was not the given label, int32
      [N].
    forgotten: number of forgetting events, int32 [N].
    was_correct: whether the last prediction was the given label, bool [N].
    weighted: number of presentations with a weight, int32 [N].
    rejected: number of presentations whose weight was zero, int32 [N].
    scored: number of presentations with a score, int32 [N].
    loss: cross-entropies in nats, `Sum` of [N].
    margin: margins, `Sum` of [N].
    weight: weights in units of the uniform weight, `Sum` of [N].
    score: scores, scaled in each step, `Sum` of [N].
    step_weight: mean losses of the steps in which the example occurred, one for each
      presentation, `Sum` of [N].
    probabilities: predicted distributions times the mean losses of their steps, `Sum`
      of [N, C].
  """

  seen: base.Array
  wrong: base.Array
  forgotten: base.Array
  was_correct: base.Array
  weighted: base.Array
  rejected: base.Array
  scored: base.Array
  loss: Sum
  margin: Sum
  weight: Sum
  score: Sum
  step_weight: Sum
  probabilities: Sum


def init(num_examples: int, num_classes: int) -> State:
  """The state before the first step.

  Args:
    num_examples: N, the number of training examples.
    num_classes: C, at least 2.

  Returns:
    A `State` in which nothing has been seen.

  Raises:
    InputError: `num_examples` is below 1, `num_classes` is below 2, or one of them is
      not an integer.
  """
  num_examples = base.check_integer("audit.init: num_examples", num_examples)
  num_classes = base.check_integer("audit.init: num_classes", num_classes, 2)

  # No two leaves share a buffer, so that a step may donate the state.
  def zeros(dtype, *shape):
    return jnp.zeros((num_examples, *shape), dtype)

  def empty(*shape):
    return Sum(zeros(jnp.float32, *shape), zeros(jnp.float32, *shape))

  return State(
    seen=zeros(jnp.int32),
    wrong=zeros(jnp.int32),
    forgotten=zeros(jnp.int32),
    was_correct=zeros(jnp.bool_),
    weighted=zeros(jnp.int32),
    rejected=zeros(jnp.int32),
    scored=zeros(jnp.int32),
    loss=empty(),
    margin=empty(),
    weight=empty(),
    score=empty(),
    step_weight=empty(),
    probabilities=empty(num_classes),
  )


def update(
  state: State,
  index: Any,
  logits: Any,
  labels: Any,
  weights: Any = None,
  scores: Any = None,
  mask: Any = None,
  *,
  axis_name: base.AxisName = None,
) -> State:
  """The state after one more batch.

  This function is pure: it works inside `jit`, `vmap`, `pmap` and `shard_map`, and on
  arrays that are sharded over a mesh. The state is the same on every device; the rows
  are those of this device. The cost is proportional to the batch size, not to N, if
  the state is donated (`jax.jit(audit.update, donate_argnums=0)`, or a part of the
  state that your compiled step donates). Otherwise every call copies the whole state.

  If an example occurs in several rows, each row is a presentation. Because all of them
  come from the same parameters, they count as one prediction for forgetting, which is
  right if it is right in every row.

  Args:
    state: the result of `init` or `update`.
    index: the row of each example in the training set, integers [B]. Rows with an
      index outside 0 .. N - 1 do not count.
    logits: logits of the network before this step's update, [B, C], of any
      floating-point type. Logits [B, 1] are those of class 1 of two classes.
    labels: the given labels, integers [B].
    weights: example weights as the methods of this library return them, which sum to
      1 over the global batch, [B]. They are recorded in units of the uniform weight,
      that is, multiplied by the number of rows that count. None records no weights.
    scores: the scores before they are clipped at zero, [B]. They are divided by the
      mean absolute score of the step, because the scale of scores changes during
      training. None records no scores.
    mask: which rows count, bool [B]; None is all. Other rows may contain anything.
    axis_name: mapped axis over which the rows are sharded; the state is then updated
      with the rows of all devices.

  Returns:
    The new `State`.

  Raises:
    InputError: shapes or types do not match, or, outside `jit`, a label of a row that
      counts is not one of the C classes. Under `jit`, such a label makes the mean loss
      and the mean margin of the example NaN.
    FloatingPointError: outside `jit`, if a loss of a row that counts is not finite.

  >>> import jax.numpy as jnp
  >>> state = init(num_examples=3, num_classes=2)
  >>> logits = jnp.log(jnp.array([[.9, .1], [.2, .8]]))
  >>> state = update(state, jnp.array([2, 0]), logits, jnp.array([0, 0]))
  >>> print(summarize(state)["mean_loss"].round(3))
  [1.609   nan 0.105]
  """
  num_examples, num_classes = state.probabilities.total.shape
  index, labels = base.host_or_jax_array(index), base.host_or_jax_array(labels)
  mask = None if mask is None else base.host_or_jax_array(mask)
  logits = jnp.asarray(logits)
  _check(index, logits, labels, weights, scores, mask, num_classes)
  index = base.wide_integers(index, num_examples)
  counts = (index >= 0) & (index < num_examples)
  index = index.astype(jnp.int32)
  if mask is not None:
    counts &= jnp.asarray(mask)
  _refuse_wrong_labels(labels, counts, num_classes)
  labels = base.wide_integers(labels, num_classes)

  state, row_losses = _updated(
    state, index, logits, labels, counts, weights, scores, axis_name=axis_name
  )
  base.check_finite(
    "losses", row_losses, axis_name, ": check the logits given to audit.update"
  )
  return state


def summarize(state: State) -> dict[str, np.ndarray]:
  """The statistics by name, as NumPy arrays of float64.

  Args:
    state: the result of `update`, on any device. If it comes from `vmap` over R runs,
      all results have an additional leading axis R.

  Returns:
    Arrays [N], with NaN for examples that were never seen:

      seen                 number of presentations (0, not NaN, if there was none)
      mean_loss            mean cross-entropy of the given label, in nats
      mean_margin          mean of the given label's logit minus the largest other one
      wrong_predictions    number of presentations with another predicted class
      forgetting_events    number of correct predictions followed by a wrong one
      mean_weight          mean weight; 1 is the uniform weight
      zero_weight_share    share of presentations with weight 0
      mean_score           mean unclipped score, divided by the step's mean |score|

    The last three are also NaN if no weight or score was given. In addition,
    "mean_probabilities" [N, C] is the mean predicted distribution, in which the weight
    of a step is the mean loss of its batch.
  """
  arrays: Any = jax.tree.map(np.asarray, jax.device_get(state))

  def exact(sum_: Sum) -> np.ndarray:
    # To save memory, only the result is converted to float64, not both summands.
    values = np.array(sum_.total, np.float64)
    values += sum_.error
    return values

  def mean(sum_: Sum, count: np.ndarray) -> np.ndarray:
    values = exact(sum_)
    shape = count.shape + (1,) * (values.ndim - count.ndim)
    values /= np.where(count > 0, count, np.nan).reshape(shape)
    return values

  is_seen = arrays.seen > 0
  weighted = np.where(arrays.weighted > 0, arrays.weighted, np.nan)
  return {
    "seen": arrays.seen.astype(np.float64),
    "mean_loss": mean(arrays.loss, arrays.seen),
    "mean_margin": mean(arrays.margin, arrays.seen),
    "wrong_predictions": np.where(is_seen, arrays.wrong, np.nan),
    "forgetting_events": np.where(is_seen, arrays.forgotten, np.nan),
    "mean_weight": mean(arrays.weight, arrays.weighted),
    "zero_weight_share": arrays.rejected / weighted,
    "mean_score": mean(arrays.score, arrays.scored),
    "mean_probabilities": mean(arrays.probabilities, exact(arrays.step_weight)),
  }


def _check(index, logits, labels, weights, scores, mask, num_classes):
  losses_lib.check_logits(logits, labels)
  if index.shape != labels.shape or not jnp.issubdtype(index.dtype, jnp.integer):
    raise base.InputError(
      f"index must be integers of shape {labels.shape}, one for each label; got"
      f" {index.dtype} of shape {index.shape}."
    )
  if max(logits.shape[1], 2) != num_classes:
    raise base.InputError(
      f"the state has {num_classes} classes, but the logits have shape"
      f" {logits.shape}; pass the number of classes of the network to audit.init."
    )
  for name, values in (("weights", weights), ("scores", scores), ("mask", mask)):
    if values is None:
      continue
    if jnp.shape(values) != labels.shape:
      raise base.InputError(
        f"{name} must have shape {labels.shape}, one for each label; got"
        f" {jnp.shape(values)}."
      )
    if name == "mask" and jnp.result_type(values) != jnp.bool_:
      raise base.InputError(f"mask must be bool; got {jnp.result_type(values)}.")


def _refuse_wrong_labels(labels, counts, num_classes):
  if isinstance(labels, jax.core.Tracer) or isinstance(counts, jax.core.Tracer):
    return
  given = np.asarray(labels).astype(np.int64)
  wrong = np.flatnonzero(np.asarray(counts) & ((given < 0) | (given >= num_classes)))
  if len(wrong):
    raise base.InputError(
      f"{len(wrong)} labels are not one of the {num_classes} classes; the first is"
      f" {given[wrong[0]]} in row {wrong[0]}; number the classes from 0 to"
      f" {num_classes - 1}, or leave the rows out with mask."
    )


# This is compiled as one program, even if the caller does not use `jit`.
@functools.partial(jax.jit, static_argnames="axis_name")
def _updated(state, index, logits, labels, counts, weights, scores, *, axis_name):
  """The new state, and the losses of this device's rows [B]; 0 if not counted."""
  num_examples = len(state.seen)
  rows = _rows(logits, labels, counts)
  row_losses = rows["loss"]
  rows |= {"index": jnp.where(counts, index, num_examples), "counts": counts}
  for name, values in (("weight", weights), ("score", scores)):
    if values is not None:
      rows[name] = jnp.where(counts, jnp.asarray(values).astype(jnp.float32), 0)
  rows = {
    name: base.unsharded(base.gather_replicated(x, axis_name))
    for name, x in rows.items()
  }
  rows["step_weight"] = _step_weight(rows["loss"], rows["counts"])
  rows["probabilities"] *= rows["step_weight"][:, None]
  if weights is not None:
    rows["weight"] *= jnp.sum(rows["counts"]).astype(jnp.float32)
  if scores is not None:
    rows["score"] = _scaled(rows["score"], rows["counts"])
  return _add_rows(state, rows), row_losses


def _rows(logits, labels, counts):
  """Statistics of each row of this device; zeros for rows that do not count."""
  log_p, is_label, scale = losses_lib.label_rows(logits, labels, counts)
  z = logits.astype(log_p.dtype)
  if z.shape[1] == 1:
    z = jnp.concatenate([jnp.zeros_like(z), z], axis=1)
  z = jnp.where(counts[:, None], z, 0)
  given = jnp.sum(jnp.where(is_label, z, 0), axis=1)
  largest_other = jnp.max(jnp.where(is_label, -jnp.inf, z), axis=1)
  loss = -jnp.sum(jnp.where(is_label, log_p, 0), axis=1)
  predicted = jnp.argmax(z, axis=1).astype(jnp.int32)
  rows = {
    "loss": loss * scale,
    "margin": (given - largest_other) * scale,
    "probabilities": jnp.where(counts[:, None], jnp.exp(log_p), 0),
  }
  rows = {name: x.astype(jnp.float32) for name, x in rows.items()}
  return rows | {"wrong": counts & (predicted != labels.astype(jnp.int32))}


def _step_weight(loss, counts):
  """The mean loss of the step for each row that counts, [B]."""
  # A label that is not a class has a NaN loss, which must not affect other examples.
  is_finite = counts & jnp.isfinite(loss)
  number = jnp.maximum(jnp.sum(is_finite), 1).astype(jnp.float32)
  mean = jnp.sum(jnp.where(is_finite, loss, 0)) / number
  # The weight is above zero, so that the weights of an example never sum to zero.
  return jnp.where(counts, jnp.maximum(mean, _LEAST_WEIGHT), 0)


def _scaled(scores, counts):
  """Scores divided by the mean of the finite |scores| that count; zeros stay zeros."""
  # A score that is not finite must not affect other examples.
  is_finite = counts & jnp.isfinite(scores)
  sizes = jnp.where(is_finite, jnp.abs(scores), 0)
  # Scores are first divided by the largest |score|, so that no sum overflows or
  # underflows.
  largest = jnp.max(sizes, initial=0)
  scores = base.divide_by_largest(scores, largest)
  number = jnp.maximum(jnp.sum(is_finite), 1).astype(jnp.float32)
  size = jnp.sum(jnp.where(is_finite, jnp.abs(scores), 0)) / number
  return scores / jnp.where(size == 0, 1, size)


def _add_rows(state, rows):
  """`state` with the rows of the global batch, the same on every device."""
  num_examples = len(state.seen)
  size = len(rows["index"])
  # Rows of the same example are combined, so that each example is written once.
  order = jnp.argsort(rows["index"])
  ordered = rows["index"][order]
  first = jnp.ones(min(size, 1), jnp.bool_)
  begins = jnp.concatenate([first, ordered[1:] != ordered[:-1]])
  group = jnp.cumsum(begins.astype(jnp.int32)) - 1
  target = jnp.full(size, num_examples, jnp.int32).at[group].set(ordered)

  def sum_by_example(values):
    values = values[order]
    return jnp.zeros_like(values).at[group].add(values)

  def at(table):
    return table.at[target].get(mode="fill", fill_value=0)

  def put(table, values):
    return table.at[target].set(values, mode="drop")

  def add(table, values):
    return put(table, at(table) + values)

  def add_sum(sum_, values):
    old, values = at(sum_.total), sum_by_example(values)
    new = old + values
    # This is the part of the smaller number that was lost in the sum by rounding.
    is_larger = jnp.abs(old) >= jnp.abs(values)
    lost = jnp.where(is_larger, (old - new) + values, (values - new) + old)
    # A margin is infinite if all other classes have logits of -inf.
    lost = jnp.where(jnp.isfinite(new), lost, 0)
    return Sum(put(sum_.total, new), add(sum_.error, lost))

  number = sum_by_example(rows["counts"].astype(jnp.int32))
  wrong = sum_by_example(rows["wrong"].astype(jnp.int32))
  is_correct = wrong == 0
  state = state._replace(
    seen=add(state.seen, number),
    wrong=add(state.wrong, wrong),
    forgotten=add(
      state.forgotten, (at(state.was_correct) & ~is_correct).astype(jnp.int32)
    ),
    was_correct=put(state.was_correct, is_correct),
    **{
      name: add_sum(getattr(state, name), rows[name])
      for name in ("loss", "margin", "step_weight", "probabilities")
    },
  )
  if "weight" in rows:
    is_zero = (rows["weight"] == 0) & rows["counts"]
    state = state._replace(
      weighted=add(state.weighted, number),
      rejected=add(state.rejected, sum_by_example(is_zero.astype(jnp.int32))),
      weight=add_sum(state.weight, rows["weight"]),
    )
  if "score" in rows:
    state = state._replace(
      scored=add(state.scored, number), score=add_sum(state.score, rows["score"])
    )
  return state

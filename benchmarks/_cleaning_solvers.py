"""Solvers of the data cleaning problem, as pure functions of a state.

The inner problem trains a linear classifier z [D, C] on examples with wrong labels,
each with a weight w_i. The outer problem seeks weights for which z classifies clean
examples correctly:

    inner  g(z, w) = mean_i w_i CE_i(z) + reg |z|^2
    outer  f(z)    = mean_j CE_j(z)                       over the clean examples

SOBA and SABA (Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization
that enables stochastic and global variance reduction algorithms", NeurIPS 2022,
arXiv:2201.13409) update z, the solution v of a linear system, and the logits x of the
weights w = sigmoid(x) at the same time, with step sizes rho and gamma:

    z <- z - rho   d_z,   d_z = dg/dz
    v <- v - rho   d_v,   d_v = (d^2 g/dz^2) v + df/dz
    x <- x - gamma d_x,   d_x = (d^2 g/dx dz) v

SOBA estimates the directions from a batch. SABA reduces their variance: like SAGA, it
keeps the last value of every term for every batch.

The other solvers train z by SGD: with fixed weights, on the clean examples alone, first
with fixed weights and then on the clean examples, or with the weights of a method of
this library. The regularization is not part of the example losses, so it does not
change the weights directly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.methods import nested_maml

State = dict[str, Any]
# With "mean", the sum of the weights of a batch would be below 1, so that the
# regularization would outweigh the examples.
_NORMALIZATION = "sum"


class Sizes(NamedTuple):
  """Shape of a problem.

  Attributes:
    num_examples: N, the number of training examples, some of whose labels are wrong.
    num_meta: number of clean examples.
    num_features: D.
    num_classes: C.
    batch_size: batch size of both kinds of batches.
    num_steps: number of steps of a run, which determines the cosine schedule.
    regularization: reg in the equation for g.
  """

  num_examples: int
  num_meta: int
  num_features: int
  num_classes: int
  batch_size: int
  num_steps: int
  regularization: float

  def num_batches(self, size: int) -> int:
    """Number of batches that cover `size` examples."""
    return -(-size // self.batch_size)

  def start(self, batch: base.Array, size: int) -> base.Array:
    """First row of a batch; the last batch may overlap the one before it."""
    return jnp.minimum(batch * self.batch_size, size - self.batch_size)


class Batch(NamedTuple):
  """Consecutive rows of the training or the clean examples.

  Attributes:
    x: inputs, [B, D].
    y: labels, [B].
    start: number of the first row, int32 scalar.
    number: index of the batch, int32 scalar.
    following: index of the batch of the next step, int32 scalar.
    is_clean: whether each label is right, [B]. Only the oracle, which knows the wrong
      labels, uses it.
  """

  x: base.Array
  y: base.Array
  start: base.Array
  number: base.Array
  following: base.Array
  is_clean: base.Array

  @property
  def examples(self) -> tuple[base.Array, base.Array]:
    """Inputs and labels."""
    return self.x, self.y


class Solver(NamedTuple):
  """One way to solve the problem.

  Attributes:
    init: `(sizes, key) -> state`; the state contains the classifier "z" [D, C].
    step: `(sizes, state, step, batch, meta_batch) -> state`.
    trust: `state -> {name: [N]}`, numbers that are higher for labels that the solver
      trusts; empty if the solver does not weight examples.
  """

  init: Callable[[Sizes, base.Array], State]
  step: Callable[[Sizes, State, base.Array, Batch, Batch], State]
  trust: Callable[[State], dict[str, base.Array]] = lambda state: {}


def example_losses(
  z: base.Array, examples: tuple[base.Array, base.Array]
) -> base.Array:
  """Cross-entropy of each example of a batch, [B]; `examples` is (x, y)."""
  x, y = examples
  return losses.softmax_cross_entropy(x @ z, y)


def _zeros(sizes: Sizes) -> base.Array:
  return jnp.zeros((sizes.num_features, sizes.num_classes))


def _rows(values: base.Array, batch: Batch) -> base.Array:
  size = batch.y.shape[0]
  return jax.lax.dynamic_slice_in_dim(values, batch.start, size)


def _with_rows(values: base.Array, rows: base.Array, batch: Batch) -> base.Array:
  return jax.lax.dynamic_update_slice_in_dim(values, rows, batch.start, 0)


def _added(values: base.Array, rows: base.Array, batch: Batch) -> base.Array:
  return _with_rows(values, _rows(values, batch) + rows, batch)


def _cosine(learning_rate: float, sizes: Sizes, step: base.Array) -> base.Array:
  share = step.astype(jnp.float32) / sizes.num_steps
  return learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * share))


def _sgd(
  sizes: Sizes, z: base.Array, gradient: base.Array, learning_rate: base.Array
) -> base.Array:
  """Takes a step; `gradient` is that of the weighted losses, without regularization."""
  return z - learning_rate * (gradient + 2 * sizes.regularization * z)


def fixed_weights(
  learning_rate: float, weights_fn: Callable[[Batch], base.Array] | None = None
) -> Solver:
  """SGD with a cosine schedule, with weights that are not learned.

  Args:
    learning_rate: initial learning rate.
    weights_fn: `batch -> weights [B]`; None means weight 1 for every example.
  """

  def step(sizes, state, step, batch, meta_batch):
    del meta_batch

    def loss(z):
      values = example_losses(z, batch.examples)
      return jnp.mean(values if weights_fn is None else weights_fn(batch) * values)

    rate = _cosine(learning_rate, sizes, step)
    return {"z": _sgd(sizes, state["z"], jax.grad(loss)(state["z"]), rate)}

  return Solver(lambda sizes, key: {"z": _zeros(sizes)}, step)


def clean_only(learning_rate: float) -> Solver:
  """SGD with a cosine schedule on the clean examples alone."""

  def step(sizes, state, step, batch, meta_batch):
    del batch
    gradient = jax.grad(lambda z: jnp.mean(example_losses(z, meta_batch.examples)))(
      state["z"]
    )
    rate = _cosine(learning_rate, sizes, step)
    return {"z": _sgd(sizes, state["z"], gradient, rate)}

  return Solver(lambda sizes, key: {"z": _zeros(sizes)}, step)


def fine_tuning(learning_rate: float) -> Solver:
  """Uniform training; in the second half of the steps, training on the clean examples.

  The cosine schedule starts again with the second half.
  """

  def step(sizes, state, step, batch, meta_batch):
    half = sizes.num_steps - sizes.num_steps // 2
    is_first = step < half
    x, y = jax.tree.map(
      lambda a, b: jnp.where(is_first, a, b), batch.examples, meta_batch.examples
    )
    gradient = jax.grad(lambda z: jnp.mean(example_losses(z, (x, y))))(state["z"])
    first = _cosine(learning_rate, sizes._replace(num_steps=half), step)
    second = _cosine(
      learning_rate, sizes._replace(num_steps=sizes.num_steps // 2), step - half
    )
    rate = jnp.where(is_first, first, second)
    return {"z": _sgd(sizes, state["z"], gradient, rate)}

  return Solver(lambda sizes, key: {"z": _zeros(sizes)}, step)


def l2rw_solver(learning_rate: float) -> Solver:
  """L2RW, which trusts examples with a high mean weight or a high mean score."""
  value_and_grad = l2rw.weighted_value_and_grad(example_losses)

  def init(sizes, key):
    del key
    zeros = jnp.zeros(sizes.num_examples)
    return {"z": _zeros(sizes), "weights": zeros, "scores": zeros, "seen": zeros}

  def step(sizes, state, step, batch, meta_batch):
    (_, info), gradient = value_and_grad(
      state["z"], batch.examples, meta_batch.examples
    )
    return {
      "z": _sgd(sizes, state["z"], gradient, _cosine(learning_rate, sizes, step)),
      "weights": _added(state["weights"], info.weights, batch),
      "scores": _added(state["scores"], info.scores, batch),
      "seen": _added(state["seen"], jnp.ones_like(info.weights), batch),
    }

  def trust(state):
    seen = jnp.maximum(state["seen"], 1)
    return {"weight": state["weights"] / seen, "score": state["scores"] / seen}

  return Solver(init, step, trust)


def meta_weight_net_solver(learning_rate: float) -> Solver:
  """Meta-Weight-Net with the optimizer of its preset `noise_stable`.

  Args:
    learning_rate: initial learning rate of z, and of the look-ahead.
  """
  preset = meta_weight_net.PRESETS["noise_stable"]
  net = meta_weight_net.WeightNet()

  def init(sizes, key):
    phi = net.init(key, jnp.zeros(1))
    zeros = jnp.zeros(sizes.num_examples)
    return {
      "z": _zeros(sizes),
      "phi": phi,
      "opt_state": preset.optimizer.init(phi),
      "weights": zeros,
      "seen": zeros,
    }

  def step(sizes, state, step, batch, meta_batch):
    z, phi = state["z"], state["phi"]
    linearized = linearization.linearize(example_losses, z, batch.examples)
    # The look-ahead has a constant learning rate. If it followed the schedule, the
    # gradient of the weighting network would vanish.
    lookahead = optax.sgd(learning_rate)
    meta = meta_weight_net.meta_gradient(
      linearized,
      net.apply,
      phi,
      example_losses,
      z,
      meta_batch.examples,
      optimizer=lookahead,
      opt_state=lookahead.init(z),
      normalization=_NORMALIZATION,
    )
    with base.implicit_promotion():  # Adam computes float**int.
      updates, opt_state = preset.optimizer.update(
        meta.gradient, state["opt_state"], phi
      )
    phi = optax.apply_updates(phi, updates)
    weights = meta_weight_net.example_weights(
      net.apply, phi, linearized.losses, normalization=_NORMALIZATION
    )
    gradient = linearized.weighted_gradient(weights)
    return {
      "z": _sgd(sizes, z, gradient, _cosine(learning_rate, sizes, step)),
      "phi": phi,
      "opt_state": opt_state,
      "weights": _added(state["weights"], weights, batch),
      "seen": _added(state["seen"], jnp.ones_like(weights), batch),
    }

  def trust(state):
    return {"weight": state["weights"] / jnp.maximum(state["seen"], 1)}

  return Solver(init, step, trust)


def kept_weights(learning_rate: float, weight_learning_rate: float) -> Solver:
  """Keeps a weight for every example between steps, as NestedMAML does for tasks.

  Args:
    learning_rate: initial learning rate of z.
    weight_learning_rate: initial gamma of `nested_maml.update_weights`; it decays with
      the same schedule as the learning rate of z.
  """

  def init(sizes, key):
    del key
    zeros = jnp.zeros(sizes.num_examples)
    return {"z": _zeros(sizes), "weights": zeros + 1, "scores": zeros}

  def step(sizes, state, step, batch, meta_batch):
    z = state["z"]
    linearized = linearization.linearize(example_losses, z, batch.examples)
    weights = _rows(state["weights"], batch)
    meta = nested_maml.linearized_weight_gradient(
      linearized,
      example_losses,
      z,
      meta_batch.examples,
      weights,
      lookahead_learning_rate=learning_rate,
    )
    weights = nested_maml.update_weights(
      weights, meta.gradient, _cosine(weight_learning_rate, sizes, step)
    )
    gradient = linearized.weighted_gradient(weights / sizes.batch_size)
    return {
      "z": _sgd(sizes, z, gradient, _cosine(learning_rate, sizes, step)),
      "weights": _with_rows(state["weights"], weights, batch),
      "scores": _added(state["scores"], -meta.gradient, batch),
    }

  def trust(state):
    # Sums of scores rank examples as means would: each pass visits all examples equally
    # often, except for the few that are in both of the last two batches.
    return {"weight": state["weights"], "score": state["scores"]}

  return Solver(init, step, trust)


def _divided_by_norm(x: base.Array) -> base.Array:
  norm = jnp.linalg.norm(x)
  return x / jnp.where(norm > 0, norm, 1.0)


def averaged_weights(learning_rate: float, weight_learning_rate: float) -> Solver:
  """Keeps a weight for every example, and averages the gradients of the meta batches.

  It differs from `kept_weights` in several points. The derivative of the meta loss with
  respect to a weight is taken at z, without a look-ahead. The gradient of the meta loss
  is a moving average over the meta batches, with a decay of 0.99. Each gradient is
  divided by its norm before it is averaged, so that a clean image with a pixel that is
  far out of the usual range does not determine the average. The average is divided by
  its norm, too, and the learning rate of the weights is constant, so that late
  steps change the weights as much as early ones. A weight is max(a, 0) for a number a
  that may fall below 0, so that the past of an example with weight 0 is not forgotten.

  Args:
    learning_rate: initial learning rate of z.
    weight_learning_rate: constant learning rate of the numbers a.
  """
  decay = 0.99

  def init(sizes, key):
    del key
    z = _zeros(sizes)
    return {"z": z, "weights": jnp.ones(sizes.num_examples), "average": z}

  def step(sizes, state, step, batch, meta_batch):
    z = state["z"]
    linearized = linearization.linearize(example_losses, z, batch.examples)
    meta_gradient = _divided_by_norm(_outer_gradient(state, meta_batch))
    average = decay * state["average"] + (1 - decay) * meta_gradient
    direction = _divided_by_norm(average)
    # The scores are minus the derivatives, with respect to the weights w_i, of
    # <direction, z'>, where z' is z after a step of SGD on sum_i w_i l_i / B.
    scores = learning_rate * linearized.directional(direction) / sizes.batch_size
    weights = _rows(state["weights"], batch) + weight_learning_rate * scores
    gradient = linearized.weighted_gradient(jnp.maximum(weights, 0) / sizes.batch_size)
    return {
      "z": _sgd(sizes, z, gradient, _cosine(learning_rate, sizes, step)),
      "weights": _with_rows(state["weights"], weights, batch),
      "average": average,
    }

  return Solver(init, step, lambda state: {"weight": state["weights"]})


# The initial logit of every weight, as the problem prescribes.
_INITIAL_LOGIT = -2.0


def _inner_terms(
  sizes: Sizes, state: State, batch: Batch
) -> tuple[base.Array, base.Array, base.Array]:
  """For a batch: d_z, the Hessian times v [D, C], the mixed derivative times v [B]."""

  def gradient(z, logits):
    def loss(z):
      weights = jax.nn.sigmoid(logits)
      weighted = jnp.mean(weights * example_losses(z, batch.examples))
      return weighted + sizes.regularization * jnp.sum(z**2)

    return jax.grad(loss)(z)

  logits = _rows(state["logits"], batch)
  value, transpose = jax.vjp(gradient, state["z"], logits)
  # One VJP gives both products: the Hessian is symmetric, and the product with the
  # mixed derivative needs its transpose.
  hessian_product, mixed_product = transpose(state["v"])
  return value, hessian_product, mixed_product


def _outer_gradient(state: State, meta_batch: Batch) -> base.Array:
  return jax.grad(lambda z: jnp.mean(example_losses(z, meta_batch.examples)))(
    state["z"]
  )


def _init_bilevel(sizes: Sizes, key: base.Array) -> State:
  del key
  logits = jnp.full(sizes.num_examples, _INITIAL_LOGIT)
  return {"z": _zeros(sizes), "v": _zeros(sizes), "logits": logits}


def soba(step_size: float, outer_step_size: float) -> Solver:
  """SOBA; both step sizes fall as 1 / sqrt(number of steps)."""

  def step(sizes, state, step, batch, meta_batch):
    decay = 1 / jnp.sqrt(step.astype(jnp.float32) + 1)
    inner, hessian_product, mixed_product = _inner_terms(sizes, state, batch)
    outer = _outer_gradient(state, meta_batch)
    change = -outer_step_size * decay * mixed_product
    return {
      "z": state["z"] - step_size * decay * inner,
      "v": state["v"] - step_size * decay * (hessian_product + outer),
      "logits": _added(state["logits"], change, batch),
    }

  return Solver(_init_bilevel, step, lambda state: {"weight": state["logits"]})


def saba(step_size: float, outer_step_size: float) -> Solver:
  """SABA with constant step sizes and a memory that starts at 0."""

  def init(sizes, key):
    inner, outer = (sizes.num_batches(n) for n in (sizes.num_examples, sizes.num_meta))
    shape = (sizes.num_features, sizes.num_classes)
    return _init_bilevel(sizes, key) | {
      "inner": _memory(inner, shape),
      "hessian": _memory(inner, shape),
      "outer": _memory(outer, shape),
      "mixed": jnp.zeros((inner, sizes.batch_size)),
      "mixed_mean": jnp.zeros(sizes.num_examples),
    }

  def step(sizes, state, step, batch, meta_batch):
    del step
    share = sizes.batch_size / sizes.num_examples
    meta_share = sizes.batch_size / sizes.num_meta
    terms = _inner_terms(sizes, state, batch)
    inner, state["inner"] = _reduced(state["inner"], terms[0], batch, share)
    hessian, state["hessian"] = _reduced(state["hessian"], terms[1], batch, share)
    outer, state["outer"] = _reduced(
      state["outer"],
      _outer_gradient(state, meta_batch),
      meta_batch,
      meta_share,
    )
    # A batch has derivatives only with respect to the logits of its examples, so one
    # number per example is kept.
    change = terms[2] - state["mixed"][batch.number]
    direction = _added(state["mixed_mean"], change, batch)
    return state | {
      "z": state["z"] - step_size * inner,
      "v": state["v"] - step_size * (hessian + outer),
      "logits": state["logits"] - outer_step_size * direction,
      "mixed": state["mixed"].at[batch.number].add(change),
      "mixed_mean": _added(state["mixed_mean"], share * change, batch),
    }

  return Solver(init, step, lambda state: {"weight": state["logits"]})


class Memory(NamedTuple):
  """The last value of a term for each batch.

  Attributes:
    last: the values, [number of batches, ...].
    mean: mean of the values over examples.
    of_next: the entry of `last` for the batch of the next step. It is read right after
      `last` is written, because XLA:CPU copies an array in every step of a loop that
      reads it before writing it.
  """

  last: base.Array
  mean: base.Array
  of_next: base.Array


def _memory(num_batches: int, shape: tuple[int, ...]) -> Memory:
  return Memory(jnp.zeros((num_batches, *shape)), jnp.zeros(shape), jnp.zeros(shape))


def _reduced(
  memory: Memory, value: base.Array, batch: Batch, share: float
) -> tuple[base.Array, Memory]:
  """SAGA's estimate from the new value of a batch, and the new memory.

  `share` is the number of examples of the batch divided by that of all examples.
  """
  change = value - memory.of_next
  last = jax.lax.dynamic_update_index_in_dim(memory.last, value, batch.number, 0)
  of_next = jax.lax.dynamic_index_in_dim(last, batch.following, keepdims=False)
  return memory.mean + change, Memory(last, memory.mean + share * change, of_next)

r"""AdaCore: a weighted subset whose preconditioned gradient is that of all the data.

Every R passes the network looks at the whole training set and chooses r of its N
examples to train on until the next look:

    g_i    gradient of example i's loss with respect to its logits, [C]
    D      diagonal of the loss's Hessian with respect to the logits (Hutchinson)
    m      <- b1 m + (1 - b1) g,        g~ = m / (1 - b1^t)
    u      <- b2 u + (1 - b2) D^2,      H~ = (sqrt(u / (1 - b2^t)))^k + eps
    q_i    = g~_i / H~
    S      minimizes sum_i min_{j in S} |q_i - q_j|, greedily, class by class
    gamma  of a chosen example: how many of its class are nearest to it; sum N

A batch of B of the chosen examples gets the weights gamma r / (N B), so that the
expected gradient is sum_{j in S} gamma_j grad l_j / N, which stands for the mean
gradient of all N. This is what CRAIG's script for deep networks does (gamma scaled
to mean 1, then the batch mean); its script for logistic regression takes the raw
gamma, a step N / r times as large.

CRAIG is the special case H = 1 without averages: `curvature=False`.

What is the paper's and what is ours: from the paper's abstract come weighted subsets
chosen by gradients preconditioned with the Hessian, and the exponential averages of
gradients and curvature; no official code is public. Distances, classes on their own
and cluster sizes are CRAIG's, the equations of the averages and the defaults of b1,
b2, k and eps those of AdaHessian as released. That the averages run over selections
(not steps), and the choice of whose Hessian it is (`hessian_scope`), are ours.

References:
  Pooladzandi, Davini, Mirzasoleiman, "Adaptive Second Order Coresets for
  Data-efficient Machine Learning", ICML 2022, arXiv:2207.13887.
  Mirzasoleiman, Bilmes, Leskovec, "Coresets for Data-efficient Training of Machine
  Learning Models", ICML 2020 (CRAIG).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax import coresets
from l2rw_jax import losses
from l2rw_jax.methods import adacore_table
from l2rw_jax.methods import baselines


def gradient_proxies(logits: base.Array, labels: base.Array) -> base.Array:
  """softmax(z) - onehot(y): the cross-entropy's gradient at the logits, [n, C].

  Args:
    logits: z, [n, C].
    labels: y, integers [n]. A label that names no class gives NaN.

  Raises:
    InputError: the shapes do not fit.
  """
  losses.check_logits(logits, labels)
  is_label = losses.label_mask(labels, logits.shape[1])
  probabilities = jax.nn.softmax(logits, axis=1)
  scale = losses.label_scale(is_label).astype(probabilities.dtype)
  return (probabilities - is_label.astype(probabilities.dtype)) * scale[:, None]


class Averages(NamedTuple):
  """Exponential averages, not yet corrected for their start at zero.

  Attributes:
    gradients: m.
    squares: u, of the squared curvature.
    num_updates: t, how often they were updated, int32 scalar.
  """

  gradients: base.Array
  squares: base.Array
  num_updates: base.Array


def update_averages(
  averages: Averages,
  gradients: base.Array,
  curvature: base.Array,
  beta1: float = 0.9,
  beta2: float = 0.999,
) -> Averages:
  """m <- b1 m + (1 - b1) g, u <- b2 u + (1 - b2) D^2, t <- t + 1."""
  return Averages(
    beta1 * averages.gradients + (1 - beta1) * gradients,
    beta2 * averages.squares + (1 - beta2) * curvature**2,
    averages.num_updates + 1,
  )


def corrected(
  averages: Averages,
  beta1: float = 0.9,
  beta2: float = 0.999,
  power: float = 1.0,
  epsilon: float = 1e-4,
) -> tuple[base.Array, base.Array]:
  """(g~, H~) of averages that were updated at least once.

  Args:
    averages: m, u and t.
    beta1: of the gradients.
    beta2: of the squared curvature.
    power: k; 0 switches the curvature off.
    epsilon: added to it.
  """
  num_updates = averages.num_updates.astype(averages.gradients.dtype)
  gradients = averages.gradients / (1 - beta1**num_updates)
  mean_square = averages.squares / (1 - beta2**num_updates)
  return gradients, jnp.sqrt(mean_square) ** power + epsilon


class State(NamedTuple):
  """What the method carries; arrays of fixed shape.

  Attributes:
    rows: to visit in an epoch, int32 [r].
    weights: of every example in units in which uniform is 1, [N]: gamma r / N, and 0
      outside the subset. All 1 before the first selection.
    num_selections: how many there were, int32 scalar.
    averages: of gradients [N, C] and squared curvature, or None for CRAIG.
  """

  rows: base.Array
  weights: base.Array
  num_selections: base.Array
  averages: Averages | None


def adacore(
  fraction: float,
  refresh_every: int = 1,
  *,
  curvature: bool = True,
  hessian_scope: str = "shared",
  num_probes: int = 8,
  beta1: float = 0.9,
  beta2: float = 0.999,
  power: float = 1.0,
  epsilon: float = 1e-4,
  last_layer: bool = False,
  budget: str = "proportional",
  greedy: str = "lazy",
  greedy_epsilon: float = 0.1,
  warmup_epochs: int = 0,
) -> base.Method:
  """AdaCore for the training loop, and CRAIG with `curvature=False`.

  What the loop calls an epoch is R passes over the r chosen examples, from one
  selection to the next.

  With one Hessian for all examples ("shared") the proxies are CRAIG's in rescaled
  coordinates. With one an example, H is p (1 - p) for cross-entropy: wherever the
  network is sure, |q| is about 1 however small the gradient, until epsilon ends it.

  Args:
    fraction: r / N, in (0, 1].
    refresh_every: R, passes over the subset from one selection to the next.
    curvature: whether gradients are averaged and preconditioned.
    hessian_scope: "shared", of the mean loss with respect to the last layer's bias
      (with `last_layer` its weights too), or "example", of each example's own loss
      with respect to its logits.
    num_probes: of Hutchinson's estimate at each selection.
    beta1: of the gradients' average.
    beta2: of the squared curvature's.
    power: k, of the curvature.
    epsilon: added to the curvature.
    last_layer: whether distances are between gradients of the last layer's weights
      and bias. Then only the logits' part is averaged. Needs a network with features,
      and not `hessian_scope="example"`.
    budget: of the classes, see `coresets.class_budgets`.
    greedy: "lazy" or "stochastic", see `coresets.select`.
    greedy_epsilon: of the stochastic greedy.
    warmup_epochs: passes over all examples before the first selection.

  Returns:
    A `base.Method`.

  Raises:
    InputError: a setting out of range.
  """
  check_fraction("adacore", fraction)
  check_epochs("adacore", refresh_every, warmup_epochs)
  coresets.check_greedy(greedy, greedy_epsilon)
  _check_averages(num_probes, beta1, beta2, epsilon)
  scopes = adacore_table.SCOPES[: 1 if last_layer else None]
  if hessian_scope not in scopes:
    raise base.InputError(
      f"adacore: hessian_scope={hessian_scope!r}, last_layer={last_layer}: choose one"
      f" of {scopes}."
    )

  def init(key, problem, params):
    del key, params
    averages = None
    if curvature:
      shape = (problem.num_examples, problem.num_classes)
      by_scope = {"example": shape, "shared": shape[1:]}
      squares = by_scope[hessian_scope]
      if last_layer:
        squares = (problem.num_classes, adacore_table.num_features(problem) + 1)
      averages = Averages(
        jnp.zeros(shape), jnp.zeros(squares), jnp.zeros((), jnp.int32)
      )
    return State(
      jnp.arange(subset_size(fraction, problem.num_examples), dtype=jnp.int32),
      jnp.ones(problem.num_examples),
      jnp.zeros((), jnp.int32),
      averages,
    )

  def refresh(state, problem, view):
    if view.epoch < warmup_epochs:
      return state
    key = jax.random.key(int(view.rng.integers(2**31)))
    scope = hessian_scope if curvature else None
    found = adacore_table.look(
      problem, view, key, scope=scope, last_layer=last_layer, num_probes=num_probes
    )
    proxies, scale, averages = found.gradients, None, None
    if found.curvature is not None:
      averages = update_averages(
        state.averages, found.gradients, found.curvature, beta1, beta2
      )
      proxies, scale = corrected(averages, beta1, beta2, power, epsilon)
      if not last_layer:
        proxies, scale = proxies / jnp.broadcast_to(scale, proxies.shape), None
    chosen = coresets.select(
      proxies,
      view.train["label"],
      state.rows.size,
      features=found.features,
      scale=scale,
      budget=budget,
      greedy=greedy,
      epsilon=greedy_epsilon,
      key=jax.random.fold_in(key, 1),
    )
    weights = np.zeros(problem.num_examples, np.float32)
    weights[chosen.rows] = chosen.weights * (chosen.rows.size / problem.num_examples)
    rows = jnp.asarray(chosen.rows)
    return State(rows, jnp.asarray(weights), state.num_selections + 1, averages)

  return _method(init, refresh, refresh_every)


def random_subset(fraction: float, refresh_every: int | None = 1) -> base.Method:
  """Training on a random part of the data, with equal weights.

  With a new part at every pass this is stochastic gradient descent on all the data.

  Args:
    fraction: of the training set, in (0, 1].
    refresh_every: passes over the part from one draw to the next; None for one draw.

  Raises:
    InputError: a setting out of range.
  """
  check_fraction("random_subset", fraction)
  check_epochs("random_subset", 1 if refresh_every is None else refresh_every)

  def init(key, problem, params):
    del key, params
    size = subset_size(fraction, problem.num_examples)
    rows, ones = jnp.arange(size, dtype=jnp.int32), jnp.ones(problem.num_examples)
    return State(rows, ones, jnp.zeros((), jnp.int32), None)

  def refresh(state, problem, view):
    if refresh_every is None and state.num_selections:
      return state
    rows = view.rng.choice(problem.num_examples, state.rows.size, replace=False)
    return state._replace(
      rows=jnp.asarray(np.sort(rows), jnp.int32),
      num_selections=state.num_selections + 1,
    )

  return _method(init, refresh, refresh_every or math.ceil(1 / fraction))


def _method(init, refresh, num_passes):
  def sample(state, problem, train, rng):
    if not state.num_selections:
      return base.permutation(state, problem, train, rng)
    rows = np.asarray(state.rows)
    return np.concatenate([rng.permutation(rows) for _ in range(num_passes)])

  def gradients(state, problem, inputs):
    def weights(losses):
      size = base.global_size(losses.shape[0], problem.axis_name)
      own = base.take(state.weights, inputs.batch["index"])
      return own.astype(losses.dtype) / size

    return baselines.weighted_gradients(problem, inputs, weights), state

  return base.Method(gradients, init=init, refresh=refresh, sample=sample)


def subset_size(fraction: float, num_examples: int) -> int:
  """r, the share of the examples, rounded, at least 1."""
  return max(1, round(fraction * num_examples))


def check_fraction(where: str, fraction: float) -> None:
  """Raises InputError unless `fraction` is in (0, 1]."""
  if not 0 < fraction <= 1:
    raise base.InputError(
      f"{where}: fraction={fraction} must be above 0 and at most 1, such as 0.1."
    )


def _check_averages(
  num_probes: int, beta1: float, beta2: float, epsilon: float
) -> None:
  if num_probes < 1:
    raise base.InputError(f"adacore: num_probes={num_probes} must be at least 1.")
  for name, beta in (("beta1", beta1), ("beta2", beta2)):
    if not 0 <= beta < 1:
      raise base.InputError(f"adacore: {name}={beta} must be in [0, 1).")
  if not 0 <= epsilon < np.inf:
    raise base.InputError(f"adacore: epsilon={epsilon} must be at least 0, and finite.")


def check_epochs(where: str, refresh_every: int, warmup_epochs: int = 0) -> None:
  """Raises InputError unless both are numbers of epochs."""
  if refresh_every < 1 or warmup_epochs < 0:
    raise base.InputError(
      f"{where}: refresh_every={refresh_every} must be at least 1, warmup_epochs="
      f"{warmup_epochs} at least 0."
    )

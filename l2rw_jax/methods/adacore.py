r"""AdaCore: training on a weighted subset whose gradient is close to the full one.

After every R passes over the current subset, the method computes the gradients of the
whole training set. It then selects r of the N examples, on which it trains until the
next selection:

    g_i    gradient of example i's loss with respect to its logits, [C]
    D      diagonal of the loss's Hessian with respect to the logits (Hutchinson)
    m      <- b1 m + (1 - b1) g,        g~ = m / (1 - b1^t)
    u      <- b2 u + (1 - b2) D^2,      H~ = (sqrt(u / (1 - b2^t)))^k + eps
    q_i    = g~_i / H~
    S      minimizes sum_i min_{j in S} |q_i - q_j|, greedily, class by class
    gamma_j = the number of examples of j's class whose nearest chosen example is j;
           these numbers sum to N

Here t is the number of selections, including the current one; b1, b2, k and eps are
settings of `adacore`.

A batch of B of the chosen examples gets the weights gamma r / (N B), so that the
expected gradient is sum_{j in S} gamma_j grad l_j / N, an estimate of the mean gradient
of all N examples. CRAIG's script for deep networks does the same (it scales gamma to
mean 1 and then takes the batch mean). CRAIG's script for logistic regression uses gamma
without scaling, so its step is N / r times as large.

CRAIG is the special case H = 1 without averages: `curvature=False`.

Relation to the paper: no official code is public. The paper's abstract specifies
weighted subsets chosen by gradients preconditioned with the Hessian, and exponential
averages of gradients and curvature. The distances, the selection within each class and
the cluster sizes are CRAIG's; the equations of the averages and the defaults of b1, b2,
k and eps are those of AdaHessian's released code. Averaging over selections
(not steps) and the choice of Hessians (`hessian_scope`) are decisions of this library.

References:
  Pooladzandi, Davini, Mirzasoleiman, "Adaptive Second Order Coresets for
  Data-efficient Machine Learning", ICML 2022, arXiv:2207.13887.
  Mirzasoleiman, Bilmes, Leskovec, "Coresets for Data-efficient Training of Machine
  Learning Models", ICML 2020 (CRAIG).
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2rw_jax import base
from l2rw_jax import coresets
from l2rw_jax import inference
from l2rw_jax import losses
from l2rw_jax import weighted_update

# The Hessian of the mean loss, or of the loss of each example.
SCOPES = ("shared", "example")
_BATCH_SIZE = 1000


def gradient_proxies(logits: base.Array, labels: base.Array) -> base.Array:
  """d cross-entropy / d logits [n, C], which is softmax(z) - onehot(y).

  For a single logit, [n, 1], it is sigmoid(z) - y.

  Args:
    logits: z, [n, C].
    labels: y, integers [n]. A label that is not a class gives NaN.

  Raises:
    InputError: the shapes or types do not match.
  """
  losses.check_logits(logits, labels)
  is_label = losses.label_mask(labels, max(logits.shape[1], 2))
  if logits.shape[1] == 1:
    target, probabilities = is_label[:, 1:], jax.nn.sigmoid(logits)
  else:
    target, probabilities = is_label, jax.nn.softmax(logits, axis=1)
  scale = losses.label_scale(is_label).astype(probabilities.dtype)
  return (probabilities - target.astype(probabilities.dtype)) * scale[:, None]


def hessian_diagonal(
  key: base.Array,
  loss: Callable[[base.PyTree], base.Array],
  point: base.PyTree,
  num_probes: int = 1,
) -> base.PyTree:
  """Hutchinson's unbiased estimate of the diagonal of the Hessian, E[v * (H v)].

  The estimator is `optax.contrib.hutchinson_estimator_diag_hessian`.

  Args:
    key: a typed PRNG key.
    loss: `point -> scalar`.
    point: the argument of `loss` at which the Hessian is computed; a pytree.
    num_probes: number of random sign vectors v to average over, each of which costs one
      Hessian-vector product.

  Returns:
    The diagonal, shaped like `point`.

  Raises:
    InputError: `num_probes` is not a positive integer.
  """
  num_probes = base.check_integer("num_probes", num_probes)

  def probe(key):
    estimator = optax.contrib.hutchinson_estimator_diag_hessian(key)
    return estimator.update(point, estimator.init(point), point, obj_fn=loss)[0]

  estimates = jax.vmap(probe)(jax.random.split(key, num_probes))
  return jax.tree.map(lambda x: x.mean(axis=0), estimates)


class LossDerivatives(NamedTuple):
  """Derivatives of the loss of all N training examples.

  Attributes:
    gradients: gradients of the losses with respect to the logits, [N, C].
    curvature: diagonal of the Hessian, or None. For the scope "example", it is the
      Hessian of each loss with respect to the logits, [N, C]. For the scope "shared",
      it is the Hessian of the mean loss with respect to the last layer's bias, [C], or
      to its weights and bias, [C, d + 1].
    features: inputs of the last layer, [N, d], or None.
  """

  gradients: base.Array
  curvature: base.Array | None
  features: base.Array | None


def loss_derivatives(
  problem: base.Problem,
  view: base.EpochView,
  key: base.Array,
  *,
  scope: str | None,
  last_layer: bool,
  num_probes: int,
) -> LossDerivatives:
  """Derivatives of the losses, from one evaluation-mode pass over the training set.

  With several processes, each of them computes some of the batches that a single
  process would use, so that the results are the same as with a single process.

  Args:
    problem: the learning problem.
    view: parameters and training set.
    key: PRNG key for the random signs of Hutchinson's estimate.
    scope: scope of the curvature, one of `SCOPES`; None computes no curvature.
    last_layer: whether to return features, and to include the last layer's weights in
      the shared curvature.
    num_probes: number of random vectors of Hutchinson's estimate.

  Raises:
    InputError: `last_layer` is True, but the network has no features.
  """
  if last_layer:
    num_features(problem)
  functions: tuple[Any, ...] = (problem.forward, problem.loss)
  if last_layer:
    functions += (problem.features, problem.head)
  rows = np.arange(problem.num_examples)

  def batch_derivatives(batch):
    start = batch.pop("row")[0]
    derivatives = _batch_derivatives(
      functions,
      view.params,
      view.model_state,
      batch,
      # The Hessian of the mean is a sum over batches, which all use the same signs.
      jax.random.fold_in(key, start) if scope == "example" else key,
      num_outputs=problem.num_classes,
      scope=scope,
      num_probes=num_probes,
    )
    if scope == "shared":
      return derivatives._replace(curvature=derivatives.curvature[None])
    return derivatives

  derivatives = inference.map_batches(
    batch_derivatives, {**view.train, "row": rows}, _BATCH_SIZE, by_process=True
  )
  derivatives = jax.tree.map(jnp.asarray, derivatives)
  if scope == "shared":
    total = derivatives.curvature.sum(axis=0)
    derivatives = derivatives._replace(curvature=total / problem.num_examples)
  return derivatives


def num_features(problem: base.Problem) -> int:
  """Input width d of the last layer; raises InputError if there are no features."""
  if problem.num_features is None:
    raise base.InputError(
      "adacore: last_layer=True needs a network with features; leave last_layer out."
    )
  return problem.num_features


@functools.partial(
  jax.jit, static_argnames=("functions", "num_outputs", "scope", "num_probes")
)
def _batch_derivatives(
  functions, params, model_state, batch, key, *, num_outputs, scope, num_probes
):
  """`LossDerivatives` of a batch, with curvature of the summed loss if "shared"."""
  forward, loss, *split_functions = functions
  unused_key = jax.random.key(0)
  features: Any = None
  if split_functions:
    features_fn, head = split_functions
    features, _ = features_fn(params, model_state, batch, unused_key, False)
    logits = head(params, features)
  else:
    outputs, _ = forward(params, model_state, batch, unused_key, False)
    logits = losses.logits_of(outputs)
  width = logits.shape[1]

  def total_loss(padded):
    return loss(padded[:, :width], batch).sum()

  # A binary classifier may have one logit; the second one added here has no effect.
  dtype = base.accumulator_dtype(logits.dtype)
  logits = jnp.pad(logits.astype(dtype), ((0, 0), (0, num_outputs - width)))
  curvature: Any = None
  if scope == "example":
    curvature = hessian_diagonal(key, total_loss, logits, num_probes)
  elif scope == "shared" and features is None:
    zeros = jnp.zeros(num_outputs, dtype)
    curvature = hessian_diagonal(
      key, lambda b: total_loss(logits + b[None, :]), zeros, num_probes
    )
  elif scope == "shared":
    inputs = jnp.pad(features.astype(dtype), ((0, 0), (0, 1)), constant_values=1)
    zeros = jnp.zeros((num_outputs, inputs.shape[1]), dtype)
    curvature = hessian_diagonal(
      key, lambda w: total_loss(logits + inputs @ w.T), zeros, num_probes
    )
  return LossDerivatives(jax.grad(total_loss)(logits), curvature, features)


class Averages(NamedTuple):
  """Exponential averages without bias correction.

  Attributes:
    gradients: m.
    squares: u, of the squared curvature.
    num_updates: t, the number of updates so far, int32 scalar.
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
  # Squares of small numbers vanish in float16.
  gradients = jnp.asarray(gradients).astype(averages.gradients.dtype)
  curvature = jnp.asarray(curvature).astype(averages.squares.dtype)
  return Averages(
    beta1 * averages.gradients + (1 - beta1) * gradients,
    beta2 * averages.squares + (1 - beta2) * curvature**2,
    averages.num_updates + 1,
  )


def bias_corrected(
  averages: Averages,
  beta1: float = 0.9,
  beta2: float = 0.999,
  power: float = 1.0,
  epsilon: float = 1e-4,
) -> tuple[base.Array, base.Array]:
  """(g~, H~) from averages that were updated at least once.

  Args:
    averages: m, u and t.
    beta1: decay rate of the gradients.
    beta2: decay rate of the squared curvature.
    power: k; 0 disables the curvature.
    epsilon: added to the curvature.
  """
  num_updates = averages.num_updates.astype(averages.gradients.dtype)
  gradients = averages.gradients / _one_minus_power(beta1, num_updates)
  mean_square = averages.squares / _one_minus_power(beta2, num_updates)
  return gradients, jnp.sqrt(mean_square) ** power + epsilon


def _one_minus_power(beta, num_updates):
  """1 - beta^t without cancellation: in float32, 1 - 0.99999999 would be 0."""
  if isinstance(beta, jax.Array):
    return -jnp.expm1(num_updates * jnp.log(beta))
  # The logarithm in float32 would be 0 for 0.99999999.
  return -jnp.expm1(num_updates * (math.log(beta) if beta else -math.inf))


class State(NamedTuple):
  """State of the methods in this file; arrays of fixed shape.

  Attributes:
    rows: rows of the subset, int32 [r]; not used before the first selection.
    weights: weights of every example, [N], in units in which the uniform weight is 1:
      gamma r / N in the subset and 0 outside. Before the first selection, and in
      `random_subset`, all are 1.
    num_selections: number of selections so far, int32 scalar.
    averages: averages of gradients [N, C] and squared curvature; None for CRAIG and
      `random_subset`.
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

  One epoch of the loop consists of R passes over the r chosen examples, from one
  selection to the next.

  With one Hessian for all examples ("shared"), the vectors q_i are CRAIG's in rescaled
  coordinates. With one Hessian per example, H is p (1 - p) for cross-entropy. Where the
  network is certain, |q| is therefore about 1 for any small gradient, unless epsilon
  dominates H.

  Args:
    fraction: r / N, in (0, 1].
    refresh_every: R, passes over the subset from one selection to the next.
    curvature: whether gradients are averaged and preconditioned.
    hessian_scope: "shared", the Hessian of the mean loss with respect to the last
      layer's bias (with `last_layer` also its weights), or "example", the Hessian of
      each example's loss with respect to its logits.
    num_probes: number of random vectors of Hutchinson's estimate at each selection.
    beta1: decay rate of the average of gradients.
    beta2: decay rate of the average of squared curvature.
    power: k, exponent of the curvature.
    epsilon: added to the curvature.
    last_layer: whether distances are between gradients of the last layer's weights
      and bias. In this case only the gradients of the logits are averaged. This option
      requires a network with features and excludes `hessian_scope="example"`.
    budget: how the r examples are divided among classes, see `coresets.class_budgets`.
    greedy: "lazy" or "stochastic", see `coresets.select`.
    greedy_epsilon: epsilon of the stochastic greedy algorithm.
    warmup_epochs: number of passes over all examples before the first selection.

  Returns:
    A `base.Method`.

  Raises:
    InputError: a setting is out of range; when training begins, `last_layer` is True,
      but the network has no features; at a selection, see `coresets.select`.
  """
  check_fraction("adacore", fraction)
  check_epochs("adacore", refresh_every, warmup_epochs)
  coresets.check_greedy(greedy, greedy_epsilon)
  _check_averages(num_probes, beta1, beta2, epsilon)
  scopes = SCOPES[: 1 if last_layer else None]
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
        squares = (problem.num_classes, num_features(problem) + 1)
      averages = Averages(
        jnp.zeros(shape), jnp.zeros(squares), jnp.zeros((), jnp.int32)
      )
    return State(
      jnp.arange(subset_size(fraction, problem.num_examples), dtype=jnp.int32),
      jnp.ones(problem.num_examples, jnp.float32),
      jnp.zeros((), jnp.int32),
      averages,
    )

  def refresh(state, problem, view):
    if view.epoch < warmup_epochs:
      return state
    key = jax.random.key(int(view.rng.integers(2**31)))
    scope = hessian_scope if curvature else None
    derivatives = loss_derivatives(
      problem, view, key, scope=scope, last_layer=last_layer, num_probes=num_probes
    )
    proxies, scale, averages = derivatives.gradients, None, None
    if derivatives.curvature is not None:
      averages = update_averages(
        state.averages, derivatives.gradients, derivatives.curvature, beta1, beta2
      )
      proxies, scale = bias_corrected(averages, beta1, beta2, power, epsilon)
      if not last_layer:
        proxies, scale = proxies / jnp.broadcast_to(scale, proxies.shape), None
    chosen = coresets.select(
      proxies,
      view.train["label"],
      state.rows.size,
      features=derivatives.features,
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
  """Training on a random subset of the data, with equal weights.

  With a new subset for every pass, this is stochastic gradient descent on all the data.

  Args:
    fraction: size of the subset divided by that of the training set, in (0, 1].
    refresh_every: number of passes over the subset from one draw to the next; None
      keeps the first subset, and an epoch then has ceil(1 / fraction) passes.

  Raises:
    InputError: a setting is out of range.
  """
  check_fraction("random_subset", fraction)
  check_epochs("random_subset", 1 if refresh_every is None else refresh_every)

  def init(key, problem, params):
    del key, params
    size = subset_size(fraction, problem.num_examples)
    rows = jnp.arange(size, dtype=jnp.int32)
    ones = jnp.ones(problem.num_examples, jnp.float32)
    return State(rows, ones, jnp.zeros((), jnp.int32), None)

  def refresh(state, problem, view):
    if refresh_every is None and state.num_selections:
      return state
    rows = view.rng.choice(problem.num_examples, state.rows.size, replace=False)
    return state._replace(
      rows=jnp.asarray(np.sort(rows), jnp.int32),
      num_selections=state.num_selections + 1,
    )

  # 1 / (1 / 49) is slightly more than 49.
  return _method(
    init, refresh, refresh_every or math.ceil((1 - 1e-9) / float(fraction))
  )


def _method(init, refresh, num_passes):
  def sample(state, problem, train, rng):
    if not state.num_selections:
      return base.permutation(state, problem, train, rng)
    rows = np.asarray(state.rows)
    return np.concatenate([rng.permutation(rows) for _ in range(num_passes)])

  def gradients(state, problem, inputs):
    def weights(losses):
      size = base.global_size(losses.shape[0], problem.axis_name)
      index = base.entry(inputs.batch, "index", "adacore or random_subset")
      batch_weights = base.take(state.weights, index)
      return batch_weights.astype(losses.dtype) / size

    return weighted_update.weighted_gradients(problem, inputs, weights), state

  return base.Method(gradients, init=init, refresh=refresh, sample=sample)


def subset_size(fraction: float, num_examples: int) -> int:
  """r, the size of the subset: the fraction of N, rounded, at least 1."""
  return max(1, round(float(fraction) * num_examples))


def check_fraction(where: str, fraction: float) -> None:
  """Raises InputError unless `fraction` is in (0, 1]."""
  if not 0 < fraction <= 1:
    raise base.InputError(
      f"{where}: fraction={fraction} must be above 0 and at most 1, such as 0.1."
    )


def _check_averages(
  num_probes: int, beta1: float, beta2: float, epsilon: float
) -> None:
  base.check_integer("adacore: num_probes", num_probes)
  for name, beta in (("beta1", beta1), ("beta2", beta2)):
    if not 0 <= beta < 1:
      raise base.InputError(f"adacore: {name}={beta} must be in [0, 1).")
  if not 0 <= epsilon < np.inf:
    raise base.InputError(f"adacore: epsilon={epsilon} must be at least 0, and finite.")


def check_epochs(where: str, refresh_every: int, warmup_epochs: int = 0) -> None:
  """Raises InputError unless both are integers, the first >= 1 and the second >= 0."""
  base.check_integer(f"{where}: refresh_every", refresh_every)
  base.check_integer(f"{where}: warmup_epochs", warmup_epochs, 0)

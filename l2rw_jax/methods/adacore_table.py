"""What AdaCore asks a network about every training example: gradients, curvature."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2rw_jax import base
from l2rw_jax import losses

# Whose Hessian: of the mean loss, or of each example's own.
SCOPES = ("shared", "example")
_BATCH = 1000


def hessian_diagonal(
  key: base.Array,
  loss: Callable[[base.PyTree], base.Array],
  point: base.PyTree,
  num_probes: int = 1,
) -> base.PyTree:
  """Hutchinson's unbiased estimate of the Hessian's diagonal, E[v * (H v)].

  The estimator is `optax.contrib.hutchinson_estimator_diag_hessian`.

  Args:
    key: a typed PRNG key.
    loss: `point -> scalar`.
    point: where; a pytree.
    num_probes: random signs v to average over, a Hessian-vector product each.

  Returns:
    Shaped like `point`.
  """

  def probe(key):
    estimator = optax.contrib.hutchinson_estimator_diag_hessian(key)
    return estimator.update(point, estimator.init(point), point, obj_fn=loss)[0]

  found = jax.vmap(probe)(jax.random.split(key, num_probes))
  return jax.tree.map(lambda x: x.mean(axis=0), found)


class Table(NamedTuple):
  """Of all N training examples.

  Attributes:
    gradients: of the loss with respect to the logits, [N, C].
    curvature: diagonal of the Hessian, or None. Of scope "example" with respect to
      the logits, [N, C]; of scope "shared", of the mean loss, with respect to the
      last layer's bias, [C], or to its weights and bias, [C, d + 1].
    features: what the last layer sees, [N, d], or None.
  """

  gradients: base.Array
  curvature: base.Array | None
  features: base.Array | None


def look(
  problem: base.Problem,
  view: base.EpochView,
  key: base.Array,
  *,
  scope: str | None,
  last_layer: bool,
  num_probes: int,
) -> Table:
  """One pass over the training set in evaluation mode.

  Args:
    task: the learning problem.
    view: parameters and training set.
    key: of Hutchinson's signs.
    scope: of the curvature, one of `SCOPES`; None for none.
    last_layer: whether to look at the features and the last layer's weights too.
    num_probes: of Hutchinson's estimate.

  Raises:
    InputError: `last_layer` of a network that has no features.
  """
  if last_layer:
    num_features(problem)
  functions: tuple[Any, ...] = (problem.forward, problem.loss)
  if last_layer:
    functions += (problem.features, problem.head)
  parts = []
  for start in range(0, problem.num_examples, _BATCH):
    batch = {k: v[start : start + _BATCH] for k, v in view.train.items()}
    # The Hessian of the mean is a sum over batches: the same signs for all of them.
    own_key = jax.random.fold_in(key, start) if scope == "example" else key
    parts.append(
      _look_at_batch(
        functions,
        view.params,
        view.model_state,
        batch,
        own_key,
        num_outputs=problem.num_classes,
        scope=scope,
        num_probes=num_probes,
      )
    )
  gradients, curvatures, features = zip(*parts, strict=True)
  curvature = None
  if scope == "shared":
    curvature = sum(curvatures) / problem.num_examples
  elif scope == "example":
    curvature = jnp.concatenate(curvatures)
  return Table(
    jnp.concatenate(gradients),
    curvature,
    jnp.concatenate(features) if last_layer else None,
  )


def num_features(problem: base.Problem) -> int:
  """Width d of what the last layer sees; raises InputError if there is no such."""
  if problem.num_features is None:
    raise base.InputError(
      "adacore: last_layer=True needs a network with features; leave it out."
    )
  return problem.num_features


@functools.partial(
  jax.jit, static_argnames=("functions", "num_outputs", "scope", "num_probes")
)
def _look_at_batch(
  functions, params, model_state, batch, key, *, num_outputs, scope, num_probes
):
  forward, loss, *of_last_layer = functions
  unused = jax.random.key(0)
  features: Any = None
  if of_last_layer:
    features_of, head = of_last_layer
    features, _ = features_of(params, model_state, batch, unused, False)
    logits = head(params, features)
  else:
    outputs, _ = forward(params, model_state, batch, unused, False)
    logits = losses.logits_of(outputs)
  width = logits.shape[1]

  def total(padded):
    return loss(padded[:, :width], batch).sum()

  # A binary classifier may have one logit: a second one, that does nothing.
  logits = jnp.pad(logits, ((0, 0), (0, num_outputs - width)))
  curvature: Any = None
  if scope == "example":
    curvature = hessian_diagonal(key, total, logits, num_probes)
  elif scope == "shared" and features is None:
    none = jnp.zeros(num_outputs)
    curvature = hessian_diagonal(
      key, lambda b: total(logits + b[None, :]), none, num_probes
    )
  elif scope == "shared":
    seen = jnp.pad(features, ((0, 0), (0, 1)), constant_values=1)
    none = jnp.zeros((num_outputs, seen.shape[1]))
    curvature = hessian_diagonal(
      key, lambda w: total(logits + seen @ w.T), none, num_probes
    )
  return jax.grad(total)(logits), curvature, features

"""Directional derivatives along a part of the parameters.

The score of an example is a sum over layers, <grad l_i, v> = sum_p <grad_p l_i, v_p>.
`restricted` keeps only the terms of some layers. This approximates the score, and
reduces the cost of `directional` to the cost of these layers. Losses and weighted
gradients are those of the whole network.
"""

from collections.abc import Callable, Sequence, Sized
import numbers
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.linearization import ghost_products
from l2rw_jax.linearization import parameter_uses
from l2rw_jax.linearization import trainable

# A share of the cost, names of layers, or a predicate on paths; see `restricted`.
Layers: TypeAlias = float | str | Sequence[str] | Callable[[str], bool]


def check(layers: Layers | None) -> None:
  """Raises InputError unless `layers` is None or has a form that `restricted` takes."""
  if layers is None or callable(layers):
    return
  given: Any = layers
  if isinstance(given, numbers.Real):
    is_valid = not isinstance(given, bool) and 0 < float(given) <= 1
  else:
    # An iterator would be used up here, and a scalar array is not iterable.
    is_sized = isinstance(given, Sized) and getattr(given, "shape", None) != ()
    names = [given] if isinstance(given, str) else list(given) if is_sized else []
    is_valid = bool(names) and all(isinstance(n, str) and n for n in names)
  if is_valid:
    return
  raise base.InputError(
    f"layers={layers!r}: must be a share of the cost in (0, 1], names of layers, a"
    " predicate on paths, or None for all."
  )


def restricted(
  linearize: Callable[..., base.Linearized], layers: Layers | None
) -> Callable[..., base.Linearized]:
  """Returns `linearize` with a `directional` that uses only some of the parameters.

  Args:
    linearize: `linearization.linearize`, or the `linearize` of a `base.Problem`.
    layers: the parameters to use, in one of these forms. A number in (0, 1] is a share
      of the FLOPs of `directional`. It selects the last layers, as many as fit into
      this share, and needs a model to which the layerwise engine applies and which
      uses no parameters in a loop or under `jax.checkpoint`. A parameter that costs
      less than half of the parameter that is used before it, such as a bias, is
      selected only together with it. A string or a list of strings selects the
      parameters whose path has such a name among its components ("Dense_2",
      "block_3/qkv"). A function takes a path, such as "params/Dense_2/kernel", and
      returns whether the parameter is used. None selects all parameters; the result is
      then `linearize` itself.

  Returns:
    A function of the arguments of `linearize` that returns a `base.Linearized`. The
    cost of its `directional` is lower with the engines "layerwise" and "forward".

  Raises:
    InputError: `layers` has an unsupported form. When the returned function is called:
      `layers` selects no parameter or contains an unknown name, or the model does not
      support a share.

  Example:
    >>> import jax.numpy as jnp
    >>> from l2rw_jax import linearization
    >>> losses_fn = lambda p, x: x @ p["a"] + 2 * x @ p["b"]
    >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    >>> linearize_b = restricted(linearization.linearize, "b")
    >>> print(linearize_b(losses_fn, params, jnp.eye(2)).directional(params))
    [2. 2.]
  """
  check(layers)
  if layers is None:
    return linearize
  chosen: Any = layers

  def linearize_restricted(
    losses_fn, params, batch, *, has_aux=False, direction=None, **options
  ):
    # Do not pass `direction`: the first pass would compute the derivative along all
    # parameters, which is the cost that this function avoids.
    del direction
    linearized = linearize(losses_fn, params, batch, has_aux=has_aux, **options)
    partition = trainable.Partition(params)
    if isinstance(chosen, numbers.Real):
      is_used = _last(chosen, losses_fn, params, batch, has_aux)
    else:
      is_used = _named(chosen, partition.names)

    def directional(vector):
      leaves = partition.leaves(vector)
      zeros = [jnp.zeros_like(x) for x in leaves]
      used = [x for x, keep in zip(leaves, is_used, strict=True) if keep]

      def along(used):
        remaining = iter(used)
        pairs = zip(zeros, is_used, strict=True)
        moved = [next(remaining) if keep else x for x, keep in pairs]
        return linearized.directional(partition.combine_gradient(moved))

      if linearized.engine not in ("layerwise", "forward"):
        return along(used)
      # `along` is linear, so this derivative equals `along(used)`. Unlike that call, it
      # skips the operations that do not depend on `used`.
      at = [jnp.zeros_like(x) for x in used]
      return jax.jvp(along, (at,), (used,))[1]

    return linearized._replace(directional=directional)

  return linearize_restricted


def _named(layers, names):
  """Whether each path is selected by a predicate or by names."""
  if callable(layers):
    is_used = [bool(layers(name)) for name in names]
  else:
    wanted = [layers] if isinstance(layers, str) else layers
    padded = [f"/{name}/" for name in names]
    for layer in wanted:
      if not any(f"/{layer}/" in name for name in padded):
        raise base.InputError(
          f"layers: no parameter has {layer!r} among the components of its path; the"
          f" paths are {_listed(names)}."
        )
    is_used = [any(f"/{layer}/" in name for layer in wanted) for name in padded]
  if not any(is_used):
    raise base.InputError(
      f"layers selects no parameter; the paths are {_listed(names)}."
    )
  return is_used


def _listed(names):
  """Paths for an error message; the path of params itself is empty."""
  return ", ".join(name or "params (a single array)" for name in names)


def _last(share, losses_fn, params, batch, has_aux):
  """Whether each trainable leaf is in one of the last layers that fit the share."""
  partition = trainable.Partition(params)

  def losses_of(leaves, batch):
    result = losses_fn(partition.combine(leaves), batch)
    return base.losses_and_aux("losses_fn", result, has_aux)

  leaves = partition.leaves(params)
  try:
    plan, *_ = parameter_uses.trace(losses_of, leaves, batch, partition.names)
    uses = ghost_products.uses_of(plan)
  except parameter_uses.NotLayerwiseError as error:
    raise base.InputError(
      f"layers={share}: the cost of this model's layers is not known"
      f" ({error}). Name the layers instead."
    ) from error
  costs, last_use = [0] * len(leaves), [-1] * len(leaves)
  for position, step in enumerate(uses):
    for index in step.param_inputs:
      # With weight normalization, a kernel is computed from two parameters.
      sources = plan.sources(step.inputs[index].place)
      for leaf in sources:
        last_use[leaf] = position
      if sources:
        costs[max(sources, key=lambda leaf: leaves[leaf].size)] += parameter_uses.flops(
          step.eqn
        )
  order = sorted(range(len(leaves)), key=lambda leaf: (-last_use[leaf], costs[leaf]))
  # A kernel and its bias form a layer. The bias alone would cost nearly nothing.
  layers: list[list[int]] = [[]]
  for index, earlier in zip(order, [*order[1:], None], strict=True):
    layers[-1].append(index)
    if earlier is not None and costs[index] >= costs[earlier] / 2:
      layers.append([])
  remaining = share * sum(costs)
  is_used = [False] * len(leaves)
  for layer in layers:
    cost = sum(costs[index] for index in layer)
    if cost > remaining:
      break
    remaining -= cost
    for index in layer:
      is_used[index] = True
  if not any(is_used):
    name = _listed([partition.names[max(layers[0], key=costs.__getitem__)]])
    raise base.InputError(
      f"layers={share}: the last layer ({name}) alone costs more than this share;"
      " raise the share, or name the layers."
    )
  return is_used

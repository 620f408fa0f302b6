"""The layerwise engine of `linearization`: one backward pass serves every weight.

A network meets its parameters a few hundred times: a product with a kernel, a
bias that is added, a row of an embedding. Call such an operation y = f(q, a), with
q made of parameters alone and a of the examples. If examples do not mix, the loss
of example i changes along a direction v of the parameters by

    (J v)_i = sum over meetings of < delta_i, (df/dq (dq/dp) v)_i >

where delta = d(sum of losses)/dy comes for all meetings from ONE backward pass that
never forms a gradient of parameters, and

    J^T w = sum over meetings of (dq/dp)^T (df/dq)^T (w_i delta_i)

Costs in forward passes of the batch beyond the first: recording 1, `directional` 1,
`weighted_gradient` 1; forward mode takes 0, 2, 2. No per-example gradient is formed,
and what is done to parameters alone (casts, reshapes, weight normalisation) is
differentiated as it stands.

It works on the jaxpr of the losses, so any framework and any way to share
parameters will do. `batch_axes` tells whether examples mix. What is refused beside
that: `jax.custom_vjp` (its backward rule is not followed), `jax.checkpoint` (which the
recording would undo), loops over data.
"""

from collections.abc import Callable, Sequence
import enum
from typing import Any, NamedTuple

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax import batch_axes


class NotLayerwiseError(base.InputError):
  """The losses cannot be taken apart layer by layer; the message says why."""


class _Kind(enum.IntEnum):
  """What a value is made of."""

  CONSTANT = 0
  OWN = 1  # of parameters, and constants
  DATA = 2  # of examples


class _Known(NamedTuple):
  """A value before it is computed: its place in the environment, if it has one."""

  place: int | None
  literal: Any
  kind: _Kind
  # The examples' axis, or why it cannot be told: an error if the losses need it.
  axis: Any = None
  # The leaf of the parameters that went into it last.
  leaf: int | None = None


class _Step(NamedTuple):
  """One operation.

  Attributes:
    eqn: of the jaxpr.
    inputs: its arguments.
    outputs: places of its results.
    kind: of its results.
    own: which arguments are made of parameters, where examples meet them.
    found: which results are then differentiable, and their batch axes.
  """

  eqn: Any
  inputs: list[_Known]
  outputs: list[int]
  kind: _Kind
  own: list[int]
  found: list[tuple[int, int]]


class _Plan:
  """A jaxpr with its calls written out, and what every value in it is made of."""

  def __init__(self, names: Sequence[str]):
    """Empty, with the names of the leaves of the parameters."""
    self.steps: list[_Step] = []
    self._names = names
    self._size = 0

  def place(self, kind: _Kind, axis: Any = None, leaf: int | None = None) -> _Known:
    """Room for one more value."""
    self._size += 1
    return _Known(self._size - 1, None, kind, axis, leaf)

  def add(self, jaxpr: Any, consts: list[_Known], args: list[_Known]) -> list[_Known]:
    """Appends the operations of a jaxpr; returns its results."""
    found = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom):
      if isinstance(atom, jax_core.Literal):
        return _Known(None, atom.val, _Kind.CONSTANT)
      return found[atom]

    for eqn in jaxpr.eqns:
      results = self._add_eqn(eqn, [read(v) for v in eqn.invars])
      found |= dict(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def _add_eqn(self, eqn, inputs):
    kind = max((known.kind for known in inputs), default=_Kind.CONSTANT)
    if kind == _Kind.DATA:
      call = batch_axes.inlined(eqn)
      if call is not None:
        jaxpr, consts = call
        literals = [_Known(None, c, _Kind.CONSTANT) for c in consts]
        return self.add(jaxpr, literals, inputs)
      return self._add_data(eqn, inputs)
    why = self._refused(eqn, inputs) if kind == _Kind.OWN else None
    leaf = _last_leaf(inputs)
    results = [self.place(kind, why, leaf) for _ in eqn.outvars]
    self._append(eqn, inputs, results, kind)
    return results

  def _add_data(self, eqn, inputs):
    axes = self._axes(eqn, inputs)
    leaf = _last_leaf(inputs)
    results = [self.place(_Kind.DATA, axis, leaf) for axis in axes]
    found = [
      (i, axis)
      for i, axis in enumerate(axes)
      if isinstance(axis, int) and _inexact(eqn.outvars[i])
    ]
    own = [
      i
      for i, (known, atom) in enumerate(zip(inputs, eqn.invars, strict=True))
      if known.kind == _Kind.OWN and _inexact(atom)
    ]
    self._append(eqn, inputs, results, _Kind.DATA, own if found else (), found)
    return results

  def _axes(self, eqn, inputs):
    """The batch axes of what an operation returns, or why they are not known."""
    for known in inputs:
      if isinstance(known.axis, NotLayerwiseError):
        return [known.axis] * len(eqn.outvars)
    try:
      axes = batch_axes.propagate(eqn, [known.axis for known in inputs])
    except batch_axes.MixedError as error:
      return [self._error(str(error), eqn, inputs)] * len(eqn.outvars)
    if None in axes:
      why = self._error(f"{eqn.primitive.name} hides a constant", eqn, inputs)
      return [why] * len(eqn.outvars)
    if any(known.kind == _Kind.OWN for known in inputs):
      why = self._refused(eqn, inputs)
      return axes if why is None else [why] * len(eqn.outvars)
    return axes

  def _refused(self, eqn, inputs):
    """Why the derivative of an operation in parameters cannot be had, if so."""
    for known in inputs:
      if isinstance(known.axis, NotLayerwiseError):
        return known.axis
    if _has_custom_vjp(eqn):
      return self._error("a jax.custom_vjp takes parameters", eqn, inputs)
    return None

  def _error(self, what, eqn, inputs):
    scope, leaf = str(eqn.source_info.name_stack), _last_leaf(inputs)
    where = [f"in {scope}"] if scope else []
    where += [f"after parameter {self._names[leaf]}"] if leaf is not None else []
    return NotLayerwiseError(f"{what} ({', '.join(where)})" if where else what)

  def _append(self, eqn, inputs, results, kind, own=(), found=()):
    places = [known.place for known in results]
    self.steps.append(_Step(eqn, inputs, places, kind, list(own), list(found)))

  def run(self, kind: _Kind, env: dict[int, Any], nudges: Any = None) -> None:
    """Computes the values of one kind into `env`, those of lower kinds being there.

    Args:
      kind: which steps to take.
      env: values by place.
      nudges: added to the differentiable results of each meeting.
    """
    nudges = iter(nudges or ())
    for step in self.steps:
      if step.kind == kind:
        results = _bind(step.eqn, [_value(known, env) for known in step.inputs])
        if step.own and kind == _Kind.DATA:
          for (i, _), nudge in zip(step.found, next(nudges), strict=True):
            results[i] = results[i] + nudge
        env.update(zip(step.outputs, results, strict=True))

  def meetings(self) -> list[_Step]:
    """The steps where examples meet parameters."""
    return [step for step in self.steps if step.kind == _Kind.DATA and step.own]


def linearize(
  losses_fn: Callable[[list[base.Array], Any], tuple[base.Array, Any]],
  leaves: list[base.Array],
  batch: Any,
  names: Sequence[str],
) -> tuple[base.Array, Callable[..., Any], Callable[..., Any], Any]:
  """Linearises losses in the leaves of the parameters; `linearization` wraps it.

  Args:
    losses_fn: `(leaves, batch) -> (losses [B], aux)`.
    leaves: inexact arrays.
    batch: pytree; arrays whose first axis is B hold the examples.
    names: of the leaves, for messages.

  Returns:
    losses [B]; directional, `list like leaves -> [B]`; weighted_gradient,
    `[B] -> list like leaves`; aux.

  Raises:
    NotLayerwiseError: examples mix on the way to the losses, or may do so; what is
      mixed for aux alone is no matter.
  """
  plan, env, outputs, tree = _plan(losses_fn, leaves, batch, names)
  meetings = plan.meetings()
  own_places = [[step.inputs[i].place for i in step.own] for step in meetings]

  def own(leaves):
    """What meets the examples, of parameters alone."""
    now = env | dict(enumerate(leaves))
    plan.run(_Kind.OWN, now)
    return [[now[place] for place in places] for places in own_places]

  def outcome(nudges):
    now = env | dict(enumerate(leaves))
    plan.run(_Kind.OWN, now)
    plan.run(_Kind.DATA, now, nudges)
    losses, *aux = [_value(known, now) for known in outputs]
    return losses, (now, aux)

  zeros = [[_zero(step, i) for i, _ in step.found] for step in meetings]
  losses, pull, (now, aux) = jax.vjp(outcome, zeros, has_aux=True)
  (deltas,) = pull(jnp.ones_like(losses))

  def met(step):
    values = [_value(known, now) for known in step.inputs]

    def apply(*parameters):
      given = dict(zip(step.own, parameters, strict=True))
      results = _bind(step.eqn, [given.get(i, x) for i, x in enumerate(values)])
      return [results[i] for i, _ in step.found]

    return apply, [values[i] for i in step.own]

  def directional(vector):
    _, slopes = jax.jvp(own, (leaves,), (vector,))
    parts = []
    for step, slope, delta in zip(meetings, slopes, deltas, strict=True):
      apply, parameters = met(step)
      _, changes = jax.jvp(apply, tuple(parameters), tuple(slope))
      for (_, axis), change, d in zip(step.found, changes, delta, strict=True):
        others = tuple(i for i in range(d.ndim) if i != axis)
        parts.append(jnp.sum((change * d).astype(losses.dtype), others))
    # Stacked, because a chain of sums is cheap enough for XLA to be repeated for
    # every element of what the weights made of it are multiplied with.
    ones = jnp.ones(len(parts), losses.dtype)
    return jnp.matmul(ones, jnp.stack(parts), precision="highest")

  def weighted_gradient(weights):
    cotangents = []
    for step, delta in zip(meetings, deltas, strict=True):
      apply, parameters = met(step)
      weighted = [
        d * jnp.expand_dims(weights, [i for i in range(d.ndim) if i != axis])
        for (_, axis), d in zip(step.found, delta, strict=True)
      ]
      weighted = [w.astype(d.dtype) for w, d in zip(weighted, delta, strict=True)]
      cotangents.append(list(jax.vjp(apply, *parameters)[1](weighted)))
    return jax.vjp(own, leaves)[1](cotangents)[0]

  return losses, directional, weighted_gradient, jax.tree.unflatten(tree, aux)


def _plan(losses_fn, leaves, batch, names):
  """The plan, with the constants computed and the batch put into its environment."""
  closed, shapes = jax.make_jaxpr(losses_fn, return_shape=True)(leaves, batch)
  size = shapes[0].shape[0]
  plan = _Plan(names)
  env: dict[Any, Any] = {}
  args = [plan.place(_Kind.OWN, leaf=i) for i in range(len(leaves))]
  for value in jax.tree.leaves(batch):
    is_data = jnp.shape(value)[:1] == (size,)
    args.append(plan.place(_Kind.DATA, 0) if is_data else plan.place(_Kind.CONSTANT))
    env[args[-1].place] = value
  consts = [plan.place(_Kind.CONSTANT) for _ in closed.consts]
  env.update(zip([known.place for known in consts], closed.consts, strict=True))
  outputs = plan.add(closed.jaxpr, consts, args)
  if isinstance(outputs[0].axis, NotLayerwiseError):
    raise outputs[0].axis
  if outputs[0].kind != _Kind.DATA or outputs[0].axis != 0:
    raise NotLayerwiseError("the losses are not made row by row of the batch")
  plan.run(_Kind.CONSTANT, env)
  return plan, env, outputs, jax.tree.structure(shapes[1])


def _has_custom_vjp(eqn):
  if eqn.primitive.name.startswith("custom_vjp_call"):
    return True
  inside = jax_core.jaxprs_in_params(eqn.params)
  return any(_has_custom_vjp(inner) for jaxpr in inside for inner in jaxpr.eqns)


def _last_leaf(inputs):
  """The leaf met here, else the one that examples met before."""
  known = sorted((k for k in inputs if k.leaf is not None), key=lambda k: k.kind)
  return known[0].leaf if known else None


def _inexact(atom):
  return jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def _value(known: _Known, env: dict[int, Any]) -> Any:
  return known.literal if known.place is None else env[known.place]


def _zero(step: _Step, result: int) -> base.Array:
  """What is added to a result to ask for its slope, as local to devices as that is."""
  aval = step.eqn.outvars[result].aval
  return base.varying(jnp.zeros(aval.shape, aval.dtype), aval)


def _bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
  params = eqn.primitive.get_bind_params(eqn.params)
  with eqn.ctx.manager:
    results = eqn.primitive.bind(*values, **params)
  return list(results) if eqn.primitive.multiple_results else [results]

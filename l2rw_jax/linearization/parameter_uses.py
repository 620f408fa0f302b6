"""Where the examples of a batch meet the parameters of a network.

A jaxpr with its calls written out, each value in it known as a constant, as made of
parameters alone, or as made of examples; an operation that takes both of these is a
meeting. `layerwise` records what happens there.
"""

from collections.abc import Callable, Sequence
import enum
from typing import Any, NamedTuple

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.linearization import batch_axes


class NotLayerwiseError(base.InputError):
  """The losses cannot be taken apart layer by layer; the message says why."""


class Kind(enum.IntEnum):
  """What a value is made of."""

  CONSTANT = 0
  PARAMS = 1  # of parameters, and constants
  DATA = 2  # of examples


class Known(NamedTuple):
  """A value before it is computed: its place in the environment, if it has one."""

  place: int | None
  literal: Any
  kind: Kind
  # The examples' axis, or why it cannot be told: an error if the losses need it.
  axis: Any = None
  # The leaf of the parameters that went into it last.
  leaf: int | None = None


class Step(NamedTuple):
  """One operation.

  Attributes:
    eqn: of the jaxpr.
    inputs: its arguments.
    outputs: places of its results.
    kind: of its results.
    own: which arguments are made of parameters, where examples meet them.
    found: which results are then differentiable, and their batch axes.
    refused: whether there is a derivative of it that cannot be had.
  """

  eqn: Any
  inputs: list[Known]
  outputs: list[int]
  kind: Kind
  param_inputs: list[int]
  differentiable_outputs: list[tuple[int, int]]
  refused: bool


class Plan:
  """A jaxpr with its calls written out, and what every value in it is made of."""

  def __init__(self, names: Sequence[str]):
    """Empty, with the names of the leaves of the parameters."""
    self.steps: list[Step] = []
    self._names = names
    self._size = 0

  def place(self, kind: Kind, axis: Any = None, leaf: int | None = None) -> Known:
    """Room for one more value."""
    self._size += 1
    return Known(self._size - 1, None, kind, axis, leaf)

  def add(self, jaxpr: Any, consts: list[Known], args: list[Known]) -> list[Known]:
    """Appends the operations of a jaxpr; returns its results."""
    differentiable_outputs = dict(
      zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True)
    )

    def read(atom):
      if isinstance(atom, jax_core.Literal):
        return Known(None, atom.val, Kind.CONSTANT)
      return differentiable_outputs[atom]

    for eqn in jaxpr.eqns:
      results = self._add_eqn(eqn, [read(v) for v in eqn.invars])
      differentiable_outputs |= dict(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def _add_eqn(self, eqn, inputs):
    kind = max((known.kind for known in inputs), default=Kind.CONSTANT)
    if kind == Kind.DATA:
      call = batch_axes.inlined(eqn)
      if call is not None:
        jaxpr, consts = call
        literals = [Known(None, c, Kind.CONSTANT) for c in consts]
        return self.add(jaxpr, literals, inputs)
      return self._add_data(eqn, inputs)
    why = self._refused(eqn, inputs) if kind == Kind.PARAMS else None
    leaf = _last_leaf(inputs)
    results = [self.place(kind, why, leaf) for _ in eqn.outvars]
    self._append(eqn, inputs, results, kind)
    return results

  def _add_data(self, eqn, inputs):
    axes = self._axes(eqn, inputs)
    leaf = _last_leaf(inputs)
    results = [self.place(Kind.DATA, axis, leaf) for axis in axes]
    differentiable_outputs = [
      (i, axis)
      for i, axis in enumerate(axes)
      if not isinstance(axis, NotLayerwiseError) and _inexact(eqn.outvars[i])
    ]
    param_inputs = [
      i
      for i, (known, atom) in enumerate(zip(inputs, eqn.invars, strict=True))
      if known.kind == Kind.PARAMS and _inexact(atom)
    ]
    self._append(
      eqn,
      inputs,
      results,
      Kind.DATA,
      param_inputs if differentiable_outputs else (),
      differentiable_outputs,
    )
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
    if any(known.kind == Kind.PARAMS for known in inputs):
      why = self._refused(eqn, inputs)
      if why is not None:
        return [why] * len(eqn.outvars)
    return [self._axis(axis, eqn, inputs) for axis in axes]

  def _axis(self, axis, eqn, inputs):
    """The batch axis of one result of an operation, or why it is not known."""
    if axis is None:
      return self._error(f"{eqn.primitive.name} hides a constant", eqn, inputs)
    if isinstance(axis, batch_axes.MixedError):
      return self._error(str(axis), eqn, inputs)
    return axis

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

  def _append(
    self, eqn, inputs, results, kind, param_inputs=(), differentiable_outputs=()
  ):
    places = [known.place for known in results]
    refused = any(isinstance(k.axis, NotLayerwiseError) for k in results)
    self.steps.append(
      Step(
        eqn,
        inputs,
        places,
        kind,
        list(param_inputs),
        list(differentiable_outputs),
        refused,
      )
    )

  def run(
    self,
    kind: Kind,
    env: dict[int, Any],
    perturbations: Any = None,
    refused: bool = True,
  ) -> None:
    """Computes the values of one kind into `env`, those of lower kinds being there.

    Args:
      kind: which steps to take.
      env: values by place.
      nudges: added to the differentiable results of each meeting.
      refused: whether to take steps without a derivative, which aux alone needs.
    """
    perturbations = iter(perturbations or ())
    for step in self.steps:
      if step.kind == kind and (refused or not step.refused):
        results = bind(step.eqn, [value_of(known, env) for known in step.inputs])
        if step.param_inputs:
          for (i, _), perturbation in zip(
            step.differentiable_outputs, next(perturbations), strict=True
          ):
            results[i] = results[i] + perturbation
        env.update(zip(step.outputs, results, strict=True))

  def parameter_uses(self) -> list[Step]:
    """The steps where examples meet parameters."""
    return [step for step in self.steps if step.param_inputs]


def trace(
  losses_fn: Callable[..., Any], leaves: list[base.Array], batch: Any, names: list[str]
) -> tuple[Plan, dict[int, Any], list[Known], Any]:
  """The plan of a losses function; arguments as in `layerwise.linearize`.

  Returns:
    The plan; an environment with its constants and the batch; what the function
    returns, losses first; the structure of the rest.

  Raises:
    NotLayerwiseError: the losses are not made example by example.
  """
  closed, shapes = jax.make_jaxpr(losses_fn, return_shape=True)(leaves, batch)
  size = shapes[0].shape[0]
  plan = Plan(names)
  env: dict[Any, Any] = {}
  args = [plan.place(Kind.PARAMS, leaf=i) for i in range(len(leaves))]
  for value in jax.tree.leaves(batch):
    is_data = jnp.shape(value)[:1] == (size,)
    args.append(plan.place(Kind.DATA, 0) if is_data else plan.place(Kind.CONSTANT))
    env[args[-1].place] = value
  consts = [plan.place(Kind.CONSTANT) for _ in closed.consts]
  env.update(zip([known.place for known in consts], closed.consts, strict=True))
  outputs = plan.add(closed.jaxpr, consts, args)
  if isinstance(outputs[0].axis, NotLayerwiseError):
    raise outputs[0].axis
  if outputs[0].kind != Kind.DATA or outputs[0].axis != 0:
    raise NotLayerwiseError("the losses are not made row by row of the batch")
  plan.run(Kind.CONSTANT, env)
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


def value_of(known: Known, env: dict[int, Any]) -> Any:
  """What a value is, once it is computed."""
  return known.literal if known.place is None else env[known.place]


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """What an operation makes of `values`."""
  params = eqn.primitive.get_bind_params(eqn.params)
  with eqn.ctx.manager:
    results = eqn.primitive.bind(*values, **params)
  return list(results) if eqn.primitive.multiple_results else [results]

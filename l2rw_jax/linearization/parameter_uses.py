"""The operations of a network in which examples and parameters meet.

A `Plan` is a jaxpr with inlined calls. Each of its values is a constant, or depends on
parameters alone, or depends on examples. A parameter use is an operation with inputs of
the last two kinds. The layerwise engine records the outputs of these operations.
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
  """The layerwise engine does not support the losses; the message says why."""


class Kind(enum.IntEnum):
  """What a value depends on."""

  CONSTANT = 0
  PARAMS = 1  # Parameters, and no examples.
  DATA = 2  # Examples.


class Value(NamedTuple):
  """A value of the program, before it is computed.

  Attributes:
    place: index in the environment, or None for a literal.
    literal: the value of a literal.
    kind: what it depends on.
    axis: the axis of the examples, or None.
    error: why the axis or the derivative is not known, or None. It is raised only if
      the losses depend on this value.
    leaf: index of the parameter that was used last to compute the value, or None.
  """

  place: int | None
  literal: Any
  kind: Kind
  axis: int | None = None
  error: NotLayerwiseError | None = None
  leaf: int | None = None


class Step(NamedTuple):
  """One operation.

  Attributes:
    eqn: the equation of the jaxpr.
    inputs: its inputs.
    outputs: places of its outputs.
    kind: the kind of its outputs.
    param_inputs: for a parameter use, the indices of the inputs that depend on
      parameters alone; empty for other operations.
    differentiable_outputs: (index, batch axis) of each differentiable output.
    is_refused: whether the axis or the derivative of an output is not known.
  """

  eqn: Any
  inputs: list[Value]
  outputs: list[int]
  kind: Kind
  param_inputs: list[int]
  differentiable_outputs: list[tuple[int, int]]
  is_refused: bool


class Plan:
  """A jaxpr with inlined calls, and what each of its values depends on."""

  def __init__(self, names: Sequence[str]):
    """Creates an empty plan.

    Args:
      names: names of the parameters, for error messages.
    """
    self.steps: list[Step] = []
    self._names = names
    self._size = 0

  def place(
    self,
    kind: Kind,
    axis: int | None = None,
    *,
    error: NotLayerwiseError | None = None,
    leaf: int | None = None,
  ) -> Value:
    """Adds a place to the environment and returns its value."""
    self._size += 1
    return Value(self._size - 1, None, kind, axis, error, leaf)

  def add(self, jaxpr: Any, consts: list[Value], args: list[Value]) -> list[Value]:
    """Appends the operations of a jaxpr and returns its outputs."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom):
      if isinstance(atom, jax_core.Literal):
        return Value(None, atom.val, Kind.CONSTANT)
      return values[atom]

    for eqn in jaxpr.eqns:
      outputs = self._add_eqn(eqn, [read(v) for v in eqn.invars])
      values |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def _add_eqn(self, eqn, inputs):
    kind = max((value.kind for value in inputs), default=Kind.CONSTANT)
    if kind == Kind.DATA:
      call = batch_axes.inlined(eqn)
      if call is not None:
        jaxpr, consts = call
        literals = [Value(None, c, Kind.CONSTANT) for c in consts]
        return self.add(jaxpr, literals, inputs)
      outputs = self._data_outputs(eqn, inputs)
    else:
      error = self._derivative_error(eqn, inputs) if kind == Kind.PARAMS else None
      leaf = _last_leaf(inputs)
      outputs = [self.place(kind, error=error, leaf=leaf) for _ in eqn.outvars]
    self._append(eqn, inputs, outputs, kind)
    return outputs

  def _data_outputs(self, eqn, inputs):
    """Places for the outputs of an operation on examples."""
    error = _first_error(inputs)
    axes: list[Any] = [None] * len(eqn.outvars)
    if error is None:
      try:
        axes = batch_axes.propagate(eqn, [value.axis for value in inputs])
      except batch_axes.MixedError as mixed:
        error = self._error(str(mixed), eqn, inputs)
    if error is None and any(value.kind == Kind.PARAMS for value in inputs):
      error = self._derivative_error(eqn, inputs)
    return [self._data_output(axis, error, eqn, inputs) for axis in axes]

  def _data_output(self, axis, error, eqn, inputs):
    """A place for one output with the batch axis `axis`, or its MixedError."""
    if error is None and axis is None:
      error = self._error(f"{eqn.primitive.name} hides a constant", eqn, inputs)
    elif error is None and isinstance(axis, batch_axes.MixedError):
      error = self._error(str(axis), eqn, inputs)
    if error is not None:
      axis = None
    return self.place(Kind.DATA, axis, error=error, leaf=_last_leaf(inputs))

  def _derivative_error(self, eqn, inputs):
    """Why an operation has no derivative in the parameters, or None."""
    error = _first_error(inputs)
    if error is None and _has_custom_vjp(eqn):
      error = self._error("a jax.custom_vjp takes parameters", eqn, inputs)
    return error

  def _error(self, what, eqn, inputs):
    scope, leaf = str(eqn.source_info.name_stack), _last_leaf(inputs)
    where = [f"in {scope}"] if scope else []
    where += [f"after parameter {self._names[leaf]}"] if leaf is not None else []
    return NotLayerwiseError(f"{what} ({', '.join(where)})" if where else what)

  def _append(self, eqn, inputs, outputs, kind):
    differentiable_outputs, param_inputs = [], []
    if kind == Kind.DATA:
      differentiable_outputs = [
        (i, value.axis)
        for i, (value, atom) in enumerate(zip(outputs, eqn.outvars, strict=True))
        if value.error is None and _is_inexact(atom)
      ]
    if differentiable_outputs:
      param_inputs = [
        i
        for i, (value, atom) in enumerate(zip(inputs, eqn.invars, strict=True))
        if value.kind == Kind.PARAMS and _is_inexact(atom)
      ]
    self.steps.append(
      Step(
        eqn,
        inputs,
        [value.place for value in outputs],
        kind,
        param_inputs,
        differentiable_outputs,
        _first_error(outputs) is not None,
      )
    )

  def run(
    self,
    kind: Kind,
    env: dict[int, Any],
    perturbations: list[list[base.Array]] | None = None,
    run_refused: bool = True,
  ) -> None:
    """Computes the values of one kind into `env`, which has those of lower kinds.

    Args:
      kind: which operations to run.
      env: values by place.
      perturbations: for each parameter use, arrays that are added to its differentiable
        outputs.
      run_refused: whether to run operations without a known derivative, which only aux
        depends on.
    """
    remaining = iter(perturbations or ())
    for step in self.steps:
      if step.kind == kind and (run_refused or not step.is_refused):
        results = bind(step.eqn, [value_of(value, env) for value in step.inputs])
        if step.param_inputs:
          for (i, _), perturbation in zip(
            step.differentiable_outputs, next(remaining), strict=True
          ):
            results[i] = results[i] + perturbation
        env.update(zip(step.outputs, results, strict=True))

  def parameter_uses(self) -> list[Step]:
    """The operations that have both examples and parameters as inputs."""
    return [step for step in self.steps if step.param_inputs]


def trace(
  losses_fn: Callable[..., Any], leaves: list[base.Array], batch: Any, names: list[str]
) -> tuple[Plan, dict[int, Any], list[Value], Any]:
  """Traces a losses function; arguments as in `layerwise.linearize`.

  Returns:
    A tuple of the plan; an environment with its constants and the batch; the outputs of
    the function, losses first; the tree structure of aux.

  Raises:
    NotLayerwiseError: the losses are not known to process examples independently.
  """
  closed, shapes = jax.make_jaxpr(losses_fn, return_shape=True)(leaves, batch)
  size = shapes[0].shape[0]
  plan = Plan(names)
  env: dict[Any, Any] = {}
  args = [plan.place(Kind.PARAMS, leaf=i) for i in range(len(leaves))]
  for array in jax.tree.leaves(batch):
    is_data = jnp.shape(array)[:1] == (size,)
    args.append(plan.place(Kind.DATA, 0) if is_data else plan.place(Kind.CONSTANT))
    env[args[-1].place] = array
  consts = [plan.place(Kind.CONSTANT) for _ in closed.consts]
  env.update(zip([value.place for value in consts], closed.consts, strict=True))
  outputs = plan.add(closed.jaxpr, consts, args)
  losses = outputs[0]
  if losses.error is not None:
    raise losses.error
  if losses.kind != Kind.DATA or losses.axis != 0:
    raise NotLayerwiseError("the losses are not computed row by row from the batch")
  plan.run(Kind.CONSTANT, env)
  return plan, env, outputs, jax.tree.structure(shapes[1])


def value_of(value: Value, env: dict[int, Any]) -> Any:
  """The array of a value that is computed."""
  return value.literal if value.place is None else env[value.place]


def bind(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
  """Runs one operation and returns its results."""
  params = eqn.primitive.get_bind_params(eqn.params)
  with eqn.ctx.manager:
    results = eqn.primitive.bind(*inputs, **params)
  return list(results) if eqn.primitive.multiple_results else [results]


def _first_error(values):
  return next((value.error for value in values if value.error is not None), None)


def _has_custom_vjp(eqn):
  if eqn.primitive.name.startswith("custom_vjp_call"):
    return True
  jaxprs = jax_core.jaxprs_in_params(eqn.params)
  return any(_has_custom_vjp(inner) for jaxpr in jaxprs for inner in jaxpr.eqns)


def _last_leaf(inputs):
  """The parameter that is used here, or else the one that was used last."""
  values = [value for value in inputs if value.leaf is not None]
  return min(values, key=lambda value: value.kind).leaf if values else None


def _is_inexact(atom):
  return jnp.issubdtype(atom.aval.dtype, jnp.inexact)

"""The operations of a network that have both examples and parameters as inputs.

A `Plan` is a jaxpr with inlined calls. Each of its values is a constant, depends on
parameters alone, or depends on examples. A parameter use is an operation with at least
one input of each of the last two kinds. The layerwise engine records the values that
the derivatives of parameter uses need.

The body of a `jax.lax.scan` with an input that depends on examples is a separate plan,
see `Loop`. Computations that do not depend on examples are moved out of the loop if
possible: operations that are the same in every iteration, and values that are passed
from one iteration to the next (counters, keys).
"""

from collections.abc import Callable, Iterable, Sequence
import enum
import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax.linearization import batch_axes

# Elementwise operations that broadcast axes of size one.
_BROADCASTING = ("add", "sub", "mul", "div", "max", "min", "pow")
# Operations whose derivative with respect to one input does not depend on the others.
_INDEPENDENT = ("add_any", "concatenate")
# Names of the operation of `jax.checkpoint`.
CHECKPOINTS = ("checkpoint", "remat2")


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
    aval: its type.
    axis: the axis of the examples, or None.
    error: why the axis or the derivative is not known, or None. It is raised only if
      the losses depend on this value.
    leaf: index of the parameter that was used last to compute the value, or None.
  """

  place: int | None
  literal: Any
  kind: Kind
  aval: Any
  axis: int | None = None
  error: NotLayerwiseError | None = None
  leaf: int | None = None

  @property
  def is_parameter(self) -> bool:
    """Whether it is floating point or complex and depends on parameters alone."""
    return self.kind == Kind.PARAMS and _is_inexact(self)


# Returns zeros of a type.
ZerosOf: TypeAlias = Callable[[Any], base.Array]
# Pairs of a place in the body of a loop and the value outside that is put there.
Places: TypeAlias = list[tuple[int, Value]]


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
    is_refused: whether the axis or the derivative of an output is unknown.
  """

  eqn: Any
  inputs: list[Value]
  outputs: list[int]
  kind: Kind
  param_inputs: list[int]
  differentiable_outputs: list[tuple[int, int]]
  is_refused: bool

  @property
  def is_use(self) -> bool:
    """Whether it has both examples and parameters as inputs."""
    return bool(self.param_inputs)

  @property
  def is_broadcast(self) -> bool:
    """Whether the use broadcasts one array of parameters over the examples.

    Such a use (of a bias, or of the scale of a normalization) is perturbed at its
    parameters, because their per-example gradient is small. Other uses are perturbed at
    their outputs.
    """
    if self.eqn.primitive.name not in _BROADCASTING or len(self.param_inputs) != 1:
      return False
    shape = self.inputs[self.param_inputs[0]].aval.shape
    return not shape or shape[self.differentiable_outputs[0][1]] == 1

  def parameters(self) -> list[Value]:
    """The inputs of a use that depend on parameters alone."""
    return [self.inputs[i] for i in self.param_inputs]

  def reads(self) -> list[int]:
    """Indices of the inputs, except parameters, that the derivative of a use needs."""
    if self.is_broadcast or self.eqn.primitive.name in _INDEPENDENT:
      return []
    return [i for i in range(len(self.inputs)) if i not in self.param_inputs]

  def needs(self) -> Iterable[Value]:
    """Values, except parameters, that derivatives with respect to parameters need."""
    if self.is_use:
      return [self.inputs[i] for i in self.reads()]
    if self.kind == Kind.PARAMS and not self.is_refused:
      return [value for value in self.inputs if not value.is_parameter]
    return []

  def perturbations(self, zeros_of: ZerosOf) -> list[base.Array]:
    """Zeros to add to the parameter of a broadcast use, or to the outputs otherwise."""
    if not self.is_broadcast:
      return [
        zeros_of(self.eqn.outvars[i].aval) for i, _ in self.differentiable_outputs
      ]
    output, axis = self.eqn.outvars[0].aval, self.differentiable_outputs[0][1]
    parameter = self.parameters()[0].aval
    shape = list(parameter.shape or [1] * output.ndim)
    shape[axis] = output.shape[axis]
    spec = (
      name if size == full else None
      for name, size, full in zip(
        output.sharding.spec, shape, output.shape, strict=True
      )
    )
    sharding = jax.NamedSharding(
      output.sharding.mesh, jax.sharding.PartitionSpec(*spec)
    )
    aval = output.update(shape=tuple(shape), dtype=parameter.dtype, sharding=sharding)
    return [zeros_of(aval)]

  def run(self, env: dict[int, Any], perturbations: list[base.Array] | None) -> None:
    """Computes the outputs into `env`."""
    inputs = [value_of(value, env) for value in self.inputs]
    if perturbations is None:
      env.update(zip(self.outputs, bind(self.eqn, inputs), strict=True))
      return
    if self.is_broadcast:
      (i,) = self.param_inputs
      rank = perturbations[0].ndim
      parameter = inputs[i] if jnp.ndim(inputs[i]) else inputs[i].reshape([1] * rank)
      inputs[i] = parameter + perturbations[0]
      results = bind(self.eqn, inputs)
    else:
      results = bind(self.eqn, inputs)
      for (i, _), perturbation in zip(
        self.differentiable_outputs, perturbations, strict=True
      ):
        results[i] = _perturbed(results[i], perturbation)
    env.update(zip(self.outputs, results, strict=True))


class Loop(NamedTuple):
  """A `jax.lax.scan` with an input that depends on examples.

  Attributes:
    body: the operations of one iteration.
    consts: values that are the same in every iteration.
    rows: arrays of which each iteration gets one row.
    carry: values that an iteration passes to the next, paired with the initial values.
    carry_after: in the body, the values of the carry after the iteration.
    results: in the body, the values that are collected, one row per iteration.
    outputs: places of the last carry and of the collected rows.
    records: place of the recorded values: a dictionary from each place in the body to
      an array with one row per iteration.
    length: number of iterations.
    reverse: whether the scan runs from the last row to the first.
    unroll: number of iterations in one iteration of the compiled loop.
  """

  body: "Plan"
  consts: Places
  rows: Places
  carry: Places
  carry_after: list[Value]
  results: list[Value]
  outputs: list[int]
  records: int
  length: int
  reverse: bool
  unroll: int

  @property
  def kind(self) -> Kind:
    """The kind of its outputs."""
    return Kind.DATA

  @property
  def is_refused(self) -> bool:
    """False, because `Plan.run` skips only instances of `Step`."""
    return False

  @property
  def is_use(self) -> bool:
    """Whether its body has uses of parameters."""
    return bool(self.body.parameter_uses())

  def parameters(self) -> list[Value]:
    """The inputs that depend on parameters alone: constants, then rows."""
    return [v for _, v in (*self.consts, *self.rows) if v.is_parameter]

  def other_inputs(self, inputs: Places) -> Places:
    """The inputs (constants or rows) that derivatives need, except parameters."""
    needed = self.body.needs()
    return [(p, v) for p, v in inputs if p in needed and not v.is_parameter]

  def recorded(self) -> list[int]:
    """Places of the values that derivatives need, except constants and rows."""
    given = {place for place, _ in (*self.consts, *self.rows)}
    return sorted(self.body.needs() - given)

  def needs(self) -> Iterable[Value]:
    """Values, except parameters, that derivatives with respect to parameters need."""
    if not self.is_use:
      return []
    others = [v for _, v in self.other_inputs([*self.consts, *self.rows])]
    return [*others, Value(self.records, None, Kind.DATA, None)]

  def perturbations(self, zeros_of: ZerosOf) -> list[Any]:
    """Zeros for the uses in the body, one row per iteration."""
    del zeros_of
    return jax.tree.map(
      lambda x: jax.lax.broadcast(x, (self.length,)), self.body.perturbations()
    )

  def run(self, env: dict[int, Any], perturbations: list[Any] | None) -> None:
    """Computes the outputs into `env`, and the records if there are perturbations."""
    consts = {place: value_of(value, env) for place, value in self.consts}
    rows = {place: value_of(value, env) for place, value in self.rows}
    places = [place for place, _ in self.carry]
    recorded = [] if perturbations is None else self.recorded()

    def iterate(carry, row):
      rows, perturbations = row
      inner = consts | rows | dict(zip(places, carry, strict=True))
      for kind in Kind:
        self.body.run(kind, inner, perturbations if kind == Kind.DATA else None)
      after = [_array_of(value, inner) for value in self.carry_after]
      results = [_array_of(value, inner) for value in self.results]
      records = {place: inner[place] for place in recorded}
      return after, (results, records)

    carry, (results, records) = jax.lax.scan(
      iterate,
      [_array_of(value, env) for _, value in self.carry],
      (rows, perturbations),
      length=self.length,
      reverse=self.reverse,
      unroll=self.unroll,
    )
    env.update(zip(self.outputs, (*carry, *results), strict=True))
    env[self.records] = records


class Recomputed(NamedTuple):
  """A `jax.checkpoint` with parameter uses, whose values are not stored.

  Attributes:
    eqn: the equation of the jaxpr.
    inputs: its inputs.
    outputs: places of its outputs.
    body: its operations.
    given: the inputs that are not literals, each with its place in the body.
    results: for each differentiable output, its index and its value in the body.
  """

  eqn: Any
  inputs: list[Value]
  outputs: list[int]
  body: "Plan"
  given: Places
  results: list[tuple[int, Value]]

  @property
  def kind(self) -> Kind:
    """The kind of its outputs."""
    return Kind.DATA

  @property
  def is_refused(self) -> bool:
    """False, because `Plan.run` skips only instances of `Step`."""
    return False

  @property
  def is_use(self) -> bool:
    """Whether its body has uses of parameters."""
    return bool(self.results) and bool(self.body.parameter_uses())

  def parameters(self) -> list[Value]:
    """The inputs that depend on parameters alone."""
    return [value for _, value in self.given if value.is_parameter]

  def needs(self) -> Iterable[Value]:
    """Inputs, except parameters, from which the values of the body are recomputed."""
    return [v for _, v in self.given if not v.is_parameter] if self.is_use else []

  def perturbations(self, zeros_of: ZerosOf) -> list[base.Array]:
    """Zeros to be added to the outputs."""
    return [zeros_of(self.eqn.outvars[i].aval) for i, _ in self.results]

  def run(self, env: dict[int, Any], perturbations: list[base.Array] | None) -> None:
    """Computes the outputs into `env`."""
    results = bind(self.eqn, [value_of(value, env) for value in self.inputs])
    if perturbations is not None:
      for (i, _), perturbation in zip(self.results, perturbations, strict=True):
        results[i] = _perturbed(results[i], perturbation)
    env.update(zip(self.outputs, results, strict=True))

  def recompute(
    self, known: dict[int, Any], gradients: list[base.Array]
  ) -> tuple[dict[int, Any], list[Any]]:
    """Recomputes the values of the body, and computes the gradients of its uses.

    Args:
      known: the inputs, by place in the body.
      gradients: gradients of the losses with respect to the outputs.

    Returns:
      The values of the body by place, and for each of its uses the gradients of the
      losses with respect to its perturbations.
    """

    def outputs(perturbations):
      env = dict(known)
      for kind in Kind:
        self.body.run(kind, env, perturbations if kind == Kind.DATA else None)
      return [_array_of(value, env) for _, value in self.results], env

    _, vjp_fn, env = jax.vjp(outputs, self.body.perturbations(), has_aux=True)
    return env, vjp_fn(gradients)[0]


class Plan:
  """A jaxpr with inlined calls, and what each of its values depends on."""

  def __init__(
    self,
    names: Sequence[str],
    outer: "Plan | None" = None,
    *,
    recompute: bool = False,
  ):
    """Creates an empty plan.

    Args:
      names: names of the parameters, for error messages.
      outer: the plan with the loop whose body is this plan; None if there is none.
      recompute: whether a `jax.checkpoint` may take parameters; its values are then
        computed again for each derivative.
    """
    self.steps: list[Step | Loop | Recomputed] = []
    self._recompute = recompute
    self.consts: Places = []  # Empty unless this plan is a loop's body.
    # Constants whose value is known during tracing, by place; None if it is not known.
    self.known: dict[int, Any] = {}
    self._names = names
    self._outer = outer
    self._size = 0

  def place(
    self,
    kind: Kind,
    aval: Any,
    axis: int | None = None,
    *,
    error: NotLayerwiseError | None = None,
    leaf: int | None = None,
  ) -> Value:
    """Adds a place to the environment and returns its value."""
    self._size += 1
    return Value(self._size - 1, None, kind, aval, axis, error, leaf)

  @functools.cached_property
  def producers(self) -> dict[int, Step]:
    """The operation that computes each value that depends on parameters alone.

    Use it only when the plan is complete.
    """
    return {
      place: step
      for step in self.steps
      if isinstance(step, Step) and step.kind == Kind.PARAMS
      for place in step.outputs
    }

  def sources(self, place: int | None) -> set[int]:
    """The parameters from which a value that depends on them alone is computed."""
    seen: set[int] = set()
    sources: set[int] = set()
    remaining = [place]
    while remaining:
      place = remaining.pop()
      if place is None or place in seen:
        continue
      seen.add(place)
      if place < len(self._names):
        sources.add(place)
      elif place in self.producers:
        remaining += [value.place for value in self.producers[place].inputs]
    return sources

  def const(self, value: Value) -> Value:
    """Adds a place for a value of the outer plan that is the same in all iterations."""
    if value.place is None:
      return value
    inner = self.place(
      value.kind, value.aval, value.axis, error=value.error, leaf=value.leaf
    )
    self.consts.append((_place(inner), value))
    return inner

  def add(self, jaxpr: Any, consts: list[Value], args: list[Value]) -> list[Value]:
    """Adds the operations of a jaxpr to the plan and returns the outputs."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom):
      if isinstance(atom, jax_core.Literal):
        return Value(None, atom.val, Kind.CONSTANT, atom.aval)
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
        return self.add(jaxpr, _constants(consts), inputs)
      name = eqn.primitive.name
      outputs = self._add_scan(eqn, inputs) if name == "scan" else None
      if name == "optimization_barrier":
        outputs = self._add_barrier(inputs)
      if outputs is None and name in CHECKPOINTS and self._recompute:
        outputs = self._add_recomputed(eqn, inputs)
      if outputs is not None:
        return outputs
      outputs = self._data_outputs(eqn, inputs)
    else:
      outputs = self._add_outside(eqn, inputs)
      if outputs is not None:
        return outputs
      error = self._derivative_error(eqn, inputs) if kind == Kind.PARAMS else None
      leaf = _last_leaf(inputs)
      outputs = [self.place(kind, v.aval, error=error, leaf=leaf) for v in eqn.outvars]
    self._append(eqn, inputs, outputs, kind)
    return outputs

  def _add_outside(self, eqn, inputs):
    """Adds an operation outside of the loop and returns its outputs.

    Returns None if there is no outer plan, or if the operation is not known to be the
    same in every iteration.
    """
    if self._outer is None or eqn.effects:
      return None
    consts = dict(self.consts)
    if not all(value.place is None or value.place in consts for value in inputs):
      return None
    outside = [v if v.place is None else consts[v.place] for v in inputs]
    return [self.const(value) for value in self._outer._add_eqn(eqn, outside)]

  def _data_outputs(self, eqn, inputs):
    """Places for the outputs of an operation on examples."""
    error = _first_error(inputs)
    axes: list[Any] = [None] * len(eqn.outvars)
    if error is None:
      try:
        axes = self._axes(eqn, inputs)
      except batch_axes.MixedError as mixed:
        error = self._error(str(mixed), eqn, inputs)
    if error is None and any(value.kind == Kind.PARAMS for value in inputs):
      error = self._derivative_error(eqn, inputs)
    return [
      self._data_output(axis, error, v.aval, eqn, inputs)
      for axis, v in zip(axes, eqn.outvars, strict=True)
    ]

  def _axes(self, eqn, inputs):
    """The batch axes of the outputs, or a MixedError; see `batch_axes.propagate`."""
    axes = [value.axis for value in inputs]
    try:
      return batch_axes.propagate(eqn, axes)
    except batch_axes.MixedError:
      if not batch_axes.takes_indices(eqn.primitive.name):
        raise
      row_columns = self._row_columns(inputs[1])
      return batch_axes.propagate(eqn, axes, row_columns=row_columns)

  def _row_columns(self, indices):
    """The `row_columns` of `batch_axes.propagate` for an array of indices."""
    producers = {
      place: step
      for step in self.steps
      if isinstance(step, Step)
      for place in step.outputs
    }
    parts, last = [indices], indices.aval.ndim - 1
    step = producers.get(indices.place)
    if step is not None and step.eqn.primitive.name == "concatenate":
      parts = step.inputs if step.eqn.params["dimension"] == last else []
    pairs, column = set(), 0
    for part in parts:
      array = self._number(part, producers)
      for j in range(part.aval.shape[last]):
        for axis in range(last if array is not None else 0):
          rows = np.moveaxis(array[..., j], axis, -1)
          if (rows == np.arange(rows.shape[-1])).all():
            pairs.add((column + j, axis))
      column += part.aval.shape[last]
    return pairs

  def _number(self, value, producers):
    """An integer constant as a NumPy array; None if it is not known during tracing."""
    is_integer = any(jnp.issubdtype(value.aval.dtype, t) for t in (jnp.integer, bool))
    if value.kind != Kind.CONSTANT or not is_integer:
      return None
    known = self.known.get(value.place, value.literal)
    if value.place in producers and value.place not in self.known:
      step = producers[value.place]
      # Store unknown values, too: exponentially many paths may lead to one of them.
      self.known |= dict.fromkeys(step.outputs)
      inputs = [self._number(x, producers) for x in step.inputs]
      if step.eqn.effects or any(x is None for x in inputs):
        return None
      # These do not change values, and cannot be evaluated without their mesh.
      if step.eqn.primitive.name in ("pcast", "pvary"):
        results = inputs
      else:
        with jax.ensure_compile_time_eval():
          results = bind(step.eqn, inputs)
      self.known |= dict(zip(step.outputs, results, strict=True))
      known = self.known[value.place]
    if known is None or isinstance(known, jax.core.Tracer):
      return None
    return np.asarray(known)

  def _data_output(self, axis, error, aval, eqn, inputs):
    """A place for one output; `axis` is its batch axis, a MixedError or None."""
    if error is None and axis is None:
      error = self._error(
        f"an output of {eqn.primitive.name} does not depend on examples", eqn, inputs
      )
    elif error is None and isinstance(axis, batch_axes.MixedError):
      error = self._error(str(axis), eqn, inputs)
    if error is not None:
      axis = None
    return self.place(Kind.DATA, aval, axis, error=error, leaf=_last_leaf(inputs))

  def _derivative_error(self, eqn, inputs):
    """Why an operation has no derivative with respect to parameters, or None."""
    error = _first_error(inputs)
    if error is None and _has_custom_vjp(eqn):
      error = self._error("a jax.custom_vjp takes parameters", eqn, inputs)
    if error is None and eqn.primitive.name == "pad":
      array, padding_value = inputs
      if padding_value.is_parameter and not array.is_parameter:
        # JAX fails to transpose the derivative with respect to the value alone.
        error = self._error("a pad whose padding value is a parameter", eqn, inputs)
    is_call = eqn.primitive.name in CHECKPOINTS
    if error is None and is_call and any(v.kind == Kind.DATA for v in inputs):
      error = self._error("a jax.checkpoint takes parameters", eqn, inputs)
    return error

  def _error(self, what, eqn, inputs):
    scope, leaf = str(eqn.source_info.name_stack), _last_leaf(inputs)
    where = [f"in {scope}"] if scope else []
    if leaf is not None:
      name = self._names[leaf]  # Empty if the parameters are a single array.
      where.append(f"after parameter {name}" if name else "after params")
    return NotLayerwiseError(f"{what} ({', '.join(where)})" if where else what)

  def _append(self, eqn, inputs, outputs, kind):
    differentiable_outputs, param_inputs = [], []
    if kind == Kind.DATA:
      differentiable_outputs = [
        (i, value.axis)
        for i, value in enumerate(outputs)
        if value.error is None and _is_inexact(value)
      ]
    if differentiable_outputs:
      param_inputs = [i for i, value in enumerate(inputs) if value.is_parameter]
    self.steps.append(
      Step(
        eqn,
        inputs,
        [_place(value) for value in outputs],
        kind,
        param_inputs,
        differentiable_outputs,
        _first_error(outputs) is not None,
      )
    )

  def _add_recomputed(self, eqn, inputs):
    """Adds a `jax.checkpoint` and returns its outputs; None if it takes no parameters.

    Operations of its body on parameters alone are not moved out; they are recomputed,
    too.
    """
    if _first_error(inputs) or not any(value.is_parameter for value in inputs):
      return None
    body = Plan(self._names, recompute=True)
    args = [
      v if v.place is None else body.place(v.kind, v.aval, v.axis, leaf=v.leaf)
      for v in inputs
    ]
    jaxpr, consts = batch_axes.inner_jaxpr(eqn)
    after = body.add(jaxpr, _constants(consts), args)
    outputs = [
      self._data_output(value.axis, value.error, value.aval, eqn, inputs)
      for value in after
    ]
    pairs = zip(args, inputs, strict=True)
    self.steps.append(
      Recomputed(
        eqn,
        inputs,
        [_place(value) for value in outputs],
        body,
        [(_place(arg), value) for arg, value in pairs if arg.place is not None],
        [
          (i, after[i])
          for i, value in enumerate(outputs)
          if value.error is None and _is_inexact(value)
        ],
      )
    )
    return outputs

  def _add_barrier(self, inputs):
    """Adds a barrier and returns its outputs; None if all depend on examples.

    Values that do not depend on examples are not passed through the barrier. They are
    computed before the others anyway. If they passed through it, they would count as
    values that depend on examples, and later uses of parameters would not be recorded.
    """
    is_data = [value.kind == Kind.DATA for value in inputs]
    if all(is_data):
      return None
    data = [value for value, keep in zip(inputs, is_data, strict=True) if keep]
    closed = jax.make_jaxpr(lambda *arrays: jax.lax.optimization_barrier(arrays))(
      *(value.aval for value in data)
    )
    outputs = iter(self.add(closed.jaxpr, [], data))
    return [
      next(outputs) if keep else value
      for value, keep in zip(inputs, is_data, strict=True)
    ]

  def _add_scan(self, eqn, inputs):
    """Adds a loop and returns its outputs; None if it iterates over the examples."""
    if _first_error(inputs) is not None:
      return None
    scan = batch_axes.scan(eqn)
    start, end = scan.num_consts, scan.num_consts + scan.num_carry
    try:
      axes, _ = batch_axes.body_axes(
        eqn, [value.axis for value in inputs], check_rules=False
      )
    except batch_axes.MixedError:
      return None
    avals = [v.aval for v in scan.jaxpr.invars]
    first = self._spread_all(inputs[start:end], axes[start:end])
    inputs = [*inputs[:start], *first, *inputs[end:]]
    states = [
      self._first_state(value, axis, eqn, inputs)
      for value, axis in zip(first, axes[start:end], strict=True)
    ]
    before = None
    while before != states:
      before = states
      body = Plan(self._names, outer=self, recompute=self._recompute)
      args = [body.const(value) for value in inputs[:start]]
      args += [
        body.place(kind, aval, axis, error=error, leaf=_last_leaf(inputs))
        for (kind, axis, error), aval in zip(states, avals[start:end], strict=True)
      ]
      args += [
        body.place(
          value.kind,
          aval,
          None if value.axis is None else value.axis - 1,
          leaf=value.leaf,
        )
        for value, aval in zip(inputs[end:], avals[end:], strict=True)
      ]
      after = body.add(scan.jaxpr, _constants(scan.closed_consts), args)
      after[: scan.num_carry] = body._spread_all(
        after[: scan.num_carry], [axis for _, axis, _ in states]
      )
      states = [
        self._next_state(state, value, eqn, inputs)
        for state, value in zip(before, after[: scan.num_carry], strict=True)
      ]
    rows = [(_place(arg), v) for arg, v in zip(args[end:], inputs[end:], strict=True)]
    carry = [
      (_place(arg), v)
      for arg, v in zip(args[start:end], inputs[start:end], strict=True)
    ]
    return self._add_loop(scan, body, rows, carry, args[start:end], after, inputs)

  def _spread_all(self, values, axes):
    """Makes parameters depend on examples where `axes` has a batch axis.

    A loop may start with parameters (a learned initial state) and continue with values
    that depend on examples, or the other way round. Adding zeros with a row per example
    is an operation that can be recorded as a use of these parameters.
    """
    return [
      self._spread(value, axis) if isinstance(axis, int) else value
      for value, axis in zip(values, axes, strict=True)
    ]

  def _spread(self, value, axis):
    if not value.is_parameter or value.error is not None:
      return value
    closed = jax.make_jaxpr(jax.lax.add)(value.aval, value.aval)
    rows = Value(None, zeros(value.aval), Kind.DATA, value.aval, axis)
    return self.add(closed.jaxpr, [], [value, rows])[0]

  def _first_state(self, value, axis, eqn, inputs):
    """The kind, axis and error of a carry before the first iteration."""
    if isinstance(axis, batch_axes.MixedError):
      return Kind.DATA, None, self._error(str(axis), eqn, inputs)
    return value.kind if axis is None else Kind.DATA, axis, None

  def _next_state(self, state, after, eqn, inputs):
    """The kind, axis and error of a carry in all iterations."""
    kind, axis, error = state
    error = error or after.error
    if error is None and after.kind == Kind.DATA and axis != after.axis:
      error = self._error("a scan that moves the batch axis of its carry", eqn, inputs)
    return max(kind, after.kind), None if error else axis, error

  def _add_loop(self, scan, body, rows, carry, before, after, inputs):
    """Adds the loop and returns its outputs.

    Values that do not depend on examples are computed by separate loops.
    """
    outputs: list[Value | None] = [None] * len(after)
    for kind in (Kind.CONSTANT, Kind.PARAMS):
      moved = [
        i
        for i, value in enumerate(after)
        if (before[i] if i < len(carry) else value).kind == kind
      ]
      if moved:
        values, places = self._add_loop_of_kind(
          kind, scan, body, rows, carry, before, after, moved
        )
        outputs = [values.get(i, output) for i, output in enumerate(outputs)]
        rows = rows + places
    is_data = [i for i, output in enumerate(outputs) if output is None]
    leaf = _last_leaf(inputs)
    for i in is_data:
      value = before[i] if i < len(carry) else after[i]
      axis = value.axis
      if axis is not None and i >= len(carry):
        axis += 1
      aval = value.aval if i < len(carry) else _stacked(value.aval, scan.length)
      outputs[i] = self.place(Kind.DATA, aval, axis, error=value.error, leaf=leaf)
    self.steps.append(
      Loop(
        body,
        body.consts,
        rows,
        [carry[i] for i in is_data if i < len(carry)],
        [after[i] for i in is_data if i < len(carry)],
        [after[i] for i in is_data if i >= len(carry)],
        [_place(outputs[i]) for i in is_data],
        _place(self.place(Kind.DATA, None)),
        scan.length,
        scan.reverse,
        scan.unroll,
      )
    )
    return outputs

  def _add_loop_of_kind(self, kind, scan, body, rows, carry, before, after, moved):
    """Adds a loop that computes only values of this kind and of lower kinds.

    Args:
      kind: `CONSTANT` or `PARAMS`.
      scan: the loop.
      body: the operations of its body.
      rows: its inputs of which each iteration gets one row.
      carry: its inputs that an iteration passes to the next.
      before: the carry, in the body.
      after: the carry and the results after an iteration, in the body.
      moved: indices of the outputs to compute, all of this kind.

    Returns:
      The values of these outputs, by index, and the part of the carry that this loop
      computes: one row per iteration, as an input of the other loops.
    """
    consts = [(p, v) for p, v in body.consts if v.kind <= kind]
    rows = [(p, v) for p, v in rows if v.kind <= kind]
    carried = [i for i in range(len(carry)) if before[i].kind <= kind]
    results = [i for i in moved if i >= len(carry)]

    def loop(consts, rows, first):
      def iterate(carry, row):
        inner = consts | row | carry
        for lower in range(kind + 1):
          body.run(Kind(lower), inner)
        values = [_array_of(after[i], inner) for i in carried]
        collected = [_array_of(after[i], inner) for i in results]
        return dict(zip(carry, values, strict=True)), (carry, collected)

      return jax.lax.scan(
        iterate, first, rows, length=scan.length, reverse=scan.reverse
      )

    groups = (consts, rows, [carry[i] for i in carried])
    args = [{place: value.aval for place, value in group} for group in groups]
    closed, shapes = jax.make_jaxpr(loop, return_shape=True)(*args)
    flat = [dict(group)[place] for group in groups for place in sorted(dict(group))]
    added = self.add(closed.jaxpr, _constants(closed.consts), flat)
    last, (all_before, collected) = jax.tree.unflatten(
      jax.tree.structure(shapes), added
    )
    places = [_place(before[i]) for i in carried]
    values = dict(zip(results, collected, strict=True))
    values |= {i: last[place] for i, place in zip(carried, places, strict=True)}
    return {i: values[i] for i in moved}, [
      (place, all_before[place])
      for i, place in zip(carried, places, strict=True)
      if i in moved
    ]

  def needs(self) -> set[int]:
    """Places of the values that the steps need for derivatives; see `Step.needs`."""
    values = [value for step in self.steps for value in step.needs()]
    return {value.place for value in values if value.place is not None}

  def perturbations(self) -> list[Any]:
    """Zeros for each parameter use, with respect to which losses are differentiated."""
    by_type: dict[Any, base.Array] = {}

    def zeros_of(aval):  # One array for all uses of a type keeps the program small.
      if aval not in by_type:
        by_type[aval] = zeros(aval)
      return by_type[aval]

    return [step.perturbations(zeros_of) for step in self.parameter_uses()]

  def run(
    self,
    kind: Kind,
    env: dict[int, Any],
    perturbations: list[Any] | None = None,
    run_refused: bool = True,
  ) -> None:
    """Adds the values of one kind to `env`, which contains those of lower kinds.

    Args:
      kind: which operations to run.
      env: values by place.
      perturbations: zeros for each parameter use. Derivatives with respect to these
        zeros are those of a program that adds them to the parameters or outputs of the
        use.
      run_refused: whether to run operations whose derivative is not known. Only aux
        depends on such operations.
    """
    remaining = iter(perturbations or ())
    for step in self.steps:
      if step.kind == kind and (run_refused or not step.is_refused):
        is_perturbed = perturbations is not None and step.is_use
        step.run(env, next(remaining) if is_perturbed else None)

  def parameter_uses(self) -> list[Step | Loop | Recomputed]:
    """The operations that have both examples and parameters as inputs."""
    return [step for step in self.steps if step.is_use]


def trace(
  losses_fn: Callable[..., Any],
  leaves: list[base.Array],
  batch: Any,
  names: list[str],
  *,
  recompute: bool | None = False,
) -> tuple[Plan, dict[int, Any], list[Value], Any]:
  """Traces a losses function; arguments as in `layerwise.linearize`.

  Returns:
    A tuple of the plan; an environment with its constants and the batch; the outputs of
    the function, losses first; the tree structure of aux.

  Raises:
    NotLayerwiseError: see `layerwise.linearize`.
  """
  closed, shapes = jax.make_jaxpr(losses_fn, return_shape=True)(leaves, batch)
  size = shapes[0].shape[0]
  arrays = jax.tree.leaves(batch)

  def planned(recompute):
    return _plan(closed, arrays, len(leaves), size, names, recompute)

  plan, env, outputs = planned(recompute is None or recompute)
  if recompute is None and not any(map(_has_custom_vjp, closed.jaxpr.eqns)):
    stored, recomputed = _flops_of_plan(plan)
    # The layerwise engine costs 4 * stored + 9 * recomputed FLOPs, and forward mode
    # costs 5 * stored + 6 * recomputed.
    if recomputed and stored <= 3 * recomputed:
      plan, env, outputs = planned(False)
  losses = outputs[0]
  if losses.error is not None:
    raise losses.error
  if losses.kind != Kind.DATA or losses.axis != 0:
    raise NotLayerwiseError("the losses are not computed row by row from the batch")
  plan.run(Kind.CONSTANT, env)
  return plan, env, outputs, jax.tree.structure(shapes[1])


def _plan(closed, arrays, num_leaves, size, names, recompute):
  """A plan, an environment with its constants and the batch, and its outputs."""
  plan = Plan(names, recompute=recompute)
  env: dict[Any, Any] = {}
  avals = [v.aval for v in closed.jaxpr.invars]
  args = [plan.place(Kind.PARAMS, avals[i], leaf=i) for i in range(num_leaves)]
  for array, aval in zip(arrays, avals[num_leaves:], strict=True):
    is_data = jnp.shape(array)[:1] == (size,)
    kind, axis = (Kind.DATA, 0) if is_data else (Kind.CONSTANT, None)
    args.append(plan.place(kind, aval, axis))
    # Derivatives read the dtypes of values, and a Python number has no dtype.
    env[args[-1].place] = array if hasattr(array, "dtype") else jnp.asarray(array)
  consts = [plan.place(Kind.CONSTANT, v.aval) for v in closed.jaxpr.constvars]
  plan.known = {
    _place(value): x
    for value, x in zip(consts, closed.consts, strict=True)
    if not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
  }
  env.update(zip([value.place for value in consts], closed.consts, strict=True))
  return plan, env, plan.add(closed.jaxpr, consts, args)


def _flops_of_plan(plan):
  """FLOPs of operations on examples, outside and inside of `jax.checkpoint`.

  Operations inside nested `jax.checkpoint` are recomputed, and counted, several times.
  """
  stored, recomputed = 0, 0
  for step in plan.steps:
    if step.kind != Kind.DATA:
      continue
    if isinstance(step, Step):
      stored += flops(step.eqn)
      continue
    inner_stored, inner_recomputed = _flops_of_plan(step.body)
    if isinstance(step, Loop):
      stored += step.length * inner_stored
      recomputed += step.length * inner_recomputed
    else:
      recomputed += inner_stored + 2 * inner_recomputed
  return stored, recomputed


def flops(eqn: Any) -> int:
  """FLOPs of an operation, without lower-order terms and branches of conditionals."""
  size = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
  if eqn.primitive.name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * size * math.prod(eqn.invars[0].aval.shape[a] for a in contracted)
  if eqn.primitive.name == "conv_general_dilated":
    kernel = eqn.invars[1].aval
    outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * size * kernel.size // outputs
  if eqn.primitive.name == "scan":
    loop = batch_axes.scan(eqn)
    return loop.length * sum(map(flops, loop.jaxpr.eqns))
  call = batch_axes.inner_jaxpr(eqn)
  return size if call is None else sum(map(flops, call[0].eqns))


def value_of(value: Value, env: dict[int, Any]) -> Any:
  """The array of a value that has been computed."""
  return value.literal if value.place is None else env[value.place]


def bind(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
  """Runs one operation and returns its results."""
  params = eqn.primitive.get_bind_params(eqn.params)
  with eqn.ctx.manager:
    results = eqn.primitive.bind(*inputs, **params)
  return list(results) if eqn.primitive.multiple_results else [results]


def run(
  jaxpr: Any,
  consts: Sequence[Any],
  args: Sequence[Any],
  replace: Callable[[Any, list[Any]], list[Any] | None],
) -> list[Any]:
  """The outputs of a jaxpr, some of whose operations are replaced.

  Args:
    jaxpr: the operations. Calls are inlined if `batch_axes.inlined` allows it.
    consts: values of its constants.
    args: its inputs.
    replace: `(equation, inputs) -> outputs`, or None to leave an operation unchanged.
  """
  env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

  def read(atom):
    return atom.val if isinstance(atom, jax_core.Literal) else env[atom]

  for eqn in jaxpr.eqns:
    inputs = [read(v) for v in eqn.invars]
    call = batch_axes.inlined(eqn)
    if call is not None:
      inner, inner_consts = call
      outputs = run(inner, inner_consts, inputs, replace)
    else:
      replaced = replace(eqn, inputs)
      outputs = bind(eqn, inputs) if replaced is None else replaced
    env.update(zip(eqn.outvars, outputs, strict=True))
  return [read(v) for v in jaxpr.outvars]


def zeros(aval: Any) -> base.Array:
  """Zeros with the type and the sharding of `aval`."""
  result = jax.lax.full(aval.shape, 0, aval.dtype, sharding=aval.sharding)
  return base.varying(result, aval)


@jax.custom_jvp
def _perturbed(x, perturbation):
  """`x + perturbation` for a perturbation of zeros, which need not be stored."""
  del perturbation
  return x


@_perturbed.defjvp
def _perturbed_rule(primals, tangents):
  return primals[0], tangents[0] + tangents[1]


def _array_of(value, env):
  """Like `value_of`, but an array even if the value is a literal."""
  if value.place is None:
    return jnp.full(value.aval.shape, value.literal, value.aval.dtype)
  return env[value.place]


def _place(value):
  """The place of a value that is not a literal."""
  assert value.place is not None
  return value.place


def _constants(arrays):
  return [Value(None, x, Kind.CONSTANT, jax.typeof(x)) for x in arrays]


def _stacked(aval, length):
  """The type of `length` rows of type `aval`."""
  return jax.eval_shape(lambda x: jax.lax.broadcast(x, (length,)), aval)


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


def _is_inexact(value):
  return jnp.issubdtype(value.aval.dtype, jnp.inexact)

"""The cheapest exact way to compute a step within a memory budget.

L2RW and Meta-Weight-Net can compute the same numbers in several ways, which need
different amounts of memory and time: with the layerwise engine, in forward mode, with a
second pass over the training batch, or from a few examples at a time. How much memory
each way takes depends on the model, on the compiler and on the rest of the training
step, so the memory is not estimated. Instead, `choose` compiles the step in each way,
beginning with the cheapest, until the compiler reports that the program fits.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from absl import logging
import jax

from l2rw_jax import base

_MIB = 2**20
# Each plan that does not fit costs a compilation, so there are only a few.
_MAX_MICROBATCHES = 8


class Choice(NamedTuple):
  """The result of `choose`.

  Attributes:
    step: the compiled step, a function of arguments like `args` of `choose`.
    options: the plan, that is, the keyword arguments with which the step was made.
    num_bytes: memory of the step on a device as the compiler reports it: arguments,
      results and temporary arrays. Donated arguments count once.
  """

  step: Callable[..., Any]
  options: dict[str, Any]
  num_bytes: int


def l2rw_plans(batch_size: int) -> list[dict[str, Any]]:
  """Options of `l2rw.weighted_value_and_grad`, in order of increasing cost.

  For B training and M meta examples, the costs, in forward passes of one example, are
  4B + 3M with the layerwise engine, 5B + 3M in forward mode, and 7B + 3M in
  microbatches of any size. The last plan has at most eight microbatches; append plans
  with smaller microbatches if necessary.

  Args:
    batch_size: number of training examples that a device processes in a step.

  Raises:
    InputError: `batch_size` is not a positive integer.

  >>> l2rw_plans(4)
  [{}, {'engine': 'forward'}, {'microbatch_size': 2}, {'microbatch_size': 1}]
  """
  return [{}, {"engine": "forward"}, *_microbatches(batch_size)]


def meta_weight_net_plans(batch_size: int) -> list[dict[str, Any]]:
  """Options of `meta_weight_net.network_gradient`, in order of increasing cost.

  For B training and M meta examples, the costs, in forward passes of one example, are
  4B + 3M with the layerwise engine, 5B + 3M in forward mode, 6B + 3M with either of
  them if the training batch is processed a second time, and 7B + 3M in microbatches of
  any size. The list ends with the microbatch plans of `l2rw_plans`.

  Args:
    batch_size: number of training examples that a device processes in a step.

  Raises:
    InputError: `batch_size` is not a positive integer.

  >>> for options in meta_weight_net_plans(2):
  ...   print(options)
  {}
  {'engine': 'forward'}
  {'recompute': True}
  {'recompute': True, 'engine': 'forward'}
  {'microbatch_size': 1}
  """
  forward, again = {"engine": "forward"}, {"recompute": True}
  return [{}, forward, again, again | forward, *_microbatches(batch_size)]


def _microbatches(batch_size):
  batch_size = base.check_integer("batch_size", batch_size)
  counts = [2**i for i in range(1, _MAX_MICROBATCHES.bit_length())]
  return [
    {"microbatch_size": -(-batch_size // count)}
    for count in counts
    if count <= batch_size
  ]


def choose(
  make_step: Callable[..., Callable[..., Any]],
  args: Sequence[Any],
  plans: Iterable[dict[str, Any]],
  num_bytes: int,
) -> Choice:
  """The first plan whose compiled step fits into `num_bytes`.

  A plan that does not apply to the model (microbatches with BatchNorm, forward mode
  with a `jax.custom_vjp`) is skipped. The chosen plan is logged.

  Args:
    make_step: `(**options) -> step`, where `step` is a function of `args`. It may be
      the result of `jax.jit` and donate arguments.
    args: arguments of the step: arrays, or shapes (`jax.ShapeDtypeStruct`).
    plans: keyword arguments for `make_step` in order of increasing cost, see
      `l2rw_plans`.
    num_bytes: memory budget of a device for the arguments, the results and the
      temporary arrays of a step.

  Returns:
    A `Choice`.

  Raises:
    InputError: no plan fits (the message gives the least memory of all plans), no plan
      applies, or `plans` is empty.

  Example:
    >>> import jax.numpy as jnp
    >>> from l2rw_jax import l2rw
    >>> losses_fn = lambda params, x: (x @ params) ** 2
    >>> args = jnp.ones(2), jnp.eye(2), jnp.ones((1, 2))
    >>> choice = choose(
    ...     lambda **options: l2rw.weighted_value_and_grad(losses_fn, **options),
    ...     args, l2rw_plans(2), num_bytes=2**20)
    >>> choice.options
    {}
    >>> (loss, info), grads = choice.step(*args)
    >>> print(loss)
    1.0
  """
  smallest: Choice | None = None
  refusal: base.InputError | None = None
  for options in plans:
    try:
      step = make_step(**options)
      jitted = step if hasattr(step, "lower") else jax.jit(step)
      compiled = jitted.lower(*args).compile()
    except base.InputError as error:
      refusal = refusal or error
      continue
    choice = Choice(compiled, dict(options), _num_bytes(compiled))
    if choice.num_bytes <= num_bytes:
      logging.info(
        "%s needs %.1f MiB of memory, of a budget of %.1f MiB.",
        _named(options),
        choice.num_bytes / _MIB,
        num_bytes / _MIB,
      )
      return choice
    if smallest is None or choice.num_bytes < smallest.num_bytes:
      smallest = choice
  if smallest is None:
    raise refusal or base.InputError("plans is empty: pass at least one, such as {}.")
  raise base.InputError(
    f"no plan fits into num_bytes={num_bytes} ({num_bytes / _MIB:.1f} MiB): the"
    f" smallest, {_named(smallest.options)}, needs {smallest.num_bytes / _MIB:.1f} MiB."
    " Use smaller batches or a smaller model."
  )


def _num_bytes(compiled):
  """The memory of a program; a donated argument that becomes a result counts once."""
  memory = compiled.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )


def _named(options):
  return ", ".join(f"{k}={v!r}" for k, v in options.items()) or "the default"

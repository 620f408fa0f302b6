"""Conditionals and loops whose convolutions are fast on a CPU.

XLA:CPU has fast kernels for convolutions with the features on the last axis. It
converts other convolutions, such as those in the gradients with respect to images and
kernels, to this layout. It does not do so in the bodies of loops and conditionals
(https://github.com/jax-ml/jax/issues/12868), where these convolutions can take 27 times
as long. The functions of this module convert convolutions before XLA sees them. On
other devices, the functions change nothing.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.extend import core as jax_core
from jax.extend import source_info_util
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.linearization import batch_axes
from l2rw_jax.linearization import parameter_uses


def channels_last(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function` with its convolutions in the layout that is fast in loops on a CPU.

  Apply it to the body of a loop or to a branch. If the body needs derivatives, take
  them inside `function`: convolutions of these derivatives are converted, as are those
  under `jax.checkpoint`, but not the convolutions of a derivative of the returned
  function. Convolutions in loops, conditionals, `jax.shard_map` and functions with a
  custom derivative inside of `function` are not converted, nor are those of arrays that
  are sharded over an explicit mesh. Results change only by rounding.

  Args:
    function: any function of pytrees of arrays that can be traced.

  Returns:
    `function` itself if the default backend is not a CPU, or under `jax.disable_jit`.
    Otherwise a function with the same arguments and results.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> def loss(kernel, image):
    ...   return jnp.sum(jax.lax.conv(image, kernel, (1, 1), "SAME") ** 2)
    >>> @jax.jit
    ... def sum_of_gradients(kernel, images):
    ...   def step(total, image):
    ...     return total + jax.grad(loss)(kernel, image), None
    ...   return jax.lax.scan(channels_last(step), jnp.zeros_like(kernel), images)[0]
    >>> sum_of_gradients(jnp.ones((1, 1, 3, 3)), jnp.ones((2, 5, 1, 4, 4))).shape
    (1, 1, 3, 3)
  """
  if jax.default_backend() != "cpu" or jax.config.jax_disable_jit:
    return function

  @functools.wraps(function)
  def converted(*args, **kwargs):
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
    outputs = _run(closed.jaxpr, closed.consts, jax.tree.leaves((args, kwargs)))
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

  return converted


def cond(
  pred: base.Array,
  true_fn: Callable[..., Any],
  false_fn: Callable[..., Any],
  *operands: Any,
) -> Any:
  """`jax.lax.cond` with `channels_last` branches.

  Args:
    pred: which branch is taken, bool scalar.
    true_fn: the branch if `pred` is true.
    false_fn: the branch if `pred` is false.
    *operands: arguments of both branches.

  Returns:
    The result of the branch.
  """
  return jax.lax.cond(pred, channels_last(true_fn), channels_last(false_fn), *operands)


def _run(jaxpr, consts, args):
  """The outputs of a jaxpr whose convolutions are computed channels-last."""
  env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

  def read(atom):
    return atom.val if isinstance(atom, jax_core.Literal) else env[atom]

  for eqn in jaxpr.eqns:
    inputs = [read(v) for v in eqn.invars]
    # Profiles show the names and the lines of the original program.
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack):
      env.update(zip(eqn.outvars, _outputs(eqn, inputs), strict=True))
  return [read(v) for v in jaxpr.outvars]


def _outputs(eqn, inputs):
  """The results of an operation whose convolutions are computed channels-last."""
  if eqn.primitive.name == "conv_general_dilated":
    return [_convolution(eqn, *inputs)]
  if not any(map(_has_convolution, jax_core.jaxprs_in_params(eqn.params))):
    return parameter_uses.bind(eqn, inputs)
  call = batch_axes.inlined(eqn)
  if call is not None:
    inner, inner_consts = call
    return _run(inner, inner_consts, inputs)
  if eqn.primitive.name in ("checkpoint", "remat2"):
    inner, inner_consts = batch_axes.inner_jaxpr(eqn)
    body = jax.make_jaxpr(lambda *x: _run(inner, inner_consts, x))(*inputs)
    if not body.consts:
      eqn = eqn.replace(params=eqn.params | {"jaxpr": body.jaxpr})
  return parameter_uses.bind(eqn, inputs)


def _has_convolution(jaxpr):
  return any(
    eqn.primitive.name == "conv_general_dilated"
    or any(map(_has_convolution, jax_core.jaxprs_in_params(eqn.params)))
    for eqn in jaxpr.eqns
  )


def _convolution(eqn, lhs, rhs):
  """The result of a convolution, computed with its features on the last axis."""
  numbers = eqn.params["dimension_numbers"]
  order, kernel_order, output_order = (
    (*outer, *spec[2:], *inner)
    for spec, outer, inner in (
      (numbers.lhs_spec, numbers.lhs_spec[:1], numbers.lhs_spec[1:2]),
      (numbers.rhs_spec, (), numbers.rhs_spec[1::-1]),
      (numbers.out_spec, numbers.out_spec[:1], numbers.out_spec[1:2]),
    )
  )
  rank = len(order)
  in_order = tuple(range(rank))
  is_sharded = any(any(jax.typeof(x).sharding.spec) for x in (lhs, rhs))
  # XLA:CPU has no fast kernel for batch groups in any layout.
  if (
    (order == kernel_order == output_order == in_order)
    or eqn.params["batch_group_count"] != 1
    or is_sharded
  ):
    (output,) = parameter_uses.bind(eqn, [lhs, rhs])
    return output
  spatial = in_order[1:-1]
  image_spec = (0, rank - 1, *spatial)
  kernel_spec = (rank - 1, rank - 2, *in_order[:-2])
  eqn = eqn.replace(
    params=eqn.params
    | {
      "dimension_numbers": jax.lax.ConvDimensionNumbers(
        image_spec, kernel_spec, image_spec
      )
    }
  )
  (output,) = parameter_uses.bind(
    eqn, [jnp.transpose(lhs, order), jnp.transpose(rhs, kernel_order)]
  )
  return jnp.transpose(output, sorted(in_order, key=output_order.__getitem__))

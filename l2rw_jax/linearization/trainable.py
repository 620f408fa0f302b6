"""The trainable leaves of a pytree of parameters.

A leaf can be differentiated if its dtype is floating-point or complex. All other leaves
(counters, masks, PRNG keys) are held fixed, and their gradients are zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base


class Partition:
  """Splits pytrees shaped like `params` into trainable leaves and the others.

  >>> import jax.numpy as jnp
  >>> params = {"count": jnp.array(3), "w": jnp.array([1., 2.])}
  >>> partition = Partition(params)
  >>> (w,) = partition.leaves(params)
  >>> print(partition.combine([2 * w])["w"], partition.combine([w])["count"])
  [2. 4.] 3
  >>> print(partition.combine_gradient([w])["count"])
  0

  Attributes:
    names: paths of the trainable leaves.
  """

  def __init__(self, params: base.PyTree):
    """Raises InputError if a leaf of `params` is not an array or a number."""
    leaves_with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    self._treedef: Any = treedef
    self._leaves = [leaf for _, leaf in leaves_with_paths]
    self._is_trainable = [_is_trainable(leaf) for leaf in self._leaves]
    self.names = [
      jax.tree_util.keystr(path, simple=True, separator="/")
      for (path, _), keep in zip(leaves_with_paths, self._is_trainable, strict=True)
      if keep
    ]

  def leaves(self, tree: base.PyTree) -> list[base.Array]:
    """The trainable leaves of a pytree shaped like `params`."""
    leaves = self._treedef.flatten_up_to(tree)
    pairs = zip(leaves, self._is_trainable, strict=True)
    return [jnp.asarray(leaf) for leaf, keep in pairs if keep]

  def checked_leaves(self, name: str, vector: base.PyTree) -> list[base.Array]:
    """The trainable leaves of a vector, with their dtypes unchanged.

    Args:
      name: the name of the argument, for error messages.
      vector: pytree shaped like `params`.

    Raises:
      InputError: the structure or a shape is not that of `params`, or a leaf is complex
        and the parameter is not.
    """
    try:
      leaves = self.leaves(vector)
    except (TypeError, ValueError) as error:
      raise base.InputError(f"{name} must be a pytree like params: {error}") from error
    for path, leaf, of_param in zip(self.names, leaves, self._arrays(), strict=True):
      if leaf.shape != of_param.shape:
        raise base.InputError(
          f"{name} must have the shapes of params; it has {leaf.shape} at"
          f" {path or 'the root'}, where params has {of_param.shape}."
        )
      if jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(of_param):
        raise base.InputError(
          f"{name} is complex at {path or 'the root'}, where params is real: pass its"
          " real part."
        )
    return leaves

  def vector_leaves(self, name: str, vector: base.PyTree) -> list[base.Array]:
    """`checked_leaves`, cast to the dtypes of the parameters."""
    pairs = zip(self.checked_leaves(name, vector), self._arrays(), strict=True)
    return [leaf.astype(of_param.dtype) for leaf, of_param in pairs]

  def _arrays(self):
    return self.leaves(self._treedef.unflatten(self._leaves))

  def combine(self, leaves: list[Any]) -> base.PyTree:
    """A pytree of the given trainable leaves and the other leaves of `params`."""
    return self._combine(leaves, self._leaves)

  def combine_gradient(self, leaves: list[Any]) -> base.PyTree:
    """A pytree of the given gradients of trainable leaves, and zeros for the others."""
    pairs = zip(self._leaves, self._is_trainable, strict=True)
    # Zeros for a trainable leaf would add two operations to the program.
    others = [None if keep else zero_gradient(leaf) for leaf, keep in pairs]
    return self._combine(leaves, others)

  def _combine(self, leaves, others):
    remaining = iter(leaves)
    pairs = zip(others, self._is_trainable, strict=True)
    return self._treedef.unflatten(
      next(remaining) if keep else other for other, keep in pairs
    )


def check(params: base.PyTree) -> None:
  """Raises InputError unless a leaf of `params` is trainable and all are arrays.

  Without a trainable leaf, all example weights would silently be zero.
  """
  types = [_type(leaf) for leaf in jax.tree.leaves(params)]
  if not any(jnp.issubdtype(t, jnp.inexact) for t in types):
    names = sorted({str(t) for t in types})
    raise base.InputError(
      "params has no floating-point array, so nothing can be trained"
      f" (its types: {', '.join(names) or 'none'}): convert params to float32."
    )


def zero_gradient(leaf: Any) -> Any:
  """The gradient of a leaf that is held fixed: zeros of its shape and dtype.

  The zeros for typed PRNG keys have the dtype float0.
  """
  if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.extended):
    return np.zeros(jnp.shape(leaf), jax.dtypes.float0)
  return jnp.zeros_like(leaf)


def zero_gradients(tree: base.PyTree) -> base.PyTree:
  """`zero_gradient` of each leaf; leaves of the same shape and dtype share an array."""
  zeros: dict[Any, Any] = {}

  def zero(leaf):
    key = jax.typeof(leaf)
    if key not in zeros:
      zeros[key] = zero_gradient(leaf)
    return zeros[key]

  return jax.tree.map(zero, tree)


def conjugated(tree: base.PyTree) -> base.PyTree:
  """`tree` with its complex leaves conjugated; the others are unchanged.

  `jax.grad` with respect to complex parameters returns the conjugate of the direction
  of steepest ascent. Optimizers subtract multiples of what they are given, so they need
  this direction.

  >>> import jax, jax.numpy as jnp
  >>> gradient = jax.grad(lambda p: jnp.abs(p) ** 2)(1 + 2j)
  >>> print(gradient, conjugated(gradient))
  (2-4j) (2+4j)
  """

  def conj(x):
    is_complex = jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.complexfloating)
    return jnp.conj(x) if is_complex else x

  return jax.tree.map(conj, tree)


def without_keys(tree: base.PyTree) -> base.PyTree:
  """`tree` with float zeros in place of typed PRNG keys and their gradients.

  Optimizers compute with all leaves, but typed keys do not support arithmetic.
  """

  def replace(leaf):
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    is_key = jnp.issubdtype(dtype, jax.dtypes.extended) or dtype == jax.dtypes.float0
    return jnp.zeros(jnp.shape(leaf)) if is_key else leaf

  return jax.tree.map(replace, tree)


def _is_trainable(leaf: Any) -> bool:
  return bool(jnp.issubdtype(_type(leaf), jnp.inexact))


def _type(leaf: Any) -> Any:
  # `jnp.result_type` would accept types and their names, such as "f".
  if not isinstance(leaf, str | type | np.dtype):
    try:
      return jnp.result_type(leaf)
    except TypeError:
      pass
  raise base.InputError(
    f"params contains a {type(leaf).__name__}, which is not an array: separate it,"
    " for instance by eqx.partition(model, eqx.is_inexact_array)."
  )

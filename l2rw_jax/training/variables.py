"""The trained variables of a run, in a file that flax can read without this package.

To apply the network:

    from flax import serialization
    content = pathlib.Path("runs/NAME/seed-0/variables.msgpack").read_bytes()
    stored = serialization.msgpack_restore(content)
    variables = {"params": stored["params"], **stored["model_state"]}
    logits = network.apply(variables, images)
"""

import pathlib
from typing import Any

from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax.io import workdir

FILE = "variables.msgpack"


def write(folder: pathlib.Path, params: base.PyTree, model_state: base.PyTree) -> None:
  """Writes the variables of one run to `folder`.

  Args:
    folder: folder of the run.
    params: parameters of the network.
    model_state: variables of the network that are not trained.

  Raises:
    InputError: the file cannot be written.
  """
  trees = {"params": _nested(params), "model_state": _nested(model_state)}
  workdir.write_bytes(folder / FILE, serialization.msgpack_serialize(trees))


def read(folder: pathlib.Path) -> tuple[Any, Any]:
  """The variables of one run, `(params, model_state)`.

  Args:
    folder: folder of the run.

  Returns:
    Nested dictionaries of NumPy arrays. Other containers become dictionaries whose keys
    are the names of the fields or the positions of the elements, as strings. PRNG keys
    become their data, unsigned integers.

  Raises:
    InputError: the file is missing or damaged.
  """
  path = folder / FILE
  try:
    stored = serialization.msgpack_restore(path.read_bytes())
    return stored["params"], stored["model_state"]
  except OSError as error:
    raise base.InputError(f"{path} cannot be read ({error.strerror}).") from error
  # msgpack can raise nearly any error for a damaged file.
  except Exception as error:
    raise base.InputError(f"{path} is damaged ({type(error).__name__}).") from error


def restore(stored: Any, like: base.PyTree) -> base.PyTree:
  """Converts nested dictionaries to the structure of `like`.

  Args:
    stored: params or model_state, as `read` returns them.
    like: a pytree with the structure that was written, with arrays or their shapes.

  Returns:
    NumPy arrays and typed PRNG keys in the structure of `like`.

  Raises:
    InputError: `stored` lacks an array of `like`, or has it in another shape. Other
      entries of `stored` are ignored.
  """

  def leaf(path, wanted):
    value = stored
    for entry in path:
      value = value.get(_key(entry)) if isinstance(value, dict) else None
    shape = np.shape(wanted)
    if _is_key(wanted):
      shape = jax.eval_shape(jax.random.key_data, wanted).shape
    if isinstance(value, dict) or np.shape(value) != shape or value is None:
      raise base.InputError(
        f"the stored variables have no {jax.tree_util.keystr(path)} of shape"
        f" {list(np.shape(wanted))}: they are those of another model or method."
      )
    if _is_key(wanted):
      key = jnp.empty((), wanted.dtype)  # `wanted` may be only a shape.
      return jax.random.wrap_key_data(value, impl=jax.random.key_impl(key))
    return value

  return jax.tree_util.tree_map_with_path(leaf, like)


def _nested(tree: base.PyTree) -> Any:
  """A pytree as nested dictionaries of NumPy arrays."""
  result: dict[str, Any] = {}
  for path, value in jax.tree_util.tree_leaves_with_path(tree):
    value = np.asarray(jax.random.key_data(value) if _is_key(value) else value)
    if not path:
      return value
    place = result
    for entry in path[:-1]:
      place = place.setdefault(_key(entry), {})
    place[_key(path[-1])] = value
  return result


def _is_key(value: Any) -> bool:
  return jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key)


def _key(entry: Any) -> str:
  for name in ("key", "name", "idx"):
    if hasattr(entry, name):
      return str(getattr(entry, name))
  return str(entry)

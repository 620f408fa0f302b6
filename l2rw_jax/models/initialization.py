"""Initial parameters of other libraries, to reproduce results obtained with them."""

import math

from flax import traverse_util
import jax

from l2rw_jax import base


def pytorch(key: base.Array, params: base.PyTree) -> base.PyTree:
  """Draws the parameters of dense and convolution layers as PyTorch does by default.

  `torch.nn.Linear` and `torch.nn.Conv2d` draw kernels *and* biases uniformly between
  -1/sqrt(fan_in) and 1/sqrt(fan_in). The standard deviation of the kernels is therefore
  1/sqrt(3) times that of flax's default, and the biases do not start at zero.

  Args:
    key: PRNG key.
    params: parameters of a linen module. A layer is a dictionary with a "kernel"
      [..., *outputs] and possibly a "bias" [*outputs]; the fan-in is the product of the
      sizes of those kernel axes that the bias does not have. Without a bias, the kernel
      is that of a dense layer [inputs, outputs] or a convolution
      [height, width, inputs, outputs]. All other parameters are kept, for example the
      scales and biases of normalization layers.

  Returns:
    New parameters of the same structure, shapes and types, in nested dictionaries.

  Raises:
    InputError: the fan-in of a layer cannot be inferred from its shapes, for example
      because layers are stacked (`nn.scan`); use `jax.vmap` over a key and the
      parameters of each of these layers.
  """
  leaves = traverse_util.flatten_dict(params, keep_empty_nodes=True)
  drawn = {}
  for number, (path, leaf) in enumerate(sorted(leaves.items())):
    kernel = leaves.get((*path[:-1], "kernel"))
    if kernel is None or path[-1] not in ("kernel", "bias"):
      drawn[path] = leaf
      continue
    fan_in = _fan_in(path[:-1], kernel, leaves.get((*path[:-1], "bias")))
    bound = max(fan_in, 1) ** -0.5
    leaf_key = jax.random.fold_in(key, number)
    drawn[path] = jax.random.uniform(leaf_key, leaf.shape, leaf.dtype, -bound, bound)
  return traverse_util.unflatten_dict(drawn)


def _fan_in(path, kernel, bias):
  """Number of inputs of each output of a layer."""
  num_axes = kernel.ndim - (1 if bias is None else bias.ndim)
  is_known = (
    num_axes in (1, 3) if bias is None else kernel.shape[num_axes:] == bias.shape
  )
  if not is_known:
    given = "and it has no bias" if bias is None else f"its bias {bias.shape}"
    raise base.InputError(
      f"the fan-in of layer {'/'.join(path)} is unknown: its kernel has shape"
      f" {kernel.shape}, {given}. Map stacked layers with jax.vmap, and give"
      " convolutions of 1 or 3 dimensions a bias."
    )
  return math.prod(kernel.shape[:num_axes])

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
      [..., inputs, outputs] and possibly a "bias" [outputs]; the fan-in is the product
      of all axes of the kernel except the last. All other parameters are kept, for
      example the scales and biases of normalization layers.

  Returns:
    New parameters of the same structure, shapes and types, in nested dictionaries.
  """
  leaves = traverse_util.flatten_dict(params, keep_empty_nodes=True)
  drawn = {}
  for number, (path, leaf) in enumerate(sorted(leaves.items())):
    kernel = leaves.get((*path[:-1], "kernel"))
    if kernel is None or path[-1] not in ("kernel", "bias"):
      drawn[path] = leaf
      continue
    bound = max(math.prod(kernel.shape[:-1]), 1) ** -0.5
    leaf_key = jax.random.fold_in(key, number)
    drawn[path] = jax.random.uniform(leaf_key, leaf.shape, leaf.dtype, -bound, bound)
  return traverse_util.unflatten_dict(drawn)

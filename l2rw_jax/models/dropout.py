"""Dropout whose masks do not depend on the number of devices."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2rw_jax import base


class Dropout(nn.Module):
  """Zeroes a share of the values, scales up the rest; in training only.

  Each example has a key of its own, folded with its place in the *global* batch:
  eight devices draw together what one would. (flax's own draws one mask from a
  key that all devices share, so that equal masks meet different examples.) A
  batch that all devices hold whole, as a meta batch that does not divide among
  them, gets other masks on each.

  Attributes:
    rate: probability of a zero, in [0, 1).
    axis_name: mapped axis over which the batch is sharded.
  """

  rate: float
  axis_name: base.AxisName = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[B, ...] to [B, ...]; needs the flax rng "dropout" in training."""
    if not train or self.rate == 0:
      return x
    size = base.global_size(x.shape[0], self.axis_name)
    places = base.local_slice(jnp.arange(size), self.axis_name)
    key = self.make_rng("dropout")
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, places)
    kept = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - self.rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)

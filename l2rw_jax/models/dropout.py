"""Dropout whose masks do not depend on the number of devices."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2rw_jax import base


class Dropout(nn.Module):
  """Dropout, which is applied only in training.

  The key of an example is derived from its position in the *global* batch, so that
  eight devices draw the same masks as one. (With `flax.linen.Dropout`, all devices have
  the same key and apply the same mask to different examples.) If every device has the
  whole batch, as with a meta batch that cannot be divided among devices, the masks
  differ between devices.

  Attributes:
    rate: probability of a zero, in [0, 1).
    axis_name: mapped axis over which the batch is sharded.
  """

  rate: float
  axis_name: base.AxisName = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps [B, ...] to [B, ...]; needs the flax rng "dropout" in training.

    Raises:
      InputError: `rate` is not in [0, 1).
    """
    if not 0 <= self.rate < 1:
      raise base.InputError(
        f"Dropout: rate={self.rate} must be at least 0, less than 1."
      )
    if not train or self.rate == 0:
      return x
    size = base.global_size(x.shape[0], self.axis_name)
    positions = base.local_slice(jnp.arange(size), self.axis_name)
    key = self.make_rng("dropout")
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)
    kept = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - self.rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)

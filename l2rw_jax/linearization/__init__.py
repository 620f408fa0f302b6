"""Per-example losses of a batch, linearized: slopes and weighted gradients."""

from l2rw_jax.linearization.engines import ENGINES
from l2rw_jax.linearization.engines import linearize
from l2rw_jax.linearization.engines import linearize_outputs

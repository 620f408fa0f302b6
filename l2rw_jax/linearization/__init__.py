"""Linearization of the per-example losses of a batch."""

from l2rw_jax.linearization.engines import ENGINES
from l2rw_jax.linearization.engines import linearize
from l2rw_jax.linearization.engines import linearize_outputs

"""Training on data that is wrong, in JAX: example weights as pure functions."""

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax.linearization import linearize
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.methods.l2rw import weighted_value_and_grad

__version__ = "0.1.0"

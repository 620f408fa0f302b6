"""Training on noisy, imbalanced or redundant data with per-example weights, in JAX."""

from l2rw_jax import audit
from l2rw_jax import base
from l2rw_jax import changed_loss
from l2rw_jax import class_balance
from l2rw_jax import coresets
from l2rw_jax import group_objectives
from l2rw_jax import hypergradient
from l2rw_jax import label_transition
from l2rw_jax import losses
from l2rw_jax import meta_network
from l2rw_jax import susceptibility
from l2rw_jax.linearization import linearize
from l2rw_jax.linearization import linearize_outputs
from l2rw_jax.linearization import memory_plans
from l2rw_jax.linearization import per_example
from l2rw_jax.methods import absgd
from l2rw_jax.methods import adacore
from l2rw_jax.methods import advisor
from l2rw_jax.methods import bare
from l2rw_jax.methods import baselines
from l2rw_jax.methods import forml
from l2rw_jax.methods import forward_correction
from l2rw_jax.methods import group_dro
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import ldam_drw
from l2rw_jax.methods import mentornet
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.methods import nested_maml
from l2rw_jax.methods import s_model
from l2rw_jax.methods import warpi
from l2rw_jax.methods.l2rw import weighted_value_and_grad
from l2rw_jax.models import few_shot

__version__ = "0.1.0"

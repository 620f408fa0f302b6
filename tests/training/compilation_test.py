"""The cache of compiled functions."""

import jax
import toy_runs

from l2rw_jax import base
from l2rw_jax.methods import baselines
from l2rw_jax.training import compilation


def test_functions_are_cached_by_all_arguments():
  uniform = baselines.uniform()
  method = base.Method(uniform.gradients, uniform.init)
  devices = tuple(jax.local_devices()[:1])

  def functions(model=toy_runs.MODEL, num_steps=7, num_runs=1):
    return compilation.functions(
      model, method, toy_runs.OPTIMIZER, 40, num_steps, num_runs, devices
    )

  equal = toy_runs.MODEL._replace(model=toy_runs.MODEL.model.clone())
  assert functions() is functions(model=equal)
  other = toy_runs.MODEL._replace(model=toy_runs.MODEL.model.clone(hidden=(5,)))
  cases = [functions(), functions(other), functions(num_steps=8), functions(num_runs=2)]
  assert len({id(case) for case in cases}) == 4

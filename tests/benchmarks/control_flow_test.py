"""The benchmark of convolutions in loops: all variants compute the same gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import control_flow
from l2rw_jax import base


def _losses(params, batch):
  x = jax.lax.conv(batch["image"], params, (1, 1), "SAME")
  return jnp.tanh(x).sum((1, 2, 3))


def test_all_variants_compute_the_same_gradient():
  rng = np.random.default_rng(0)
  params, images = rng.normal(size=(2, 3, 3, 3)), rng.normal(size=(8, 3, 5, 4))
  with jax.enable_x64():
    gradients = [
      control_flow.make_gradient(_losses, *way)(
        jnp.asarray(params), {"image": jnp.asarray(images)}, jnp.ones((), bool)
      )
      for way in control_flow.WAYS
    ]
    for gradient in gradients[1:]:
      chex.assert_trees_all_close(gradient, gradients[0], rtol=1e-12)


def test_batch_size_must_be_a_multiple_of_four(tmp_path):
  with pytest.raises(base.InputError, match="--batch_size=6: give a multiple of 4"):
    control_flow.run(control_flow.Settings(batch_size=6), tmp_path)

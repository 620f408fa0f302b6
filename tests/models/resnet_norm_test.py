"""ResNet with GroupNorm: as many parameters, and examples one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.models import resnet


def _shapes(model):
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), image)


def test_the_parameters_are_those_of_batch_norm_without_statistics():
  group, batch = (_shapes(resnet.ResNet(10, norm=norm)) for norm in resnet.NORMS[::-1])
  assert list(group) == ["params"] and set(batch) == {"params", "batch_stats"}
  renamed = {k.replace("Group", "Batch"): v for k, v in group["params"].items()}
  assert renamed == batch["params"]


def test_it_can_be_linearised_layer_by_layer():
  model = resnet.ResNet(3, blocks=1, width=8, norm="group")
  images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), images)

  def losses_fn(params, batch):
    logits = model.apply(params, batch, train=True)
    return losses.softmax_cross_entropy(logits, jnp.arange(4) % 3)

  @functools.partial(jax.jit, static_argnums=1)
  def change(variables, engine):
    found = linearization.linearize(losses_fn, variables, images, engine=engine)
    return found.directional(variables)

  found = [change(variables, engine) for engine in ("layerwise", "forward")]
  np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("options", "message"),
  [({"norm": "layer"}, "norm='layer': choose"), ({"width": 12}, "a multiple of 8")],
)
def test_what_cannot_be(options, message):
  model = resnet.ResNet(3, norm="group", blocks=1).clone(**options)
  with pytest.raises(base.InputError, match=message):
    _shapes(model)

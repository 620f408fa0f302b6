"""FLOPs of a training step, as counted by the compiler. Nothing is run.

Counts are taken before optimization, since compiling takes most of the time. The
compiled program has the same count within one percent, except for the literal form,
from which the compiler removes repeated operations.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax.methods import advisor
from l2rw_jax.methods import baselines
from l2rw_jax.methods import forml
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.methods import warpi
from l2rw_jax.models import classifier
from l2rw_jax.models import gpt
from l2rw_jax.models import lenet
from l2rw_jax.models import resnet

_B = 100
_OPTIMIZER = optax.sgd(0.1)
_NETWORKS = {
  "lenet": (lenet.LeNet(10), (28, 28, 1)),
  "resnet": (resnet.ResNet(10, blocks=1), (16, 16, 3)),
}
# The compiler counts the body of a loop only once, so the loop is unrolled.
_GPT = functools.partial(
  gpt.GPT, 10, 32, 3, scan=True, unroll=3, tied=False, last_only=True
)
_SCANNED = {
  "gpt_scan": (_GPT(), (16,)),
  "gpt_scan_remat": (_GPT(remat=True), (16,)),
}


class _Problem(NamedTuple):
  """A problem with the shapes of its variables."""

  problem: base.Problem
  params: Any
  model_state: Any
  batch: Any

  def meta_batch(self, size):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), self.batch
    )


@functools.cache
def _problem(name):
  network, shape = (_NETWORKS | _SCANNED)[name]
  dtype = jnp.int32 if name in _SCANNED else jnp.float32
  batch = {
    "image": jax.ShapeDtypeStruct((_B, *shape), dtype),
    "label": jax.ShapeDtypeStruct((_B,), jnp.int32),
    "index": jax.ShapeDtypeStruct((_B,), jnp.int32),
  }
  model = classifier.Classifier(network, 10)
  params, model_state = jax.eval_shape(model.init, jax.random.key(0), batch)
  problem = model.problem(
    class_counts=jnp.full(10, 100), num_examples=1000, num_steps=10
  )
  return _Problem(problem, params, model_state, batch)


def _updated(params, grads):
  updates, _ = _OPTIMIZER.update(grads, _OPTIMIZER.init(params), params)
  return optax.apply_updates(params, updates)


def _flops(step_fn, *shapes, compiled=False):
  program = jax.jit(step_fn).lower(*shapes)
  return (program.compile() if compiled else program).cost_analysis()["flops"]


@functools.cache
def _plain_flops(name):
  problem, params, model_state, batch = _problem(name)

  def step_fn(params, model_state, batch):
    def mean_loss(params):
      losses_fn = problem.losses_fn(model_state, jax.random.key(0))
      values, new_state = losses_fn(params, batch)
      return values.mean(), (values, new_state)

    grads, aux = jax.grad(mean_loss, has_aux=True)(params)
    return _updated(params, grads), aux

  return _flops(step_fn, params, model_state, batch)


def _method_flops(method, name, num_meta):
  problem, params, model_state, batch = _problem(name)

  def init(params):
    return method.init(jax.random.key(1), problem, params)

  def step_fn(state, params, model_state, batch, meta_batch):
    opt_state, step = _OPTIMIZER.init(params), jnp.int32(0)
    inputs = base.Inputs(
      params, model_state, opt_state, batch, meta_batch, step, jax.random.key(0)
    )
    result, state = method.gradients(state, problem, inputs)
    return _updated(params, result.grads), result, state

  meta_batch = _problem(name).meta_batch(num_meta)
  state = jax.eval_shape(init, params)
  return _flops(step_fn, state, params, model_state, batch, meta_batch)


@functools.cache
def _l2rw_flops(name, num_meta):
  return _method_flops(l2rw.l2rw(), name, num_meta)


def _literal_flops(name, num_meta):
  """FLOPs of algorithm 1 as published: reverse over reverse, then a second pass."""
  problem, params, model_state, batch = _problem(name)

  def step_fn(params, model_state, batch, meta_batch):
    def losses_of(params, batch):
      return problem.losses_fn(model_state, jax.random.key(0))(params, batch)[0]

    scores = -hypergradient.unrolled_weight_gradient(
      losses_of,
      losses_of,
      params,
      batch,
      meta_batch,
      jnp.zeros(_B),
      optimizer=_OPTIMIZER,
      opt_state=_OPTIMIZER.init(params),
    )
    weights = jnp.maximum(scores, 0) / jnp.maximum(scores, 0).sum()
    grads = jax.grad(lambda p: weights @ losses_of(p, batch))(params)
    return _updated(params, grads), weights

  meta_batch = _problem(name).meta_batch(num_meta)
  return _flops(step_fn, params, model_state, batch, meta_batch, compiled=True)


# Limits for M = B and for M = B / 10. The costs in forward passes of an example are
# 5B + 3M with BatchNorm (forward mode) and 4B + 3M for LeNet and GPT (layerwise),
# relative to 3B of plain training; with `jax.checkpoint`, 6B + 4M relative to 4B
# (forward mode).
_LIMITS = {
  "lenet": (2.40, 1.48),
  "resnet": (2.70, 1.80),
  "gpt_scan": (2.40, 1.48),
  "gpt_scan_remat": (2.60, 1.70),
}


@pytest.mark.ci(unless=("1-10-lenet", "1-10-gpt_scan"))
@pytest.mark.slow("0-100-gpt_scan", "0-100-resnet", "1-10-gpt_scan_remat")
@pytest.mark.parametrize("name", _LIMITS)
@pytest.mark.parametrize(("column", "num_meta"), [(0, _B), (1, _B // 10)])
def test_a_step_of_l2rw_has_the_documented_cost(name, column, num_meta):
  ratio = _l2rw_flops(name, num_meta) / _plain_flops(name)
  assert 1 < ratio <= _LIMITS[name][column]


def test_a_share_of_the_layers_and_a_rare_clean_gradient_add_less_than_a_tenth():
  """At most 1.08 times the cost of a plain step, for M = B / 10.

  The step costs 3B + 0.2B + 3M / 10 forward passes of an example, a plain step 3B.
  """
  problem, params, _, batch = _problem("lenet")
  meta_batch = _problem("lenet").meta_batch(_B // 10)

  def losses_fn(params, batch):
    return problem.losses_fn({}, jax.random.key(0))(params, batch)[0]

  def step_fn(params, batch, meta_batch, direction=None):
    value_and_grad = l2rw.weighted_value_and_grad(losses_fn, layers=0.2)
    return value_and_grad(params, batch, meta_batch, direction=direction)

  direction = jax.eval_shape(
    lambda *args: l2rw.meta_direction(losses_fn, *args), params, meta_batch
  )
  refresh = _flops(step_fn, params, batch, meta_batch)
  keep = _flops(step_fn, params, batch, meta_batch, direction)
  assert keep < refresh < _l2rw_flops("lenet", _B // 10)
  assert 1 < (0.9 * keep + 0.1 * refresh) / _plain_flops("lenet") <= 1.08


@pytest.mark.slow
@pytest.mark.parametrize("name", _NETWORKS)
def test_the_literal_form_costs_more(name):
  assert _literal_flops(name, _B // 10) > 1.1 * _l2rw_flops(name, _B // 10)


@pytest.mark.parametrize("name", _NETWORKS)
def test_uniform_weights_cost_no_more_than_plain_training(name):
  flops = _method_flops(baselines.uniform(), name, _B)
  assert flops <= 1.01 * _plain_flops(name)


_NETWORK_METHODS = {
  "meta_weight_net": meta_weight_net.meta_weight_net(0.1),
  "warpi": warpi.warpi(0.1),
  "advisor": advisor.advisor(0.1),
}


_WEIGHTED_LOOKAHEAD = {
  "meta_weight_net": _NETWORK_METHODS["meta_weight_net"],
  "forml": forml.forml(objective="worst", groups_fn=lambda batch: batch["label"]),
}


@pytest.mark.parametrize("method", _WEIGHTED_LOOKAHEAD)
@pytest.mark.parametrize(("num_meta", "limit"), [(_B, 2.75), (_B // 10, 1.85)])
def test_a_weighted_lookahead_saves_two_passes_with_the_layerwise_engine(
  method, num_meta, limit
):
  """5B + 3M forward passes of an example, relative to 3B: 2.67 and 1.77."""
  flops = _method_flops(_WEIGHTED_LOOKAHEAD[method], "lenet", num_meta)
  assert 1.5 < flops / _plain_flops("lenet") <= limit


def test_recomputing_the_batch_costs_meta_weight_net_two_forward_passes():
  """7B + 3M forward passes of an example, relative to 3B: 3.33."""
  method = meta_weight_net.meta_weight_net(0.1, recompute=True)
  assert 3 < _method_flops(method, "lenet", _B) / _plain_flops("lenet") <= 3.4


@pytest.mark.ci
@pytest.mark.slow(
  "10-2.45-advisor", "100-3.35-advisor", "10-2.45-warpi", "10-2.45-meta_weight_net"
)
@pytest.mark.parametrize("method", _NETWORK_METHODS)
@pytest.mark.parametrize(("num_meta", "limit"), [(_B, 3.35), (_B // 10, 2.45)])
def test_a_network_in_the_loss_has_the_documented_cost(method, num_meta, limit):
  """7B + 3M forward passes of an example, relative to 3B: 3.33 and 2.43."""
  flops = _method_flops(_NETWORK_METHODS[method], "resnet", num_meta)
  assert 1.5 < flops / _plain_flops("resnet") <= limit

"""Convolutions in loops and conditionals: values, and the layout that XLA sees."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax.linearization import control_flow
from l2rw_jax.linearization import linearize
from l2rw_jax.linearization import linearize_outputs
from l2rw_jax.linearization import microbatching
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import meta_weight_net

# Shapes of the images and the kernel, and options.
_CASES = {
  "features_last": (
    (2, 6, 5, 3),
    (3, 2, 3, 4),
    {"dimension_numbers": ("NHWC", "HWIO", "NHWC")},
  ),
  "features_first": ((2, 3, 6, 5), (4, 3, 3, 2), {}),
  "mixed": (
    (6, 2, 3, 5),
    (4, 2, 3, 3),
    {"dimension_numbers": ("HNCW", "OWIH", "CWNH")},
  ),
  "strides": (
    (2, 3, 7, 8),
    (4, 3, 3, 2),
    {"window_strides": (2, 3), "padding": "SAME"},
  ),
  "dilations": (
    (2, 3, 6, 5),
    (4, 3, 3, 2),
    {"lhs_dilation": (2, 1), "rhs_dilation": (1, 2), "padding": [(0, 1), (1, 1)]},
  ),
  "groups": ((2, 4, 6, 5), (6, 2, 3, 2), {"feature_group_count": 2}),
  "one_axis": ((2, 3, 9), (4, 3, 3), {}),
  "three_axes": ((2, 3, 4, 5, 4), (4, 3, 2, 3, 2), {}),
}


def _loss(options, kernel, images):
  options = {"window_strides": (1,) * (images.ndim - 2), "padding": "VALID"} | options
  return jnp.sum(jnp.tanh(jax.lax.conv_general_dilated(images, kernel, **options)))


@pytest.mark.ci(unless=("one_axis-True",))
@pytest.mark.slow(
  unless=("one_axis-True", "mixed-False", "strides-True", "groups-False")
)
@pytest.mark.parametrize("is_batched", [False, True])
@pytest.mark.parametrize("case", _CASES)
def test_values_and_derivatives_are_the_same(case, is_batched):
  shape, kernel_shape, options = _CASES[case]
  rng = np.random.default_rng(0)
  prefix = (2,) if is_batched else ()
  kernel, images = (rng.normal(size=prefix + s) for s in (kernel_shape, shape))
  both = jax.value_and_grad(functools.partial(_loss, options), argnums=(0, 1))
  converted = control_flow.channels_last(jax.jit(both))
  if is_batched:
    both, converted = jax.vmap(both), jax.vmap(converted)
  with jax.enable_x64():
    kernel, images = jnp.asarray(kernel), jnp.asarray(images)
    for x, y in zip(
      jax.tree.leaves(both(kernel, images)),
      jax.tree.leaves(converted(kernel, images)),
      strict=True,
    ):
      assert x.dtype == y.dtype
      np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_other_devices_and_other_operations_are_not_changed(monkeypatch):
  key = jax.random.key(0)

  def function(x, key):
    return {"a": x["b"] + 1, "key": jax.random.fold_in(key, 1), "none": None}

  result = control_flow.channels_last(function)({"b": jnp.arange(2)}, key)
  assert result["none"] is None
  assert result["key"] == jax.random.fold_in(key, 1)
  np.testing.assert_array_equal(result["a"], [1, 2])
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert control_flow.channels_last(function) is function


def _convolutions(lowered):
  """The layouts of all convolutions in loops and conditionals, and of the others."""
  inside, outside = set(), set()

  def visit(operation, place):
    if operation.name == "stablehlo.convolution":
      numbers = str(operation.attributes["dimension_numbers"])
      place.add(re.search(r"conv<(.*)>", numbers)[1])
    if operation.name == "func.call":
      visit(functions[operation.attributes["callee"].value], place)
    if operation.name in ("stablehlo.while", "stablehlo.case"):
      place = inside
    for region in operation.regions:
      for block in region:
        for inner in block:
          visit(inner.operation, place)

  module = lowered.compiler_ir().operation
  functions = {
    op.operation.attributes["sym_name"].value: op.operation
    for op in module.regions[0].blocks[0]
  }
  visit(functions["main"], outside)
  return inside, outside


_FEATURES_LAST = {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
_PARAMS = {
  "kernel": jax.ShapeDtypeStruct((3, 3, 1, 2), jnp.float32),
  "dense": jax.ShapeDtypeStruct((1, 3), jnp.float32),
}
_BATCH = {
  "image": jax.ShapeDtypeStruct((4, 6, 6, 1), jnp.float32),
  "label": jax.ShapeDtypeStruct((4,), jnp.int32),
}


def _logits(params, images):
  x = images
  for _ in range(2):  # The second one has a gradient with respect to its input.
    x = jax.lax.conv_general_dilated(
      x,
      params["kernel"],
      (1, 1),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ).sum(-1, keepdims=True)
  return x.mean((1, 2)) * params["dense"]


def _losses(params, batch):
  logits = _logits(params, batch["image"])
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


_OPTIMIZER = optax.sgd(0.1)
_PROBLEM = base.Problem(
  forward=lambda p, state, batch, *_: (_logits(p, batch["image"]), state),
  loss=lambda logits, batch: optax.softmax_cross_entropy_with_integer_labels(
    logits, batch["label"]
  ),
  linearize=linearize,
  linearize_outputs=linearize_outputs,
  num_classes=3,
  class_counts=np.ones(3),
  num_examples=8,
  num_steps=4,
)


@pytest.mark.parametrize("is_differentiated", [False, True])
def test_rematerialized_layers_have_features_last(is_differentiated):
  losses_fn = jax.checkpoint(_losses)

  def step(total, batch):
    if is_differentiated:
      gradient = jax.grad(lambda p: losses_fn(p, batch).sum())(_concrete(_PARAMS))
      return total + gradient["dense"].sum(), None
    return total + losses_fn(_concrete(_PARAMS), batch).sum(), None

  def loop(batch):
    batches = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
    return jax.lax.scan(control_flow.channels_last(step), jnp.zeros(()), batches)[0]

  lowered = jax.jit(loop).lower(_BATCH)
  inside, outside = _convolutions(lowered)
  assert inside == _FEATURES_LAST and not outside
  if is_differentiated:  # The barrier makes XLA recompute values, not store them.
    assert "optimization_barrier" in lowered.as_text()


def _concrete(shapes):
  return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def test_names_of_scopes_are_kept():
  def step(x, _):
    with jax.named_scope("the_scope"):
      return jnp.sin(x), None

  def loop(x):
    return jax.lax.scan(control_flow.channels_last(step), x, length=2)[0]

  assert "the_scope" in jax.jit(loop).lower(1.0).as_text(debug_info=True)


def test_values_can_be_inspected_without_jit():
  with jax.disable_jit():
    result = control_flow.cond(
      True, lambda x: x if x > 0 else -x, lambda x: x, jnp.float32(-2)
    )
  assert result == 2


def test_keyword_arguments_are_supported():
  assert control_flow.channels_last(lambda a, *, b: a - b)(3.0, b=1.0) == 2


@pytest.mark.parametrize("cond", [jax.lax.cond, control_flow.cond])
def test_only_conditionals_of_this_module_have_features_last(cond):
  def step(params, batch, pred):
    def gradient(params):
      return jax.grad(lambda p: _losses(p, batch).sum())(params)

    return cond(pred, gradient, lambda params: params, params)

  pred = jax.ShapeDtypeStruct((), bool)
  inside, outside = _convolutions(jax.jit(step).lower(_PARAMS, _BATCH, pred))
  assert (inside == _FEATURES_LAST) == (cond is control_flow.cond) and not outside


def test_microbatches_have_features_last():
  linearize_batch = microbatching.microbatched(linearize, 2)

  def step(params, batch):
    linearized = linearize_batch(_losses, params, batch)
    return linearized.weighted_gradient(linearized.directional(params))

  inside, outside = _convolutions(jax.jit(step).lower(_PARAMS, _BATCH))
  assert inside == _FEATURES_LAST and not outside


@pytest.mark.parametrize(
  "method",
  [
    baselines.fine_tuning(2),
    l2rw.l2rw(refresh_every=2),
    meta_weight_net.meta_weight_net(0.1, every=2),
  ],
  ids=["fine_tuning", "l2rw", "meta_weight_net"],
)
def test_conditionals_of_methods_have_features_last(method):
  def step(params, batch, count, key):
    opt_state = _OPTIMIZER.init(params)
    inputs = base.Inputs(params, {}, opt_state, batch, batch, count, key)
    state = method.init(key, _PROBLEM, params)
    return method.gradients(state, _PROBLEM, inputs)[0].grads

  count = jax.ShapeDtypeStruct((), jnp.int32)
  lowered = jax.jit(step).lower(_PARAMS, _BATCH, count, jax.random.key(0))
  inside, _ = _convolutions(lowered)
  assert inside == _FEATURES_LAST

"""L2RW: the paper's equations, edge cases, and `weighted_value_and_grad`."""

import dataclasses
import functools

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import l2rw_jax
from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax import normalization
from l2rw_jax.methods import l2rw

_B, _M, _CLASSES = 6, 4, 3


def _examples(seed, size):
  rng = np.random.default_rng(seed)
  return {
    "x": rng.normal(size=(size, 4)).astype(np.float32),
    "label": rng.integers(_CLASSES, size=size, dtype=np.int32),
  }


_BATCH, _META = _examples(0, _B), _examples(1, _M)


def _params(seed=2):
  rng = np.random.default_rng(seed)
  shapes = {"w": (4, 5), "out": (5, _CLASSES)}
  return {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}


def _losses_fn(params, batch):
  logits = jnp.tanh(batch["x"] @ params["w"]) @ params["out"]
  return losses.softmax_cross_entropy(logits, batch["label"])


_example_weights = jax.jit(functools.partial(l2rw.example_weights, _losses_fn))


def _squared(params, batch):
  return (batch["x"] @ params - batch["y"]) ** 2 / 2


_squared_value_and_grad = jax.jit(l2rw.weighted_value_and_grad(_squared))


def _hand_case(**meta):
  batch = {"x": jnp.eye(2), "y": jnp.array([1.0, -1.0])}
  return jnp.zeros(2), batch, {k: jnp.array(v) for k, v in meta.items()}


def test_weights_match_hand_computed_values():
  # The gradients of the losses are [-1, 0] and [0, 1], and that of the meta loss is
  # -2 * [1, -0.5]: scores 2 and 1.
  data = _hand_case(x=[[1.0, -0.5]], y=[2.0])
  info = jax.jit(functools.partial(l2rw.example_weights, _squared))(*data)
  np.testing.assert_allclose(info.scores, [2.0, 1.0], rtol=1e-6)
  np.testing.assert_allclose(info.weights, [2 / 3, 1 / 3], rtol=1e-6)
  np.testing.assert_allclose(info.losses, [0.5, 0.5], rtol=1e-6)
  np.testing.assert_allclose(info.meta_loss, 2.0, rtol=1e-6)
  assert info.finite
  assert info.aux is None
  (loss, _), grads = _squared_value_and_grad(*data)
  np.testing.assert_allclose(loss, 0.5, rtol=1e-6)
  np.testing.assert_allclose(grads, [-2 / 3, 1 / 3], rtol=1e-6)


def test_rejecting_all_examples_gives_zero_weights_without_nan():
  data = _hand_case(x=[[-1.0, 1.0]], y=[2.0])
  (loss, info), grads = jax.device_get(_squared_value_and_grad(*data))
  assert (info.scores < 0).all()
  assert not info.weights.any()
  assert loss == 0
  assert not grads.any()


def test_scores_are_inner_products_of_gradients():
  params, info = _params(), _example_weights(_params(), _BATCH, _META)
  jacobian = jax.jit(jax.jacrev(_losses_fn))(params, _BATCH)
  meta_gradient = jax.jit(jax.grad(lambda p: _losses_fn(p, _META).mean()))(params)
  products = sum(
    np.tensordot(jacobian[name], meta_gradient[name], 2) for name in params
  )
  np.testing.assert_allclose(info.scores, products, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(np.sum(info.weights), 1, rtol=1e-6)
  rectified = np.maximum(info.scores, 0)
  np.testing.assert_allclose(info.weights, rectified / rectified.sum(), rtol=1e-6)
  assert 0 < np.count_nonzero(info.weights) < _B


@pytest.mark.parametrize("rate", [1e-4, 1e3])
def test_lookahead_learning_rate_cancels(rate):
  expected = _example_weights(_params(), _BATCH, _META)
  run = jax.jit(
    lambda rate: l2rw.example_weights(
      _losses_fn, _params(), _BATCH, _META, optimizer=optax.sgd(rate)
    )
  )
  actual = run(rate)
  np.testing.assert_allclose(actual.weights, expected.weights, rtol=1e-5, atol=1e-7)
  scores = rate * np.asarray(expected.scores)
  np.testing.assert_allclose(actual.scores, scores, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_order_of_examples_does_not_matter(seed):
  rng = np.random.default_rng(seed)
  order, meta_order = rng.permutation(_B), rng.permutation(_M)
  expected = _example_weights(_params(), _BATCH, _META)
  batch = {k: v[order] for k, v in _BATCH.items()}
  meta_batch = {k: v[meta_order] for k, v in _META.items()}
  actual = _example_weights(_params(), batch, meta_batch)
  np.testing.assert_allclose(
    actual.weights, np.asarray(expected.weights)[order], rtol=1e-4, atol=1e-6
  )


def _unrolled(losses_fn, params, optimizer, opt_state, meta=None):
  meta_losses_fn, meta_batch = meta or (losses_fn, _META)
  unrolled = functools.partial(
    hypergradient.unrolled_weight_gradient,
    losses_fn,
    meta_losses_fn,
    optimizer=optimizer,
    opt_state=opt_state,
  )
  return jax.jit(unrolled)(params, _BATCH, meta_batch, jnp.zeros(_B))


@pytest.mark.slow
def test_meta_batch_may_have_another_loss_and_shape():
  target = np.random.default_rng(7).normal(size=(_M, 4)).astype(np.float32)

  def meta_losses_fn(params, meta_batch):
    return jnp.sum((params["w"].sum(axis=1)[None] - meta_batch) ** 2, axis=1)

  weigh = functools.partial(
    l2rw.example_weights, _losses_fn, meta_losses_fn=meta_losses_fn
  )
  run = l2rw.weighted_value_and_grad(_losses_fn, meta_losses_fn=meta_losses_fn)
  given = _params(), _BATCH, target
  info, ((_, fused), _) = jax.jit(weigh)(*given), jax.jit(run)(*given)
  optimizer = optax.sgd(1.0)
  expected = -_unrolled(
    _losses_fn,
    _params(),
    optimizer,
    optimizer.init(_params()),
    (meta_losses_fn, target),
  )
  for outcome in (info, fused):
    np.testing.assert_allclose(outcome.scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow(unless=("auto",))
@pytest.mark.parametrize("engine", linearization.ENGINES)
def test_weighted_value_and_grad_equals_its_parts(engine):
  params = _params()
  optimizer = optax.sgd(0.1, momentum=0.9)
  _, opt_state = optimizer.update(params, optimizer.init(params), params)
  drop_in = l2rw.weighted_value_and_grad(_losses_fn, optimizer=optimizer, engine=engine)
  (loss, info), grads = jax.jit(drop_in)(params, _BATCH, _META, opt_state)

  @jax.jit
  def three_lines(params):
    w = l2rw.example_weights(
      _losses_fn,
      params,
      _BATCH,
      _META,
      optimizer=optimizer,
      opt_state=opt_state,
      engine=engine,
    )
    return w, jax.value_and_grad(lambda p: jnp.sum(w.weights * _losses_fn(p, _BATCH)))(
      params
    )

  w, (expected, expected_grads) = three_lines(params)
  tolerance = 1e-3 if engine == "difference" else 1e-5
  np.testing.assert_allclose(info.weights, w.weights, atol=tolerance)
  np.testing.assert_allclose(loss, expected, rtol=tolerance)
  chex.assert_trees_all_close(grads, expected_grads, rtol=1e-4, atol=tolerance)


def test_another_rule_can_turn_scores_into_weights():
  params, batch, clean = _regression(4)
  normalize = normalization.equal_weights
  info = l2rw.example_weights(
    _squared_errors, params, batch, clean, normalize=normalize
  )
  positive = np.asarray(info.scores) > 0
  assert 0 < positive.sum() < 4, "some scores must be positive and some negative"
  np.testing.assert_allclose(info.weights, positive / positive.sum(), rtol=1e-6)

  drop_in = l2rw_jax.weighted_value_and_grad(_squared_errors, normalize=normalize)
  (loss, fused), grads = drop_in(params, batch, clean)
  np.testing.assert_array_equal(fused.weights, info.weights)
  expected = jax.value_and_grad(
    lambda p: jnp.sum(info.weights * _squared_errors(p, batch))
  )(params)
  chex.assert_trees_all_close((loss, grads), expected, rtol=1e-5)


def test_a_rule_must_return_one_weight_for_each_example():
  params, batch, clean = _regression(4)
  with pytest.raises(base.InputError, match=r"normalize.*\[B\] = \[4\]; got \(\)"):
    l2rw.example_weights(
      _squared_errors, params, batch, clean, normalize=lambda s, _: s.max()
    )
  with pytest.raises(base.InputError, match=r"must return an array .* of type list"):
    l2rw.example_weights(
      _squared_errors, params, batch, clean, normalize=lambda *_: [0.25] * 4
    )


def test_weights_of_a_rule_that_are_not_finite_are_reported():
  params, batch, clean = _regression(4)

  def softmax(scores, axis_name):
    del axis_name
    exponentials = jnp.exp(1e6 * scores)  # The largest of them is infinite.
    return exponentials / jnp.sum(exponentials)

  with pytest.raises(FloatingPointError, match=r"weights are NaN .* check normalize"):
    l2rw.example_weights(_squared_errors, params, batch, clean, normalize=softmax)
  drop_in = l2rw.weighted_value_and_grad(_squared_errors, normalize=softmax)
  (_, info), _ = jax.jit(drop_in)(params, batch, clean)
  assert np.isfinite(info.scores).all() and np.isnan(info.weights).any()
  assert not info.finite and info.fault == base.Fault.SLOPES


def test_vmap_over_seeds_equals_a_loop():
  seeds = range(3)
  stacked = jax.tree.map(lambda *x: np.stack(x), *map(_params, seeds))
  run = l2rw.weighted_value_and_grad(_losses_fn)
  (loss, info), grads = jax.jit(jax.vmap(run, in_axes=(0, None, None)))(
    stacked, _BATCH, _META
  )
  jitted = jax.jit(run)
  for seed in seeds:
    expected = jitted(_params(seed), _BATCH, _META)
    actual = jax.tree.map(
      lambda x, seed=seed: x[seed], ((loss, info._replace(aux=None)), grads)
    )
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_vmap_works_without_jit():
  _, batch, meta_batch = _hand_case(x=[[1.0, -0.5]], y=[2.0])
  weigh = functools.partial(l2rw.example_weights, _squared)
  info = jax.vmap(weigh, in_axes=(0, None, None))(jnp.zeros((2, 2)), batch, meta_batch)
  np.testing.assert_allclose(info.weights, [[2 / 3, 1 / 3]] * 2, rtol=1e-6)
  assert info.finite.all()


def test_nan_is_reported_and_not_a_rejection():
  batch = {**_BATCH, "x": _BATCH["x"].copy()}
  batch["x"][0] = np.nan
  info = _example_weights(_params(), batch, _META)
  assert np.isnan(info.scores[0])
  assert np.isnan(info.weights[0])
  meta_batch = {**_META, "x": _META["x"] * np.nan}
  info = _example_weights(_params(), _BATCH, meta_batch)
  assert not info.finite
  assert np.isnan(info.weights).all()
  with pytest.raises(FloatingPointError, match="check meta_batch"):
    l2rw.example_weights(_losses_fn, _params(), _BATCH, meta_batch)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_losses_of_another_shape_are_refused(wrap):
  def mean(params, batch):
    return _losses_fn(params, batch).mean()

  def column(params, batch):
    return _losses_fn(params, batch)[:, None]

  for broken, shape in ((mean, r"\(\)"), (column, r"\(4, 1\)")):
    run = wrap(functools.partial(l2rw.example_weights, broken))
    with pytest.raises(base.InputError, match=f"meta_losses_fn's result.*{shape}"):
      run(_params(), _BATCH, _META)
  run = wrap(functools.partial(l2rw.example_weights, _losses_fn, meta_losses_fn=mean))
  with pytest.raises(ValueError, match=r"meta_losses_fn's result.*\(\)"):
    run(_params(), _BATCH, _META)


class _Net(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
    return nn.Dense(_CLASSES)(nn.tanh(x))


def _problem():
  def forward(params, model_state, batch, key, train):
    del key
    variables = {"params": params, **model_state}
    return _Net().apply(variables, batch["x"], train, mutable="batch_stats")

  return base.Problem(
    forward=forward,
    loss=lambda logits, batch: losses.softmax_cross_entropy(logits, batch["label"]),
    linearize=linearization.linearize,
    linearize_outputs=linearization.linearize_outputs,
    num_classes=_CLASSES,
    class_counts=jnp.array([4, 4, 4]),
    num_examples=12,
    num_steps=10,
  )


@pytest.mark.slow
def test_only_the_training_batch_changes_the_running_statistics():
  problem, key = _problem(), jax.random.key(0)
  variables = jax.jit(_Net().init, static_argnums=2)(key, _BATCH["x"], True)
  params, momentum_sgd = variables.pop("params"), optax.sgd(0.1, momentum=0.9)
  _, opt_state = momentum_sgd.update(params, momentum_sgd.init(params), params)
  inputs = base.Inputs(params, variables, opt_state, _BATCH, _META, jnp.int32(3), key)
  losses_of = problem.losses_fn(variables, key)
  want_losses, want_state = jax.jit(losses_of)(params, _BATCH)
  for optimizer in (None, momentum_sgd):
    method = l2rw.l2rw(optimizer)
    assert method.needs_meta
    outcome, state = jax.jit(lambda i, m=method: m.gradients((), problem, i))(inputs)
    assert state == ()
    chex.assert_trees_all_close(outcome.model_state, want_state, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(outcome.losses, want_losses, rtol=1e-5)
    scores = -_unrolled(
      lambda p, b: losses_of(p, b)[0],
      params,
      optimizer or optax.sgd(1.0),
      opt_state if optimizer else optax.sgd(1.0).init(params),
    )
    expected = np.maximum(scores, 0) / np.maximum(scores, 0).sum()
    np.testing.assert_allclose(outcome.weights, expected, rtol=1e-3, atol=1e-5)
    assert outcome.metrics["rejected"] == np.mean(expected == 0)
    assert outcome.metrics["direction_finite"] == 1


@pytest.mark.slow
def test_a_clean_gradient_of_some_layers_is_used_for_several_steps():
  def forward(params, model_state, batch, key, train):
    return jnp.tanh(batch["x"] @ params["w"]) @ params["out"], model_state

  problem = dataclasses.replace(_problem(), forward=forward)
  method = l2rw.l2rw(layers="out", refresh_every=2)
  metas = [_examples(seed, _M) for seed in (1, 5, 6)]
  params = [_params(seed) for seed in (2, 3, 4)]

  @jax.jit
  def run(params, metas):
    state, actual, expected = method.init(jax.random.key(0), problem, params[0]), [], []
    for step, (p, meta) in enumerate(zip(params, metas, strict=True)):
      inputs = base.Inputs(p, {}, (), _BATCH, meta, jnp.int32(step), jax.random.key(1))
      result, state = method.gradients(state, problem, inputs)
      actual.append((result.scores, result.metrics["meta_loss"], result.grads))
      if step % 2 == 0:
        direction = l2rw.meta_direction(_losses_fn, p, meta)
      value_and_grad = l2rw.weighted_value_and_grad(_losses_fn, layers="out")
      (_, info), grads = value_and_grad(p, _BATCH, None, direction=direction)
      expected.append((info.scores, info.meta_loss, grads))
      weights = l2rw.example_weights(
        _losses_fn, p, _BATCH, None, layers=["out"], direction=direction
      )
      expected.append((weights.scores, direction.meta_loss, grads))
    return actual, expected

  # `expected` alternates between the results of the two functions.
  actual, expected = run(params, metas)
  chex.assert_trees_all_close(actual, expected[::2], rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(actual, expected[1::2], rtol=1e-5, atol=1e-6)
  for options in ({"refresh_every": 0}, {"layers": 2.0}):
    with pytest.raises(base.InputError, match=r"refresh_every=0|layers=2.0"):
      l2rw.l2rw(**options)


def _squared_errors(params, batch):
  return (batch["x"] @ params - batch["y"]) ** 2


def _regression(size: int, seed: int = 0):
  rng = np.random.default_rng(seed)

  def part(n):
    return {
      "x": rng.normal(size=(n, 3)).astype(np.float32),
      "y": rng.normal(size=n).astype(np.float32),
    }

  return jnp.ones(3), part(size), part(4)


@pytest.mark.parametrize("check_vma", [True, False])
def test_two_mapped_axes_equal_one_device(check_vma):
  params, batch, clean = _regression(8)
  fun = l2rw_jax.weighted_value_and_grad(_squared_errors)
  (_, expected), grads = jax.jit(fun)(params, batch, clean)
  mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def body(params, batch, clean):
    fun = l2rw_jax.weighted_value_and_grad(_squared_errors, axis_name=("a", "b"))
    (_, info), grads = fun(params, batch, clean)
    return grads, info.scores, info.weights

  shards = P(("a", "b"))
  mapped = jax.shard_map(
    body,
    mesh=mesh,
    in_specs=(P(), shards, shards),
    out_specs=(P(), shards, shards),
    check_vma=check_vma,
  )
  result = jax.jit(mapped)(params, batch, clean)
  wanted = (grads, expected.scores, expected.weights)
  for one, other in zip(result, wanted, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_nan_example_is_reported():
  params, batch, clean = _regression(4)
  batch["x"][2] = np.nan
  with pytest.raises(
    FloatingPointError, match=r"1 of 4 training losses .* first in row 2"
  ):
    l2rw.example_weights(_squared_errors, params, batch, clean)
  weigh = jax.jit(lambda *args: l2rw.example_weights(_squared_errors, *args))
  result = weigh(params, batch, clean)
  assert not result.finite and np.isnan(result.weights).all()


def test_no_gradient_flows_through_the_weights():
  params, batch, clean = _regression(4)

  def weighted(params):
    weights = l2rw.example_weights(_squared_errors, params, batch, clean).weights
    return jnp.sum(weights * _squared_errors(params, batch))

  _, grads = l2rw_jax.weighted_value_and_grad(_squared_errors)(params, batch, clean)
  slope = jax.jit(jax.grad(weighted))(params)
  np.testing.assert_allclose(slope, grads, rtol=1e-5)


def test_weights_of_the_wrong_shape_are_refused():
  params, batch, _ = _regression(4)
  linearized = l2rw_jax.linearize(_squared_errors, params, batch)
  with pytest.raises(base.InputError, match=r"\(4,\).*\(3,\)"):
    linearized.weighted_gradient(jnp.ones(3))


def test_empty_meta_batch_is_refused_under_jit():
  params, batch, clean = _regression(4)
  clean = {name: values[:0] for name, values in clean.items()}
  with pytest.raises(base.InputError, match="meta_batch is empty"):
    jax.jit(lambda: l2rw.example_weights(_squared_errors, params, batch, clean))()


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 2}])
def test_without_meta_batch_the_error_suggests_direction(options):
  params, batch, _ = _regression(4)
  value_and_grad = l2rw.weighted_value_and_grad(_squared_errors, **options)
  message = r"meta_batch is None: .* l2rw\.meta_direction as direction="
  with pytest.raises(base.InputError, match=message):
    value_and_grad(params, batch, None)
  with pytest.raises(base.InputError, match=message):
    l2rw.example_weights(_squared_errors, params, batch, None, **options)


def test_params_with_a_function_are_refused_with_advice():
  params = {"w": jnp.ones(3), "activation": jnp.tanh}
  with pytest.raises(base.InputError, match=r"eqx\.partition"):
    l2rw_jax.linearize(lambda p, x: x @ p["w"], params, jnp.ones((2, 3)))


@pytest.mark.parametrize("where", ["training", "clean"])
def test_nan_loss_with_a_zero_gradient_is_not_finite(where):
  params, batch, clean = _regression(4)

  def spoiled(params, batch):
    losses = _squared_errors(params, batch)
    return jnp.where(jnp.arange(4) == 1, jnp.nan, losses)

  fns = {"training": (spoiled, _squared_errors), "clean": (_squared_errors, spoiled)}[
    where
  ]

  def run(batch):
    return l2rw.example_weights(fns[0], params, batch, clean, meta_losses_fn=fns[1])

  with pytest.raises(FloatingPointError, match=r"1 of 4 .* losses .* first in row 1"):
    run(batch)
  result = jax.jit(run)(batch)
  assert not result.finite and np.isfinite(result.weights).all()


def test_opt_state_without_optimizer_is_refused():
  params, batch, clean = _regression(4)
  with pytest.raises(base.InputError, match="opt_state without optimizer"):
    l2rw.example_weights(_squared_errors, params, batch, clean, opt_state=())


@pytest.mark.ci
@pytest.mark.slow("False-float16")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_small_slopes_in_half_precision_do_not_underflow(dtype, is_mixed):
  # Scores are as small as 2e-10; the smallest positive float16 is 6e-8.
  slopes = jnp.array([1e-5, -2e-5, 4e-5])
  params = jnp.zeros(2, jnp.float32 if is_mixed else dtype)

  def linear(p, x):
    return (x.astype(dtype) @ p.astype(dtype)[:, None])[:, 0]

  batch, clean = slopes[:, None] * jnp.ones((1, 2)), jnp.full((2, 2), 1e-5)
  for engine in ("layerwise", "forward", "reverse"):
    info = l2rw.example_weights(linear, params, batch, clean, engine=engine)
    assert info.scores.dtype == jnp.float32 and info.weights.dtype == dtype
    expected = 2e-5 * np.asarray(slopes)
    np.testing.assert_allclose(info.scores, expected, rtol=2e-2)
    np.testing.assert_allclose(info.weights.astype(float), [0.2, 0, 0.8], rtol=2e-2)


@pytest.mark.slow
def test_tokens_can_be_weighted():
  """Losses [B * T] give a score per token; losses [B, T] are refused with advice."""
  rng = np.random.default_rng(0)
  params = {"table": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)}
  mask = np.arange(4) < np.array([[2], [4], [3], [4]])
  text, meta_text = (
    {"ids": jnp.asarray(ids), "mask": jnp.asarray(mask)}
    for ids in rng.integers(5, size=(2, 4, 5))
  )

  def by_token(params, batch):
    h = jnp.cumsum(params["table"][batch["ids"][:, :-1]], axis=1)
    logits = jax.nn.log_softmax(h @ params["table"].T)
    values = jnp.take_along_axis(logits, batch["ids"][:, 1:, None], axis=2)[..., 0]
    return jnp.where(batch["mask"], -values, 0)

  def token_losses(params, batch):
    return by_token(params, batch).reshape(-1)

  @jax.jit
  def both(params, text, meta_text):
    expected = hypergradient.unrolled_weight_gradient(
      token_losses,
      token_losses,
      params,
      text,
      meta_text,
      jnp.zeros(16),
      optimizer=optax.sgd(1.0),
      opt_state=optax.sgd(1.0).init(params),
    )
    return l2rw.example_weights(token_losses, params, text, meta_text), -expected

  info, expected = jax.device_get(both(params, text, meta_text))
  scores = info.scores.reshape(mask.shape)
  np.testing.assert_allclose(scores, expected.reshape(mask.shape), atol=1e-6)
  assert (scores[~mask] == 0).all() and (scores[mask] != 0).all()
  np.testing.assert_allclose(info.weights.sum(), 1, rtol=1e-6)
  with pytest.raises(base.InputError, match=r"return losses.reshape\(-1\), \[B \* T\]"):
    l2rw.example_weights(by_token, params, text, meta_text)

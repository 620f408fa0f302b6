"""Meta-Weight-Net: its gradient, the released variants, the size of its network."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax import losses as losses_lib
from l2rw_jax import meta_network
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

_B, _M, _RATE = 6, 5, 0.3
_NET = meta_weight_net.WeightNet((4,))
_VARIANTS = [
  ("mean", True),
  ("sum", True),
  ("mean", False),
  ("sum", False),
]


def _losses_fn(params, batch):
  logits = jnp.tanh(batch["x"] @ params["w"]) @ params["v"]
  return losses_lib.softmax_cross_entropy(logits, batch["label"])


def _problem(dtype=np.float64):
  rng = np.random.default_rng(0)

  def examples(size):
    x = rng.normal(size=(size, 4)).astype(dtype)
    return {"x": x, "label": rng.integers(3, size=size)}

  params = {
    "w": rng.normal(size=(4, 5)).astype(dtype),
    "v": rng.normal(size=(5, 3)).astype(dtype),
  }
  batch, meta_batch = examples(_B), examples(_M)
  phi = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(dtype),
    _NET.init(jax.random.key(0), jnp.zeros(1)),
  )
  return phi, params, batch, meta_batch


def _unrolled(phi, params, batch, meta_batch, normalization, detached, optimizer):
  """The meta loss after a step on the weighted loss: the definition in the paper."""

  def weighted_loss(params):
    losses = _losses_fn(params, batch)
    seen = jax.lax.stop_gradient(losses) if detached else losses
    values = _NET.apply(phi, seen)
    weights = values / (values.sum() if normalization == "sum" else _B)
    return jnp.sum(weights * losses)

  value, gradient = jax.value_and_grad(weighted_loss)(params)
  ahead = hypergradient.lookahead_params(
    params, gradient, optimizer, optimizer.init(params), value
  )
  return _losses_fn(ahead, meta_batch).mean()


_OPTIMIZERS = {
  "sgd": optax.sgd(_RATE),
  # A large eps, because a fresh Adam otherwise ignores the size of the gradient.
  "adam": optax.adam(_RATE, eps=1.0),
  # It uses the inner loss, whose derivative depends on the variant.
  "polyak": optax.polyak_sgd(max_learning_rate=1e6),
}


@pytest.mark.ci(unless=("polyak-sum-False",))
@pytest.mark.slow(unless=("sgd-mean-True", "polyak-sum-False"))
@pytest.mark.parametrize(
  ("optimizer", "normalization", "detached"),
  [
    *(("sgd", *variant) for variant in _VARIANTS),
    *(("polyak", *variant) for variant in _VARIANTS),
    # One variant suffices: the optimizer does not depend on it.
    ("adam", "sum", False),
  ],
)
def test_gradient_equals_the_unrolled_step_and_finite_differences(
  x64, optimizer, normalization, detached
):
  phi, *rest = problem = _problem()
  options = {
    "optimizer": _OPTIMIZERS[optimizer],
    "normalization": normalization,
    "detached": detached,
  }
  result = jax.jit(
    lambda phi, *given: meta_weight_net.network_gradient(
      _NET.apply, phi, _losses_fn, *given, **options
    )
  )(*problem)
  meta_loss = jax.jit(jax.value_and_grad(functools.partial(_unrolled, **options)))
  value, literal = meta_loss(*problem)
  np.testing.assert_allclose(result.meta_loss, value, rtol=1e-12)
  assert result.finite
  scale = optax.tree.norm(literal)
  assert scale > 1e-6
  chex.assert_trees_all_close(result.gradient, literal, rtol=1e-7, atol=1e-9 * scale)
  if optimizer != "sgd":
    return
  rng = np.random.default_rng(1)

  def at(step, along):  # Uses the program that is already compiled.
    return meta_loss(jax.tree.map(lambda x, d: x + step * d, phi, along), *rest)[0]

  for _ in range(3):
    along = jax.tree.map(lambda x: rng.normal(size=x.shape), phi)
    slope = (at(1e-5, along) - at(-1e-5, along)) / 2e-5
    product = optax.tree.vdot(result.gradient, along)
    np.testing.assert_allclose(product, slope, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 1), (1,), ()])
@pytest.mark.parametrize("detached", [True, False])
def test_weights_of_another_shape_are_refused(shape, detached):
  losses = jnp.array([1.0, 2.0, 3.0])

  def weight_fn(phi, losses):
    return jnp.full(shape, phi * losses[0])

  message = r"weight_fn must return one number per loss, shape \(3,\)"
  with pytest.raises(base.InputError, match=message):
    meta_weight_net.inner_weights(weight_fn, 1.0, losses, detached=detached)
  with pytest.raises(base.InputError, match=message):
    meta_weight_net.example_weights(weight_fn, 1.0, losses)


def test_weights_of_many_losses_in_float16_are_not_zero():
  losses = jnp.ones(70_000, jnp.float16)
  weights = meta_weight_net.example_weights(lambda phi, values: phi * values, 1, losses)
  np.testing.assert_allclose(weights, 1 / 70_000, rtol=0.01)


def test_closed_form_of_the_paper(x64):
  problem = _problem()

  @jax.jit
  def parts(phi, params, batch, meta_batch):
    losses = _losses_fn(params, batch)
    per_example = jax.jacrev(_losses_fn)(params, batch)
    values = _NET.apply(phi, losses)
    inner = jax.tree.map(lambda j: jnp.tensordot(values, j, 1) / _B, per_example)
    ahead = jax.tree.map(lambda p, g: p - _RATE * g, params, inner)
    gradient = jax.grad(lambda p: _losses_fn(p, meta_batch).mean())(ahead)
    return per_example, gradient, jax.jacrev(lambda phi: _NET.apply(phi, losses))(phi)

  per_example, gradient, jacobian = jax.device_get(parts(*problem))
  products = sum(np.tensordot(per_example[k], g, 2) for k, g in gradient.items())
  expected = jax.tree.map(
    lambda j: -_RATE / _B * np.tensordot(products, j, 1), jacobian
  )
  run = functools.partial(
    meta_weight_net.network_gradient, _NET.apply, optimizer=optax.sgd(_RATE)
  )
  result = jax.jit(lambda phi, *given: run(phi, _losses_fn, *given))(*problem)
  chex.assert_trees_all_close(result.gradient, expected, rtol=1e-9, atol=1e-14)


def test_weights_match_hand_computed_values():
  losses = jnp.array([0.0, 1.0, 3.0])

  def weight_fn(k, losses):
    return k * losses

  mean = meta_weight_net.example_weights(weight_fn, 2.0, losses)
  np.testing.assert_allclose(mean, [0, 2 / 3, 2], rtol=1e-6)
  normalized = meta_weight_net.example_weights(
    weight_fn, 2.0, losses, normalization="sum"
  )
  np.testing.assert_allclose(normalized, [0, 0.25, 0.75], rtol=1e-6)
  none = meta_weight_net.example_weights(weight_fn, 0.0, losses, normalization="sum")
  np.testing.assert_array_equal(none, [0, 0, 0])
  # d/dl of sum k l^2 / 3, through the weight as well as the loss.
  inner = meta_weight_net.inner_weights(weight_fn, 2.0, losses, detached=False)
  np.testing.assert_allclose(inner, [0, 4 / 3, 4], rtol=1e-6)


@pytest.mark.ci
def test_network_has_the_released_size():
  net = meta_weight_net.WeightNet()
  phi = net.init(jax.random.key(0), jnp.zeros(1))
  assert sum(x.size for x in jax.tree.leaves(phi)) == 301
  first, last = phi["params"]["Dense_0"], phi["params"]["Dense_1"]
  assert 0.9 < jnp.abs(first["kernel"]).max() <= 1
  assert 0.09 < jnp.abs(last["kernel"]).max() <= 0.1
  assert jnp.abs(last["bias"]).max() <= 0.1 and jnp.any(first["bias"] != 0)
  weights = net.apply(phi, jnp.array([0.0, 1.0, 30.0, 1e6]))
  assert ((weights >= 0) & (weights <= 1)).all()
  deep = meta_weight_net.WeightNet((10, 10))
  assert deep.apply(deep.init(jax.random.key(0), jnp.zeros(1)), jnp.zeros(7)).shape == (
    7,
  )


def test_integer_losses_are_refused():
  # The weights would be rounded to zero.
  with pytest.raises(base.InputError, match="losses must be floating-point numbers"):
    meta_weight_net.example_weights(lambda _, x: x / 2, None, jnp.array([1, 2]))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"preset": "clothing"}, "preset='clothing'; choose among imbalance, noise"),
    ({"normalization": "max"}, "normalization='max'; choose 'mean' or 'sum'"),
    ({"every": 0}, "every=0 must be an integer of at least 1"),
  ],
)
def test_bad_settings_are_refused(arguments, message):
  with pytest.raises(base.InputError, match=message) as raised:
    meta_weight_net.meta_weight_net(0.1, **arguments)
  assert "\n" not in str(raised.value)


@pytest.mark.promotes("optax.adam raises a float to an integer step count")
@pytest.mark.parametrize("name", meta_weight_net.PRESETS)
def test_presets_match_the_releases(name):
  expected = {
    "imbalance": ("sum", False),
    "noise": ("sum", True),
    "noise_stable": ("mean", True),
    "bare": ("sum", True),
  }
  preset = meta_weight_net.PRESETS[name]
  assert preset[:2] == expected[name]
  method = meta_weight_net.meta_weight_net(0.1, name)
  phi = method.init(jax.random.key(0), None, None).params
  shapes = [layer["kernel"].shape for layer in phi["params"].values()]
  assert shapes == (
    [(1, 50), (50, 50), (50, 1)] if name == "bare" else [(1, 100), (100, 1)]
  )
  net = meta_weight_net.WeightNet.of(phi)
  assert net.hidden == ((50, 50) if name == "bare" else (100,))
  # Steps on gradients of 1 and then 0 at a parameter of 2; `first` and `last` are these
  # gradients with the weight decay.
  phi = jnp.array(2.0)
  update, state = preset.optimizer.update(
    jnp.array(1.0), preset.optimizer.init(phi), phi
  )
  second, _ = preset.optimizer.update(jnp.array(0.0), state, phi)
  first, last = 1 + 5e-4 * 2, 5e-4 * 2
  momentum = last + 0.9 * first
  nesterov = np.array([first + 0.9 * first, last + 0.9 * momentum])
  # Adam: the decay term, 1e-4 * 2, is added to the gradient, so it enters both moments.
  first, last = 1 + 2e-4, 2e-4
  mean = (0.9 * 0.1 * first + 0.1 * last) / (1 - 0.9**2)
  square = (0.999 * 1e-3 * first**2 + 1e-3 * last**2) / (1 - 0.999**2)
  by_hand = {
    "imbalance": -1e-5 * nesterov,
    "noise": -1e-3 * nesterov,
    "noise_stable": -1e-3 * np.array([1, mean / np.sqrt(square)]),
    "bare": -1e-3 * np.array([1, 0.9]),
  }
  np.testing.assert_allclose([update, second], by_hand[name], rtol=3e-5)


def _factory_step(step=0, **options):
  """One step: (losses_fn, state before, state after, `Gradients`, inputs)."""
  model = classifier.Classifier(mlp.MLP(3, (5,)), 3)
  rng = np.random.default_rng(0)

  def examples(size):
    return {
      "image": rng.normal(size=(size, 4)).astype(np.float32),
      "label": rng.integers(3, size=size).astype(np.int32),
      "index": np.arange(size, dtype=np.int32),
    }

  batch, meta_batch = examples(_B), examples(_M)
  problem = model.problem(class_counts=jnp.ones(3), num_examples=_B, num_steps=4)
  params, variables = jax.jit(model.init)(jax.random.key(0), batch)
  method = meta_weight_net.meta_weight_net(
    lambda step: _RATE * (step + 1), hidden=(4,), optimizer=optax.sgd(50.0), **options
  )
  before = jax.jit(lambda: method.init(jax.random.key(1), problem, params))()
  inputs = base.Inputs(
    params, variables, (), batch, meta_batch, jnp.int32(step), jax.random.key(2)
  )
  result, after = jax.jit(lambda s, i: method.gradients(s, problem, i))(before, inputs)

  def losses_fn(params, batch):
    return problem.losses_fn(variables, inputs.key)(params, batch)[0]

  return losses_fn, before, after, result, inputs


# The gradients of all four variants are tested above; two of them suffice to show that
# the method passes both settings on.
@pytest.mark.slow
@pytest.mark.parametrize(
  ("normalization", "detached"), [("mean", True), ("sum", False)]
)
def test_weights_use_the_updated_network(normalization, detached):
  losses_fn, before, after, result, inputs = _factory_step(
    normalization=normalization, detached=detached
  )

  @jax.jit
  def references(old_phi, new_phi):
    meta_gradient = meta_weight_net.network_gradient(
      _NET.apply,
      old_phi,
      losses_fn,
      inputs.params,
      inputs.batch,
      inputs.meta_batch,
      optimizer=optax.sgd(_RATE),
      normalization=normalization,
      detached=detached,
    )
    losses = losses_fn(inputs.params, inputs.batch)
    old, new = (
      meta_weight_net.example_weights(
        _NET.apply, phi, losses, normalization=normalization
      )
      for phi in (old_phi, new_phi)
    )
    grads_fn = jax.grad(lambda p: jnp.sum(new * losses_fn(p, inputs.batch)))
    return meta_gradient.gradient, old, new, grads_fn(inputs.params)

  gradient, old, new, grads = jax.device_get(references(before.params, after.params))
  expected = jax.tree.map(lambda p, g: np.asarray(p) - 50 * g, before.params, gradient)
  chex.assert_trees_all_close(after.params, expected, rtol=1e-4, atol=1e-6)
  assert np.abs(new - old).max() > 1e-5
  np.testing.assert_allclose(result.weights, new, rtol=1e-5)
  chex.assert_trees_all_close(result.grads, grads, rtol=1e-4, atol=1e-6)


@pytest.mark.ci
@pytest.mark.slow(unless=("2-2",))
@pytest.mark.parametrize(("step", "every"), [(0, 1), (2, 2), (1, 2)])
def test_a_step_that_recomputes_the_batch_has_the_same_results(step, every):
  (_, _, state, result, _), (_, before, recomputed_state, recomputed_result, _) = (
    _factory_step(step, every=every, recompute=recompute) for recompute in (False, True)
  )
  chex.assert_trees_all_close(recomputed_state, state, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(recomputed_result, result, rtol=1e-5, atol=1e-6)
  change = jax.tree.map(jnp.subtract, recomputed_state.params, before.params)
  assert (max(map(base.max_abs, jax.tree.leaves(change))) > 0) == (step % every == 0)


@pytest.mark.slow
@pytest.mark.parametrize(("normalization", "detached"), _VARIANTS)
def test_a_recomputed_gradient_is_the_same_in_float64(x64, normalization, detached):
  phi, params, batch, meta_batch = _problem()
  expected, actual = (
    jax.jit(
      functools.partial(
        meta_weight_net.network_gradient,
        _NET.apply,
        losses_fn=_losses_fn,
        optimizer=_OPTIMIZERS["adam"],
        normalization=normalization,
        detached=detached,
        recompute=recompute,
      )
    )(phi, params=params, batch=batch, meta_batch=meta_batch)
    for recompute in (False, True)
  )
  chex.assert_trees_all_close(actual.gradient, expected.gradient, rtol=1e-11)
  assert actual.engine == expected.engine == "layerwise"


def test_a_missing_meta_batch_is_refused():
  def gradient():
    return meta_weight_net.network_gradient(
      *(lambda phi, losses: phi * losses, 1.0, lambda params, x: params * x, 1.0),
      *(jnp.ones(2), None),
      optimizer=optax.sgd(0.1),
    )

  with pytest.raises(base.InputError, match="meta_batch is None: give clean examples"):
    jax.eval_shape(gradient)


def test_microbatches_cannot_also_be_recomputed():
  message = "recompute=True and microbatch_size=2: .* leave out recompute"
  with pytest.raises(base.InputError, match=message):
    meta_weight_net.meta_weight_net(0.1, microbatch_size=2, recompute=True)


@pytest.mark.slow
def test_preset_provides_missing_settings():
  *_, result, _ = _factory_step(preset="imbalance")
  np.testing.assert_allclose(result.weights.sum(), 1, rtol=1e-5)
  *_, result, _ = _factory_step(preset="noise_stable")
  assert result.weights.sum() < 0.9


def test_network_is_updated_every_so_many_steps():
  state = meta_network.init(jnp.array(1.0), optax.sgd(1.0))

  def meta_gradient_fn(phi):
    return meta_network.MetaGradient(
      phi, jnp.float32(7), jnp.array(True), jnp.array(False), jnp.int32(0)
    )

  phis = [
    meta_network.update(
      state, meta_gradient_fn, optax.sgd(0.5), jnp.int32(step), 3
    ).params
    for step in range(5)
  ]
  assert [float(x) for x in phis] == [0.5, 1, 1, 0.5, 1]
  always = meta_network.update(state, meta_gradient_fn, optax.sgd(0.5), jnp.int32(4))
  assert float(always.params) == 0.5 and float(always.meta_loss) == 7


@pytest.mark.slow
@pytest.mark.promotes("optax.adam raises a float to an integer step count")
def test_network_learns_small_weights_for_large_losses():
  """With 40% wrong labels, it learns weights that decrease with the loss."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(200, 5)).astype(np.float32)
  label = (x[:, 0] > 0).astype(np.int32)
  given = np.where(rng.uniform(size=200) < 0.4, 1 - label, label)

  def losses_fn(params, batch):
    return losses_lib.softmax_cross_entropy(batch["x"] @ params, batch["label"])

  params = jnp.zeros((5, 2)).at[0].set(jnp.array([-2.0, 2.0]))
  net = meta_weight_net.WeightNet((20,))
  phi = net.init(jax.random.key(1), jnp.zeros(1))
  optimizer = optax.adam(0.02)

  @jax.jit
  def update(phi, opt_state):
    result = meta_weight_net.network_gradient(
      net.apply,
      phi,
      losses_fn,
      params,
      {"x": x, "label": given},
      {"x": x[:50], "label": label[:50]},
      optimizer=optax.sgd(1.0),
    )
    updates, opt_state = optimizer.update(result.gradient, opt_state)
    return optax.apply_updates(phi, updates), opt_state

  opt_state = optimizer.init(phi)
  for _ in range(60):
    phi, opt_state = update(phi, opt_state)
  small, large = net.apply(phi, jnp.array([0.05, 4.0]))
  assert small > large + 0.3


@pytest.mark.ci
@pytest.mark.slow(unless=("True-sum",))
@pytest.mark.parametrize("normalization", ["mean", "sum"])
@pytest.mark.parametrize("detached", [True, False])
def test_a_gradient_with_a_loss_of_1e30_equals_that_in_float64(normalization, detached):
  net = meta_weight_net.WeightNet((8,))
  rng = np.random.default_rng(0)
  x, meta = rng.normal(size=(6, 3)), rng.normal(size=(4, 3))
  w = rng.normal(size=3)
  phi = jax.device_get(net.init(jax.random.key(0), jnp.zeros(1)))

  def losses_fn(params, batch):
    return (batch["x"] @ params - batch["y"]) ** 2 + batch["offset"]

  def gradient(dtype):
    def batch(x, y, offset):
      return {
        "x": x.astype(dtype),
        "y": y.astype(dtype),
        "offset": offset.astype(dtype),
      }

    return meta_weight_net.network_gradient(
      net.apply,
      jax.tree.map(lambda leaf: leaf.astype(dtype), phi),
      losses_fn,
      w.astype(dtype),
      batch(x, np.zeros(6), 1e30 * (np.arange(6) == 2)),
      batch(meta, np.ones(4), np.zeros(4)),
      optimizer=optax.sgd(0.1),
      normalization=normalization,
      detached=detached,
    )

  if normalization == "sum" and not detached:
    # The derivative of the sum of the weights multiplies all examples' gradients by
    # about 1e30.
    with pytest.raises(FloatingPointError, match="4 of 4 meta losses"):
      gradient(np.float32)
    return
  single = gradient(np.float32)
  with jax.enable_x64(True):
    double = gradient(np.float64)
  assert single.finite and double.finite
  chex.assert_trees_all_close(
    single.gradient, jax.tree.map(np.float32, double.gradient), rtol=1e-4, atol=1e-7
  )

"""Per-example losses against formulas, finite differences and extreme inputs."""

import functools

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from l2rw_jax import base
from l2rw_jax import losses

_softmax = jax.jit(losses.softmax_cross_entropy)
_sigmoid = jax.jit(losses.sigmoid_cross_entropy)


def test_cross_entropy_by_hand():
  logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0]]))
  np.testing.assert_allclose(
    _softmax(logits, jnp.array([1, 0])), [np.log(4 / 3), np.log(2)], rtol=1e-6
  )
  logits = jnp.log(jnp.array([[3.0], [1.0]]))
  np.testing.assert_allclose(
    _sigmoid(logits, jnp.array([0, 1])), [np.log(4), np.log(2)], rtol=1e-6
  )


@hypothesis.given(
  st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3), st.integers(0, 1)
)
@hypothesis.settings(deadline=None, max_examples=40)
def test_one_logit_equals_two_logits_of_which_one_is_zero(values, label):
  one = jnp.array(values, jnp.float32)[:, None]
  two = jnp.concatenate([jnp.zeros_like(one), one], axis=1)
  labels = jnp.full(3, label)
  np.testing.assert_allclose(
    _sigmoid(one, labels), _softmax(two, labels), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize("label", [0, 1])
def test_extreme_logits_give_finite_losses_and_gradients(label):
  labels = jnp.array([label])
  for loss_fn, logits in (
    (_softmax, jnp.array([[1e4, -1e4]])),
    (_sigmoid, jnp.array([[1e4]])),
  ):
    gradient = jax.grad(lambda z, f=loss_fn: f(z, labels).sum())(logits)
    assert np.isfinite(loss_fn(logits, labels)).all()
    assert np.isfinite(gradient).all()


def test_nan_logits_affect_only_their_example():
  logits = jnp.array([[1.0, 2.0], [jnp.nan, 0.0]])
  actual = np.isnan(_softmax(logits, jnp.array([0, 0])))
  np.testing.assert_array_equal(actual, [False, True])


def test_predictions():
  logits = jnp.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
  np.testing.assert_array_equal(losses.predictions(logits), [1, 0])
  logits = jnp.array([[0.3], [-0.3], [0.0]])
  np.testing.assert_array_equal(losses.predictions(logits), [1, 0, 0])


@pytest.mark.parametrize(
  "loss_fn",
  [
    _softmax,
    _sigmoid,
    losses.focal,
    losses.symmetric_cross_entropy,
    losses.generalized_cross_entropy,
    losses.bootstrapping_soft,
    losses.bootstrapping_hard,
    lambda *args: losses.forward_corrected(*args, np.eye(2)),
    lambda *args: losses.balanced_softmax(*args, np.ones(2)),
  ],
)
@pytest.mark.parametrize(
  ("logits", "labels"),
  [((4,), (4,)), ((4, 1), (3,)), ((4, 1), (4, 1)), ((2, 4, 1), (2,))],
)
def test_mismatched_shapes_are_refused(loss_fn, logits, labels):
  with pytest.raises(base.InputError, match=r"logits must be \[B, C\]"):
    loss_fn(jnp.zeros(logits), jnp.zeros(labels, jnp.int32))


_CLASSES = 3
_NOISE = np.array([[7, 2, 1], [0, 6, 4], [3, 0, 7]], np.float32) / 10
_COUNTS = np.array([50, 10, 2])
_LOSSES = {
  "cross_entropy": losses.softmax_cross_entropy,
  "focal": losses.focal,
  "focal_half": functools.partial(losses.focal, gamma=0.5),
  "sce": functools.partial(losses.symmetric_cross_entropy, alpha=0.3, beta=0.7),
  "gce": losses.generalized_cross_entropy,
  "gce_truncated": functools.partial(losses.generalized_cross_entropy, threshold=0.5),
  "soft": losses.bootstrapping_soft,
  "hard": losses.bootstrapping_hard,
  "forward": functools.partial(losses.forward_corrected, transition=_NOISE),
  "adjusted": functools.partial(losses.logit_adjusted, class_counts=_COUNTS, tau=0.5),
}


def _literal(p, label):
  """Each loss of one example from its probabilities [C], by the papers' formulas."""
  target, p_y = np.eye(len(p))[label], p[label]
  reverse = -np.sum(np.clip(p, 1e-7, 1) * np.log(np.clip(target, 1e-4, 1)))
  return {
    "cross_entropy": -np.log(p_y),
    "focal": -((1 - p_y) ** 2) * np.log(p_y),
    "focal_half": -((1 - p_y) ** 0.5) * np.log(p_y),
    "sce": -0.3 * np.log(p_y) + 0.7 * reverse,
    "gce": (1 - p_y**0.7) / 0.7,
    "gce_truncated": (1 - max(p_y, 0.5) ** 0.7) / 0.7,
    "soft": -np.sum((0.95 * target + 0.05 * p) * np.log(p)),
    "hard": -np.sum((0.8 * target + 0.2 * np.eye(len(p))[p.argmax()]) * np.log(p)),
    "forward": -np.log((p @ _NOISE)[label]),
    "adjusted": -np.log(p_y * _COUNTS[label] ** 0.5 / np.sum(p * _COUNTS**0.5)),
  }


def _losses(logits, labels):
  return {name: loss_fn(logits, labels) for name, loss_fn in _LOSSES.items()}


def _values_and_gradients(logits, labels):
  """Every loss [B], and d loss_i / d logits_i [B, C]."""
  gradients = jax.jacrev(lambda z: jax.tree.map(jnp.sum, _losses(z, labels)))(logits)
  return _losses(logits, labels), gradients


_run = jax.jit(_values_and_gradients)
_B = 12


@pytest.mark.usefixtures("x64")
def test_losses_equal_the_formulas_and_gradients_equal_finite_differences():
  rng = np.random.default_rng(0)
  logits = 2 * rng.normal(size=(_B, _CLASSES))
  logits[0] = [0.5, 0, -20]  # A probability below the smallest one of SCE, 1e-7.
  labels = np.arange(_B) % _CLASSES
  actual, gradients = _run(logits, labels)
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  expected = [_literal(row, label) for row, label in zip(p, labels, strict=True)]
  p_y = p[np.arange(_B), labels]
  assert p_y.min() < 0.5 < p_y.max()  # On both sides of the truncation.
  for name in _LOSSES:
    np.testing.assert_allclose(actual[name], [e[name] for e in expected], rtol=1e-10)
  for column in np.eye(_CLASSES):
    above, below = (_run(logits + s * column, labels)[0] for s in (1e-6, -1e-6))
    for name in _LOSSES:
      difference = (above[name] - below[name]) / 2e-6
      np.testing.assert_allclose(gradients[name] @ column, difference, atol=1e-8)


def test_large_logits_give_finite_losses_and_gradients():
  rows = np.array([[1e4, -1e4, 0], [0, 0, 0], [1e4, 1e4, -1e4], [-1e4, 0, 1e-3]])
  logits = np.repeat(rows, _CLASSES, axis=0).astype(np.float32)
  labels = np.tile(np.arange(_CLASSES), len(rows))
  values, gradients = _run(logits, labels)
  for actual in (values, gradients):
    assert all(np.isfinite(x).all() for x in actual.values()), actual
  # GCE has no gradient for an example whose label has a tiny probability.
  assert np.abs(gradients["cross_entropy"][1]).max() == 1
  assert not gradients["gce"][1].any() and not gradients["gce_truncated"][1].any()


def test_examples_are_independent_under_vmap():
  """A NaN in one example affects no other example."""
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(2, _B, _CLASSES)).astype(np.float32)
  logits[1, 3, 0] = np.nan
  labels = rng.integers(_CLASSES, size=(2, _B))
  actual = jax.jit(jax.vmap(_values_and_gradients))(logits, labels)
  for run in range(2):
    mapped = jax.tree.map(lambda x, i=run: x[i], actual)
    alone = _run(logits[run], labels[run])
    chex.assert_trees_all_close(mapped, alone, rtol=1e-4, atol=1e-5)
    for name in _LOSSES:
      is_nan = np.isnan(mapped[0][name])
      assert is_nan.sum() == run and is_nan[3] == bool(run), name


@jax.jit
def _run_binary(one, two, labels):
  """Values and slopes along the last logit, for logits [B, 1] and [B, 2]."""
  transition = _NOISE[:2, :2]
  binary = {k: v for k, v in _LOSSES.items() if k != "cross_entropy"}
  binary["forward"] = functools.partial(binary["forward"], transition=transition)
  binary["adjusted"] = functools.partial(binary["adjusted"], class_counts=_COUNTS[:2])

  def values(logits):
    return {k: v(logits, labels) for k, v in binary.items()}

  def run(logits):
    gradients = jax.jacrev(lambda z: jax.tree.map(jnp.sum, values(z)))(logits)
    return values(logits), jax.tree.map(lambda x: x[:, -1], gradients)

  return run(one), run(two)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_every_loss_of_one_logit_equals_that_of_two(scale):
  one = scale * np.array([[-2.0], [-0.3], [0.4], [3.0]] * 2, np.float32)
  two = np.concatenate([np.zeros_like(one), one], axis=1)
  actual, expected = _run_binary(one, two, np.repeat([0, 1], 4))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(actual))
  chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(
    losses.log_probabilities(one), losses.log_probabilities(two), rtol=1e-5, atol=1e-6
  )


def test_limits_of_parameters_give_known_losses():
  rng = np.random.default_rng(2)
  logits = rng.normal(size=(6, _CLASSES)).astype(np.float32)
  labels = np.arange(6) % _CLASSES

  @jax.jit
  def limits(logits):
    return {
      "focal": losses.focal(logits, labels, 0),
      "sce": losses.symmetric_cross_entropy(logits, labels, 1, 0),
      "gce": losses.generalized_cross_entropy(logits, labels, 1e-5),
      "soft": losses.bootstrapping_soft(logits, labels, 1),
      "hard": losses.bootstrapping_hard(logits, labels, 1),
      "forward": losses.forward_corrected(logits, labels, np.eye(_CLASSES)),
      "adjusted": losses.logit_adjusted(logits, labels, np.arange(_CLASSES), 0),
      "absolute": losses.generalized_cross_entropy(logits, labels, 1),
    }

  values = limits(logits)
  absolute = values.pop("absolute")
  cross_entropy = np.asarray(_softmax(logits, labels))
  for name, actual in values.items():
    np.testing.assert_allclose(actual, cross_entropy, rtol=1e-4, err_msg=name)
  np.testing.assert_allclose(absolute, 1 - np.exp(-cross_entropy), rtol=1e-5, atol=1e-6)


def test_soft_bootstrapping_has_the_gradient_of_the_entropy():
  logits = jnp.array([[0.0, 1.0, 0.5]])
  soft = losses.bootstrapping_soft
  gradient = jax.jit(jax.grad(lambda z: soft(z, jnp.array([0]), 0.0)[0]))
  p = np.exp(losses.log_probabilities(logits))[0]
  entropy = -np.sum(p * np.log(p))
  np.testing.assert_allclose(gradient(logits)[0], -p * (np.log(p) + entropy), rtol=1e-4)


def test_a_label_of_probability_zero_has_a_finite_loss():
  transition = jnp.array([[0.0, 1.0], [0.0, 1.0]])
  run = jax.jit(
    jax.value_and_grad(
      lambda z, t: losses.forward_corrected(z, jnp.array([0]), t)[0], (0, 1)
    )
  )
  value, gradient = run(jnp.array([[3.0, -3.0]]), transition)
  assert value == pytest.approx(-np.log(np.finfo(np.float32).tiny), rel=1e-5)
  assert np.isfinite(gradient[1]).all()
  np.testing.assert_allclose(gradient[0], 0, atol=1e-5)
  # A NaN in the transition matrix is not mistaken for 0.
  broken, _ = run(jnp.zeros((1, 2)), jnp.array([[np.nan, 1.0], [0.0, 1.0]]))
  assert np.isnan(broken)


@pytest.mark.parametrize(
  ("loss_fn", "options", "message"),
  [
    (losses.focal, {"gamma": -1}, "focal: gamma=-1 must be at least 0"),
    (losses.focal, {"gamma": np.nan}, "focal: gamma=nan must be"),
    (
      losses.symmetric_cross_entropy,
      {"alpha": -0.1},
      "alpha=-0.1, beta=1.0 must be finite and not negative",
    ),
    (losses.symmetric_cross_entropy, {"alpha": 0, "beta": 0}, "one must be positive"),
    (losses.generalized_cross_entropy, {"q": 0}, r"q=0 must be in \(0, 1\]"),
    (losses.generalized_cross_entropy, {"threshold": 1.0}, "threshold=1.0 must be in"),
    (losses.bootstrapping_soft, {"beta": 1.1}, "bootstrapping_soft: beta=1.1 must be"),
    (losses.bootstrapping_hard, {"beta": -0.1}, "bootstrapping_hard: beta=-0.1 must"),
    (losses.forward_corrected, {"transition": np.eye(2)}, r"shape \(2, 2\); 3 classes"),
    (losses.logit_adjusted, {"class_counts": _COUNTS, "tau": -1}, "tau=-1 must be at"),
    (losses.balanced_softmax, {"class_counts": _COUNTS[:2]}, "each of the 3 classes"),
    (losses.balanced_softmax, {"class_counts": -_COUNTS}, "must not be negative"),
  ],
)
def test_settings_out_of_range_are_refused(loss_fn, options, message):
  logits, labels = jnp.zeros((4, _CLASSES)), jnp.zeros(4, jnp.int32)
  with pytest.raises(base.InputError, match=message):
    loss_fn(logits, labels, **options)


# Impossible labels, `where`, and logits of -inf.


def _all_values_and_gradients(logits, labels, where):
  """Losses [B] and their gradients [B, C], by name."""

  def run(loss_fn):
    value, vjp_fn = jax.vjp(lambda z: loss_fn(z, labels, where=where), logits)
    return value, vjp_fn(jnp.ones_like(value))[0]

  return {name: run(loss_fn) for name, loss_fn in _LOSSES.items()}


_all_jitted = jax.jit(_all_values_and_gradients)


def test_an_impossible_label_gives_nan_and_where_excludes_it():
  logits = np.random.default_rng(0).normal(size=(6, _CLASSES)).astype(np.float32)
  labels = np.array([0, -1, _CLASSES, 1, 2, -7])
  exists = np.array([True, False, False, True, True, False])
  of_all_rows = _all_jitted(logits, labels, np.ones(6, bool))
  logits_with_nan = np.where(exists[:, None], logits, np.nan)
  chosen = _all_jitted(logits_with_nan, labels, exists)
  for name in _LOSSES:
    assert np.isnan(of_all_rows[name][0][~exists]).all(), name
    if name != "gce_truncated":  # The truncated loss is constant.
      assert np.isnan(of_all_rows[name][1][~exists]).all(), name
    for of_all, of_chosen in zip(of_all_rows[name], chosen[name], strict=True):
      assert np.isfinite(of_all[exists]).all(), name
      np.testing.assert_array_equal(of_chosen[~exists], 0, err_msg=name)
      np.testing.assert_array_equal(of_chosen[exists], of_all[exists], err_msg=name)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint32, np.int64])
def test_narrow_and_unsigned_labels_are_compared_by_value(dtype):
  logits = np.zeros((2, 300), np.float32)
  labels = np.array([3, 100], dtype)
  actual = _softmax(logits, labels)
  np.testing.assert_allclose(actual, np.log(300), rtol=1e-6)
  if dtype == np.int8:
    impossible = _softmax(logits, np.array([-1, -100], dtype))
    assert np.isnan(impossible).all()


def test_infinite_negative_logits_give_finite_losses_and_gradients():
  # Six rows, so that the program of an earlier test is used again.
  rows = np.array([[1.0, -np.inf, 2.0], [-np.inf, 0.5, -np.inf]], np.float32)
  actual = _all_jitted(np.tile(rows, (3, 1)), np.tile([2, 1], 3), np.ones(6, bool))
  two = np.array([[1.0, 2.0]], np.float32)
  same = {k: v for k, v in _LOSSES.items() if k not in ("forward", "sce", "adjusted")}
  reduced = jax.jit(lambda z: {k: v(z, np.array([1]))[0] for k, v in same.items()})(two)
  for name in _LOSSES:
    value, gradient = actual[name]
    assert np.isfinite(value).all() and np.isfinite(gradient).all(), name
    assert gradient[0, 1] == 0, name
    if name in same:  # The others depend on the number of classes.
      np.testing.assert_allclose(value[0], reduced[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
  ("loss_fn", "logits", "labels", "message"),
  [
    (losses.softmax_cross_entropy, (4, 1), np.zeros(4, int), "use sigmoid_cross"),
    (losses.sigmoid_cross_entropy, (4, 2), np.zeros(4, int), "Use softmax_cross"),
    (losses.softmax_cross_entropy, (4, 3), np.zeros(4), "labels must be integers"),
    (losses.softmax_cross_entropy, (4, 3), np.eye(4, 3, dtype=int), "labels of shape"),
  ],
)
def test_logits_or_labels_of_another_loss_are_refused(loss_fn, logits, labels, message):
  with pytest.raises(base.InputError, match=message):
    loss_fn(jnp.zeros(logits), labels)


@pytest.mark.parametrize("name", list(_LOSSES))
def test_integer_logits_are_refused(name):
  # The losses would be rounded to integers.
  with pytest.raises(base.InputError, match=r"got int32.*astype\(jnp.float32\)"):
    _LOSSES[name](jnp.array([[1, 2, 0]]), np.array([1]))


def test_an_infinite_single_logit_of_the_right_sign_has_a_loss_and_a_gradient_of_0():
  logits, labels = jnp.array([[-jnp.inf], [jnp.inf]]), jnp.array([0, 1])
  value, vjp = jax.vjp(lambda z: losses.sigmoid_cross_entropy(z, labels), logits)
  np.testing.assert_array_equal(value, [0, 0])
  np.testing.assert_array_equal(vjp(jnp.ones(2))[0], [[0], [0]])
  # The other losses convert a single logit to the logits of two classes.
  assert losses.focal(logits[:1], labels[:1]) == 0


def test_labels_other_than_0_and_1_give_nan_for_a_single_logit():
  actual = losses.sigmoid_cross_entropy(jnp.zeros((4, 1)), jnp.array([-1, 0, 1, 2]))
  np.testing.assert_array_equal(np.isnan(actual), [True, False, False, True])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", list(_LOSSES))
def test_labels_and_where_may_be_lists(name):
  logits = jnp.array([[1.0, 0.0, 2.0], [3.0, 1.0, 0.0]])
  labels, where = [2, 1], [True, False]
  actual = _LOSSES[name](logits, labels, where=where)
  expected = _LOSSES[name](logits, jnp.array(labels), where=jnp.array(where))
  np.testing.assert_array_equal(actual, expected)


@pytest.mark.filterwarnings("error")
def test_counts_transitions_and_masks_may_be_lists():
  logits, labels = jnp.array([[1.0, 0.0, 2.0]]), jnp.array([1])
  for loss_fn, table in (
    (losses.forward_corrected, _NOISE),
    (losses.balanced_softmax, _COUNTS),
  ):
    np.testing.assert_array_equal(
      loss_fn(logits, labels, table.tolist()), loss_fn(logits, labels, table)
    )
  np.testing.assert_array_equal(losses.label_scale([[True]], where=[False]), [0])
  with np.errstate(divide="ignore"):
    log_t = np.log(np.eye(2))
  loss = losses.transition_loss([[-1.0, -2.0]], [[False, True]], log_t.tolist())
  np.testing.assert_array_equal(loss, [2])


@pytest.mark.parametrize(
  "function",
  [
    *(functools.partial(loss_fn, labels=[0]) for loss_fn in _LOSSES.values()),
    losses.predictions,
    losses.log_probabilities,
  ],
)
def test_a_list_of_logits_is_refused(function):
  with pytest.raises(base.InputError, match=r"logits must be an array; got .* list"):
    function([[0.0, 1.0, 2.0]])


def test_where_is_checked():
  with pytest.raises(base.InputError, match="where must be bool of shape"):
    losses.focal(jnp.zeros((2, 3)), jnp.zeros(2, int), where=jnp.ones((2, 1), bool))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype):
  logits, labels = jnp.zeros((1, 70_000), dtype), jnp.array([1])
  for loss_fn in (losses.softmax_cross_entropy, losses.bootstrapping_hard):
    actual = loss_fn(logits, labels)
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual.astype(float), np.log(70_000), rtol=4e-3)


def test_a_numpy_transition_keeps_its_precision_after_a_trace_in_float32():
  # JAX caches a converted constant, even if double precision is turned on later.
  rng = np.random.default_rng(0)
  transition = 0.7 * np.eye(3) + 0.1
  logits, labels = rng.normal(size=(5, 3)), np.array([0, 1, 2, 0, 1])
  loss_fn = jax.jit(lambda z, y: losses.forward_corrected(z, y, transition))
  loss_fn(logits.astype(np.float32), labels.astype(np.int32))
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  expected = -np.log((p @ transition)[np.arange(5), labels])
  with jax.enable_x64(True):
    np.testing.assert_allclose(loss_fn(logits, labels), expected, rtol=1e-14)


# Balanced softmax and logit adjustment.


@jax.jit
def _balanced(logits, labels, class_counts, where):
  """Losses [B] and gradients [B, C] by name."""

  def run(loss_fn):
    value, vjp_fn = jax.vjp(
      lambda z: loss_fn(z, labels, class_counts, where=where), logits
    )
    return value, vjp_fn(jnp.ones_like(value))[0]

  adjusted = functools.partial(losses.logit_adjusted, tau=1.0)
  return {"balanced": run(losses.balanced_softmax), "adjusted": run(adjusted)}


def test_balanced_softmax_without_examples_of_a_class():
  # Class 1 has no training examples. Rows 3 and 4 have label 1; the label of row 5 is
  # not a class.
  logits = np.random.default_rng(0).normal(size=(6, _CLASSES)).astype(np.float32)
  logits[1] = [-1e8, 1e30, -1e8 + 64]
  labels, counts = np.array([0, 2, 0, 1, 1, 3]), np.array([6, 0, 3])
  where = np.array([True, True, False, True, False, True])
  z = logits[:, [0, 2]].astype(float)
  shifted = np.exp(z - z.max(axis=1, keepdims=True)) * [6, 3]
  p = (shifted / shifted.sum(axis=1, keepdims=True))[:3]
  for value, gradient in _balanced(logits, labels, counts, where).values():
    expected = [-np.log(p[0, 0]), -np.log(p[1, 1]), 0, np.inf, 0, np.nan]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient[0], [p[0, 0] - 1, 0, p[0, 1]], rtol=1e-5)
    assert np.isfinite(gradient[1]).all() and gradient[1, 1] == 0
    assert not gradient[2:5].any() and np.isnan(gradient[5, [0, 2]]).all()


def test_balanced_softmax_with_impossible_counts():
  logits, labels = np.ones((6, _CLASSES), np.float32), np.array([0, 1, 2, 0, -1, 3])
  where = np.arange(6) != 3
  none, negative, only_class_2 = (
    _balanced(logits, labels, np.array(counts), where)
    for counts in ([0, 0, 0], [3, -1, 1], [0, 0, 3])
  )
  for name, (value, gradient) in none.items():
    np.testing.assert_array_equal(value, [np.inf] * 3 + [0, np.nan, np.nan])
    assert not gradient[:4].any()
    # The loss of a label that is not a class is NaN, although the code computes it as
    # that of class 0, which has no examples here.
    np.testing.assert_array_equal(
      only_class_2[name][0], [np.inf, np.inf, 0, 0, np.nan, np.nan]
    )
    assert np.isnan(negative[name][0]).all()


def test_balanced_softmax_adjusts_balanced_logits_to_the_training_posterior():
  # Logits log p(x | y) are optimal for balanced classes. With the training counts, the
  # loss must therefore be the cross-entropy of the posterior in the training set.
  likelihood = np.random.default_rng(1).dirichlet(np.ones(6), size=_CLASSES).T
  posterior = likelihood * _COUNTS / (likelihood @ _COUNTS)[:, None]
  labels, where = np.arange(6) % _CLASSES, np.ones(6, bool)
  logits = np.log(likelihood).astype(np.float32)
  for value, gradient in _balanced(logits, labels, _COUNTS, where).values():
    expected = -np.log(posterior[np.arange(6), labels])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    target = np.eye(_CLASSES)[labels]
    np.testing.assert_allclose(gradient, posterior - target, rtol=1e-4, atol=1e-6)


def test_forward_correction_uses_only_the_columns_of_the_labels():
  num_classes, batch = 500, 4
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(batch, num_classes)))
  labels = jnp.array([0, 7, 499, 7])
  transition = np.random.default_rng(1).dirichlet(np.ones(num_classes), num_classes)
  grad = jax.jit(jax.grad(lambda z, t: losses.forward_corrected(z, labels, t).sum()))
  cost = grad.lower(logits, transition).compile().cost_analysis()
  # The logarithms of the whole matrix would be C^2 = 250,000.
  assert cost["transcendentals"] < 20 * batch * num_classes
  p = scipy.special.softmax(np.asarray(logits, np.float64), axis=1)
  expected = -np.log(np.einsum("bj,jb->b", p, transition[:, np.asarray(labels)]))
  actual = losses.forward_corrected(logits, labels, transition)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_a_threshold_that_float32_cannot_hold_truncates():
  logits, labels = jnp.array([[0.0, 200.0]]), jnp.array([0])
  loss = losses.generalized_cross_entropy(logits, labels, q=0.01, threshold=1e-40)
  np.testing.assert_allclose(loss, (1 - 1e-40**0.01) / 0.01, rtol=1e-5)

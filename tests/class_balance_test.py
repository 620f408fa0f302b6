"""Class weights, compared with formulas and with values computed by hand."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import class_balance
from l2rw_jax.methods import ldam_drw

_inverse_frequency = jax.jit(class_balance.inverse_frequency)
_effective_number = jax.jit(class_balance.effective_number, static_argnums=1)
_CIFAR_10_LT = np.array([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])


def test_inverse_frequency_by_hand():
  np.testing.assert_allclose(_inverse_frequency(np.array([30, 10])), [2 / 3, 2])
  np.testing.assert_allclose(_inverse_frequency(np.array([5, 5, 5])), [1, 1, 1])


def test_an_absent_class_has_zero_weight():
  np.testing.assert_allclose(_inverse_frequency(np.array([30, 0, 10])), [2 / 3, 0, 2])
  assert not _inverse_frequency(np.zeros(3)).any()


@hypothesis.given(st.lists(st.integers(0, 10**6), min_size=4, max_size=4))
@hypothesis.settings(deadline=None, max_examples=60)
def test_present_classes_share_the_examples_equally(counts):
  counts = np.array(counts)
  share = counts * np.asarray(_inverse_frequency(counts), np.float64)
  present = counts > 0
  expected = np.where(present, counts.sum() / max(present.sum(), 1), 0)
  np.testing.assert_allclose(share, expected, rtol=1e-5)


def test_effective_number_on_the_imbalanced_sets_of_ldam():
  weights = [0.0506, 0.0769, 0.1211, 0.195, 0.3188, 0.5246, 0.8683, 1.4426, 2.4092]
  np.testing.assert_allclose(
    _effective_number(_CIFAR_10_LT, 0.9999), [*weights, 3.9927], atol=5e-5
  )
  step = _effective_number(np.repeat([5000, 50], 5), 0.9999)
  np.testing.assert_allclose(step, np.repeat([0.025, 1.975], 5), atol=5e-4)
  counts = np.floor(500 * 0.01 ** (np.arange(100) / 99))
  actual = _effective_number(counts, 0.9999)
  np.testing.assert_allclose(actual[:100:50], [0.0449, 0.4571], atol=5e-5)
  assert actual[99] == pytest.approx(4.3783, abs=5e-5)


@hypothesis.given(
  st.lists(st.integers(0, 10**6), min_size=4, max_size=4),
  st.sampled_from([0.0, 1e-3, 0.9, 0.9999, 1 - 1e-9, np.nextafter(1, 0)]),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_effective_number_equals_the_formula(counts, beta):
  counts = np.array(counts)
  present = counts > 0
  actual = np.asarray(_effective_number(counts, beta), np.float64)
  # 1 - beta^n in double precision, accurate near beta = 1.
  power = counts * np.log(beta) if beta else np.where(present, -np.inf, 0)
  literal = np.where(present, 1 / np.where(present, -np.expm1(power), 1), 0)
  expected = literal * present.sum() / max(literal.sum(), 1e-300)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  np.testing.assert_allclose(actual.sum(), present.sum(), rtol=1e-5)


def test_effective_number_goes_from_equal_weights_to_inverse_counts():
  counts = np.array([30, 0, 10, 1])
  np.testing.assert_array_equal(_effective_number(counts, 0.0), [1, 0, 1, 1])
  inverse = _inverse_frequency(counts)
  actual = _effective_number(counts, float(np.nextafter(1, 0)))
  np.testing.assert_allclose(actual, inverse * 3 / inverse.sum(), rtol=1e-6)
  assert not _effective_number(np.zeros(3), 0.9).any()


@pytest.mark.parametrize("beta", [-0.1, 1.0, 2.0, float("nan")])
def test_a_beta_out_of_range_is_refused(beta):
  with pytest.raises(base.InputError, match=f"beta={beta} of the effective number"):
    class_balance.effective_number(jnp.ones(2), beta)


@pytest.mark.parametrize(
  "function",
  [class_balance.inverse_frequency, class_balance.effective_number, ldam_drw.margins],
)
def test_two_dimensional_counts_are_refused(function):
  message = r"one number for each class, shape \[C\]; got shape \[3, 1\]"
  with pytest.raises(base.InputError, match=message):
    function(np.ones((3, 1)))


def test_counts_of_another_shape_are_refused_under_jit():
  @jax.jit
  def run(counts):
    class_balance.check_counts(counts, 3)
    return counts

  assert run(np.arange(3)).shape == (3,)
  for counts in (np.arange(2), np.ones((3, 1))):
    with pytest.raises(base.InputError, match=r"each of the 3 classes.* got shape \["):
      run(counts)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_invalid_counts_are_refused_or_give_nan(bad):
  for function in (class_balance.inverse_frequency, class_balance.effective_number):
    with pytest.raises(base.InputError, match="the count of class 1 is"):
      function(jnp.array([3.0, bad]))
    assert np.isnan(jax.jit(function)(jnp.array([3.0, bad]))).all()


@pytest.mark.parametrize("dtype", [int, float])
def test_a_label_that_is_not_a_class_gives_nan(dtype):
  class_weights = jnp.array([1, 3], dtype)
  assert np.isnan(class_balance.example_weights(class_weights, jnp.array([0, 2]))).all()
  with pytest.raises(base.InputError, match="classes and groups must be integers"):
    class_balance.example_weights(class_weights, jnp.array([0.0, 1.0]))


def test_labels_of_several_axes_are_refused():
  message = r"labels \[B\]; got \(2,\) and \(2, 3\)"
  with pytest.raises(base.InputError, match=message):
    class_balance.example_weights(jnp.ones(2), jnp.zeros((2, 3), int))


def test_weights_sum_to_one_over_all_devices():
  class_weights, labels = jnp.array([1.0, 3.0]), jnp.array([0, 1, 1, 0])
  run = jax.vmap(
    lambda labels: class_balance.example_weights(class_weights, labels, "devices"),
    axis_name="devices",
  )
  actual = jax.jit(run)(labels.reshape(2, 2)).ravel()
  np.testing.assert_allclose(actual, [0.125, 0.375, 0.375, 0.125])


def test_counts_may_exceed_32_bits():
  weights = class_balance.inverse_frequency(np.array([3 * 2**32, 2**32]))
  np.testing.assert_allclose(weights, [2 / 3, 2])


def test_counts_keep_double_precision(x64):
  counts = np.array([5000, 17, 3])
  expected = counts.sum() / 3 / counts
  for typed in (counts, counts.astype(np.float64)):
    actual = class_balance.inverse_frequency(typed)
    np.testing.assert_allclose(actual, expected, rtol=1e-14)


def test_the_balanced_order_of_no_labels_is_empty():
  order = class_balance.balanced_order(np.zeros(0, int), np.random.default_rng(0))
  assert order.shape == (0,)


@pytest.mark.filterwarnings("error")
def test_counts_and_weights_may_be_lists():
  class_weights = class_balance.inverse_frequency([30, 10])
  np.testing.assert_allclose(class_weights, [2 / 3, 2], rtol=1e-6)
  weights = class_balance.example_weights([1, 3], [0, 1, 1, 0])
  np.testing.assert_allclose(weights, [0.125, 0.375, 0.375, 0.125], rtol=1e-6)

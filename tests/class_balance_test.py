"""Class weights: hand values, and the scale they keep."""

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np

from l2rw_jax import class_balance

_inverse_frequency = jax.jit(class_balance.inverse_frequency)


def test_by_hand():
  np.testing.assert_allclose(_inverse_frequency(np.array([30, 10])), [2 / 3, 2])
  np.testing.assert_allclose(_inverse_frequency(np.array([5, 5, 5])), [1, 1, 1])


def test_an_absent_class_has_no_weight_and_takes_none():
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

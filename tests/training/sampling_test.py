"""Which examples come when: a function of seed and position alone."""

import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.training import sampling


def _order(epoch):
  """Ten rows, in an order of the epoch's own."""
  return sampling.generator(0, "order", epoch).permutation(10)


_START = sampling.Position(0, 0)


def _stream(batch_size, position=_START, order=_order):
  return sampling.TrainSampler(order, batch_size, position)


def test_an_epoch_visits_every_row_once():
  batches = _stream(5)
  first, second = ([batches.next(), batches.next()] for _ in range(2))
  assert sorted(np.concatenate(first)) == sorted(np.concatenate(second)) == [*range(10)]
  assert not np.array_equal(first, second)
  assert batches.position == sampling.Position(2, 0)


def test_rows_that_fill_no_batch_are_left_to_the_next_epoch():
  batches = _stream(4)
  first = np.concatenate([batches.next(), batches.next()])
  np.testing.assert_array_equal(first, _order(0)[:8])
  assert batches.starts_epoch()
  np.testing.assert_array_equal(batches.next(), _order(1)[:4])
  assert not batches.starts_epoch()


@pytest.mark.parametrize("steps", range(8))
def test_resumes_anywhere_with_the_same_rows(steps):
  whole = _stream(3)
  for _ in range(steps):
    whole.next()
  resumed = _stream(3, position=whole.position)
  assert resumed.starts_epoch() == whole.starts_epoch() == (steps % 3 == 0)
  for _ in range(8):
    np.testing.assert_array_equal(resumed.next(), whole.next())
    assert resumed.position == whole.position


def test_the_order_is_asked_for_once_an_epoch_and_not_before_it_is_due():
  asked = []

  def order(epoch):
    asked.append(epoch)
    return _order(epoch)

  batches = _stream(5, order=order)
  assert asked == []
  seen = []
  for _ in range(5):
    batches.next()
    seen.append(list(asked))
  assert seen == [[0], [0], [0, 1], [0, 1], [0, 1, 2]]


def test_an_order_may_repeat_rows_and_change_its_length():
  batches = _stream(2, order=lambda epoch: [7] * 2 * (epoch + 1))
  assert [batches.next().tolist() for _ in range(3)] == [[7, 7]] * 3
  assert batches.position == sampling.Position(2, 0)


def test_a_batch_larger_than_the_epoch_is_refused():
  with pytest.raises(base.InputError, match="--batch_size=11 is larger than the 10"):
    _stream(11).next()
  assert sorted(_stream(10).next()) == [*range(10)]


def test_generators_are_repeatable_and_apart():
  def draw(*key):
    return tuple(sampling.generator(*key).integers(2**62, size=4))

  keys = [
    (s, p, n) for s in (0, 1) for p in ("order", "meta", "refresh") for n in (0, 1)
  ]
  assert len({draw(*key) for key in keys}) == len(keys)
  assert [draw(*key) for key in keys] == [draw(*key) for key in keys]


def _meta(step, num_meta, size, seed=0):
  return sampling.meta_rows(seed, step, num_meta, size)


def test_a_pass_over_the_clean_set_does_not_repeat():
  passes = [
    np.concatenate([_meta(2 * p, 10, 5), _meta(2 * p + 1, 10, 5)]) for p in (0, 1)
  ]
  for rows in passes:
    assert sorted(rows) == [*range(10)]
  assert not np.array_equal(*passes)


def test_a_clean_batch_that_does_not_divide_the_set():
  for first in (0, 2, 4):  # Two batches of four a pass, of ten.
    rows = np.concatenate([_meta(first, 10, 4), _meta(first + 1, 10, 4)])
    assert len(set(rows)) == 8 and set(rows) <= set(range(10))


def test_all_clean_examples_at_every_step():
  for step in range(3):
    np.testing.assert_array_equal(_meta(step, 7, 7), np.arange(7))


def test_clean_rows_need_no_memory():
  later = _meta(137, 10, 3)
  _meta(0, 10, 3)
  np.testing.assert_array_equal(_meta(137, 10, 3), later)
  others = [_meta(137, 10, 3, seed).tolist() for seed in range(1, 9)]
  assert any(rows != later.tolist() for rows in others)


def test_more_than_half_the_clean_set_a_step():
  assert all(len(set(_meta(step, 5, 3))) == 3 for step in range(4))

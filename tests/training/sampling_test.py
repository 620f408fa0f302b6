"""The rows of each step depend on the seed and the position only."""

import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.training import sampling


def _order(epoch):
  """Ten rows, in a different order for every epoch."""
  return sampling.generator(0, "order", epoch).permutation(10)


_START = sampling.Position(0, 0)


def _sampler(batch_size, position=_START, order=_order):
  return sampling.TrainSampler(order, batch_size, position)


def test_epoch_visits_every_row_once():
  batches = _sampler(5)
  first, second = ([batches.next(), batches.next()] for _ in range(2))
  assert sorted(np.concatenate(first)) == sorted(np.concatenate(second)) == [*range(10)]
  assert not np.array_equal(first, second)
  assert batches.position == sampling.Position(2, 0)


def test_incomplete_last_batch_is_left_out():
  batches = _sampler(4)
  first = np.concatenate([batches.next(), batches.next()])
  np.testing.assert_array_equal(first, _order(0)[:8])
  assert batches.starts_epoch()
  np.testing.assert_array_equal(batches.next(), _order(1)[:4])
  assert not batches.starts_epoch()


@pytest.mark.parametrize("steps", range(8))
def test_resumes_at_any_step_with_the_same_rows(steps):
  whole = _sampler(3)
  for _ in range(steps):
    whole.next()
  resumed = _sampler(3, position=whole.position)
  assert resumed.starts_epoch() == whole.starts_epoch() == (steps % 3 == 0)
  for _ in range(8):
    np.testing.assert_array_equal(resumed.next(), whole.next())
    assert resumed.position == whole.position


def test_order_is_requested_once_per_epoch_when_it_is_needed():
  requested = []

  def order(epoch):
    requested.append(epoch)
    return _order(epoch)

  batches = _sampler(5, order=order)
  assert requested == []
  history = []
  for _ in range(5):
    batches.next()
    history.append(list(requested))
  assert history == [[0], [0], [0, 1], [0, 1], [0, 1, 2]]


def test_order_may_repeat_rows_and_change_its_length():
  batches = _sampler(2, order=lambda epoch: [7] * 2 * (epoch + 1))
  assert [batches.next().tolist() for _ in range(3)] == [[7, 7]] * 3
  assert batches.position == sampling.Position(2, 0)


def test_batch_larger_than_the_epoch_raises():
  with pytest.raises(base.InputError, match="--batch_size=11 is larger than the 10"):
    _sampler(11).next()
  assert sorted(_sampler(10).next()) == [*range(10)]


def test_generators_are_repeatable_and_independent():
  def draw(*key):
    return tuple(sampling.generator(*key).integers(2**62, size=4))

  keys = [
    (s, p, n) for s in (0, 1) for p in ("order", "meta", "refresh") for n in (0, 1)
  ]
  assert len({draw(*key) for key in keys}) == len(keys)
  assert [draw(*key) for key in keys] == [draw(*key) for key in keys]


def _meta(step, num_meta, size, seed=0):
  return sampling.meta_rows(seed, step, num_meta, size)


def test_pass_over_the_meta_set_repeats_no_row():
  passes = [
    np.concatenate([_meta(2 * p, 10, 5), _meta(2 * p + 1, 10, 5)]) for p in (0, 1)
  ]
  for rows in passes:
    assert sorted(rows) == [*range(10)]
  assert not np.array_equal(*passes)


def test_meta_batch_size_need_not_divide_the_set():
  for first in (0, 2, 4):  # A pass over ten rows has two batches of four.
    rows = np.concatenate([_meta(first, 10, 4), _meta(first + 1, 10, 4)])
    assert len(set(rows)) == 8 and set(rows) <= set(range(10))


def test_the_whole_meta_set_is_used_at_every_step():
  for step in range(3):
    np.testing.assert_array_equal(_meta(step, 7, 7), np.arange(7))


def test_meta_rows_depend_on_step_and_seed_only():
  later = _meta(137, 10, 3)
  _meta(0, 10, 3)
  np.testing.assert_array_equal(_meta(137, 10, 3), later)
  others = [_meta(137, 10, 3, seed).tolist() for seed in range(1, 9)]
  assert any(rows != later.tolist() for rows in others)


def test_a_meta_batch_of_more_than_half_the_set_repeats_no_row():
  assert all(len(set(_meta(step, 5, 3))) == 3 for step in range(4))


def test_sampler_draws_train_and_meta_rows_of_all_runs():
  sampler = sampling.Sampler(
    (3, 4),
    lambda run, epoch, rng: rng.permutation(10),
    num_train=10,
    batch_size=5,
    num_meta=6,
    meta_batch_size=2,
  )
  steps = [sampler.next(step) for step in range(4)]
  for run, seed in enumerate((3, 4)):
    for epoch in (0, 1):
      rows = np.concatenate([s.train[run] for s in steps[2 * epoch : 2 * epoch + 2]])
      order = sampling.generator(seed, "order", epoch).permutation(10)
      np.testing.assert_array_equal(rows, order)
    np.testing.assert_array_equal(
      [s.meta[run] for s in steps], [_meta(step, 6, 2, seed) for step in range(4)]
    )
  resumed = sampling.Sampler(
    (3,), lambda run, epoch, rng: rng.permutation(10), num_train=10, batch_size=5
  )
  resumed.seek([sampling.Position(1, 1)])
  assert resumed.epoch() == (1, 2)
  rows = resumed.next(3)
  np.testing.assert_array_equal(rows.train[0], steps[3].train[0])
  assert rows.meta is None and resumed.positions() == [sampling.Position(2, 0)]


def test_the_order_of_a_pass_over_the_meta_set_is_drawn_once(monkeypatch):
  drawn = []

  def order(seed, number, num_meta):
    drawn.append((seed, number))
    return meta_order(seed, number, num_meta)

  meta_order = sampling.meta_order
  monkeypatch.setattr(sampling, "meta_order", order)
  sampler = sampling.Sampler(
    (0, 1),
    lambda run, epoch, rng: rng.permutation(10),
    num_train=10,
    batch_size=2,
    num_meta=12,
    meta_batch_size=4,
  )
  rows = [sampler.next(step).meta for step in range(6)]
  assert drawn == [(0, 0), (1, 0), (0, 1), (1, 1)]
  for step, row in enumerate(rows):
    expected = [sampling.meta_rows(seed, step, 12, 4) for seed in (0, 1)]
    np.testing.assert_array_equal(row, expected)

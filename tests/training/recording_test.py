"""Recording a student's losses with an epoch probe of the loop."""

import numpy as np
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.methods.mentornet import loss_dump

# Each method is one object, so that its compiled functions are shared by the tests.
_UNIFORM, _L2RW = baselines.uniform(), l2rw.l2rw()


def _recorded(folder, *, name="run", method=_UNIFORM, seeds=(0,), **settings):
  """Records the losses of 12 steps, 5 per epoch; returns the `Writer`."""
  writer = loss_dump.Writer(folder / "losses")
  options = {k: settings.pop(k) for k in ("every", "num_examples") if k in settings}
  toy_runs.train(
    folder / name,
    method,
    epoch_probes=[loss_dump.record_losses(writer, **options)],
    **({"num_steps": 12, "seeds": seeds} | settings),
  )
  return writer


def _combine(writer, seed=0, num_steps=12):
  train = toy_runs.make_splits(seed).train
  return loss_dump.Writer(writer.folder).combine(
    seed, train.label, train.true_label, batch_size=8, num_steps=num_steps
  )


def test_all_examples_are_recorded_before_every_epoch(tmp_path):
  dump = _combine(_recorded(tmp_path))
  train = toy_runs.make_splits().train
  # Epochs start at steps 0, 5 and 10 of 12.
  np.testing.assert_array_equal(dump.epoch_percent, np.repeat([0, 41, 83], 40))
  np.testing.assert_array_equal(dump.sample, np.tile(train.index, 3))
  np.testing.assert_array_equal(dump.label, np.tile(train.label, 3))
  np.testing.assert_array_equal(dump.true_label, np.tile(train.true_label, 3))
  assert np.isfinite(dump.loss).all()
  # Training lowers the losses of right labels to less than those of wrong labels.
  early, late = dump.loss[:40], dump.loss[80:]
  right = train.label == train.true_label
  assert late[right].mean() < early[right].mean()
  assert late[right].mean() < late[~right].mean()


def test_losses_are_those_of_the_parameters_before_the_epoch(tmp_path):
  dump = _combine(_recorded(tmp_path))
  # The last epoch starts at step 10, where a run of 10 steps ends.
  toy_runs.train(tmp_path / "ten", _UNIFORM, num_steps=10)
  params = toy_runs.saved_params(tmp_path / "ten")
  by_name = {name.split("['params']")[-1]: x[0] for name, x in params.items()}
  kernels = [x for name, x in sorted(by_name.items()) if "kernel" in name]
  biases = [x for name, x in sorted(by_name.items()) if "bias" in name]
  train = toy_runs.make_splits().train
  hidden = np.maximum(train.image @ kernels[0] + biases[0], 0)
  logits = hidden @ kernels[1] + biases[1]
  log_sum = np.log(np.exp(logits).sum(axis=1))
  expected = log_sum - logits[np.arange(40), train.label]
  np.testing.assert_allclose(dump.loss[80:], expected, rtol=1e-4, atol=1e-5)


def test_recording_does_not_change_the_run(tmp_path):
  _recorded(tmp_path, method=_L2RW)
  toy_runs.train(tmp_path / "plain", _L2RW, num_steps=12)
  assert toy_runs.outcome(tmp_path / "run") == toy_runs.outcome(tmp_path / "plain")


def test_a_random_sample_is_recorded_every_second_epoch(tmp_path):
  dump = _combine(_recorded(tmp_path, every=2, num_examples=10))
  np.testing.assert_array_equal(dump.epoch_percent, np.repeat([0, 83], 10))
  first, second = dump.sample[:10], dump.sample[10:]
  assert len(set(first)) == len(set(second)) == 10 and set(first) != set(second)
  assert (np.diff(first) > 0).all()


def test_runs_side_by_side_are_recorded_separately(tmp_path):
  writer = _recorded(tmp_path, seeds=(0, 1))
  alone = _combine(_recorded(tmp_path / "alone", seeds=(1,)), seed=1)
  both = _combine(writer, seed=1)
  np.testing.assert_allclose(both.loss, alone.loss, rtol=1e-4, atol=1e-5)
  assert not np.allclose(both.loss, _combine(writer, seed=0).loss)


def test_repeating_a_run_records_no_row_twice(tmp_path):
  first = _combine(_recorded(tmp_path))
  again = _combine(_recorded(tmp_path, name="again"))
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a, b)


def test_folder_of_other_losses_raises(tmp_path):
  _recorded(tmp_path)
  with pytest.raises(base.InputError, match="contains the losses of other settings"):
    _recorded(tmp_path, name="other", splits=[toy_runs.make_splits(5)])


def test_an_interrupted_run_records_the_same_rows(tmp_path):
  expected = _combine(_recorded(tmp_path / "whole"))
  writer, epochs = loss_dump.Writer(tmp_path / "losses"), []

  def until_interrupted(seed, epoch, index, losses):
    epochs.append(epoch)
    writer(seed, epoch, index, losses)
    if epochs == [0, 1]:
      raise KeyboardInterrupt

  settings = {
    "num_steps": 12,
    "checkpoint_every": 3,
    "epoch_probes": [loss_dump.record_losses(until_interrupted)],
  }
  with pytest.raises(KeyboardInterrupt):
    toy_runs.train(tmp_path / "run", _UNIFORM, **settings)
  toy_runs.train(tmp_path / "run", _UNIFORM, **settings)
  assert epochs == [0, 1, 1, 2]
  for a, b in zip(_combine(writer), expected, strict=True):
    np.testing.assert_array_equal(a, b)


def test_every_epoch_is_recorded_with_several_steps_per_call(tmp_path):
  epochs = []
  toy_runs.train(
    tmp_path,
    _UNIFORM,
    num_steps=12,
    log_every=12,
    eval_every=12,
    steps_per_call=4,
    epoch_probes=[lambda snapshot, epoch: epochs.append((snapshot.step, epoch))],
  )
  assert epochs == [(0, 0), (5, 1), (10, 2)]

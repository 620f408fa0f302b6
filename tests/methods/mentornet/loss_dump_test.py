"""Files of recorded losses: round trips, and every kind of damage."""

import chex
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.methods.mentornet import loss_dump


def _combine(folder):
  """Reads the records of a run of seed 0 with 40 training examples."""
  labels = np.zeros(40, int)
  return loss_dump.Writer(folder).combine(0, labels, labels, batch_size=8, num_steps=12)


def test_unusable_folders_of_records_are_refused(tmp_path):
  with pytest.raises(base.InputError, match="has no recorded losses"):
    _combine(tmp_path)
  (tmp_path / "seed-0").mkdir()
  (tmp_path / "seed-0" / "epoch-00000.npz").write_bytes(b"PK\x03\x04 broken")
  with pytest.raises(base.InputError, match="damaged, or not an npz file"):
    _combine(tmp_path)
  (tmp_path / "file").touch()
  writer = loss_dump.Writer(tmp_path / "file" / "below")
  with pytest.raises(base.InputError, match="cannot write"):
    writer(0, 0, np.arange(2), np.ones(2))
  writer = loss_dump.Writer(tmp_path / "many")
  writer(0, 0, np.array([100]), np.ones(1))
  with pytest.raises(
    base.InputError, match="has an example beyond the 40 training examples"
  ):
    _combine(tmp_path / "many")


def test_recording_zero_examples_or_epochs_is_refused():
  for settings in ({"every": 0}, {"num_examples": 0}):
    with pytest.raises(base.InputError, match="must be an integer of at least 1"):
      loss_dump.record_losses(print, **settings)


def _dump():
  rng = np.random.default_rng(0)
  losses = rng.lognormal(sigma=3, size=20).astype(np.float32)
  integers = (rng.integers(10, size=20, dtype=np.int32) for _ in range(4))
  return loss_dump.LossDump(*integers, losses)


@pytest.mark.parametrize("name", ["dump.csv", "dump.npz", "dump"])
def test_dump_is_restored_bit_for_bit(tmp_path, name):
  path = tmp_path / "new" / "folder" / name
  loss_dump.write_dump(path, _dump())
  result = loss_dump.read_dump(path)
  for a, b in zip(result, _dump(), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  assert list(path.parent.iterdir()) == [path]


_HEADER = "sample,epoch_percent,label,true_label,loss"


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("d.csv", "", "its first line is not sample,epoch_percent"),
    ("d.csv", "1,2,3,4,0.5\n", "its first line is not sample,epoch_percent"),
    ("d.csv", f"{_HEADER}\n", "it has no rows"),
    ("d.csv", f"{_HEADER}\n1,2,3,4\n", "a column is missing"),
    ("d.csv", f"{_HEADER}\n1,2,3,4,5\n1,2\n", "number of columns changed"),
    ("d.csv", f"{_HEADER}\n1,2,nan,4,5\n", "in its column label is missing"),
    ("d.csv", f"{_HEADER}\n1,2,x,4,5\n", "could not convert string 'x'"),
    ("d.npz", "not an archive", "damaged, or not an npz file"),
    ("d.npz", "", "damaged, or not an npz file"),
    ("d.npz", None, "No such file"),
    ("d.csv", None, "No such file"),
  ],
)
def test_unreadable_dumps_are_refused(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_text(content)
  with pytest.raises(base.InputError) as error:
    loss_dump.read_dump(tmp_path / name)
  (line,) = str(error.value).splitlines()
  assert line.startswith(f"--dump={tmp_path}") and message in line


def test_archives_with_other_columns_are_refused(tmp_path):
  np.savez(tmp_path / "dump.npz", sample=np.arange(3))
  with pytest.raises(base.InputError, match=r"no column"):
    loss_dump.read_dump(tmp_path / "dump.npz")
  columns = {**_dump()._asdict(), "loss": np.ones(3)}
  np.savez(tmp_path / "dump.npz", **columns)
  with pytest.raises(base.InputError, match="its columns differ in length"):
    loss_dump.read_dump(tmp_path / "dump.npz")


def test_a_dump_below_a_file_cannot_be_written(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(base.InputError, match="cannot write"):
    loss_dump.write_dump(tmp_path / "file" / "dump.npz", _dump())


def _write_npz(path, **changed):
  np.savez(path, **{**_dump()._asdict(), **changed})


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"loss": np.array(["a"] * 20)}, "loss is not a list of numbers"),
    ({"loss": np.ones(20, complex)}, "loss is not a list of numbers"),
    ({"label": np.ones((20, 1))}, "label is not a list of numbers"),
    ({"sample": np.ones(20, bool)}, "sample is not a list of numbers"),
    ({"label": np.full(20, 2**40)}, "label must be whole numbers from 0"),
    ({"label": np.full(20, -1)}, "label must be whole numbers from 0"),
    ({"true_label": np.full(20, 0.5)}, "true_label must be whole numbers"),
    ({"true_label": np.full(20, np.inf)}, "column true_label is missing or infinite"),
    ({"epoch_percent": np.full(20, 100)}, "whole numbers from 0 to 99"),
    ({"epoch_percent": np.full(20, 2**32, np.uint64)}, "whole numbers from 0 to 99"),
    ({name: np.zeros(0) for name in _dump()._fields}, "it has no rows"),
    ({name: np.zeros(()) for name in _dump()._fields}, "is not a list of numbers"),
    ({"sample": np.array([{}] * 20)}, "damaged, or not an npz file"),
  ],
)
def test_invalid_columns_are_refused(tmp_path, changed, message):
  _write_npz(tmp_path / "dump.npz", **changed)
  with pytest.raises(base.InputError, match=message):
    loss_dump.read_dump(tmp_path / "dump.npz")


def test_damaged_archives_are_refused(tmp_path):
  path = tmp_path / "dump.npz"
  loss_dump.write_dump(path, _dump())
  whole = path.read_bytes()
  places = range(0, len(whole), 29)
  num_refused = 0
  for place in places:
    path.write_bytes(whole[:place])
    with pytest.raises(base.InputError, match="cannot read it"):
      loss_dump.read_dump(path)
    changed = bytes([whole[place] ^ 0xFF])
    path.write_bytes(whole[:place] + changed + whole[place + 1 :])
    try:
      result = loss_dump.read_dump(path)
    except base.InputError:
      num_refused += 1
    else:
      # A changed byte outside the data, such as in a date, has no effect.
      chex.assert_trees_all_equal(result, _dump())
  # Most bytes are data.
  assert len(places) / 2 < num_refused < len(places)


def test_loss_beyond_float32_is_infinite(tmp_path):
  _write_npz(tmp_path / "dump.npz", loss=np.full(20, 1e300))
  assert np.isinf(loss_dump.read_dump(tmp_path / "dump.npz").loss).all()


@pytest.mark.parametrize(
  ("name", "columns"),
  [
    ("epoch-00000", {"index": np.array([-1]), "loss": np.ones(1)}),
    ("epoch-00000", {"index": np.array([0.5]), "loss": np.ones(1)}),
    ("epoch-00000", {"index": np.array([0, 1]), "loss": np.ones(1)}),
    ("epoch-00000", {"index": np.array([0]), "loss": np.array(["a"])}),
    ("epoch-last", {"index": np.array([0]), "loss": np.ones(1)}),
  ],
)
def test_invalid_files_of_epochs_are_refused(tmp_path, name, columns):
  (tmp_path / "seed-0").mkdir()
  np.savez(tmp_path / "seed-0" / f"{name}.npz", **columns)
  with pytest.raises(base.InputError, match="cannot read it"):
    _combine(tmp_path)

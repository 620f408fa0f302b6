"""The checksum of the data of a run."""

import numpy as np

from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import fingerprint


class _Rows:
  """A row source that is not an array, and counts the rows that it reads."""

  def __init__(self, array):
    self._array, self.num_read = array, 0
    self.shape, self.dtype = array.shape, array.dtype

  def __len__(self):
    return len(self._array)

  def __getitem__(self, rows):
    self.num_read += len(rows)
    return self._array[rows]


def make_examples(size, image=None):
  index = np.arange(size, dtype=np.int32)
  image = np.zeros((size, 2), np.float32) if image is None else image
  return examples_lib.Examples(image, index % 3, index % 3, index, index)


def make_splits(**parts):
  names = ("train", "meta", "validation", "test")
  examples = {name: make_examples(4) for name in names} | parts
  return examples_lib.Splits(**examples, num_classes=3, fingerprint="rows")


def test_every_field_of_every_part_matters():
  base = make_splits()
  all_splits = [base, base._replace(num_classes=4), base._replace(fingerprint="x")]
  for name in ("train", "meta", "validation", "test"):
    part = getattr(base, name)
    for field, column in part._asdict().items():
      changed = part.index if column is None else column + column.dtype.type(1)
      all_splits.append(base._replace(**{name: part._replace(**{field: changed})}))
  digests = [fingerprint.fingerprint(splits) for splits in all_splits]
  assert len(set(digests)) == len(digests) == 3 + 4 * 6
  assert fingerprint.fingerprint(make_splits()) == digests[0]


def test_row_sources_are_sampled():
  images = np.arange(2000, dtype=np.uint8).reshape(1000, 2)
  source = _Rows(images)
  digest = fingerprint.fingerprint(make_splits(train=make_examples(1000, source)))
  assert source.num_read == 256
  last = images.copy()
  last[-1] += 1
  assert digest != fingerprint.fingerprint(
    make_splits(train=make_examples(1000, _Rows(last)))
  )

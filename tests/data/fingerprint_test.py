"""The checksum of the data of a run."""

import numpy as np

from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import fingerprint


class _Rows:
  """A row source that is not an array, and that counts the rows that are read."""

  def __init__(self, array):
    self._array, self.num_read, self.largest_read = array, 0, 0
    self.shape, self.dtype = array.shape, array.dtype

  def __len__(self):
    return len(self._array)

  def __getitem__(self, rows):
    values = self._array[rows]
    self.num_read += len(values)
    self.largest_read = max(self.largest_read, len(values))
    return values


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


def test_every_row_of_a_row_source_matters(monkeypatch):
  monkeypatch.setattr(examples_lib, "_BLOCK_BYTES", 64)
  images = np.arange(2000, dtype=np.uint8).reshape(1000, 2)
  source = _Rows(images)

  def digest_of(image):
    return fingerprint.fingerprint(make_splits(train=make_examples(1000, image)))

  digest = digest_of(source)
  # The rows are read in blocks of 32, and the digest is that of the array.
  assert source.num_read == 1000 and source.largest_read == 32
  assert digest == digest_of(images)
  for row in (0, 457, 999):
    changed = images.copy()
    changed[row, 1] += 1
    assert digest != digest_of(_Rows(changed))


def test_fingerprint_of_a_row_source_replaces_its_rows():
  images = np.zeros((8, 2), np.uint8)

  def digest_of(content, rows=None):
    source = _Rows(images)
    source.fingerprint = content
    image = source if rows is None else examples_lib.View(source, np.array(rows))
    examples_lib.check_images(image, "images")
    digest = fingerprint.fingerprint(make_splits(train=make_examples(8, image)))
    assert not source.num_read
    return digest

  digests = [
    digest_of("a"),
    digest_of("b"),
    digest_of("a", range(8)),
    digest_of("b", range(8)),
    digest_of("a", range(7, -1, -1)),
  ]
  assert len(set(digests)) == len(digests)
  assert digest_of("a", range(8)) == digests[2]


def test_pixels_have_the_checksum_of_the_numbers_that_a_network_gets():
  pixels = np.arange(8, dtype=np.uint8).reshape(4, 2)
  scaled = np.divide(pixels, np.float32(255), dtype=np.float32)
  checksums = {
    fingerprint.fingerprint(make_splits(train=make_examples(4, image)))
    for image in (pixels, _Rows(pixels), scaled)
  }
  assert len(checksums) == 1

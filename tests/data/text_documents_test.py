"""Documents for a language model: their files, and how they are corrupted."""

import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.data import text_documents

_RNG = np.random.default_rng(0)
_TEXTS = text_documents.Texts(
  # Every byte of a file is the number of the file.
  files=tuple(bytes([number]) * 90 for number in range(40)),
  english=bytes(_RNG.integers(100, 120, 600).astype(np.uint8)),
)
_SIZES = {"length": 8, "num_train": 90, "num_meta": 12, "num_test": 20}


def _splits(fraction=0.3, seed=0, **sizes):
  return text_documents.corrupted_documents(
    _TEXTS, **{**_SIZES, **sizes}, fraction=fraction, seed=seed
  )


def _documents(examples):
  return np.concatenate([examples.image, examples.label[:, -1:]], axis=1)


def test_labels_are_the_bytes_that_follow():
  train = _splits().train
  assert train.image.shape == train.label.shape == (90, 8)
  assert train.image.dtype == np.uint8 and train.label.dtype == np.int32
  np.testing.assert_array_equal(train.image[:, 1:], train.label[:, :-1])


def test_a_third_of_the_corrupted_documents_is_of_each_kind():
  corrupted, clean = _splits(), _splits(fraction=0.0)
  kinds = corrupted.train.group
  np.testing.assert_array_equal(np.bincount(kinds), [63, 9, 9, 9])
  assert not clean.train.group.any()
  before, after = _documents(clean.train), _documents(corrupted.train)
  np.testing.assert_array_equal(before[kinds == 0], after[kinds == 0])
  shuffled = kinds == text_documents.KINDS.index("shuffled")
  np.testing.assert_array_equal(
    np.sort(before[shuffled], axis=1), np.sort(after[shuffled], axis=1)
  )
  for document in after[kinds == text_documents.KINDS.index("english")]:
    assert document.astype(np.uint8).tobytes() in _TEXTS.english
  random_documents = after[kinds == text_documents.KINDS.index("random")]
  # Of 81 random bytes, about 70 are different.
  assert len(np.unique(random_documents)) > 60


def test_parts_are_from_different_files_and_excerpts_do_not_repeat():
  splits = _splits(fraction=0.0)
  files = [
    set(part.image[:, 0].tolist()) for part in (splits.train, splits.meta, splits.test)
  ]
  assert not (files[0] & files[1] or files[0] & files[2] or files[1] & files[2])
  # A file of 90 bytes has ten excerpts of nine bytes.
  assert np.bincount(splits.train.image[:, 0]).max() <= 10
  assert not splits.meta.group.any() and not splits.test.group.any()


def test_the_seed_decides_everything():
  one, same, other = _splits(), _splits(), _splits(seed=1)
  assert one.fingerprint == same.fingerprint != other.fingerprint
  np.testing.assert_array_equal(one.train.image, same.train.image)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_train": 10_000}, r"text for \d+ train documents, but 10000 are requested"),
    ({"num_meta": -1}, "num_meta=-1 must be an integer of at least 0"),
    ({"length": 0}, "length=0 must be an integer of at least 1"),
    ({"fraction": 1.5}, r"fraction=1.5 must be in \[0, 1\]"),
    ({"fraction": 1.0, "num_train": 240}, "documents, but 80 are requested"),
  ],
)
def test_impossible_sizes_are_refused(options, message):
  with pytest.raises(base.InputError, match=message):
    _splits(**options)


def test_the_standard_library_is_code_and_prose():
  texts = text_documents.standard_library()
  assert sum(b"\nimport " in text for text in texts.files) > 100
  assert len(texts.english) > 100_000 and b"\nimport " not in texts.english[:2000]

"""Images that are decoded when they are read."""

import os
import pickle
import threading

import numpy as np
from PIL import Image
import pytest

from l2rw_jax import base
from l2rw_jax.data import cache
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import own_data
from l2rw_jax.data import row_sources
from l2rw_jax.data import sources


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Two classes of ten gray images, each of a different shade."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  for label, name in enumerate(("cat", "dog")):
    for i in range(10):
      path = tmp_path / "set" / name / f"{i}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new("L", (6, 4), 20 * i + label).save(path)
  return tmp_path / "set"


def test_image_files_give_the_images_in_memory(folder):
  expected, data = (
    own_data.read(f"images:{folder}", "train", in_memory=m) for m in (True, False)
  )
  images = data.features
  assert isinstance(images, row_sources.ImageFiles)
  assert images.shape == expected.features.shape and images.dtype == np.uint8
  assert len(images) == len(expected.features) and images.ndim == 4
  is_dog = expected.labels == 1
  for rows in (slice(3, 5), np.array([7, 0, 7]), np.array([], int), [], 2, is_dog):
    np.testing.assert_array_equal(images[rows], expected.features[rows])
  np.testing.assert_array_equal(np.array(images), expected.features)
  np.testing.assert_array_equal(np.stack(list(images)), expected.features)
  for rows in (-1, np.array([0, len(images)])):
    with pytest.raises(IndexError, match="rows must lie between 0 and 15"):
      images[rows]
  for rows in (np.array([1.7]), 1.0, is_dog[1:], True):
    with pytest.raises(IndexError, match="rows must be integers, or 16 bools"):
      images[rows]
  np.testing.assert_array_equal(data.labels, expected.labels)
  assert data.form == expected.form and (data.duplicate_of == -1).all()


def test_splits_of_image_files_hold_the_same_numbers(folder):
  splits = []
  for in_memory in (True, False):
    train, test = (
      sources.load(f"images:{folder}", part, in_memory=in_memory)
      for part in ("train", "test")
    )
    splits.append(
      noisy_labels.noisy_labels(
        train, test, builder="uniform_flip", fraction=0.2, num_meta_per_class=2, seed=0
      )
    )
  expected, actual = splits
  assert actual.fingerprint == expected.fingerprint
  assert isinstance(actual.train.image, examples_lib.View)
  for part in ("train", "meta", "validation", "test"):
    images = getattr(actual, part).image
    np.testing.assert_array_equal(images[:], getattr(expected, part).image)


def test_sources_are_pickled_for_workers(folder):
  images = own_data.read(f"images:{folder}", "train", in_memory=False).features
  sent = pickle.loads(pickle.dumps(images))
  assert sent.fingerprint == images.fingerprint
  np.testing.assert_array_equal(sent[:], images[:])


def test_a_file_that_becomes_unreadable_is_named(folder):
  images = own_data.read(f"images:{folder}", in_memory=False).features
  (folder / "cat" / "3.png").write_bytes(b"cut")
  with pytest.raises(base.InputError, match=r"cat/3.png cannot be read: .* repair or"):
    images[:]


def test_fingerprint_depends_on_the_content_of_the_files(folder):
  def digest():
    return own_data.read(f"images:{folder}", in_memory=False).features.fingerprint

  first = digest()
  assert digest() == first
  path = folder / "dog" / "9.png"
  whole, status = path.read_bytes(), path.stat()
  path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
  assert digest() != first
  path.write_bytes(whole)
  assert digest() == first  # The hash depends on the content, not on the time.


def test_files_that_have_not_changed_are_read_once(tmp_path, monkeypatch):
  path = tmp_path / "file"
  path.write_bytes(b"content")
  digest = row_sources.hash_of_files([path], tmp_path / "cache")

  def build(*args):
    raise AssertionError("read again")

  original = cache.cached_arrays
  monkeypatch.setattr(
    cache, "cached_arrays", lambda place, key, _: original(place, key, build)
  )
  assert row_sources.hash_of_files([path], tmp_path / "cache") == digest
  path.write_bytes(b"content of another size")
  with pytest.raises(AssertionError, match="read again"):
    row_sources.hash_of_files([path], tmp_path / "cache")


def test_sets_fit_in_half_of_the_memory(monkeypatch, folder):
  # Half of the memory has to hold the 20 images of 4x6 bytes and a copy of them.
  monkeypatch.setattr(row_sources, "memory", lambda: 2 * 2 * 20 * 4 * 6)
  assert row_sources.fit_in_memory(20, (4, 6, 1))
  assert not row_sources.fit_in_memory(21, (4, 6, 1))
  data = own_data.read(f"images:{folder}", in_memory=None)
  assert isinstance(data.features, np.ndarray)
  monkeypatch.setattr(row_sources, "memory", lambda: 2 * 2 * 20 * 4 * 6 - 1)
  data = own_data.read(f"images:{folder}", in_memory=None)
  assert isinstance(data.features, row_sources.ImageFiles)


def test_threads_may_read_at_the_same_time(folder):
  images = own_data.read(f"images:{folder}", in_memory=False).features
  results = {}
  threads = [
    threading.Thread(target=lambda i=i: results.update({i: images[i::4]}))
    for i in range(4)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for i in range(4):
    np.testing.assert_array_equal(results[i], images[i::4])


@pytest.mark.parametrize(
  ("groups", "limits", "expected"),
  [
    ("0::/job/step\n", {"job/step/memory.max": "max", "job/memory.max": "5000"}, 5000),
    ("0::/\n", {"memory.max": "7000\n"}, 7000),
    # A container sees its own limit at the root, and not the group of its host.
    ("0::/of/the/host\n", {"memory.max": "7000\n"}, 7000),
    (
      "5:cpu:/\n4:hugetlb,memory:/a\n0::/\n",
      {"memory/a/memory.limit_in_bytes": "3000", "cpu/memory.limit_in_bytes": "1"},
      3000,
    ),
    ("0::/\n", {}, None),
    (None, {"memory.max": "7000"}, None),
  ],
)
def test_memory_limits_of_containers(tmp_path, monkeypatch, groups, limits, expected):
  if groups is not None:
    (tmp_path / "groups").write_text(groups)
  for name, limit in limits.items():
    path = tmp_path / "limits" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(limit)
  monkeypatch.setattr(row_sources, "_GROUPS", tmp_path / "groups")
  monkeypatch.setattr(row_sources, "_LIMITS", tmp_path / "limits")
  physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  assert row_sources.memory() == (expected or physical)

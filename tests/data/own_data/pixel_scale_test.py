"""The scale of the pixels of archives and of image files."""

import numpy as np
import pytest
import user_files

from l2rw_jax import base
from l2rw_jax.data import own_data

_AS_THEY_ARE = (
  "The values, from {} to {}, are used as they are. Networks learn best from values"
  " between -1 and 1."
)


@pytest.mark.parametrize(
  ("stored", "expected", "note"),
  [
    (np.array([0.0, 7, 255]), np.array([0, 7, 255], np.uint8), None),
    (np.array([0, 7, 255]), np.array([0, 7, 255], np.uint8), None),
    (
      np.array([0, 7, 16]),
      np.array([0, 7, 16], np.uint8),
      "the largest is 16.",
    ),
    (np.array([0, 7.0, 16]), np.array([0, 7, 16], np.float32), None),
    (np.array([0, 1, 1]), np.array([0, 255, 255], np.uint8), None),
    (np.array([False, True, True]), np.array([0, 255, 255], np.uint8), None),
    (np.array([0.0, 1, 1]), np.array([0, 1, 1], np.float32), None),
    (np.array([-1, 0.5, 1]), np.array([-1, 0.5, 1], np.float32), None),
    (
      np.array([0, 257, 65535], np.uint16),
      np.array([0, 257, 65535], np.float32),
      _AS_THEY_ARE.format(0, 65535),
    ),
    (
      np.array([-5, 0.5, 300]),
      np.array([-5, 0.5, 300], np.float32),
      _AS_THEY_ARE.format(-5, 300),
    ),
  ],
)
def test_the_scale_of_pixels(tmp_path, stored, expected, note):
  images = np.tile(stored, (10, 4, 2))  # [10, 4, 6]
  data = own_data.read(user_files.write_archive(tmp_path / "a.npz", images))
  assert data.features.dtype == expected.dtype
  np.testing.assert_array_equal(data.features[3, 1, :3, 0], expected)
  assert len(data.notes) == (note is not None)
  assert note is None or note in data.notes[0]


_LEVELS = np.random.default_rng(0).integers(0, 256, size=(20, 4, 6))


_STORED = {
  "bytes": _LEVELS.astype(np.uint8),
  "floats": _LEVELS.astype(float),
  "mask": _LEVELS > 127,
  "fractions": _LEVELS / 255,
  "standardized": (_LEVELS - 127) / 70,
  "16 bits": (257 * _LEVELS).astype(np.uint16),
  "99%": _LEVELS * 0.99,
}


@pytest.mark.parametrize(
  ("first", "others"),
  [
    # The kinds of pixels that are accepted after the first, and the factor that
    # converts them to its scale.
    ("bytes", {"bytes": 1, "floats": 1, "mask": 255, "fractions": 255}),
    ("floats", {"bytes": 1, "floats": 1, "mask": 255, "fractions": 255}),
    ("mask", {"bytes": 1, "floats": 1, "mask": 255, "fractions": 255}),
    ("fractions", {"mask": 1, "fractions": 1, "standardized": 1}),
    ("standardized", {"mask": 1, "fractions": 1, "standardized": 1}),
    ("16 bits", {"16 bits": 1}),
    ("99%", {"bytes": 1, "floats": 1, "99%": 1}),
  ],
)
def test_other_data_have_the_scale_of_the_first(tmp_path, first, others):
  names = {
    kind: user_files.write_archive(tmp_path / f"{kind}.npz", stored)
    for kind, stored in _STORED.items()
  }
  like = own_data.read(names[first])
  for kind, name in names.items():
    if kind not in others:
      with pytest.raises(base.InputError, match="give both the same scale") as caught:
        own_data.read(name, like=like.form)
      assert "\n" not in str(caught.value)
      continue
    features = own_data.read(name, like=like.form).features
    assert features.dtype == like.features.dtype
    expected = _STORED[kind].astype(float) * others[kind]
    np.testing.assert_allclose(features[..., 0], expected, rtol=1e-6, atol=1e-6)


def test_test_images_and_files_have_the_scale_of_the_training_images(tmp_path, folder):
  more = {"X_test": _STORED["99%"], "y_test": np.arange(20) % 2}
  with pytest.raises(
    base.InputError, match=r"0 to 252\.45 as pixels, but the other data"
  ):
    own_data.read(
      user_files.write_archive(tmp_path / "a.npz", _STORED["bytes"], **more), "test"
    )
  more["X_test"] = _STORED["fractions"]
  name = user_files.write_archive(tmp_path / "a.npz", _STORED["bytes"], **more)
  np.testing.assert_array_equal(own_data.read(name, "test").features[..., 0], _LEVELS)
  like = own_data.read(
    user_files.write_archive(tmp_path / "b.npz", _STORED["fractions"])
  ).form
  with pytest.raises(base.InputError, match="has image files, with pixels up to 255"):
    own_data.read(f"images:{folder}", like=like)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_skipped_images_do_not_change_the_scale(tmp_path):
  images = _LEVELS.astype(float)
  images[3, 0, :2] = np.nan, -9999
  images[5, 1, 1] = -np.finfo(np.float64).max  # Does not fit into float32.
  data = own_data.read(user_files.write_archive(tmp_path / "a.npz", images))
  assert data.features.dtype == np.uint8
  assert [name for name, _ in data.skipped] == ["row 3", "row 5"]

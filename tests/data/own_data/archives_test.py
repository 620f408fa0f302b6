"""NumPy archives: names of arrays, labels of every type, and missing values."""

import warnings

import numpy as np
import pytest
import user_files

from l2rw_jax import base
from l2rw_jax.data import own_data


@pytest.mark.parametrize(
  "keys", [("X", "y"), ("images", "labels"), ("x_train", "y_train")]
)
def test_archives_of_images(tmp_path, keys):
  x = np.arange(10 * 12).reshape(10, 4, 3) % 256
  y = np.array(["b", "a"] * 5)
  np.savez(tmp_path / "a.npz", **dict(zip(keys, (x, y), strict=True)))
  data = own_data.read(f"npz:{tmp_path / 'a.npz'}")
  assert data.features.shape == (10, 4, 3, 1) and data.features.dtype == np.uint8
  assert data.form.class_names == ("a", "b") and data.labels[:2].tolist() == [1, 0]
  assert data.names[3] == "row 3"


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_labels_of_every_type(tmp_path):
  x, y = np.random.default_rng(0).normal(size=(10, 3)), np.arange(10) % 2
  for labels, class_names in (
    (y[:, None], ("0", "1")),
    (y[:, None].astype(float), ("0", "1")),
    (y > 0, ("0", "1")),
    (y.astype(np.float16), ("0", "1")),
    (np.array([b"\xe9", b"\xe8"])[y], (r"\xe8", r"\xe9")),  # Latin-1, not UTF-8.
  ):
    data = own_data.read(user_files.write_archive(tmp_path / "a.npz", x, labels))
    assert data.form.class_names == class_names
    expected = 1 - y if class_names[0] == r"\xe8" else y
    np.testing.assert_array_equal(data.labels, expected)
  with pytest.raises(base.InputError, match=r"has the value 1e\+19; labels must be"):
    own_data.read(
      user_files.write_archive(tmp_path / "a.npz", x, np.array([1e19, 2e19])[y])
    )


def test_other_arrays_of_an_archive_are_not_read(tmp_path):
  x, y = np.arange(24.0).reshape(12, 2), np.arange(12) % 2
  others = {
    "info": np.array([{}, None], object),
    "X_test": x,
    "y_test": y.astype(object),
  }
  np.savez(tmp_path / "a.npz", X=x, y=y, **others)
  for split in (None, "train"):
    assert own_data.read(f"npz:{tmp_path / 'a.npz'}", split).labels.tolist() == [*y]
  with pytest.raises(base.InputError, match="contains Python objects"):
    own_data.read(f"npz:{tmp_path / 'a.npz'}", "test")


def test_archives_with_missing_values(tmp_path):
  x = np.random.default_rng(0).normal(size=(10, 3, 5, 5))
  x[4, 0, 0, 0] = np.nan
  y = np.array([0, 1.0] * 5)
  y[7] = np.nan
  np.savez(tmp_path / "a.npz", X=x, y=y)
  data = own_data.read(f"npz:{tmp_path / 'a.npz'}")
  assert data.features.shape == (8, 5, 5, 3) and data.features.dtype == np.float32
  assert data.rows.tolist() == [0, 1, 2, 3, 5, 6, 8, 9]
  assert dict(data.skipped) == {
    "row 7": "it has no label",
    "row 4": "it has NaN or infinite values",
  }


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_before_the_pixels_are_moved(tmp_path, channels):
  x = np.arange(12 * channels * 30, dtype=np.uint16).reshape(12, channels, 5, 6)
  data = own_data.read(user_files.write_archive(tmp_path / "a.npz", x))
  np.testing.assert_array_equal(data.features, np.moveaxis(x, 1, 3))
  assert "The channels of X were moved to the last axis." in data.notes


def test_rows_of_large_numbers_keep_their_differences(tmp_path):
  seconds = 1.7e9 + np.arange(12.0)  # float32 has steps of 128 here.
  rows = np.stack([seconds, np.full(12, np.nan), np.arange(12.0)], axis=1)
  expected = (np.arange(12) - 5.5) / np.arange(12.0).std()
  for x in (rows, rows[:, ::2].astype(np.int64)):
    np.savez(tmp_path / "a.npz", X=x, y=np.arange(12) % 2)
    with warnings.catch_warnings():
      warnings.simplefilter("error")  # scikit-learn warns of the empty column.
      features = own_data.read(f"npz:{tmp_path / 'a.npz'}").features
    np.testing.assert_allclose(features[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(features[:, 1], expected, rtol=1e-6)


def test_archives_of_rows_are_standardized_by_the_training_rows(tmp_path):
  rng = np.random.default_rng(0)
  x = rng.normal(5, 3, size=(100, 3))
  x[:10, 1] = np.nan
  np.savez(tmp_path / "a.npz", X=x, y=np.eye(2)[rng.integers(2, size=100)])
  train, test = (
    own_data.read(f"npz:{tmp_path / 'a.npz'}", p) for p in ("train", "test")
  )
  np.testing.assert_allclose(train.features.mean(axis=0), 0, atol=1e-5)
  assert train.features.shape[1] == 4  # Three columns, and a mask of missing values.
  rows = x[train.rows]
  expected = (x[test.rows][:, 0] - rows[:, 0].mean()) / rows[:, 0].std()
  np.testing.assert_allclose(test.features[:, 0], expected, rtol=1e-4, atol=1e-5)

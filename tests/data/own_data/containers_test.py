"""Duplicates of a user's examples."""

import numpy as np

from l2rw_jax.data import own_data


def test_duplicates_are_found(folder):
  (folder / "dog" / "copy.png").write_bytes((folder / "cat" / "3.png").read_bytes())
  data = own_data.read(f"images:{folder}")
  copy = data.names.index("dog/copy.png")
  assert data.names[data.duplicate_of[copy]] == "cat/3.png"
  assert (data.duplicate_of >= 0).sum() == 1
  assert own_data.report(data) == [
    "exact duplicates of other examples: 1 (1 with another label)."
  ]


def test_zero_and_negative_zero_are_equal():
  features = np.array([[0.0], [-0.0], [1.0]], np.float32)
  assert own_data.duplicates(features).tolist() == [-1, 0, -1]

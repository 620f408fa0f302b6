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
    "1 examples are exact duplicates of others, 1 of them with another label."
  ]


def test_both_zeros_are_equal():
  features = np.array([[0.0], [-0.0], [1.0]], np.float32)
  assert own_data.duplicates(features).tolist() == [-1, 0, -1]

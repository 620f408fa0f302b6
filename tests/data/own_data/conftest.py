"""Data for the tests of this folder."""

import pytest
import user_files


@pytest.fixture
def folder(tmp_path):
  """Two classes of ten gray images, each of a different shade."""
  for label, name in enumerate(("cat", "dog")):
    for i in range(10):
      user_files.save_image(tmp_path / "set" / name / f"{i}.png", 20 * i + label)
  return tmp_path / "set"

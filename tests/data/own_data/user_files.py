"""Files of users, for the tests of this folder."""

import numpy as np
from PIL import Image


def save_image(path, value, size=(6, 4), mode="L"):
  """Writes an image of one color, and the folders above it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, size, value).save(path)


def write_table(path, rows, header="a,b,label"):
  """Writes a CSV file, and returns its name as a data set."""
  path.write_text("\n".join([header, *rows]) + "\n")
  return f"csv:{path}"


def write_archive(path, x, y=None, **more):
  """Writes an archive, with two classes if `y` is None; returns its name."""
  np.savez(path, X=x, y=np.arange(len(x)) % 2 if y is None else y, **more)
  return f"npz:{path}"

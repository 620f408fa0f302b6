"""Users' own data as --dataset of the scripts."""

from collections.abc import Sequence
import functools

from experiments import _launch
from l2rw_jax import base
from l2rw_jax.data import own_data
from l2rw_jax.data import sources

HELP = "or data of your own: images:DIR, npz:FILE or csv:FILE (docs/your_own_data.md)."


def load(name: str, split: str, names: Sequence[str]) -> sources.Source:
  """A split of the data set that --dataset names.

  Args:
    name: the value of --dataset.
    split: train or test.
    names: of the data sets that the script knows besides a user's own.

  Raises:
    InputError: an unknown name, or data that cannot be read.
  """
  if own_data.is_own(name):
    return sources.from_own(name, split, read(name, split))
  if name not in names:
    raise base.InputError(
      f"--dataset={name}: choose among {', '.join(names)}, {HELP.removeprefix('or ')}"
    )
  return sources.load(name, split, **_launch.data_folders())


@functools.lru_cache(maxsize=2)
def read(name: str, split: str) -> own_data.OwnData:
  """A part of a user's own data, read once; prints what was skipped or changed."""
  data = own_data.read(name, split)
  if split == "train":  # The test part has the same notes.
    show_report(name, data)
  return data


def show_report(name: str, data: own_data.OwnData) -> None:
  """Prints what was skipped or changed while data were read."""
  for line in own_data.report(data):
    print(printable(f"{name}: {line}"))


def printable(text: str) -> str:
  """Text without what no terminal can show, or what would control the terminal."""
  return "".join(
    c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode()
    for c in text
  )

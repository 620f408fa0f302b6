"""Reads users' data, and prints what was skipped or changed."""

from l2rw_jax.data import own_data

HELP = "or your own data: images:DIR, npz:FILE or csv:FILE (docs/your_own_data.md)"


def read(
  name: str,
  part: str,
  in_memory: bool | None = True,
  like: own_data.Form | None = None,
) -> own_data.OwnData:
  """Reads a part of a user's data, and prints what was skipped or changed.

  Args:
    name: images:DIR, npz:FILE or csv:FILE.
    part: train or test.
    in_memory: whether to read images into memory, see `own_data.read`.
    like: for the part test, the format of the part train; None reads that part, too.

  Raises:
    InputError: the data cannot be read.
  """
  data = own_data.read(name, part, in_memory=in_memory, like=like)
  if part == "train":  # The test part has the same notes.
    show_report(name, data)
  return data


def show_report(name: str, data: own_data.OwnData) -> None:
  """Prints what was skipped or changed when the data were read."""
  for line in own_data.report(data):
    print(printable(f"{name}: {line}"))


def printable(text: str) -> str:
  """Escapes characters that a terminal cannot show or would execute."""
  return "".join(
    c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode()
    for c in text
  )

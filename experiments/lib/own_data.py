"""Prints what was skipped or changed in users' data."""

from l2rw_jax.data import own_data

HELP = "or your own data: images:DIR, npz:FILE or csv:FILE (docs/your_own_data.md)"


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

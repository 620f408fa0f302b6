"""A progress bar with rate and time left; silent when nobody is watching."""

import sys
from typing import Any

from absl import logging


def bar(total: int, initial: int, description: str) -> Any:
  """A tqdm bar on a terminal; otherwise one that only logs its end."""
  import tqdm  # an extra of the experiments, not needed to import the package

  if not sys.stderr.isatty():
    logging.info("%s: steps %d to %d", description, initial, total)
  return tqdm.tqdm(
    total=total,
    initial=initial,
    desc=description,
    unit="step",
    disable=not sys.stderr.isatty(),
    leave=False,
  )

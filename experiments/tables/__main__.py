r"""Shows every committed result next to its published value.

This script reads only `results/`; it trains nothing and needs no data.
Command: python -m experiments.tables
  after committing new results: --out=results --readme=results/README.md
Time: seconds.
"""

import dataclasses
import pathlib
from typing import Any

from experiments.lib import launch
from experiments.lib import settings as settings_lib
from experiments.lib.settings import data_flag, flag
from experiments.tables import catalog
from experiments.tables import formats
from l2rw_jax import base


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Flags):
  """The flags of this script."""

  format: str = flag(
    "markdown",
    "What to print: all metrics, the README's short form, or a line for each number.",
    choices=["markdown", "compact", "csv"],
    group="output",
  )
  only: tuple[str, ...] | None = flag(
    None,
    "Experiments to show, separated by commas. The default is all in --results.",
    group="output",
  )
  results: str = data_flag(
    "results", "Folder of the results, with a folder for each experiment."
  )
  out: str | None = flag(
    None, "Folder to write tables.md, tables.csv and tables.png to.", group="output"
  )
  readme: str | None = flag(
    None,
    f"File to write the short form to, between {catalog.BEGIN} and {catalog.END}.",
    group="output",
  )


def run(settings: Settings, workdir: Any = None) -> list[Any]:
  """Prints the tables, writes them to the files in the settings, and returns them.

  Raises:
    InputError: `settings` has both `readme` and `only`, or results cannot be read.
  """
  del workdir  # Nothing is trained.
  tables = catalog.collect(pathlib.Path(settings.results), settings.only or ())
  layouts = {
    "markdown": catalog.markdown,
    "compact": catalog.compact,
    "csv": formats.long_form,
  }
  text, written = layouts[settings.format](tables), []
  if settings.readme:
    if settings.only:
      raise base.InputError("--readme contains every experiment: leave out --only.")
    catalog.rewrite(pathlib.Path(settings.readme), catalog.compact(tables))
    written.append(settings.readme)
  if settings.out:
    written += catalog.write(pathlib.Path(settings.out), tables)
  print(text, end="")
  if written:
    print(f"\nwritten: {', '.join(written)}")
  return tables


if __name__ == "__main__":
  launch.main(Settings, run)

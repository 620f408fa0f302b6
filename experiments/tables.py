r"""Every committed result beside its published value.

Reads `results/` only; trains nothing and needs no data.
Command: python -m experiments.tables
  after committing new results: --out=results --readme=results/README.md
Time: seconds.
"""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

from absl import flags

from experiments import _catalogue
from experiments import _launch
from experiments import _table_figure
from experiments import _table_formats
from experiments import _tables
from l2rw_jax import base
from l2rw_jax.io import workdir

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"

_FORMAT = flags.DEFINE_enum(
  "format",
  "markdown",
  ["markdown", "compact", "csv"],
  "Of what is printed: all metrics, the README's short form, or a line a number.",
)
_ONLY = flags.DEFINE_list("only", None, "Experiments to show. [all in --results]")
_RESULTS = flags.DEFINE_string("results", "results", "Folder with a folder for each.")
_OUT = flags.DEFINE_string(
  "out", None, "Folder to write tables.md, tables.csv and tables.png to. [none]"
)
_README = flags.DEFINE_string(
  "readme", None, f"File to write the short form to, between {BEGIN} and {END}. [none]"
)


def collect(results: pathlib.Path, only: Sequence[str] = ()) -> list[_tables.Table]:
  """The tables of a folder of results.

  Args:
    results: with a folder for each experiment, which holds a `results.json` or
      folders that do, whose rows are taken together.
    only: names of experiments; empty for all there are.

  Raises:
    InputError: there are none, one is not in the catalog, or its rows cannot be
      read.
  """
  known = _catalogue.EXPERIMENTS
  if not results.is_dir():
    raise base.InputError(
      f"--results={results} is no folder; run from the repository's root, or name"
      " the folder that holds the results."
    )
  folders = [path for path in sorted(results.iterdir()) if path.is_dir()]
  files = {folder.name: _files(folder) for folder in folders}
  files = {name: own for name, own in files.items() if own}
  for name in only:
    if name not in known:
      raise base.InputError(f"--only={name}: choose among {', '.join(known)}.")
    if name not in files:
      raise base.InputError(f"--only={name}: no {results / name}/results.json.")
  unknown = [name for name in files if name not in known]
  if unknown and not only:
    raise base.InputError(
      f"{results / unknown[0]} has no entry in experiments/_catalogue.py: add one, or"
      " choose others with --only."
    )
  names = [name for name in known if name in (only or files)]
  if not names:
    raise base.InputError(f"--results={results} holds no NAME/results.json.")
  return [_tables.make(_section(name, files[name])) for name in names]


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  own = folder / "results.json"
  return [own] if own.is_file() else sorted(folder.glob("*/results.json"))


def _section(name: str, files: Sequence[pathlib.Path]) -> _tables.Section:
  contents = [_read(path) for path in files]
  flags_of_all = dict(contents[0]["flags"])
  for content in contents[1:]:
    others = content["flags"]
    flags_of_all = {k: v for k, v in flags_of_all.items() if others.get(k) == v}
  rows = [row for content in contents for row in content["rows"]]
  return _tables.Section(name, _catalogue.EXPERIMENTS[name], rows, flags_of_all)


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content["rows"]
    if not isinstance(content["flags"], dict) or not isinstance(rows, list):
      raise TypeError("flags and rows have other types")
    if not all(isinstance(row, dict) for row in rows):
      raise TypeError("a row is no object")
  except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
    raise base.InputError(
      f"{path} cannot be read as results ({error}); run its script again."
    ) from error
  return content


def markdown(tables: Sequence[_tables.Table]) -> str:
  """All metrics of all experiments."""
  parts = [
    "# Every committed result beside its published value",
    f"Mean ± 95% Student-t interval over the runs of a line, at the last step unless"
    f" its column says otherwise. {_MADE}",
  ]
  for table in tables:
    parts += [f"## {_title(table)}", _table_formats.summary(table)]
  return "\n\n".join(parts) + "\n"


def compact(tables: Sequence[_tables.Table]) -> str:
  """The README's short form."""
  parts = [
    f"Mean ± 95% Student-t interval over runs, at the last step; in brackets the"
    f" published value. {_MADE}"
  ]
  for table in tables:
    parts += [f"### {_title(table)}", _table_formats.compact(table)]
  return "\n\n".join(parts) + "\n"


_MADE = (
  "Written by `python -m experiments.tables --out=results --readme=results/README.md`."
)


def _title(table: _tables.Table) -> str:
  return f"{table.experiment.title} (`{table.name}`)"


def between_markers(text: str, block: str) -> str:
  """`text` with `block` between its markers.

  Raises:
    InputError: the markers are missing, repeated or in the wrong order.
  """
  before, _, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not end or text.count(BEGIN) != 1 or text.count(END) != 1:
    raise base.InputError(
      f"--readme must hold one {BEGIN} and after it one {END}; add them where the"
      " tables are to stand."
    )
  return f"{before}{BEGIN}\n\n{block}\n{END}{after}"


def _rewrite(readme: pathlib.Path, block: str) -> None:
  try:
    text = readme.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise base.InputError(f"--readme={readme} is not UTF-8 text ({error}).") from error
  workdir.write_text(readme, between_markers(text, block))


def write(folder: pathlib.Path, tables: Sequence[_tables.Table]) -> list[str]:
  """Writes `tables.md`, `tables.csv` and, with anything published, `tables.png`."""
  folder.mkdir(parents=True, exist_ok=True)
  workdir.write_text(folder / "tables.md", markdown(tables))
  workdir.write_text(folder / "tables.csv", _table_formats.long_form(tables))
  drawn = _table_figure.draw(tables, folder / "tables.png")
  names = ["tables.md", "tables.csv", *(["tables.png"] if drawn else [])]
  return [str(folder / name) for name in names]


def main() -> None:
  """Prints the tables, and writes them where asked to."""
  tables = collect(pathlib.Path(_RESULTS.value), _ONLY.value or ())
  formats = {
    "markdown": markdown,
    "compact": compact,
    "csv": _table_formats.long_form,
  }
  text, written = formats[_FORMAT.value](tables), []
  if _README.value:
    if _ONLY.value:
      raise base.InputError("--readme holds every experiment: leave out --only.")
    _rewrite(pathlib.Path(_README.value), compact(tables))
    written.append(_README.value)
  if _OUT.value:
    written += write(pathlib.Path(_OUT.value), tables)
  print(text, end="")
  if written:
    print(f"\nwritten: {', '.join(written)}")


if __name__ == "__main__":
  _launch.run(main)

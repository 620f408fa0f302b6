"""What a table says of rows of results: measured values next to published ones."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import dataclasses
import operator
from typing import Any, NamedTuple

from experiments.lib import report
from l2rw_jax import base

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Metric:
  """A number that every run has.

  Attributes:
    column: of a row; None there means that the run has no such number.
    heading: of the table, with its unit.
    scale: what to multiply the row's number by.
    decimals: to print.
    published: the row's column of the published value, in the heading's unit.
    spread: the row's column of its "±", whatever that is.
    is_optional: whether rows may lack the column, as those do that are older than it.
  """

  column: str
  heading: str
  scale: float = 1.0
  decimals: int = 2
  published: str | None = None
  spread: str | None = None
  is_optional: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
  """What the table of a script shows.

  Attributes:
    name: of its folder of results.
    title: for people.
    metrics: the first is the one that the experiment is about.
    settings: what distinguishes cells of the experiment besides method and seed: a
      column of the rows or a flag -> how to print its value, for `str.format`.
    keys: those of `settings` that always have a column; the others have one where
      they differ between rows, and are printed once above the table otherwise.
    method: what a row's line is called.
    method_heading: heading of that column.
    repeat: what the runs of a line differ in.
    identity: of a run among those of its line.
    published: where the published values are from and what their "±" is, or why
      there are none.
  """

  name: str
  title: str
  metrics: tuple[Metric, ...]
  settings: Mapping[str, str]
  published: str
  keys: tuple[str, ...] = ()
  method: Callable[[Row], str] = operator.itemgetter("method")
  method_heading: str = "method"
  repeat: str = "seed"
  identity: Callable[[Row], Any] = lambda row: row.get("seed")


# Of the experiments with wrong labels.
NOISE_METRICS = (
  Metric(
    "accuracy_percent",
    "test accuracy %",
    published="published_percent",
    spread="published_spread",
  ),
  Metric("best_percent", "best on test %"),
  Metric("weight_auroc", "AUROC of mean weights", decimals=3),
)


class Section(NamedTuple):
  """One experiment with the runs it has.

  Attributes:
    name: of its folder.
    layout: how to read its rows.
    rows: one a run.
    flags: that the runs were made with.
  """

  name: str
  layout: Layout
  rows: Sequence[Row]
  flags: Row


class Value(NamedTuple):
  """Measured and published value of one metric; None where there is none."""

  metric: Metric
  measured: report.Interval | None
  published: float | None
  spread: float | None

  @property
  def difference(self) -> float | None:
    """Measured minus published."""
    if self.measured is None or self.published is None:
      return None
    return self.measured.mean - self.published


class Line(NamedTuple):
  """All runs of one method under one setting."""

  method: str
  setting: dict[str, Any]
  values: list[Value]
  repeats: int


class Table(NamedTuple):
  """What a table says, before it is Markdown, CSV or a figure.

  Attributes:
    name: of the experiment's folder.
    layout: what the table shows.
    lines: in the order of their first rows.
  """

  name: str
  layout: Layout
  lines: list[Line]

  def varying(self) -> list[str]:
    """The settings that differ between lines."""
    names = self.layout.settings
    return [n for n in names if len({line.setting[n] for line in self.lines}) > 1]

  def say(self, line: Line, names: Iterable[str]) -> str:
    """Some of a line's settings in words."""
    texts = [(self.layout.settings[n], line.setting[n]) for n in names]
    return ", ".join(text.format(value) for text, value in texts if value is not None)

  def say_constant(self, but: Collection[str]) -> str:
    """The settings that do not differ, in words."""
    same = [name for name in self.layout.settings if name not in but]
    return self.say(self.lines[0], same)

  def metrics(self) -> list[int]:
    """The numbers of the metrics that some run has."""
    count = range(len(self.layout.metrics))
    return [i for i in count if any(line.values[i].measured for line in self.lines)]

  def has_published(self, metric: int) -> bool:
    """Whether any line has a published value of a metric."""
    return any(line.values[metric].published is not None for line in self.lines)


def make(section: Section) -> Table:
  """The table of an experiment.

  Raises:
    InputError: there is no row, a row lacks a column or holds there what cannot be
      read, runs of one line have the same seed, or their published values differ.
  """
  layout = section.layout
  if not section.rows:
    raise base.InputError(f"{section.name}: no rows; run its script again.")
  groups: dict[tuple, list[Row]] = {}
  for row in section.rows:
    setting = tuple(_setting(section, row, name) for name in layout.settings)
    groups.setdefault((_method(section, row), *setting), []).append(row)
  lines = []
  for (method, *values), rows in groups.items():
    _check_seeds(section, method, rows)
    lines.append(
      Line(
        method,
        dict(zip(layout.settings, values, strict=True)),
        [_value(section, metric, rows) for metric in layout.metrics],
        len(rows),
      )
    )
  return Table(section.name, layout, lines)


def _method(section: Section, row: Row) -> str:
  try:
    return _printable(str(section.layout.method(row)))
  except KeyError as error:
    raise _lacks(section, str(error)) from error
  except (TypeError, ValueError, OverflowError) as error:
    raise base.InputError(
      f"{section.name}: a row's method cannot be read; run its script again."
    ) from error


def _printable(text: str) -> str:
  """Without line breaks, control characters and halves of characters."""
  return "".join(c if c.isprintable() else " " for c in text)


def _setting(section: Section, row: Row, name: str) -> Any:
  if name not in row and name in section.layout.keys:
    raise _lacks(section, repr(name))
  value = row[name] if name in row else section.flags.get(name)
  try:
    section.layout.settings[name].format(value)
    hash(value)
  except (TypeError, ValueError, OverflowError) as error:
    if value is not None:
      raise base.InputError(
        f"{section.name}: {name!r} is {repr(value)[:80]}; run its script again."
      ) from error
  return _printable(value) if isinstance(value, str) else value


def _lacks(section: Section, column: str) -> base.InputError:
  return base.InputError(
    f"{section.name}: a row has no {column}; run its script again."
  )


def _check_seeds(section: Section, method: str, rows: Sequence[Row]) -> None:
  """Runs that differ in more than their seed must not be averaged."""
  seeds = [section.layout.identity(row) for row in rows]
  if len({str(seed) for seed in seeds}) < len(seeds):
    raise base.InputError(
      f"{section.name}: {method} has two rows of one {section.layout.repeat} and"
      f" setting; name what distinguishes them in `settings` of its table."
    )


def _value(section: Section, metric: Metric, rows: Sequence[Row]) -> Value:
  if metric.is_optional:
    rows = [{metric.column: None, **row} for row in rows]
  numbers = [_number(section, row, metric.column) for row in rows]
  known = [metric.scale * number for number in numbers if number is not None]
  published: list[float | None] = []
  for column in (metric.published, metric.spread):
    values = {_number(section, row, column) for row in rows} if column else {None}
    if len(values) > 1:
      raise base.InputError(
        f"{section.name}: {column!r} differs between runs of one line; mend its rows."
      )
    published += values
  return Value(metric, report.interval(known) if known else None, *published)


def _number(section: Section, row: Row, column: str) -> float | None:
  if column not in row:
    raise _lacks(section, repr(column))
  number = row[column]
  is_number = isinstance(number, int | float) and not isinstance(number, bool)
  # Floats hold no integer beyond about 1e308.
  is_finite = is_number and abs(number) < 1e300
  if number is not None and not is_finite:
    raise base.InputError(
      f"{section.name}: {column!r} is {repr(number)[:80]}, not a finite number; run"
      " its script again."
    )
  return number

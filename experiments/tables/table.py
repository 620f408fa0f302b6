"""Tables of results, with measured values next to published ones."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import dataclasses
import operator
import re
import types
from typing import Any, NamedTuple

from experiments.lib import report
from l2rw_jax import base

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Metric:
  """A number in the row of every run, such as the test accuracy.

  Attributes:
    column: column of the rows; None in a row means that this run did not measure it.
    heading: heading in the table, with the unit.
    scale: factor by which the numbers in the rows are multiplied.
    decimals: number of decimals to print.
    published: column of the published value in the rows, in the unit of the heading.
    spread: column of the published "±" in the rows.
    is_optional: whether the column may be missing, as in older rows.
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
  """The layout of the table of a script.

  Attributes:
    name: name of its folder of results.
    title: title of the table.
    metrics: the metrics; the first is the main one.
    settings: the settings that distinguish cells in addition to method and seed. The
      keys are columns of the rows or flags; the values are formats for `str.format`.
    keys: the settings that always have a column. Every other setting has a column only
      if it differs between rows, and is printed once above the table otherwise.
    method: a function that returns the name of a row's method in the table.
    method_heading: heading of the column of methods.
    repeat: the name for one run of a line, such as "seed" or "split".
    identity: a function that returns a value of a row that differs between the runs of
      a line.
    published: the source of the published values and the meaning of their "±", or the
      reason why there are none.
    protocol: the values that some settings have under the published protocol. The
      published values of other rows are not shown.
    divided_by: settings; each combination of their values has a separate table in the
      README's short form.
  """

  name: str
  title: str
  metrics: tuple[Metric, ...]
  settings: Mapping[str, str]
  published: str
  protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  keys: tuple[str, ...] = ()
  method: Callable[[Row], str] = operator.itemgetter("method")
  method_heading: str = "method"
  repeat: str = "seed"
  identity: Callable[[Row], Any] = lambda row: row.get("seed")
  divided_by: tuple[str, ...] = ()

  def on_validation(self) -> "Layout":
    """The layout for results on validation images instead of the test set."""
    metrics = (
      dataclasses.replace(one, heading=re.sub(r"\btest\b", "validation", one.heading))
      for one in self.metrics
    )
    return dataclasses.replace(self, metrics=tuple(metrics))


# Metrics of the experiments with wrong labels.
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
  """One experiment with its runs.

  Attributes:
    name: name of its folder.
    layout: layout of its table.
    rows: one row per run.
    flags: the flags of the runs.
  """

  name: str
  layout: Layout
  rows: Sequence[Row]
  flags: Row


class Value(NamedTuple):
  """The measured and the published value of one metric; None if there is none."""

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


class TunedOnTest(NamedTuple):
  """A setting of some lines that was chosen by test accuracy.

  Attributes:
    methods: pattern that matches the names of the methods.
    setting: the setting, as text.
    where: the values that some settings of these lines have; all others may differ.
  """

  methods: str
  setting: str
  where: Mapping[str, Any] = types.MappingProxyType({})


class Line(NamedTuple):
  """All runs of one method under one setting."""

  method: str
  setting: dict[str, Any]
  values: list[Value]
  repeats: int


class Table(NamedTuple):
  """The content of a table, before it is written as Markdown, CSV or a figure.

  Attributes:
    name: name of the experiment's folder.
    layout: layout of the table.
    lines: lines of the table, in the order of their first rows.
    tuned_on_test: the settings that were chosen by test accuracy. Their lines are
      marked.
  """

  name: str
  layout: Layout
  lines: list[Line]
  tuned_on_test: Sequence[TunedOnTest] = ()

  def tuned(self, line: Line) -> str | None:
    """The setting of a line that was chosen by test accuracy, or None."""
    for methods, setting, where in self.tuned_on_test:
      is_same = all(line.setting[name] == value for name, value in where.items())
      if is_same and re.fullmatch(methods, line.method):
        return setting
    return None

  def divided(self) -> list["Table"]:
    """A table for each combination of the settings `layout.divided_by`."""
    parts: dict[tuple[Any, ...], list[Line]] = {}
    for line in self.lines:
      key = tuple(line.setting[name] for name in self.layout.divided_by)
      parts.setdefault(key, []).append(line)
    return [self._replace(lines=lines) for lines in parts.values()]

  def varying(self) -> list[str]:
    """The settings that differ between lines."""
    names = self.layout.settings
    return [n for n in names if len({line.setting[n] for line in self.lines}) > 1]

  def say(self, line: Line, names: Iterable[str]) -> str:
    """Some of the settings of a line, as text."""
    texts = [(self.layout.settings[n], line.setting[n]) for n in names]
    return ", ".join(text.format(value) for text, value in texts if value is not None)

  def say_constant(self, but: Collection[str]) -> str:
    """The settings not in `but`, which must be the same in all lines, as text."""
    same = [name for name in self.layout.settings if name not in but]
    return self.say(self.lines[0], same)

  def metrics(self) -> list[int]:
    """The indices of the metrics that some run has."""
    count = range(len(self.layout.metrics))
    return [i for i in count if any(line.values[i].measured for line in self.lines)]

  def has_published(self, metric: int) -> bool:
    """Whether any line has a published value of a metric."""
    return any(line.values[metric].published is not None for line in self.lines)


def make(section: Section) -> Table:
  """The table of an experiment.

  Raises:
    InputError: there is no row, a row lacks a column or has a value that cannot be
      read, runs of one line have the same seed, or their published values or "±"
      differ.
  """
  layout = section.layout
  if section.flags.get("evaluate_on") == "validation":
    layout = layout.on_validation()
  if not section.rows:
    raise base.InputError(f"{section.name}: no rows; run its script again.")
  groups: dict[tuple, list[Row]] = {}
  for row in section.rows:
    key = tuple(_setting(section, row, name) for name in layout.settings)
    groups.setdefault((_method(section, row), *key), []).append(row)
  lines = []
  for (method, *values), rows in groups.items():
    _check_seeds(section, method, rows)
    setting = dict(zip(layout.settings, values, strict=True))
    numbers = [_value(section, metric, rows) for metric in layout.metrics]
    if any(setting[name] != value for name, value in layout.protocol.items()):
      numbers = [number._replace(published=None, spread=None) for number in numbers]
    lines.append(Line(method, setting, numbers, len(rows)))
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
  """`text`, with spaces in place of line breaks, control characters and surrogates."""
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
  """Raises InputError if runs of one line have the same seed.

  Such runs differ in a setting and must not be averaged.
  """
  seeds = [section.layout.identity(row) for row in rows]
  if len({str(seed) for seed in seeds}) < len(seeds):
    raise base.InputError(
      f"{section.name}: {method} has two rows with the same {section.layout.repeat}"
      " and settings; add the column that distinguishes them to the `settings` of the"
      " table."
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
        f"{section.name}: {column!r} differs between runs of one line; correct the"
        " rows."
      )
    published += values
  return Value(metric, report.interval(known) if known else None, *published)


def _number(section: Section, row: Row, column: str) -> float | None:
  if column not in row:
    raise _lacks(section, repr(column))
  number = row[column]
  is_number = isinstance(number, int | float) and not isinstance(number, bool)
  # A float cannot represent integers beyond about 1e308.
  is_finite = is_number and abs(number) < 1e300
  if number is not None and not is_finite:
    raise base.InputError(
      f"{section.name}: {column!r} is {repr(number)[:80]}, not a finite number; run"
      " its script again."
    )
  return number

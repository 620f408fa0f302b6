"""Tables of measured and published values, as Markdown and as CSV."""

from collections.abc import Sequence
import csv
import html
import io
import re
from typing import Any

from experiments.lib import report
from experiments.tables import table as table_lib

# The largest number of metrics that `compact` shows for one setting.
_MAX_METRICS = 6
LONG_FORM = (
  *("experiment", "setting", "method", "metric", "mean", "half_width", "repeats"),
  *("published", "published_spread", "difference", "chosen_by_test_accuracy"),
)


def summary(table: table_lib.Table) -> str:
  """All metrics of a table: shared settings, a line per setting and method, sources."""
  layout = table.layout
  varying, first = table.varying(), table.lines[0].setting
  keys = [k for k in layout.keys if k in varying or first[k] is not None]
  columns = [*keys, *(name for name in varying if name not in keys)]
  header = [*columns, layout.method_heading]
  for i in table.metrics():
    header.append(layout.metrics[i].heading)
    header += ["published", "difference"] if table.has_published(i) else []
  rows = []
  for line in table.lines:
    cells = [_markdown(_plain(line.setting[name])) for name in columns]
    cells.append(_markdown(line.method) + _mark(table, [line]))
    for i in table.metrics():
      value = line.values[i]
      cells.append(_measured(value, line.repeats))
      cells += [_published(value), _difference(value)] if table.has_published(i) else []
    rows.append([*cells, line.repeats])
  result = report.table([*header, f"{layout.repeat}s"], rows)
  shared = [_markdown(table.say_constant(but=columns)), "mean ± 95% interval"]
  above = "; ".join(part for part in shared if part)
  notes = [*_note_on_missing(table, table.metrics()), *_note_on_tuning(table)]
  return "\n\n".join([f"{above}.", result, _sources(table), *notes])


def compact(table: table_lib.Table) -> str:
  """The first metric, with a line per method and a column per setting.

  Lines and columns are exchanged if there are more settings than methods. If there is
  one setting, there is a column for each of the first six metrics. Published values are
  in parentheses. There are several tables if the layout is divided by a setting. Lines
  with a setting that was chosen by test accuracy are marked: at the method if all of
  its lines have such a setting, and otherwise at their numbers.
  """
  below = [_source(table), *_note_on_tuning(table)]
  return "\n\n".join([*map(_compact, table.divided()), *below])


def _compact(table):
  layout, varying = table.layout, table.varying()
  # The values, not their texts, distinguish settings: texts may be rounded.
  keys = [tuple(line.setting[name] for name in varying) for line in table.lines]
  settings = {
    key: _setting(table, line, varying)
    for key, line in zip(keys, table.lines, strict=True)
  }
  shown = table.metrics()
  shared = [_markdown(table.say_constant(but=varying)), _repeats(table)]
  if len(settings) > 1:
    header, shown = list(settings.values()), shown[:1]
    shared += [layout.metrics[i].heading for i in shown]
  else:
    shown = shown[:_MAX_METRICS]
    header = [layout.metrics[i].heading for i in shown]
  cells: dict[str, dict[tuple[Any, int], str]] = {}
  for key, line in zip(keys, table.lines, strict=True):
    for i in shown:
      value = line.values[i]
      published = "" if value.published is None else f" ({_published(value)})"
      of_method = _mark(table, [x for x in table.lines if x.method == line.method])
      of_line = "" if of_method else _mark(table, [line])
      values = cells.setdefault(_markdown(line.method) + of_method, {})
      values[key, i] = _measured(value, line.repeats) + published + of_line
  places = [(key, i) for key in settings for i in shown]
  rows = [[name, *(v.get(p, "") for p in places)] for name, v in cells.items()]
  lines = [[layout.method_heading, *header], *rows]
  if len(settings) > max(1, len(rows)):
    lines = [list(column) for column in zip(*lines, strict=True)]
    lines[0][0] = "setting"
  # A heading is empty if its setting has no value, such as M / B in plain training.
  lines[0] = [heading or "-" for heading in lines[0]]
  text = report.table(lines[0], lines[1:])
  above = "; ".join(part for part in shared if part)
  return "\n\n".join([f"{above}.", text, *_note_on_missing(table, shown)])


def long_form(tables: Sequence[table_lib.Table]) -> str:
  """CSV with a line per experiment, setting, method and metric.

  The last column names the setting that was chosen by test accuracy, if there is one:
  the rows that have † in the other forms.
  """
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(LONG_FORM)
  for table in tables:
    for line in table.lines:
      known = {k: _plain(v) for k, v in line.setting.items() if v is not None}
      setting = "; ".join(f"{k}={v}" for k, v in known.items())
      for value in line.values:
        if value.measured is None:
          continue
        measured = value.measured
        half_width = measured.half_width if measured.repeats > 1 else None
        writer.writerow(
          [_text(t) for t in (table.name, setting, line.method, value.metric.heading)]
          + [_digits(measured.mean), _digits(half_width), measured.repeats]
          + [_digits(n) for n in (value.published, value.spread, value.difference)]
          + [table.tuned(line) or ""]
        )
  return text.getvalue()


def _setting(table: table_lib.Table, line: table_lib.Line, names: Sequence[str]) -> str:
  return _markdown(table.say(line, names))


def _markdown(text: str) -> str:
  """Escapes text from a results file, so that Markdown shows it literally."""
  return re.sub(r"([\\`|\[\]])", r"\\\1", html.escape(text, quote=False))


def _mark(table: table_lib.Table, lines: Sequence[table_lib.Line]) -> str:
  """A mark if a setting of all these lines was chosen by test accuracy."""
  return " †" if all(table.tuned(line) for line in lines) else ""


def _note_on_tuning(table: table_lib.Table) -> list[str]:
  """The meaning of the marks of `_mark`; empty if no line is marked."""
  settings = [table.tuned(line) for line in table.lines]
  chosen = dict.fromkeys(setting for setting in settings if setting)
  return [f"† chosen by test accuracy: {'; '.join(chosen)}."] if chosen else []


def _note_on_missing(table: table_lib.Table, metrics: Sequence[int]) -> list[str]:
  """What "k of n" after a number means; empty if no number of `metrics` needs it."""
  if not any(_is_partial(x.values[i], x.repeats) for x in table.lines for i in metrics):
    return []
  repeats = f"{table.layout.repeat}s"
  return [
    f'"k of n" after a number: it is the mean over the k {repeats} that have it; the'
    f" other {repeats} have no such number."
  ]


def _is_partial(value: table_lib.Value, repeats: int) -> bool:
  """Whether only some of the runs of a line measured this metric."""
  return value.measured is not None and value.measured.repeats < repeats


def _text(text: str) -> str:
  """Escapes text from a results file, so that spreadsheets do not evaluate it."""
  return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


def _digits(number: float | None) -> str:
  # The last digits of a float depend on the version of NumPy, so they are left out.
  return "" if number is None else f"{number:.8g}"


def _plain(value: Any) -> str:
  if value is None:
    return "-"
  return f"{value:g}" if isinstance(value, float) else str(value)


def _measured(value: table_lib.Value, repeats: int) -> str:
  """The mean with its interval, and the number of runs that measured it if not all."""
  if value.measured is None:
    return "-"
  text = f"{value.measured:.{value.metric.decimals}f}"
  # Without the number of runs, a method that reached an accuracy in one of three runs
  # would look like a method that always reached it.
  is_partial = _is_partial(value, repeats)
  return f"{text}, {value.measured.repeats} of {repeats}" if is_partial else text


def _published(value: table_lib.Value) -> str:
  decimals = value.metric.decimals
  if value.published is None:
    return "-"
  spread = "" if value.spread is None else f" ± {value.spread:.{decimals}f}"
  return f"{value.published:.{decimals}f}{spread}"


def _difference(value: table_lib.Value) -> str:
  if value.difference is None:
    return "-"
  return f"{value.difference:+.{value.metric.decimals}f}"


def _repeats(table: table_lib.Table) -> str:
  counts = [line.repeats for line in table.lines]
  least, most = min(counts), max(counts)
  count = f"{most}" if least == most else f"{least} to {most}"
  return f"{count} {table.layout.repeat}{'s' if most > 1 else ''}"


def _source(table: table_lib.Table) -> str:
  """The source of the published values, or a note that there are none."""
  published = table.layout.published
  has_column = any(metric.published for metric in table.layout.metrics)
  has_value = any(table.has_published(i) for i in table.metrics())
  if has_column and not has_value and not published.startswith("Published: nothing"):
    return "Published: nothing for these settings."
  return published


def _sources(table: table_lib.Table) -> str:
  """The source of the published values, and the lines without a published value."""
  published, varying = _source(table), table.varying()
  missing: dict[str, list[table_lib.Line]] = {}
  for line in table.lines:
    if all(value.published is None for value in line.values):
      missing.setdefault(line.method, []).append(line)
  if sum(map(len, missing.values())) in (0, len(table.lines)):
    return published
  names = []
  for method, lines in missing.items():
    everywhere = len(lines) == sum(line.method == method for line in table.lines)
    where = "; ".join(_setting(table, line, varying) for line in lines)
    name = _markdown(method)
    names.append(name if everywhere else f"{name} ({where})")
  return f"{published} Without a published value: {', '.join(names)}."

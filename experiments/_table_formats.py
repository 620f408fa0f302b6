"""A table of ours beside the published values, as Markdown and as CSV."""

from collections.abc import Sequence
import csv
import html
import io
import re
from typing import Any

from experiments import _report
from experiments import _tables

LONG_FORM = (
  "experiment",
  "setting",
  "method",
  "metric",
  "mean",
  "half_width",
  "repeats",
  "published",
  "published_spread",
  "difference",
)


def summary(table: _tables.Table) -> str:
  """Every metric: what all lines share, a line per setting and method, sources."""
  experiment = table.experiment
  varying, first = table.varying(), table.lines[0].setting
  keys = [k for k in experiment.keys if k in varying or first[k] is not None]
  columns = [*keys, *(name for name in varying if name not in keys)]
  header = [*columns, experiment.method_heading]
  for i in table.metrics():
    header.append(experiment.metrics[i].heading)
    header += ["published", "difference"] if table.has_published(i) else []
  rows = []
  for line in table.lines:
    cells = [*(_plain(line.setting[name]) for name in columns), line.method]
    cells = [_markdown(cell) for cell in cells]
    for i in table.metrics():
      value = line.values[i]
      cells.append(_ours(value))
      cells += [_published(value), _difference(value)] if table.has_published(i) else []
    rows.append([*cells, line.repeats])
  made = _report.table([*header, f"{experiment.repeat}s"], rows)
  told = [_markdown(table.say_constant(but=columns)), "mean ± 95% interval"]
  above = "; ".join(part for part in told if part)
  return "\n\n".join([f"{above}.", made, _sources(table)])


def compact(table: _tables.Table) -> str:
  """A line per method, and a column per setting, of the first metric alone.

  Lines and columns change places where there are more settings than methods. With
  one setting, a column per metric. Published values stand in brackets.
  """
  experiment, varying = table.experiment, table.varying()
  settings = list(dict.fromkeys(_said(table, line, varying) for line in table.lines))
  shown = table.metrics()
  told = [_markdown(table.say_constant(but=varying)), _repeats(table)]
  if len(settings) > 1:
    header, shown = settings, shown[:1]
    told += [experiment.metrics[i].heading for i in shown]
  else:
    header = [experiment.metrics[i].heading for i in shown]
  cells: dict[str, dict[tuple[str, int], str]] = {}
  for line in table.lines:
    for i in shown:
      value = line.values[i]
      beside = "" if value.published is None else f" ({_published(value)})"
      own = cells.setdefault(_markdown(line.method), {})
      own[_said(table, line, varying), i] = _ours(value) + beside
  places = [(setting, i) for setting in settings for i in shown]
  rows = [[name, *(own.get(p, "") for p in places)] for name, own in cells.items()]
  lines = [[experiment.method_heading, *header], *rows]
  if len(settings) > max(1, len(rows)):
    lines = [list(column) for column in zip(*lines, strict=True)]
    lines[0][0] = "setting"
  made = _report.table(lines[0], lines[1:])
  above = "; ".join(part for part in told if part)
  return "\n\n".join([f"{above}.", made, experiment.published])


def long_form(tables: Sequence[_tables.Table]) -> str:
  """CSV: a line per experiment, setting, method and metric; empty where unknown."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(LONG_FORM)
  for table in tables:
    for line in table.lines:
      told = {k: _plain(v) for k, v in line.setting.items() if v is not None}
      setting = "; ".join(f"{k}={v}" for k, v in told.items())
      for value in line.values:
        if value.ours is None:
          continue
        ours = value.ours
        half_width = ours.half_width if ours.repeats > 1 else None
        writer.writerow(
          [_text(t) for t in (table.name, setting, line.method, value.metric.heading)]
          + [_digits(ours.mean), _digits(half_width), ours.repeats]
          + [_digits(n) for n in (value.published, value.spread, value.difference)]
        )
  return text.getvalue()


def _said(table: _tables.Table, line: _tables.Line, names: Sequence[str]) -> str:
  return _markdown(table.say(line, names))


def _markdown(text: str) -> str:
  """Text from a results file, as Markdown that shows it and does nothing else."""
  return re.sub(r"([\\`|\[\]])", r"\\\1", html.escape(text, quote=False))


def _text(text: str) -> str:
  """Text from a results file, as a CSV cell that spreadsheets take for no formula."""
  return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


def _digits(number: float | None) -> str:
  # Fewer than a float has: the last ones depend on the version of NumPy.
  return "" if number is None else f"{number:.8g}"


def _plain(value: Any) -> str:
  if value is None:
    return "-"
  return f"{value:g}" if isinstance(value, float) else str(value)


def _ours(value: _tables.Value) -> str:
  return "-" if value.ours is None else f"{value.ours:.{value.metric.decimals}f}"


def _published(value: _tables.Value) -> str:
  decimals = value.metric.decimals
  if value.published is None:
    return "-"
  spread = "" if value.spread is None else f" ± {value.spread:.{decimals}f}"
  return f"{value.published:.{decimals}f}{spread}"


def _difference(value: _tables.Value) -> str:
  if value.difference is None:
    return "-"
  return f"{value.difference:+.{value.metric.decimals}f}"


def _repeats(table: _tables.Table) -> str:
  counts = [line.repeats for line in table.lines]
  least, most = min(counts), max(counts)
  told = f"{most}" if least == most else f"{least} to {most}"
  return f"{told} {table.experiment.repeat}{'s' if most > 1 else ''}"


def _sources(table: _tables.Table) -> str:
  """Where the published values are from, and which lines have none."""
  published, varying = table.experiment.published, table.varying()
  missing: dict[str, list[_tables.Line]] = {}
  for line in table.lines:
    if all(value.published is None for value in line.values):
      missing.setdefault(line.method, []).append(line)
  if sum(map(len, missing.values())) in (0, len(table.lines)):
    return published
  told = []
  for method, own in missing.items():
    everywhere = len(own) == sum(line.method == method for line in table.lines)
    where = "; ".join(_said(table, line, varying) for line in own)
    name = _markdown(method)
    told.append(name if everywhere else f"{name} ({where})")
  return f"{published} Without a published value: {', '.join(told)}."

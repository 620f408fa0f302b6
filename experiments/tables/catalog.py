r"""All committed results next to their published values.

The layout of an experiment's table is the `TABLE` of its script. The layouts for the
benchmarks are defined in this module.
"""

from collections.abc import Sequence
import functools
import importlib
import json
import pathlib
import pkgutil
from typing import Any

import experiments
from experiments.tables import figure
from experiments.tables import formats
from experiments.tables import table as table_lib
from l2rw_jax import base
from l2rw_jax.io import workdir

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
# The order of the tables; tables of new scripts follow at the end.
_ORDER = (
  *("digits_noise", "clean_examples", "mnist_imbalance", "mnist_noise"),
  *("mnist_noise_bare", "cifar_noise", "mnist_long_tail", "cifar_long_tail"),
  *("fairness", "memorization", "few_shot", "lm_reweight", "coreset"),
  *("coreset_selection", "label_issues", "data_cleaning", "step_time"),
  "mentornet_pretrain",
)

# Settings of committed runs that were chosen by test accuracy, so that their results
# are optimistic.
_TunedOnTest = table_lib.TunedOnTest
_TUNED_ON_TEST = {
  "mnist_noise": (
    _TunedOnTest(
      "meta_weight_net|warpi|advisor",
      "the learning rate of the look-ahead, in runs with a constant learning rate",
      {"schedule": None},
    ),
    _TunedOnTest(
      "mentornet_.*",
      "the percentile of MentorNet, in runs with a constant learning rate",
      {"schedule": None},
    ),
  ),
  "mnist_long_tail": (
    _TunedOnTest(
      ".*",
      "the learning rate after 100 epochs, the same for all methods",
      {"num_epochs": 100},
    ),
  ),
}


def _step_label(row: table_lib.Row) -> str:
  """A label with the method, the engine and the framework of a timed step."""
  engine = "" if row["engine"] is None else f", {row['engine']}"
  framework = {"jax": "", "torch": " (PyTorch)"}.get(
    row["framework"], f" ({row['framework']})"
  )
  return f"{row['method']}{engine}{framework}"


CORESET_SELECTION = table_lib.Layout(
  name="coreset_selection",
  title="The cost of selecting a tenth of MNIST, in training epochs",
  metrics=(
    table_lib.Metric("seconds", "seconds, median", decimals=3),
    table_lib.Metric("epochs", "epochs"),
    table_lib.Metric("cpu_epochs", "epochs, of CPU time"),
    table_lib.Metric("extra_mib", "extra memory MiB", decimals=0),
    table_lib.Metric("cost", "sum of distances", decimals=1),
  ),
  settings={
    "dataset": "{}",
    "num_examples": "{:,} examples",
    "fraction": "{:.0%} to choose",
    "repeats": "{} rounds",
    "cpus": "CPU cores: {}",
  },
  keys=("num_examples", "cpus"),
  method_heading="timed",
  repeat="benchmark",
  published="Published: nothing comparable.",
)

DATA_CLEANING = table_lib.Layout(
  name="data_cleaning",
  title="Data cleaning as a bilevel problem",
  metrics=(
    table_lib.Metric("error_percent", "test error %"),
    table_lib.Metric("weight_auroc", "AUROC of weights", decimals=3),
    table_lib.Metric("score_auroc", "AUROC of mean scores", decimals=3),
    table_lib.Metric("seconds_to_target", "CPU seconds to 17%", decimals=1),
    table_lib.Metric("seconds", "CPU seconds", decimals=1),
  ),
  settings={"dataset": "{}", "share": "p = {:g}", "num_steps": "{:,} steps"},
  keys=("share",),
  published=(
    "Published: curves only (benchopt/benchmark_bilevel), without numeric values."
  ),
)

LABEL_ISSUES = table_lib.Layout(
  name="label_issues",
  title="Ranking wrong labels: one training run next to cross-validation",
  metrics=(
    table_lib.Metric("auroc", "AUROC", decimals=4),
    table_lib.Metric("precision_at_k", "precision at k %", scale=100, decimals=1),
    table_lib.Metric("missed_share", "missed at k %", 100, decimals=1),
    table_lib.Metric("estimate_ratio", "estimated / true number"),
    table_lib.Metric("flagged_precision", "precision of flagged %", 100, decimals=1),
    table_lib.Metric("flagged_recall", "recall of flagged %", 100, decimals=1),
    table_lib.Metric("seconds", "CPU seconds", decimals=1),
  ),
  settings={"dataset": "{}", "noise": "{}", "num_examples": "{:,} examples"},
  keys=("dataset", "noise"),
  published="Published: nothing on these data under this protocol.",
)

STEP_TIME = table_lib.Layout(
  name="step_time",
  title="What a training step costs",
  metrics=(
    table_lib.Metric("ratio", "time / plain"),
    table_lib.Metric("milliseconds", "ms"),
    table_lib.Metric("examples_per_second", "examples / s", decimals=0),
    table_lib.Metric("flops_ratio", "FLOPs / plain"),
    table_lib.Metric("temporary_bytes_ratio", "memory / plain"),
    table_lib.Metric("faster_than_torch", "times eager PyTorch's speed"),
    table_lib.Metric("fraction_of_peak", "share of peak matmul FLOP/s"),
    table_lib.Metric("compile_seconds", "s to compile", decimals=1),
    table_lib.Metric("repeats", "rounds", decimals=0),
  ),
  settings={
    "network": "{}",
    "dtype": "{}",
    "batch_size": "batch {}",
    "meta_share": "M/B = {:g}",
    "platform": "{}",
    "cpus": "CPU cores: {}",
  },
  keys=("network", "meta_share"),
  method=_step_label,
  divided_by=("network",),
  repeat="benchmark",
  published="Published: L2RW at about 3 times plain training (Ren et al. 2018).",
)


@functools.cache
def layouts() -> dict[str, table_lib.Layout]:
  """The layout of every table, of benchmarks and scripts, by name."""
  layouts = [CORESET_SELECTION, DATA_CLEANING, LABEL_ISSUES, STEP_TIME]
  for info in pkgutil.iter_modules(experiments.__path__):
    if not info.ispkg:
      module = importlib.import_module(f"experiments.{info.name}")
      values = vars(module).values()
      layouts += [v for v in values if isinstance(v, table_lib.Layout)]
  names = [layout.name for layout in layouts]
  order = [name for name in _ORDER if name in names]
  order += [name for name in names if name not in order]
  return {name: layouts[names.index(name)] for name in order}


def collect(results: pathlib.Path, only: Sequence[str] = ()) -> list[table_lib.Table]:
  """The tables of a folder of results.

  Args:
    results: folder with one folder per experiment. An experiment's folder contains a
      `results.json`, or folders with one `results.json` each; their rows are combined.
    only: names of experiments; empty for all.

  Raises:
    InputError: `results` is not a folder, there are no experiments, a name in `only` is
      unknown or has no results, an experiment has no table, or its rows cannot be read.
  """
  known = layouts()
  if not results.is_dir():
    raise base.InputError(
      f"--results={results} is not a folder; run from the repository's root, or name"
      " the folder of the results."
    )
  folders = [path for path in sorted(results.iterdir()) if path.is_dir()]
  files = {folder.name: _files(folder) for folder in folders}
  files = {name: paths for name, paths in files.items() if paths}
  for name in only:
    if name not in known:
      raise base.InputError(f"--only={name}: choose among {', '.join(known)}.")
    if name not in files:
      raise base.InputError(f"--only={name}: no {results / name}/results.json.")
  unknown = [name for name in files if name not in known]
  if unknown and not only:
    raise base.InputError(
      f"--results={results}: no script has a TABLE named {unknown[0]!r}; remove that"
      " folder, or choose experiments with --only."
    )
  names = [name for name in known if name in (only or files)]
  if not names:
    raise base.InputError(f"--results={results} contains no NAME/results.json.")
  made = [table_lib.make(_section(name, files[name])) for name in names]
  return [t._replace(tuned_on_test=_TUNED_ON_TEST.get(t.name, ())) for t in made]


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  path = folder / "results.json"
  return [path] if path.is_file() else sorted(folder.glob("*/results.json"))


def _section(name: str, files: Sequence[pathlib.Path]) -> table_lib.Section:
  contents = [_read(path) for path in files]
  flags_of_all = dict(contents[0]["flags"])
  for content in contents[1:]:
    others = content["flags"]
    flags_of_all = {k: v for k, v in flags_of_all.items() if others.get(k) == v}
  rows = [row for content in contents for row in content["rows"]]
  return table_lib.Section(name, layouts()[name], rows, flags_of_all)


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content["rows"]
    if not isinstance(content["flags"], dict) or not isinstance(rows, list):
      raise TypeError("flags must be an object and rows a list")
    if not all(isinstance(row, dict) for row in rows):
      raise TypeError("a row is not an object")
  except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
    raise base.InputError(
      f"{path} cannot be read as results ({error}); run its script again."
    ) from error
  return content


def markdown(tables: Sequence[table_lib.Table]) -> str:
  """All metrics of all experiments, as Markdown."""
  parts = [
    "# Every committed result next to its published value",
    f"Mean ± 95% Student-t interval over the runs of a line, at the last step unless"
    f" its column says otherwise. {_WRITTEN_BY}",
  ]
  for table in tables:
    parts += [f"## {_title(table)}", formats.summary(table)]
  return "\n\n".join(parts) + "\n"


def compact(tables: Sequence[table_lib.Table]) -> str:
  """The short form of the tables, for `results/README.md`."""
  parts = [
    f"Mean ± 95% Student-t interval over runs, at the last step; the published value is"
    f" in parentheses. {_WRITTEN_BY}"
  ]
  for table in tables:
    parts += [f"### {_title(table)}", formats.compact(table)]
  return "\n\n".join(parts) + "\n"


_WRITTEN_BY = (
  "Written by `python -m experiments.tables --out=results --readme=results/README.md`."
)


def _title(table: table_lib.Table) -> str:
  return f"{table.layout.title} (`{table.name}`)"


def between_markers(text: str, block: str) -> str:
  """`text` with `block` between its markers.

  Raises:
    InputError: the markers are missing, repeated or in the wrong order.
  """
  before, _, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not end or text.count(BEGIN) != 1 or text.count(END) != 1:
    raise base.InputError(
      f"--readme must contain one {BEGIN} and after it one {END}; add them where the"
      " tables belong."
    )
  return f"{before}{BEGIN}\n\n{block}\n{END}{after}"


def rewrite(readme: pathlib.Path, block: str) -> None:
  """Puts `block` between the markers of a file.

  Raises:
    InputError: the file is not UTF-8 text, or its markers are not those that
      `between_markers` needs.
  """
  try:
    text = readme.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise base.InputError(f"--readme={readme} is not UTF-8 text ({error}).") from error
  workdir.write_text(readme, between_markers(text, block))


def write(folder: pathlib.Path, tables: Sequence[table_lib.Table]) -> list[str]:
  """Writes `tables.md`, `tables.csv` and, if `figure.draw` draws one, `tables.png`.

  Returns:
    The paths of the files.
  """
  folder.mkdir(parents=True, exist_ok=True)
  workdir.write_text(folder / "tables.md", markdown(tables))
  workdir.write_text(folder / "tables.csv", formats.long_form(tables))
  drawn = figure.draw(tables, folder / "tables.png")
  names = ["tables.md", "tables.csv", *(["tables.png"] if drawn else [])]
  return [str(folder / name) for name in names]

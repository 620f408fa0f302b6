"""Tables of made-up results, compared with numbers computed by hand; and errors."""

import csv
import io
import json

import numpy as np
import pytest
import scripts

from experiments import fairness
from experiments.tables import catalog as tables
from experiments.tables import formats
from experiments.tables import table as table_lib
from l2rw_jax import base

_NAME = "experiments.tables.__main__"
_NOISE = {
  "dataset": "mnist",
  "pixels": "raw",
  "initialization": "pytorch",
  "noise": "n",
  "fraction": 0.5,
  "method": "l2rw",
  "network": "mlp",
  "weight_auroc": 0.75,
  "best_percent": 92.0,
  "published_percent": 91.39,
  "published_spread": 0.07,
}
_NONE = {"published_percent": None, "published_spread": None, "weight_auroc": None}
_ROWS = [
  *({**_NOISE, "accuracy_percent": 89.0 + seed, "seed": seed} for seed in range(3)),
  {**_NOISE, "method": "bare", "published_spread": None, "accuracy_percent": 94.5},
  {**_NOISE, **_NONE, "method": "advisor", "accuracy_percent": 70.0},
  {**_NOISE, **_NONE, "fraction": 0.7, "accuracy_percent": 60.0},
]


def make(name, rows, **flags) -> table_lib.Table:
  section = table_lib.Section(name, tables.layouts()[name], rows, flags)
  return table_lib.make(section)


def save(folder, rows, **flags):
  folder.mkdir(parents=True)
  (folder / "results.json").write_text(json.dumps({"flags": flags, "rows": rows}))


@pytest.fixture
def results(tmp_path):
  """A folder of two experiments, one of them in two parts."""
  save(tmp_path / "results" / "mnist_noise", _ROWS, preset="bare")
  for name, accuracy in (("pd", 0.25), ("dd", 0.75)):
    row = {"curriculum": name, "rows": "test", "accuracy": accuracy, "num_rows": 9}
    folder = tmp_path / "results" / "mentornet_pretrain" / name
    save(folder, [{**row, "mse": 1e-5}], compat="paper", curriculum=name)
  return tmp_path / "results"


def test_methods_that_were_tuned_on_the_test_set_are_marked():
  tuned = [
    table_lib.TunedOnTest(*pair)
    for pair in (("bare|x", "its rate"), ("advisor", "its rate"), (".*w", "the decay"))
  ]
  table = make("mnist_noise", _ROWS, preset="bare")
  note = "† chosen by test accuracy: the decay; its rate."
  for form in (formats.summary, formats.compact):
    assert "†" not in form(table)
    text = form(table._replace(tuned_on_test=tuned))
    assert text.endswith(f"\n\n{note}")
    for method in ("l2rw", "bare", "advisor"):
      assert f"| {method} †" in text
    one = form(table._replace(tuned_on_test=tuned[:1]))
    assert "| bare † " in one and one.count("†") == 2
  text = formats.long_form([table._replace(tuned_on_test=tuned[:1])])
  chosen = {
    (line["method"], line["chosen_by_test_accuracy"])
    for line in csv.DictReader(io.StringIO(text))
  }
  assert chosen == {("l2rw", ""), ("bare", "its rate"), ("advisor", "")}


def test_only_the_lines_of_a_setting_that_was_tuned_on_the_test_set_are_marked():
  tuned = table_lib.TunedOnTest(".*", "its rate", {"fraction": 0.7})
  table = make("mnist_noise", _ROWS)._replace(tuned_on_test=[tuned])
  compact = formats.compact(table)
  assert scripts.table(compact)[1:] == [
    ["l2rw", "90.00 ± 2.48", "60.00 †"],
    ["bare", "94.50", ""],
    ["advisor", "70.00", ""],
  ]
  assert compact.endswith("\n\n† chosen by test accuracy: its rate.")
  marked = [row[:3] for row in scripts.table(formats.summary(table)) if "†" in row[2]]
  assert marked == [["n", "0.7", "l2rw †"]]


def test_summary_has_measured_and_published_values():
  text = formats.summary(make("mnist_noise", _ROWS, preset="bare"))
  first, *_, last = text.splitlines()
  shared = "mnist, mlp, preset bare, raw pixels, pytorch initialization"
  assert first == f"{shared}; mean ± 95% interval."
  header, *lines = scripts.table(text)
  assert header == [
    *("noise", "fraction", "method"),
    *("test accuracy %", "published", "difference"),
    *("best on test %", "AUROC of mean weights", "seeds"),
  ]
  # The half-width is t(0.975, 2) = 4.3027 standard errors, each 1 / sqrt(3).
  measured, best, auroc = "90.00 ± 2.48", "92.00 ± 0.00", "0.750 ± 0.000"
  assert lines == [
    ["n", "0.5", "l2rw", measured, "91.39 ± 0.07", "-1.39", best, auroc, "3"],
    ["n", "0.5", "bare", "94.50", "91.39", "+3.11", "92.00", "0.750", "1"],
    ["n", "0.5", "advisor", "70.00", "-", "-", "92.00", "-", "1"],
    ["n", "0.7", "l2rw", "60.00", "-", "-", "92.00", "-", "1"],
  ]
  assert last.endswith("Without a published value: advisor, l2rw (fraction 0.7).")
  assert last.startswith("Published: Patel and Sastry (2023, BARE)")


@pytest.mark.parametrize("changed", [{"preset": "shared"}, {"pixels": "unit"}])
def test_values_of_another_protocol_are_not_shown(changed):
  rows = [{**row, "preset": "bare", **changed} for row in _ROWS]
  table = make("mnist_noise", rows)
  assert not table.has_published(0)
  text = formats.summary(table) + formats.compact(table) + formats.long_form([table])
  assert "91.39" not in text and "Published: nothing for these settings." in text


def test_the_short_form_has_a_column_per_setting():
  text = formats.compact(make("mnist_noise", _ROWS, preset="bare"))
  shared = "mnist, mlp, preset bare, raw pixels, pytorch initialization, n"
  assert text.startswith(f"{shared}; 1 to 3 seeds; test accuracy %.\n")
  assert scripts.table(text) == [
    ["method", "fraction 0.5", "fraction 0.7"],
    ["l2rw", "90.00 ± 2.48 (91.39 ± 0.07)", "60.00"],
    ["bare", "94.50 (91.39)", ""],
    ["advisor", "70.00", ""],
  ]


def test_settings_that_are_printed_alike_are_not_merged():
  layout = table_lib.Layout(
    *("x", "X", (table_lib.Metric("value", "value"),), {"share": "{:.0%}"}),
    "Published: nothing.",
  )
  rows = [
    {"method": "a", "seed": 0, "share": share, "value": value}
    for share, value in ((0.101, 10.0), (0.104, 90.0), (0.3, 95.0))
  ]
  table = table_lib.make(table_lib.Section("x", layout, rows, {}))
  lines = scripts.table(formats.compact(table))
  assert lines == [
    ["setting", "a"],
    ["10%", "10.00"],
    ["10%", "90.00"],
    ["30%", "95.00"],
  ]


def test_the_short_form_of_one_setting_has_a_column_per_metric():
  row = {"method": "l2rw", "best_accuracy": 0.5, "weight_auroc": None}
  rows = [{**row, "seed": s, "accuracy_percent": a} for s, a in enumerate((40, 60))]
  text = formats.compact(make("digits_noise", rows, noise_fraction=0.25))
  assert text.startswith("noise fraction 25%; 2 seeds.\n")
  # No run has an AUROC of mean weights, so there is no column for it.
  # The half-width is t(0.975, 1) = 12.706 standard errors, each 10.
  assert scripts.table(text) == [
    ["method", "test accuracy %", "best on test %"],
    ["l2rw", "50.00 ± 127.06", "50.00 ± 0.00"],
  ]
  assert text.endswith("Published: nothing, the problem is this project's.")


def test_a_mean_over_some_of_the_seeds_says_so():
  # A method that reached 90% with one or two of three seeds looked like one that always
  # does, and its mean over these seeds was compared with means over all seeds.
  row = {metric.column: 1.0 for metric in tables.layouts()["coreset"].metrics}
  row |= {"network": "mlp", "fraction": 0.1}
  rows = [
    {**row, "method": method, "seed": seed, "seconds_to_90": seconds}
    for method, reached in (
      ("full", (1.0, 1.0, 4.0)),
      ("craig", (3.0, None, 5.0)),
      ("random", (None, 7.0, None)),
      ("adacore", (None, None, None)),
    )
    for seed, seconds in enumerate(reached)
  ]
  table = make("coreset", rows)
  for form in (formats.summary, formats.compact):
    text = form(table)
    header, *lines = scripts.table(text)
    assert [line[header.index("seconds to 90 %")] for line in lines] == [
      # t(0.975, 2) = 4.303 and t(0.975, 1) = 12.706 standard errors, each 1.
      *("2.0 ± 4.3", "4.0 ± 12.7, 2 of 3", "7.0, 1 of 3", "-"),
    ]
    assert text.count('"k of n" after a number: it is the mean over the k seeds') == 1
    assert '"k of n"' not in form(make("coreset", rows[:3]))
  long = csv.reader(io.StringIO(formats.long_form([table])))
  assert [line[6] for line in long if line[3] == "seconds to 90 %"] == ["3", "2", "1"]


def test_the_short_form_may_have_a_table_for_each_value_of_a_setting():
  none = {metric.column: None for metric in tables.STEP_TIME.metrics}
  shared = none | {
    "seed": 0,
    "dtype": "float32",
    "cpus": 2,
    "engine": None,
    "framework": "jax",
  }
  rows = [
    shared | {"network": n, "method": m, "meta_share": share, "ratio": ratio}
    for n, m, share, ratio in (
      ("mlp", "plain", None, 1.0),
      ("mlp", "bare", 0.1, 1.5),
      ("lenet", "bare", 0.1, 2.5),
    )
  ]
  text = formats.compact(make("step_time", rows, batch_size=8, platform="cpu"))
  above = "float32, batch 8, cpu, CPU cores: 2; 1 benchmark; time / plain."
  assert text == (
    f"mlp, {above}\n\n"
    "| method | -    | M/B = 0.1 |\n"
    "|--------|------|-----------|\n"
    "| plain  | 1.00 |           |\n"
    "| bare   |      | 1.50      |\n\n"
    "lenet, float32, batch 8, M/B = 0.1, cpu, CPU cores: 2; 1 benchmark.\n\n"
    "| method | time / plain |\n"
    "|--------|--------------|\n"
    "| bare   | 2.50         |\n\n"
    "Published: L2RW at about 3 times plain training (Ren et al. 2018)."
  )


def test_the_short_form_has_at_most_six_metrics():
  metrics = [table_lib.Metric(f"m{i}", f"metric {i}") for i in range(8)]
  layout = table_lib.Layout("x", "X", tuple(metrics), {}, "Published: nothing.")
  row = {"method": "a", "seed": 0} | {f"m{i}": float(i) for i in range(8)}
  table = table_lib.make(table_lib.Section("x", layout, [row], {}))
  header, line = scripts.table(formats.compact(table))
  assert header == ["method", *(f"metric {i}" for i in range(6))]
  assert line == ["a", *(f"{i}.00" for i in range(6))]
  assert "metric 7" in formats.summary(table)


def test_a_setting_that_differs_has_a_column_of_its_own():
  rows = [_ROWS[0], {**_ROWS[0], "network": "lenet", "preset": "own"}]
  header, *lines = scripts.table(formats.summary(make("mnist_noise", rows)))
  assert header[:5] == ["noise", "fraction", "network", "preset", "method"]
  assert [line[2:4] for line in lines] == [["mlp", "-"], ["lenet", "own"]]


@pytest.mark.parametrize(("fraction", "shown"), [(0.0, True), (None, False)])
def test_a_key_has_a_column_unless_no_run_has_it(fraction, shown):
  header, line = scripts.table(
    formats.summary(make("mnist_noise", [{**_ROWS[0], "fraction": fraction}]))
  )
  assert ("fraction" in header) == shown
  assert line[: header.index("method")] == ["n", *(["0"] if shown else [])]


def test_a_method_may_be_named_by_several_columns():
  whole = {"method": "uniform", "kept_percent": None, "kept": ""}
  part = {"method": "forml_gap", "kept_percent": 9, "kept": "top"}
  measured = dict.fromkeys(fairness.MEASURES, 1.0)
  measured["worst_cell_percent"] = None
  rows = [{**whole, **measured}, {**part, **measured}]
  _, *lines = scripts.table(formats.summary(make("fairness", rows)))
  assert lines == [
    ["uniform", *["1.00"] * 4, "1"],
    ["uniform on top 9% by forml_gap", *["1.00"] * 4, "1"],
  ]


def test_long_form_has_a_line_for_each_number(results):
  text = formats.long_form(tables.collect(results))
  lines = list(csv.DictReader(io.StringIO(text)))
  assert set(lines[0]) == set(formats.LONG_FORM)
  first, single = lines[0], lines[3]
  assert first["setting"] == (
    "dataset=mnist; network=mlp; preset=bare; pixels=raw; initialization=pytorch;"
    " noise=n; fraction=0.5"
  )
  names = ("experiment", "method", "metric", "mean", "repeats", "published")
  expected = ["mnist_noise", "l2rw", "test accuracy %", "90", "3", "91.39"]
  assert [first[name] for name in names] == expected
  assert float(first["half_width"]) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
  assert float(first["difference"]) == pytest.approx(-1.39)
  assert (first["published_spread"], single["published_spread"]) == ("0.07", "")
  assert (single["method"], single["half_width"]) == ("bare", "")
  # A method without weights has no AUROC.
  advisor_metrics = [line["metric"] for line in lines if line["method"] == "advisor"]
  assert advisor_metrics == ["test accuracy %", "best on test %"]


def test_parts_of_an_experiment_are_taken_together(results):
  table = tables.collect(results, ["mentornet_pretrain"])[0]
  assert [(line.method, line.values[0].measured.mean) for line in table.lines] == [
    ("dd", 75.0),
    ("pd", 25.0),
  ]
  # Settings that all parts share stand above the table; the curricula differ.
  assert "network of paper" in formats.summary(table)


@pytest.fixture
def readme(tmp_path):
  path = tmp_path / "README.md"
  path.write_text(f"# Mine\n\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
  return path


def test_the_command_prints_and_writes_the_same_tables(results, readme, tmp_path):
  out = tmp_path / "new" / "out"
  done = scripts.run(
    _NAME, f"--results={results}", f"--out={out}", f"--readme={readme}", cwd=tmp_path
  )
  assert done.status == 0 and done.stderr == "", done.stderr
  loaded = tables.collect(results)
  text = (out / "tables.md").read_text()
  assert done.stdout.startswith(text) and text == tables.markdown(loaded)
  assert done.stdout.endswith(f", {out}/tables.csv, {out}/tables.png\n")
  assert (out / "tables.csv").read_text() == formats.long_form(loaded)
  assert (out / "tables.png").read_bytes().startswith(b"\x89PNG")
  expected = (
    f"# Mine\n\n{tables.BEGIN}\n\n{tables.compact(loaded)}\n{tables.END}\nafter\n"
  )
  assert readme.read_text() == expected
  assert tables.between_markers(expected, tables.compact(loaded)) == expected


def test_without_a_published_value_there_is_no_figure(tmp_path):
  save(tmp_path / "results" / "mnist_noise", [{**_ROWS[-1]}])
  written = tables.write(tmp_path / "out", tables.collect(tmp_path / "results"))
  assert [path.rpartition("/")[2] for path in written] == ["tables.md", "tables.csv"]
  assert not (tmp_path / "out" / "tables.png").exists()


def test_a_published_value_without_a_measured_one_is_not_drawn(tmp_path):
  rows = [
    {**_NOISE, "method": "bare", "accuracy_percent": None},
    {**_NOISE, **_NONE, "accuracy_percent": 60.0},
  ]
  written = tables.write(tmp_path / "out", [make("mnist_noise", rows, preset="bare")])
  assert not any(path.endswith(".png") for path in written)


_FORMATS = {"markdown": "# Every", "compact": "Mean ±", "csv": "experiment,setting,"}


def test_the_flags_format_and_only_choose_what_is_printed(results):
  one = [f"--results={results}", "--only=mnist_noise"]
  printed = scripts.run_many(_NAME, [[*one, f"--format={f}"] for f in _FORMATS])
  for outcome, start in zip(printed, _FORMATS.values(), strict=True):
    assert outcome.status == 0 and outcome.stderr == ""
    assert outcome.stdout.startswith(start)
    assert "mnist_noise" in outcome.stdout
    assert "mentornet_pretrain" not in outcome.stdout


_BROKEN_ROWS = {
  "no_column": ([{"method": "l2rw"}], "mnist_noise: a row has no 'noise'"),
  "no_method": (
    [{"noise": "n", "fraction": 1.0}],
    "mnist_noise: a row has no 'method'",
  ),
  "no_number": ([{**_NOISE}], "a row has no 'accuracy_percent'"),
  "text": ([{**_ROWS[0], "accuracy_percent": "9"}], "'accuracy_percent' is '9', not a"),
  "nan": ([{**_ROWS[0], "best_percent": float("nan")}], "'best_percent' is nan, not a"),
  "setting": ([{**_ROWS[0], "fraction": "half"}], "'fraction' is 'half'"),
  "list": ([{**_ROWS[0], "noise": ["n"]}], "'noise' is ['n']"),
  "same_seed": (
    [_ROWS[0], _ROWS[0]],
    "l2rw has two rows with the same seed and settings",
  ),
  "published": (
    [_ROWS[0], {**_ROWS[1], "published_percent": 1.0}],
    "'published_percent' differs between runs of one line",
  ),
  "no_rows": ([], "mnist_noise: no rows"),
  "rows": (
    7,
    "results.json cannot be read as results (flags must be an object and rows a list)",
  ),
  "row": ([7], "results.json cannot be read as results (a row is not an object)"),
}
_MISTAKES = {
  "no_folder": (["--results={tmp}/none"], "/none is not a folder; run from"),
  "empty": (["--results={tmp}/empty"], "/empty contains no NAME/results.json"),
  "not_json": (
    ["--results={tmp}/not_json"],
    "results.json cannot be read as results (",
  ),
  "no_flags": (["--results={tmp}/no_flags"], "cannot be read as results ('flags')"),
  "unknown": (
    ["--results={tmp}/unknown"],
    "/unknown: no script has a TABLE named 'mine'",
  ),
  "only": (["--only=magic"], "--only=magic: choose among digits_noise"),
  "only_absent": (["--only=fairness"], "--only=fairness: no {tmp}/good/fairness/res"),
  "format": (["--format=pdf"], "should be one of <markdown|compact|csv>"),
  "no_readme": (["--readme={tmp}/none.md"], "none.md: No such file or directory"),
  "not_text": (["--readme={tmp}/R.png"], "R.png is not UTF-8 text ("),
  "no_markers": (["--readme={tmp}/plain.md"], "must contain one <!-- tables: begin"),
  "subset": (["--readme={tmp}/R.md", "--only=mnist_noise"], "leave out --only"),
  "out": (["--out={tmp}/plain.md"], "plain.md: File exists"),
  "positional": (["mnist_noise"], "unexpected argument 'mnist_noise'"),
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
  """Outcomes of command lines with mistakes."""
  folder = tmp_path_factory.mktemp("mistakes")
  save(folder / "good" / "mnist_noise", _ROWS)
  (folder / "empty").mkdir()
  for name, (rows, _) in _BROKEN_ROWS.items():
    save(folder / name / "mnist_noise", rows)
  for name, text in (("not_json", "{"), ("no_flags", '{"rows": []}')):
    save(folder / name / "mnist_noise", [])
    (folder / name / "mnist_noise" / "results.json").write_text(text)
  save(folder / "unknown" / "mine", _ROWS)
  (folder / "plain.md").write_text("no markers")
  (folder / "R.png").write_bytes(b"\x89PNG")
  (folder / "R.md").write_text(f"{tables.BEGIN}{tables.END}")
  before = scripts.contents(folder)
  commands = [
    [f"--results={folder}/good", *(a.format(tmp=folder) for a in arguments)]
    for arguments, _ in _MISTAKES.values()
  ]
  commands += [[f"--results={folder}/{name}"] for name in _BROKEN_ROWS]
  outcomes = scripts.run_many(_NAME, commands)
  assert scripts.contents(folder) == before
  return dict(zip([*_MISTAKES, *_BROKEN_ROWS], outcomes, strict=True)), folder


@pytest.mark.parametrize("name", [*_MISTAKES, *_BROKEN_ROWS])
def test_mistake_is_a_one_line_error_and_writes_nothing(mistakes, name):
  outcomes, folder = mistakes
  _, message = {**_MISTAKES, **_BROKEN_ROWS}[name]
  scripts.assert_one_line(outcomes[name], message.replace("{tmp}", str(folder)))


@pytest.mark.parametrize(
  "text",
  [
    "",
    f"{tables.BEGIN}",
    f"{tables.END}{tables.BEGIN}",
    f"{tables.BEGIN}{tables.END}{tables.BEGIN}{tables.END}",
    f"{tables.BEGIN}{tables.BEGIN}{tables.END}",
  ],
)
def test_markers_must_be_there_once_and_in_order(text):
  with pytest.raises(base.InputError, match="must contain one"):
    tables.between_markers(text, "new")


_HOSTILE = '<img src=x onerror="y">|`[a](b)\\\n\x1b[2J\ud800'


def test_text_of_a_results_file_stays_text_in_markdown():
  rows = [{**_NOISE, "accuracy_percent": 1.0, "method": _HOSTILE, "noise": _HOSTILE}]
  rows.append({**rows[0], "noise": "n", **_NONE, "accuracy_percent": 2.0})
  table = make("mnist_noise", rows, preset=_HOSTILE)
  shown = '&lt;img src=x onerror="y"&gt;\\|\\`\\[a\\](b)\\\\  \\[2J '
  for text in (formats.summary(table), formats.compact(table)):
    assert shown in text and "<img" not in text and "\x1b" not in text
    text.encode()  # Raises an error if an unpaired surrogate is left.
    lines = [line.replace("\\|", "") for line in text.splitlines() if line[:1] == "|"]
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("start", ["=HYPERLINK(1)", "+1", "-1", "@x", "  =1", "\t=1"])
def test_text_of_a_results_file_is_not_a_formula_in_a_spreadsheet(start):
  rows = [{**_NOISE, "accuracy_percent": 1.0, "method": start}]
  text = formats.long_form([make("mnist_noise", rows)])
  (_, line, *_) = csv.reader(io.StringIO(text))
  assert line[2] == "'" + start.replace("\t", " ")
  assert line[0] == "mnist_noise"


def test_text_of_a_results_file_is_not_a_formula_in_a_figure(tmp_path):
  rows = [{**_NOISE, "accuracy_percent": 1.0, "method": r"$\frac{$ and $x"}]
  tables.write(tmp_path / "out", [make("mnist_noise", rows, preset="bare")])
  assert (tmp_path / "out" / "tables.png").stat().st_size > 1000


@pytest.mark.parametrize(
  "changed",
  [
    {"accuracy_percent": 10**400},
    {"accuracy_percent": float("nan")},
    {"accuracy_percent": "1"},
    {"fraction": [1]},
    {"network": {"a": 1}},
  ],
)
def test_unreadable_values_are_one_line_errors(changed):
  with pytest.raises(base.InputError, match="run its script again") as error:
    make("mnist_noise", [{**_NOISE, "accuracy_percent": 1.0, **changed}])
  assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_deep_json_is_a_one_line_error(tmp_path):
  (tmp_path / "mnist_noise").mkdir()
  (tmp_path / "mnist_noise" / "results.json").write_text("[" * 200_000)
  with pytest.raises(base.InputError, match="cannot be read as results"):
    tables.collect(tmp_path)


def test_error_bars_of_percentages_end_at_0_and_100():
  from experiments.lib import figures
  from experiments.lib import report
  from experiments.tables import figure

  means, widths = [5.0, 95.0, 50.0], [9.0, 9.0, float("nan")]
  expected = [[5, 9, 0], [9, 5, 0]]
  np.testing.assert_allclose(figure._errors(means, widths, True), expected)
  intervals = [report.Interval(m, w, 3) for m, w in zip(means, widths, strict=True)]
  np.testing.assert_allclose(figures.clipped_errors(intervals), expected)
  unclipped = figure._errors(means, widths, False)
  np.testing.assert_allclose(unclipped, [[9, 9, 0], [9, 9, 0]])

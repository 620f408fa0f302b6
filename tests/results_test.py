"""Committed results: whole, and quoted in the README as they are."""

import json
import pathlib
import statistics
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# What makes the table of each folder's rows.
TABLES = {
  "digits_noise": "digits_noise.summarise(rows)",
  "mnist_imbalance": "mnist_imbalance.summarise(rows)",
  "mnist_noise": "_noise_report.summarise(rows, ('noise', 'fraction'))",
  "fairness": "_fairness_report.summarise(rows)",
}


def rows(name: str) -> list[dict]:
  text = (REPOSITORY / "results" / name / "results.json").read_text()
  return json.loads(text)["rows"]


@pytest.mark.parametrize("name", TABLES)
def test_readme_quotes_the_table_of_the_committed_rows(name):
  # A process of its own: two scripts may define flags of the same name.
  script = TABLES[name].partition(".")[0]
  code = (
    f"import json, sys; from experiments import {script};"
    f" rows = json.load(sys.stdin); print({TABLES[name]})"
  )
  table = subprocess.run(
    [sys.executable, "-c", code],
    check=True,
    capture_output=True,
    text=True,
    cwd=REPOSITORY,
    input=json.dumps(rows(name)),
  ).stdout.strip()
  assert table.count("\n") >= 3
  readme = (REPOSITORY / "README.md").read_text()
  assert table in readme, f"paste into README.md:\n{table}"


@pytest.mark.parametrize("name", TABLES)
def test_every_row_tells_where_it_comes_from(name):
  for row in rows(name):
    assert row["commit"] != "unknown" and not row["commit"].endswith("+dirty")
    assert {"jax", "flax", "optax", "python", "device_kind", "seed", "data"} <= set(row)
  assert (REPOSITORY / "results" / name / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
  ("name", "methods", "repeats"),
  [
    ("digits_noise", ["uniform", "l2rw"], 3),
    ("mnist_imbalance", ["uniform", "proportion", "hard_mining", "l2rw"], 3),
    ("fairness", ["uniform", "class_proportion", "l2rw", "forml_worst"], 3),
  ],
)
def test_each_method_was_repeated(name, methods, repeats):
  for method in methods:
    assert sum(row["method"] == method for row in rows(name)) >= repeats


def test_on_half_wrong_labels_every_method_beats_uniform_beyond_both_spreads():
  accuracies = {}
  for row in rows("mnist_noise"):
    if (row["noise"], row["fraction"]) == ("bare_symmetric", 0.5):
      accuracies.setdefault(row["method"], []).append(row["accuracy_percent"])
  uniform = accuracies.pop("uniform")
  learned = {"l2rw", "meta_weight_net", "mentornet_pd", "warpi", "advisor"}
  assert learned <= set(accuracies)
  for method in learned:
    own = accuracies[method]
    assert len(own) >= 3
    margin = statistics.mean(own) - statistics.mean(uniform)
    assert margin > statistics.stdev(own) + statistics.stdev(uniform), method

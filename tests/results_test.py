"""Committed results: whole, and quoted in the README as they are."""

import json
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
NAMES = ["digits_noise", "mnist_imbalance"]


def rows(name: str) -> list[dict]:
  text = (REPOSITORY / "results" / name / "results.json").read_text()
  return json.loads(text)["rows"]


@pytest.mark.parametrize("name", NAMES)
def test_readme_quotes_the_table_of_the_committed_rows(name):
  # A process of its own: two scripts may define flags of the same name.
  code = (
    f"import json, sys; from experiments import {name} as script;"
    " print(script.summarise(json.load(sys.stdin)))"
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


@pytest.mark.parametrize("name", NAMES)
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
  ],
)
def test_each_method_was_repeated(name, methods, repeats):
  for method in methods:
    assert sum(row["method"] == method for row in rows(name)) >= repeats

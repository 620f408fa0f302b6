"""The benchmark of coreset selection on digits: its rows, and its naive baseline."""

import numpy as np
import pytest
import scripts

from benchmarks import coreset_selection
from l2rw_jax import coresets


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Rows of a short benchmark, and what it printed."""
  cwd = tmp_path_factory.mktemp("benchmark")
  done = scripts.start(
    *("-m", "benchmarks.coreset_selection", "--dataset=digits"),
    *("--repeats=2", "--part=4", "--epsilon=0.5", "--epochs=1"),
    cwd=cwd,
  )
  assert done.status == 0 and done.stderr == "", done.stderr
  return scripts.saved_rows(cwd / "runs" / "coreset_selection")[0], done.stdout


@pytest.mark.slow
def test_every_selection_is_timed_and_compared_with_an_epoch(run):
  rows, printed = run
  names = ["epoch", "lazy", "stochastic 0.5", "naive, of a part", "lazy, of a part"]
  assert [row["method"] for row in rows] == names
  for row in rows:
    assert 0 < row["seconds_least"] <= row["seconds"] <= row["seconds_most"]
  epoch, lazy, stochastic, naive, part = rows
  assert epoch["epochs"] == 1 and epoch["cost"] is None
  assert lazy["num_chosen"] == stochastic["num_chosen"] == 130
  assert lazy["cost"] <= stochastic["cost"]
  assert naive["num_examples"] == part["num_examples"] == 325
  assert naive["cost"] == pytest.approx(part["cost"], rel=1e-4)
  assert len(scripts.table(printed)) == 6


def test_the_naive_selection_chooses_the_same_rows():
  rng = np.random.default_rng(0)
  proxies, labels = rng.normal(size=(90, 3)), np.arange(90) % 3
  rows = coreset_selection.naive_greedy(proxies, labels, 21)
  result = coresets.select(proxies, labels, 21)
  np.testing.assert_array_equal(rows, result.rows)
  by_hand = sum(
    np.linalg.norm(proxies[i] - proxies[rows[labels[rows] == labels[i]]], axis=1).min()
    for i in range(90)
  )
  cost = coreset_selection.cost(proxies, labels, rows)
  assert cost == pytest.approx(by_hand)


def test_medians_by_hand():
  epochs = [coreset_selection.Turn(*turn) for turn in ((2, 1), (4, 1), (2, 1))]
  turns = [coreset_selection.Turn(*turn) for turn in ((1, 1), (4, 2), (9, 3))]
  assert coreset_selection.summary(turns, epochs) == {
    "seconds": 4,
    "seconds_least": 1,
    "seconds_most": 9,
    "epochs": 1,  # The median of 1/2, 1 and 9/2.
    "cpu_seconds": 2,
    "cpu_epochs": 2,
  }


def test_extra_memory_is_the_size_of_an_array_of_256_mib():
  extra = coreset_selection.extra_mib(lambda: np.ones(2**25).sum())
  if extra is None:
    pytest.skip("this system does not report how much memory a process uses")
  assert 200 < extra < 400


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ("--fraction=0", "--fraction=0 must lie between"),
    ("--epsilon=2", "--epsilon=2 must lie between"),
    ("--fraction=0.005", "selects 6 of 1297 examples in 10 classes; raise --fraction,"),
    ("--fraction=0.02 --part=4", "--part=4 selects 6 of 325 examples in 10 classes"),
  ],
)
def test_a_mistake_is_a_one_line_error(flags, message, tmp_path):
  arguments = ["--dataset=digits", *flags.split()]
  done = scripts.run("benchmarks.coreset_selection", *arguments, cwd=tmp_path)
  scripts.assert_one_line(done, message)
  assert not list(tmp_path.iterdir())

"""Benchmarks refuse flags with which a measurement would be wrong or fail late."""

import pytest
import scripts


@pytest.mark.parametrize(
  ("name", "flags", "message"),
  [
    (
      "approximate_scores",
      "--refresh_every=14",
      "--refresh_every=14: give a number that is not a multiple of 7;",
    ),
    ("label_issues", "--methods=audit,foo", "--methods=foo: choose among audit,"),
    ("streaming", "--data_workers=0", "--data_workers=0 must lie between 1 and"),
    (
      "label_issues",
      "--datasets=digits --noises=symmetric:0.1 --methods=audit --num_examples=100",
      "--num_examples=100: class 6 of digits has only 4 examples",
    ),
  ],
)
def test_a_mistake_is_a_one_line_error(name, flags, message, tmp_path):
  done = scripts.run(f"benchmarks.{name}", *flags.split(), cwd=tmp_path)
  scripts.assert_one_line(done, message)
  assert not list(tmp_path.iterdir())

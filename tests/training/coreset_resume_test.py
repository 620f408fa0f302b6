"""A run on a coreset that is interrupted between two selections."""

import pytest
import toy_runs

from l2rw_jax.io import workdir
from l2rw_jax.methods import adacore
from l2rw_jax.training import sampling

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("make", ["adacore", "random_fixed"])
def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path, monkeypatch, make):
  monkeypatch.setattr(workdir, "_commit", lambda: "unknown")
  # 16 of 40 examples in batches of 8, two passes: four steps from one to the next.
  methods = {
    "adacore": adacore.adacore(0.4, 2, greedy="stochastic"),
    "random_fixed": adacore.random_subset(0.4, None),
  }
  method = methods[make]
  toy_runs.train(tmp_path / "whole", method, num_steps=11, checkpoint_every=3)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    original = sampling.Sampler.next

    def stop(self, step):
      if step == 5:  # The second selection was before step 4.
        raise KeyboardInterrupt
      return original(self, step)

    patch.setattr(sampling.Sampler, "next", stop)
    toy_runs.train(tmp_path / "run", method, num_steps=11, checkpoint_every=3)
  toy_runs.train(tmp_path / "run", method, num_steps=11, checkpoint_every=3)
  whole, run = (toy_runs.outcome(tmp_path / name) for name in ("whole", "run"))
  assert run == whole

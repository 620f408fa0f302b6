"""L2RW as a measurement: plain training that reports L2RW's scores."""

import numpy as np
import pytest
import toy_runs

from l2rw_jax import audit
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw


@pytest.mark.slow
def test_l2rw_without_reweighting_trains_plainly_and_reports_scores(tmp_path):
  methods = {
    "plain": baselines.uniform(),
    "measured": audit.recording(l2rw.l2rw(reweight=False)),
    "l2rw": audit.recording(l2rw.l2rw()),
  }
  runs = {
    name: toy_runs.train(tmp_path / name, method, num_steps=1)[0]
    for name, method in methods.items()
  }
  for name, leaf in runs["plain"].params["Dense_0"].items():
    measured = runs["measured"].params["Dense_0"][name]
    np.testing.assert_allclose(measured, leaf, rtol=1e-5, atol=1e-7)
    assert not np.allclose(runs["l2rw"].params["Dense_0"][name], leaf)
  scores = [runs[name].statistics["mean_score"] for name in ("measured", "l2rw")]
  np.testing.assert_allclose(*scores, rtol=1e-5)
  assert np.isfinite(scores[0]).sum() == 8
  weights = runs["measured"].weights["mean_weight"]
  np.testing.assert_allclose(weights[np.isfinite(weights)], np.ones(8))

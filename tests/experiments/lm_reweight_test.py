"""The language model on corrupted text: rows, recovery of documents, errors."""

import types

import jax
import jax.numpy as jnp
from matplotlib import container
import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import lm_reweight
from experiments.lib import curves
from l2rw_jax import base
from l2rw_jax.data import examples

_SMALL = {
  "methods": ("uniform", "l2rw"),
  "num_train": 30,
  "num_meta": 4,
  "num_test": 6,
  "length": 8,
  "width": 16,
  "depth": 1,
  "num_steps": 4,
  "batch_size": 4,
  "meta_batch_size": 4,
  "eval_every": 2,
  "num_seeds": 1,
  "num_devices": 1,
}


def test_a_test_loss_that_is_not_finite_at_the_end_is_a_one_line_error(
  tmp_path, monkeypatch
):
  curve = curves.Curve(np.array([4]), np.array([1.0]), np.array([np.nan]))
  result = types.SimpleNamespace(metrics={"seed": 0})
  monkeypatch.setattr(lm_reweight.runner, "train", lambda *_: [result])
  monkeypatch.setattr(curves, "read", lambda *_: curve)
  with pytest.raises(base.InputError, match="uniform, seed 0: the test loss is not fi"):
    lm_reweight.run(lm_reweight.Settings(**_SMALL), tmp_path)


@pytest.mark.slow
def test_a_run_writes_its_rows_and_figure(tmp_path):
  rows = lm_reweight.run(lm_reweight.Settings(**_SMALL), tmp_path)
  assert [row["method"] for row in rows] == ["uniform", "l2rw"]
  for row in rows:
    # A network with random weights needs about log2(256) bits per byte.
    assert 6 < row["bits_per_byte"] < 10
    assert 0 <= row["recovered_percent"] <= 100
    assert row["seconds"] > 0
  assert rows[0]["bits_in_uniform_time"] == rows[0]["bits_per_byte"]
  assert (tmp_path / "figure.png").stat().st_size > 10_000
  assert (tmp_path / "results.csv").exists()


def test_the_figure_has_one_panel_if_no_method_ranks_documents(tmp_path):
  curve = curves.Curve(*np.array([[10.0, 20.0], [1.0, 2.0], [5.0, 4.0]]))
  widths = []
  for recovered in (None, 50.0):
    row = dict.fromkeys(lm_reweight.recovered(None, np.zeros(1, int)), recovered)
    path = tmp_path / f"{recovered}.png"
    rows = [{"method": "uniform", **row}]
    lm_reweight.draw(rows, {"uniform": [curve]}, path, "4 documents")
    widths.append(plt.imread(path).shape[1])
  assert widths[0] < 0.6 * widths[1]


def test_every_method_fits_the_problem():
  settings = lm_reweight.Settings(**{**_SMALL, "methods": lm_reweight.METHODS})
  cells = lm_reweight.make_cells(settings)
  assert [cell.method_name for cell in cells] == list(lm_reweight.METHODS)


def _operations(name, **flags):
  """The operations of a method's first step."""
  settings = lm_reweight.Settings(**{**_SMALL, "methods": (name,), **flags})
  (cell,) = lm_reweight.make_cells(settings)
  (split,) = lm_reweight.make_splits(settings, (0,))
  batch = {k: x[:4] for k, x in examples.as_batch(split.train).items()}

  def gradients(key):
    params, model_state = cell.model.init(key, batch)
    problem = cell.model.problem(
      class_counts=jnp.ones(cell.model.num_classes), num_examples=30, num_steps=4
    )
    state = cell.method.init(key, problem, params)
    inputs = base.Inputs(params, model_state, (), batch, batch, jnp.int32(0), key)
    return cell.method.gradients(state, problem, inputs)[0].grads

  return str(jax.make_jaxpr(gradients)(jax.random.key(0)))


@pytest.mark.slow
def test_flags_that_save_memory_reach_the_methods():
  # Tests of the methods and of mnist_noise check that the results stay the same.
  for name in ("l2rw", "meta_weight_net"):
    assert _operations(name) != _operations(name, microbatch_size=2)
  name = "meta_weight_net"
  assert _operations(name) != _operations(name, mwn_recompute=True)


def test_recovered_documents_by_hand():
  kinds = np.array([0, 1, 2, 0, 3, 0])
  suspicion = np.array([0.9, 0.8, np.nan, 0.1, 0.7, 0.0])
  assert lm_reweight.recovered(suspicion, kinds) == pytest.approx(
    {
      "recovered_percent": 100 * 2 / 3,
      "shuffled_percent": 100,
      "english_percent": 0,
      "random_percent": 100,
    }
  )
  assert set(lm_reweight.recovered(None, kinds).values()) == {None}


def test_a_kind_that_a_seed_does_not_have_is_not_drawn_as_0():
  by_method = {
    "l2rw": [
      {"recovered_percent": p, "shuffled_percent": q, "english_percent": None}
      | {"random_percent": 0.0}
      for p, q in ((40.0, None), (60.0, 80.0))
    ]
  }
  _, axes = plt.subplots()
  lm_reweight._draw_recovered(axes, by_method)
  bars = {
    bars.get_label(): [b.get_height() for b in bars]
    for bars in axes.containers
    if isinstance(bars, container.BarContainer)
  }
  plt.close("all")
  assert bars == {"all": [50.0], "shuffled": [80.0], "english": [], "random": [0.0]}


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"width": 20}, "--width=20 must be a multiple of 16"),
    ({"methods": ("sgd",)}, "--methods=sgd: choose among"),
    ({"corrupted": 1.5}, "--corrupted=1.5 must lie between 0 and 1"),
    ({"num_train": 10**8}, "documents, but 100000000 are requested"),
  ],
)
def test_impossible_flags_are_refused(flags, message, tmp_path):
  with pytest.raises(base.InputError, match=message):
    lm_reweight.run(lm_reweight.Settings(**{**_SMALL, **flags}), tmp_path)
  assert not list(tmp_path.iterdir())

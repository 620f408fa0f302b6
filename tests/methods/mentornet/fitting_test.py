"""Fitting a mentor: rows of the grid, rows of recorded losses, the fit."""

import jax
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.methods import mentornet
from l2rw_jax.methods.mentornet import fitting as mentornet_fitting
from l2rw_jax.methods.mentornet import network as mentornet_network


def test_grid_equals_the_released_grid():
  rows = mentornet_fitting.pd_rows("self_paced", num_rows=None)
  assert len(rows.losses) == 120 * 100 * 100
  losses = np.unique(rows.losses)
  tenths = np.arange(100, dtype=np.float32) / np.float32(10)
  np.testing.assert_allclose(losses, [*tenths, *range(10, 30)], rtol=1e-6)
  differences = np.unique(rows.differences)
  np.testing.assert_allclose(differences, np.arange(-50, 50) / 10, atol=1e-6)
  assert 0 in differences  # The target depends only on the sign of the difference.
  np.testing.assert_array_equal(np.unique(rows.epochs), range(100))
  assert not rows.labels.any()
  np.testing.assert_array_equal(rows.targets, rows.differences <= 0)
  keys = (rows.losses * 10).round() * 1e4 + (rows.differences * 10 + 50).round() * 100
  assert len(np.unique(keys + rows.epochs)) == len(keys)


@pytest.mark.parametrize("name", mentornet.CURRICULA)
def test_random_rows_have_the_weights_of_the_curriculum(name):
  rows = mentornet_fitting.pd_rows(name, num_rows=500, seed=3)
  given = rows[:4]
  np.testing.assert_allclose(
    rows.targets, mentornet.CURRICULA[name](*given), rtol=1e-6, atol=1e-7
  )
  again = mentornet_fitting.pd_rows(name, num_rows=500, seed=3)
  other = mentornet_fitting.pd_rows(name, num_rows=500, seed=4)
  np.testing.assert_array_equal(rows.losses, again.losses)
  assert not np.array_equal(rows.losses, other.losses)
  train, test = mentornet_fitting.split(rows)
  assert (len(train.losses), len(test.targets)) == (400, 100)


def _recorded():
  losses = np.array([0.1, 4.0, 0.3, 2.0, 0.2], np.float32)
  labels, true_labels = np.array([0, 1, 2, 0, 1]), np.array([0, 2, 2, 1, 1])
  return losses, labels, true_labels, np.array([0, 0, 50, 50, 99])


@pytest.mark.parametrize("use_labels", [False, True])
def test_rows_of_recorded_losses(use_labels):
  lists = [x.tolist() for x in _recorded()]
  rows = mentornet_fitting.dd_rows(*lists, percentile=50, use_labels=use_labels)
  order = np.argsort(rows.losses)
  losses, labels, _, epochs = (x[[0, 4, 2, 3, 1]] for x in _recorded())
  np.testing.assert_array_equal(rows.losses[order], losses)
  np.testing.assert_allclose(rows.differences[order], losses - 0.3, atol=1e-6)
  np.testing.assert_array_equal(rows.labels[order], labels if use_labels else 0)
  np.testing.assert_array_equal(rows.epochs[order], epochs)
  np.testing.assert_array_equal(rows.targets[order], [1, 1, 1, 0, 0])


@pytest.mark.parametrize(
  ("column", "value", "message"),
  [
    (0, np.full(5, np.nan), "losses contain NaN or infinity"),
    (1, _recorded()[2], "all 5 labels are right; record a student on data"),
    (1, _recorded()[2] + 1, "all 5 labels are wrong"),
    (3, np.full(5, 100), "epochs must be percents from 0 to 99"),
    (3, np.full(5, np.nan), "epochs must be percents from 0 to 99"),
    (3, np.zeros(4), r"must have shape \[N\]; got \(5,\), \(5,\), \(5,\), \(4,\)"),
  ],
)
def test_invalid_dumps_are_refused(column, value, message):
  given = list(_recorded())
  given[column] = value
  with pytest.raises(base.InputError, match=message):
    mentornet_fitting.dd_rows(*given, percentile=75)


def test_bad_names_and_numbers_are_refused():
  with pytest.raises(base.InputError, match="use 75"):
    mentornet_fitting.dd_rows(*_recorded(), percentile=0.75)
  with pytest.raises(
    base.InputError, match="curriculum='easy': choose among self_paced"
  ):
    mentornet_fitting.pd_rows("easy")
  for num_rows, message in ((1_200_001, "at most 1200000"), (1, "at least 2")):
    with pytest.raises(base.InputError, match=f"num_rows={num_rows} must .* {message}"):
      mentornet_fitting.pd_rows("pd", num_rows=num_rows)
  with pytest.raises(base.InputError, match="share=80 must be more than 0 and less"):
    mentornet_fitting.split(mentornet_fitting.pd_rows("pd", num_rows=10), 80)


def test_binary_targets_have_a_cross_entropy_and_others_a_squared_error():
  logits = np.array([0.0, 2.0, -1e4], np.float32)
  targets = np.array([1.0, 0.0, 1.0], np.float32)
  entropies = mentornet_fitting.imitation_losses(logits, targets, True)
  np.testing.assert_allclose(entropies, [np.log(2), 2.126928, 1e4], rtol=1e-5)
  squares = mentornet_fitting.imitation_losses(logits, targets, False)
  np.testing.assert_allclose(squares, [0.25, 0.880797**2, 1], rtol=1e-5)
  assert mentornet_fitting.is_binary(targets)
  assert not mentornet_fitting.is_binary(np.array([0.0, 0.5]))


def _fit(rows, compat="official_code", num_steps=600, restarts=2, **settings):
  network = mentornet_network.MentorNetwork(compat=compat)
  variables = mentornet_fitting.fit(
    network, rows, num_steps=num_steps, restarts=restarts, **settings
  )
  return mentornet_network.Mentor("test", network, variables)


@pytest.mark.slow
@pytest.mark.parametrize("compat", mentornet_network.COMPAT)
def test_fit_generalizes_to_other_rows(compat):
  rows = mentornet_fitting.pd_rows("self_paced", num_rows=4000)
  train, test = mentornet_fitting.split(rows)
  result = mentornet_fitting.imitation_errors(_fit(train, compat), test)
  assert result["accuracy"] > 0.95 and result["mse"] < 0.05


@pytest.mark.slow
def test_fit_is_deterministic_and_improves_with_more_starts():
  rows = mentornet_fitting.pd_rows("pd", num_rows=1000)
  several, again, one = (_fit(rows, num_steps=300, restarts=r) for r in (2, 2, 1))
  for a, b in zip(
    jax.tree.leaves(several.variables), jax.tree.leaves(again.variables), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  errors = [mentornet_fitting.imitation_errors(m, rows)["mse"] for m in (several, one)]
  assert errors[0] <= errors[1] + 1e-6


@pytest.mark.slow
def test_only_frozen_embeddings_do_not_change():
  rows = mentornet_fitting.pd_rows("pd", num_rows=1000)
  start, end = (_fit(rows, num_steps=n, restarts=1).variables for n in (0, 20))
  np.testing.assert_array_equal(
    start["frozen"]["epoch_embedding"], end["frozen"]["epoch_embedding"]
  )
  for name in ("output_kernel", "output_bias", "label_embedding"):
    assert not np.array_equal(start["params"][name], end["params"][name]), name


@pytest.mark.ci
def test_labels_without_embedding_and_diverged_fits_are_refused():
  rows = mentornet_fitting.pd_rows("pd", num_rows=1000)
  with pytest.raises(base.InputError, match="between 0 and 1; got 2 to 2"):
    _fit(rows._replace(labels=rows.labels + 2))
  with pytest.raises(base.InputError, match="diverged: lower learning_rate"):
    _fit(rows, num_steps=5, restarts=1, learning_rate=float("inf"))


@pytest.mark.parametrize("setting", ["restarts", "batch_size"])
def test_empty_fits_are_refused(setting):
  rows = mentornet_fitting.pd_rows("pd", num_rows=100)
  with pytest.raises(
    base.InputError, match=f"fit: {setting}=0 must be an integer of at least 1"
  ):
    _fit(rows, **{setting: 0})

"""Tests of the validation images of scripts."""

import numpy as np
import pytest

from experiments import fairness
from experiments import mnist_long_tail
from experiments import mnist_noise
from experiments.lib import held_out
from experiments.lib import runner
from l2rw_jax import base
from l2rw_jax.data import sources


def _settings(**flags):
  return mnist_noise.Settings(dataset="digits", **flags)


def test_validation_images_are_a_tenth_of_each_class_of_the_training_images():
  whole = _settings().load("train")
  settings = _settings(evaluate_on="validation")
  rest, validation = settings.load("train"), settings.load("test")
  counts = np.bincount(whole.labels, minlength=10)
  np.testing.assert_array_equal(np.bincount(validation.labels), counts // 10)
  assert len(rest.labels) + len(validation.labels) == len(whole.labels)
  # No two digits are the same image, so the two parts are disjoint if together they are
  # equal to the training set.
  images = np.concatenate([rest.images, validation.images]).reshape(
    len(whole.labels), -1
  )
  labels = np.concatenate([rest.labels, validation.labels])
  expected = whole.images.reshape(len(whole.labels), -1)
  assert sorted(map(bytes, np.column_stack([images, labels]))) == sorted(
    map(bytes, np.column_stack([expected, whole.labels]))
  )


def test_the_test_set_is_not_read():
  test_images = {bytes(image) for image in sources.load("digits", "test").images}
  for split in ("train", "test"):
    source = _settings(evaluate_on="validation").load(split)
    assert not test_images.intersection(map(bytes, source.images))


def test_the_rows_do_not_depend_on_the_order_of_calls_and_are_the_same_for_all_seeds():
  first, second = (_settings(evaluate_on="validation") for _ in range(2))
  second.load("test")
  np.testing.assert_array_equal(first.load("train").images, second.load("train").images)
  assert first.load("train") is first.load("train")


def test_small_classes_keep_all_their_images():
  labels = np.array([0] * 25 + [1] * 9 + [2] * 10)
  rows = held_out.validation_rows(labels, 4)
  np.testing.assert_array_equal(np.bincount(labels[rows], minlength=4), [2, 0, 1, 0])


def test_a_set_without_validation_images_is_refused(monkeypatch):
  digits = sources.load("digits", "train")
  few = runner.first_images(digits, 9)
  monkeypatch.setattr("experiments.lib.settings._load", lambda *_, **__: few)
  with pytest.raises(base.InputError, match="--evaluate_on=validation: no class of"):
    _settings(evaluate_on="validation").load("test")


def test_the_default_is_not_recorded():
  # Runs that older versions have started can therefore be continued.
  assert "evaluate_on" not in _settings().record()
  assert _settings(evaluate_on="validation").record()["evaluate_on"] == "validation"


@pytest.mark.parametrize(
  ("script", "flags", "said"),
  [
    (
      mnist_long_tail,
      {"imbalance": (10.0,), "num_epochs": 1},
      "validation accuracy %",
    ),
    (fairness, {"num_steps": 1}, "1 steps, validation images"),
  ],
)
def test_results_say_that_they_are_for_validation_images(
  script, flags, said, tmp_path, capsys
):
  settings = script.Settings(
    dataset="digits",
    methods=("uniform",),
    num_seeds=1,
    evaluate_on="validation",
    **flags,
  )
  (row,) = script.run(settings, tmp_path)
  assert row["evaluate_on"] == "validation"
  # The accuracy is a multiple of 1 / N, where N is the number of validation images.
  correct = row["accuracy_percent"] / 100 * len(settings.load("test").labels)
  assert correct == pytest.approx(round(correct), abs=1e-4)
  printed = capsys.readouterr().out
  assert said in printed
  assert "test accuracy" not in printed

"""The titles of figures name the settings of their rows."""

import itertools
import warnings

from matplotlib import container
import matplotlib.pyplot as plt
import pytest

from experiments.lib import figures

_ROW = {"dataset": "cifar10", "network": "mlp", "preset": "p", "fraction": 0.5}


@pytest.mark.parametrize(
  ("more", "columns", "expected"),
  [
    ({}, ["fraction"], "cifar10, mlp, preset p\nfraction 0.5"),
    ({"fraction": 0.0}, ["dataset", "fraction"], "mlp, preset p\ncifar10, fraction 0"),
    (
      {"cosine": True, "num_steps": 2000, "noise": None},
      ["noise", "num_steps"],
      "cifar10, mlp, preset p, cosine learning rate\n2,000 steps",
    ),
    (
      {"pixels": "raw", "initialization": "flax", "plateau_steps": 3},
      ["fraction"],
      "cifar10, mlp, preset p, plateau learning rate\n"
      "raw pixels, flax initialization\nfraction 0.5",
    ),
    (
      {"schedule": "constant", "preset": None},
      ["fraction"],
      "cifar10, mlp, constant learning rate\nfraction 0.5",
    ),
  ],
)
def test_title(more, columns, expected):
  assert figures.setting_title(_ROW | more, columns) == expected


def test_dollar_signs_in_the_name_of_the_data_are_not_a_formula(tmp_path):
  # As a formula, "_" without a subscript would be an error, after hours of training.
  row = _ROW | {"dataset": "npz:/data/$_$.npz", "method": "uniform"}
  row |= {"accuracy_percent": 50.0, "published_percent": None}
  figures.accuracies([row], ["preset", "fraction"], tmp_path / "a.png")
  assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_titles_of_neighboring_panels_do_not_overlap(tmp_path, monkeypatch):
  monkeypatch.setattr(plt, "close", lambda *_: None)
  rows = [
    {"dataset": "fashion_mnist " * 4, "imbalance": number, "method": "l2rw"}
    for number in (100, 200)
  ]
  figures.panels(
    rows,
    ["dataset", "imbalance"],
    tmp_path / "figure.png",
    draw_method=lambda axes, place, rows: axes.plot([50.0], [place], "k."),
    add_legend_entries=lambda axes: axes.plot([], [], "k.", label="one seed"),
    title=lambda dataset, imbalance: f"{dataset}, imbalance {imbalance}, 20 epochs",
  )
  figure = plt.gcf()
  figure.canvas.draw()
  left, right = (ax.title.get_window_extent() for ax in figure.axes)
  monkeypatch.undo()
  plt.close(figure)
  assert left.width > 0 and left.x1 < right.x0


def test_a_bar_without_values_is_left_out():
  _, axes = plt.subplots()
  values = {"all": [[10.0, 30.0], [5.0]], "shuffled": [[], [7.0]], "random": [[], []]}
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # NumPy warns of the mean of an empty list.
    edges = figures.grouped_bars(axes, values, ["a", "b"])
  is_bars = [isinstance(c, container.BarContainer) for c in axes.containers]
  bars = itertools.compress(axes.containers, is_bars)
  heights = [[bar.get_height() for bar in group] for group in bars]
  plt.close("all")
  assert heights == [[20.0, 5.0], [7.0], []]
  assert {label: len(places) for label, places in edges.items()} == dict.fromkeys(
    values, 2
  )

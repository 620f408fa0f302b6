"""Published numbers, which the tables show next to the results of this library."""

MNIST_IMBALANCE_SOURCE = (
  "Published: Ren et al. (2018), figure 3, read from the coordinates of the figure;"
  " their ± is the drawn error bar, whose type is not stated."
)
# The test error in % and its "±" for each method and share of the majority class.
_MAJORITIES = (0.9, 0.95, 0.98, 0.99, 0.995)
_IMBALANCE_ERRORS = {
  "uniform": ((1.62, 0.21), (2.86, 0.30), (5.80, 0.61), (10.48, 1.00), (18.26, 1.72)),
  "random": ((1.78, 0.20), (2.82, 0.55), (5.62, 0.52), (9.52, 1.42), (17.74, 1.97)),
  "class_proportion": (
    (1.22, 0.17),
    (2.04, 0.32),
    (3.32, 0.44),
    (5.40, 0.58),
    (8.30, 1.35),
  ),
  "resampling": ((1.40, 0.24), (1.78, 0.20), (3.38, 0.41), (5.96, 0.86), (9.62, 1.09)),
  "hard_mining": ((1.34, 0.39), (1.48, 0.53), (2.16, 0.52), (4.50, 0.87), (7.74, 1.98)),
  "l2rw": ((1.28, 0.54), (1.44, 0.58), (1.96, 0.62), (2.50, 0.75), (3.62, 0.65)),
}
# Maps a method and the share of the majority class to these numbers.
MNIST_IMBALANCE = {
  method: dict(zip(_MAJORITIES, errors, strict=True))
  for method, errors in _IMBALANCE_ERRORS.items()
}

MNIST_NOISE_SOURCE = (
  "Published: Patel and Sastry (2023, BARE), MNIST table, read from a secondary source;"
  " their ± is a standard deviation. Shown only for their 200 epochs (preset bare), and"
  " the raw pixels and PyTorch's initial parameters of the released code."
)
# Maps a builder and noise rate, and a method, to the test accuracy in % after the last
# epoch and its "±".
MNIST_NOISE = {
  ("bare_symmetric", 0.5): {
    "uniform": (74.30, 0.55),
    "bare": (94.38, 0.13),
    "l2rw": (90.39, 0.07),
    "meta_weight_net": (74.94, 9.56),
  },
  ("bare_symmetric", 0.7): {
    "uniform": (61.19, 1.29),
    "bare": (91.61, 0.60),
    "l2rw": (85.10, 0.28),
    "meta_weight_net": (65.52, 21.35),
  },
  ("bare_class_conditional", 0.45): {
    "uniform": (74.96, 0.21),
    "bare": (94.11, 0.77),
    "l2rw": (95.40, 0.31),
    "meta_weight_net": (75.03, 0.59),
  },
}

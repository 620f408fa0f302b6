"""Published numbers, which the tables show next to the results of this library."""

MNIST_IMBALANCE_SOURCE = (
  "Published: Ren et al. (2018), figure 3, read from the coordinates of the figure;"
  " their ± is the drawn error bar, whose type is not stated."
)
# Maps a method and the share of the majority class to the test error in % and its "±".
MNIST_IMBALANCE = {
  "uniform": {
    0.9: (1.62, 0.21),
    0.95: (2.86, 0.30),
    0.98: (5.80, 0.61),
    0.99: (10.48, 1.00),
    0.995: (18.26, 1.72),
  },
  "random": {
    0.9: (1.78, 0.20),
    0.95: (2.82, 0.55),
    0.98: (5.62, 0.52),
    0.99: (9.52, 1.42),
    0.995: (17.74, 1.97),
  },
  "proportion": {
    0.9: (1.22, 0.17),
    0.95: (2.04, 0.32),
    0.98: (3.32, 0.44),
    0.99: (5.40, 0.58),
    0.995: (8.30, 1.35),
  },
  "resampling": {
    0.9: (1.40, 0.24),
    0.95: (1.78, 0.20),
    0.98: (3.38, 0.41),
    0.99: (5.96, 0.86),
    0.995: (9.62, 1.09),
  },
  "hard_mining": {
    0.9: (1.34, 0.39),
    0.95: (1.48, 0.53),
    0.98: (2.16, 0.52),
    0.99: (4.50, 0.87),
    0.995: (7.74, 1.98),
  },
  "l2rw": {
    0.9: (1.28, 0.54),
    0.95: (1.44, 0.58),
    0.98: (1.96, 0.62),
    0.99: (2.50, 0.75),
    0.995: (3.62, 0.65),
  },
}

MNIST_NOISE_SOURCE = (
  "Published: Patel and Sastry (2023, BARE), MNIST table, read from a secondary source;"
  " their ± is a standard deviation. Shown only for their 200 epochs (preset bare), and"
  " the raw pixels of the released code, which has PyTorch's initial parameters."
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

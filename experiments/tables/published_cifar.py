"""Published numbers for CIFAR with wrong labels and long tails."""

from collections.abc import Iterator, Mapping, Sequence

SOURCE = (
  "Published: the tables of the preset's paper (Ren et al. 2018, Shu et al. 2019, Jiang"
  " et al. 2018). The ± of L2RW is a 95% interval over 5 splits; the meaning of that of"
  " Meta-Weight-Net could not be verified; MentorNet reports none."
)
# Numbers in the tables of wrong labels are pairs of a test accuracy in % and its "±",
# which is None if it is not published.
# Methods are called by their names in this library: bootstrapping_hard and _soft are
# Reed-Hard and Reed-Soft, and s_model_conf is S-Model+Conf. "Focal" is the focal loss
# in the tables of Meta-Weight-Net and LDAM, but a curriculum (focal_weight) in the
# table of MentorNet.

_L2RW_UNIFORM = {
  "cifar10": {
    "uniform": (67.97, 0.62),
    "bootstrapping_hard": (69.66, 1.21),
    "s_model": (70.64, 3.09),
    "random": (86.06, 0.32),
    "clean_only": (46.64, 3.90),
    "fine_tuning": (78.66, 0.44),
    "l2rw": (86.92, 0.19),
  },
  "cifar100": {
    "uniform": (50.66, 0.24),
    "bootstrapping_hard": (51.34, 0.17),
    "s_model": (49.10, 0.58),
    "random": (58.01, 0.37),
    "clean_only": (9.94, 0.82),
    "fine_tuning": (54.52, 0.40),
    "l2rw": (61.34, 2.06),
  },
}
_L2RW_BACKGROUND = {
  "cifar10": {
    "uniform": (59.54, 2.16),
    "s_model": (58.60, 2.33),
    "s_model_conf": (68.93, 1.09),
    "random": (69.51, 1.36),
    "clean_only": (15.90, 3.32),
    "fine_tuning": (82.82, 0.93),
    "l2rw": (86.73, 0.48),
  },
  "cifar100": {
    "uniform": (37.82, 0.69),
    "s_model": (37.02, 0.34),
    "s_model_conf": (46.72, 1.87),
    "random": (36.56, 0.44),
    "clean_only": (8.06, 0.76),
    "fine_tuning": (54.23, 1.75),
    "l2rw": (59.30, 0.60),
  },
}

# The methods of Meta-Weight-Net's tables that this library implements and that have a
# number at every fraction (S-Model has none at 0.6 of uniform noise). The paper states
# neither which MentorNet it used nor the gamma of the focal loss (1 in this library).
# The columns are the noise fractions 0, 0.4 and 0.6.
_MWN_UNIFORM = {
  "cifar10": {
    "uniform": ((95.60, 0.22), (68.07, 1.23), (53.12, 3.03)),
    "bootstrapping_hard": ((94.38, 0.14), (81.26, 0.51), (73.53, 1.54)),
    "focal": ((95.70, 0.15), (75.96, 1.31), (51.87, 1.19)),
    "self_paced": ((90.81, 0.34), (86.41, 0.29), (53.10, 1.78)),
    "fine_tuning": ((95.65, 0.15), (80.47, 0.25), (78.75, 2.40)),
    "l2rw": ((92.38, 0.10), (86.92, 0.19), (82.24, 0.36)),
    "meta_weight_net": ((94.52, 0.25), (89.27, 0.28), (84.07, 0.33)),
  },
  "cifar100": {
    "uniform": ((79.95, 1.26), (51.11, 0.42), (30.92, 0.33)),
    "bootstrapping_hard": ((64.45, 1.02), (51.27, 1.18), (26.95, 0.98)),
    "focal": ((81.04, 0.24), (51.19, 0.46), (27.70, 3.77)),
    "self_paced": ((59.79, 0.46), (46.31, 2.45), (19.08, 0.57)),
    "fine_tuning": ((80.88, 0.21), (52.49, 0.74), (38.16, 0.38)),
    "l2rw": ((72.99, 0.58), (60.79, 0.91), (48.15, 0.34)),
    "meta_weight_net": ((78.76, 0.24), (67.73, 0.26), (58.75, 0.11)),
  },
}

# The columns are the noise fractions 0, 0.2 and 0.4.
_MWN_FLIP = {
  "cifar10": {
    "uniform": ((92.89, 0.32), (76.83, 2.30), (70.77, 2.31)),
    "bootstrapping_hard": ((92.31, 0.25), (88.28, 0.36), (81.06, 0.76)),
    "s_model": ((83.61, 0.13), (79.25, 0.30), (75.73, 0.32)),
    "focal": ((93.03, 0.16), (86.45, 0.19), (80.45, 0.97)),
    "self_paced": ((88.52, 0.21), (87.03, 0.34), (81.63, 0.52)),
    "fine_tuning": ((93.23, 0.23), (82.47, 3.64), (74.07, 1.56)),
    "l2rw": ((89.25, 0.37), (87.86, 0.36), (85.66, 0.51)),
    "meta_weight_net": ((92.04, 0.15), (90.33, 0.61), (87.54, 0.23)),
  },
  "cifar100": {
    "uniform": ((70.50, 0.12), (50.86, 0.27), (43.01, 1.16)),
    "bootstrapping_hard": ((69.02, 0.32), (60.27, 0.76), (50.40, 1.01)),
    "s_model": ((51.46, 0.20), (45.45, 0.25), (43.81, 0.15)),
    "focal": ((70.02, 0.53), (61.87, 0.30), (54.13, 0.40)),
    "self_paced": ((67.55, 0.27), (63.63, 0.30), (53.51, 0.53)),
    "fine_tuning": ((70.72, 0.22), (56.98, 0.50), (46.37, 0.25)),
    "l2rw": ((64.11, 1.09), (57.47, 1.16), (50.98, 1.55)),
    "meta_weight_net": ((70.11, 0.33), (64.22, 0.28), (58.64, 0.47)),
  },
}

# Table 2 of MentorNet, with the student "ResNet-101". The columns are the noise
# fractions 0.2, 0.4 and 0.8.
_MENTORNET = {
  "cifar10": {
    "uniform": ((82.0, None), (69.0, None), (18.0, None)),
    "self_paced": ((89.0, None), (85.0, None), (28.0, None)),
    "bootstrapping_soft": ((81.0, None), (63.0, None), (18.0, None)),
    "focal_weight": ((79.0, None), (65.0, None), (28.0, None)),
    "mentornet_pd": ((91.0, None), (77.0, None), (33.0, None)),
    "mentornet_dd": ((92.0, None), (89.0, None), (49.0, None)),
  },
  "cifar100": {
    "uniform": ((60.0, None), (45.0, None), (8.0, None)),
    "self_paced": ((70.0, None), (55.0, None), (13.0, None)),
    "bootstrapping_soft": ((62.0, None), (46.0, None), (8.0, None)),
    "focal_weight": ((59.0, None), (44.0, None), (9.0, None)),
    "mentornet_pd": ((72.0, None), (56.0, None), (14.0, None)),
    "mentornet_dd": ((73.0, None), (68.0, None), (35.0, None)),
  },
}

# Maps a preset to the builder, the noise fractions, and a table: data set -> method ->
# a number for each fraction, or the number itself if there is one fraction.
_TABLES: dict[str, tuple[str, tuple[float, ...], dict]] = {
  "l2rw_uniform": ("uniform_flip", (0.4,), _L2RW_UNIFORM),
  "l2rw_background": ("background_flip", (0.4,), _L2RW_BACKGROUND),
  "mwn_uniform": ("mwn_uniform", (0.0, 0.4, 0.6), _MWN_UNIFORM),
  "mwn_flip": ("mwn_flip2", (0.0, 0.2, 0.4), _MWN_FLIP),
  "mentornet": ("mwn_uniform", (0.2, 0.4, 0.8), _MENTORNET),
}


def lookup(
  preset: str, dataset: str, noise: str, fraction: float | None, method: str
) -> tuple[float | None, float | None]:
  """Returns the published accuracy in % and its ±; each is None if not published."""
  builder, fractions, table = _TABLES.get(preset, ("", (), {}))
  numbers = table.get(dataset, {}).get(method)
  if noise != builder or fraction not in fractions or numbers is None:
    return None, None
  return numbers if len(fractions) == 1 else numbers[fractions.index(fraction)]


def noise_cells(dataset: str) -> Iterator[tuple[str, str, float, str]]:
  """Yields (preset, noise, fraction, method) of every number that `lookup` knows."""
  for preset, (builder, fractions, table) in _TABLES.items():
    for fraction in fractions:
      for method in table.get(dataset, {}):
        yield preset, builder, fraction, method


LONG_TAIL_SOURCE = (
  "Published: builder ldam, Cao et al. 2019, tables 2 and 5 (100 minus the error,"
  " whether of the last or the best epoch is not stated); builder mwn, Shu et al. 2019"
  " (best epoch on the test set). Neither gives a ± here."
)
# The columns are the imbalances 100 and 10 of the exponential shape, and 100 and 10 of
# the step shape, on CIFAR-10 and then on CIFAR-100. Two methods are omitted because
# this library implements them differently: class-balanced resampling, whose released
# sampler uses effective numbers, and the class-balanced focal loss, whose code computes
# the probability from the weighted loss.
_LDAM_TAILS = tuple((s, f) for s in ("exponential", "step") for f in (100.0, 10.0))
_LDAM_ERRORS = {
  "uniform": (29.64, 13.61, 36.70, 17.50, 61.68, 44.30, 61.45, 45.37),
  "focal": (29.62, 13.34, 36.09, 16.36, 61.59, 44.22, 61.43, 46.54),
  "class_balanced": (27.63, 13.46, 38.06, 16.20, 66.01, 42.88, 78.69, 47.52),
  "ldam": (26.65, 13.04, 33.42, 15.00, 60.40, 43.09, 60.42, 43.73),
  "ldam_drw": (22.97, 11.84, 23.08, 12.19, 57.96, 41.29, 54.64, 40.54),
  "uniform_drw": (25.14, 13.12, 28.40, 14.49, 59.34, 42.68, 58.86, 42.78),
  "uniform_drs": (25.50, 13.28, 27.97, 14.83, 59.67, 42.74, 58.65, 43.21),
}

# The columns are the imbalances 200, 100, 50, 20, 10 and 1 of the exponential shape, on
# CIFAR-10 and then on CIFAR-100. Where both papers report plain cross-entropy, the
# numbers are the same (except for 55.70 and 55.71 on CIFAR-100), so they are probably
# not from separate runs.
_MWN_TAILS = tuple(("exponential", f) for f in (200.0, 100.0, 50.0, 20.0, 10.0, 1.0))
_MWN_ACCURACIES = {
  "uniform": (
    *(65.68, 70.36, 74.81, 82.23, 86.39, 92.89),
    *(34.84, 38.32, 43.85, 51.14, 55.71, 70.50),
  ),
  "focal": (
    *(65.29, 70.38, 76.71, 82.76, 86.66, 93.03),
    *(35.62, 38.41, 44.32, 51.95, 55.78, 70.52),
  ),
  "fine_tuning": (
    *(66.08, 71.33, 77.42, 83.37, 86.42, 93.23),
    *(38.22, 41.83, 46.40, 52.11, 57.44, 70.72),
  ),
  "l2rw": (
    *(66.51, 74.16, 78.93, 82.12, 85.19, 89.25),
    *(33.38, 40.23, 44.44, 51.64, 53.73, 64.11),
  ),
  "meta_weight_net": (
    *(68.91, 75.21, 80.06, 84.94, 87.84, 92.66),
    *(37.91, 42.09, 46.74, 54.37, 58.46, 70.37),
  ),
}

# Maps a builder to its tails, and to a table: method -> an accuracy for each tail on
# each of these data sets.
_TAIL_SETS = ("cifar10", "cifar100")
_Tails = tuple[tuple[str, float], ...]
_TAIL_TABLES: dict[str, tuple[_Tails, Mapping[str, Sequence[float]]]] = {
  "ldam": (
    _LDAM_TAILS,
    {m: [round(100 - e, 2) for e in errors] for m, errors in _LDAM_ERRORS.items()},
  ),
  "mwn": (_MWN_TAILS, _MWN_ACCURACIES),
}


def long_tail(
  dataset: str, method: str, builder: str, shape: str, imbalance: float
) -> float | None:
  """Returns the published accuracy of ResNet-32 in %, or None."""
  tails, table = _TAIL_TABLES[builder]
  tail = (shape, imbalance)
  if tail not in tails or dataset not in _TAIL_SETS or method not in table:
    return None
  return table[method][_TAIL_SETS.index(dataset) * len(tails) + tails.index(tail)]


def long_tail_cells(dataset: str) -> Iterator[tuple[str, str, str, float]]:
  """Yields (method, builder, shape, imbalance) of every number of `long_tail`."""
  for builder, (tails, table) in _TAIL_TABLES.items():
    for tail in tails if dataset in _TAIL_SETS else ():
      for method in table:
        yield method, builder, *tail

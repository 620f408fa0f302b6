"""Floor 1: a weighted subset of the training set, class by class.

What the gradients of all n examples point to, the chosen ones should too: with the
proxies q_i of `select` for gradients, each class's part of the subset minimizes the
distance of every example to its nearest chosen one, and the weight of a chosen
example is the number of those it stands for.

References:
  Mirzasoleiman, Bilmes, Leskovec, "Coresets for Data-efficient Training of Machine
  Learning Models", ICML 2020 (CRAIG).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax.coresets import distances
from l2rw_jax.coresets import facility_location

GREEDY = ("lazy", "stochastic")
BUDGETS = ("proportional", "equal")
_SMALLEST_EPSILON = 1e-12


class Coreset(NamedTuple):
  """A weighted subset, NumPy arrays.

  Attributes:
    rows: of the chosen examples, ascending, int32 [r].
    weights: cluster sizes gamma, summing to n, float32 [r]; equal proxies that are
      chosen share the size of their cluster.
  """

  rows: np.ndarray
  weights: np.ndarray


def class_budgets(
  class_counts: Sequence[int], size: int, budget: str = "proportional"
) -> np.ndarray:
  """How many examples to choose of each class, int [C], `size` in all.

  Each class that has examples gets at least one and none more than it has.

  Args:
    class_counts: examples of each class, [C].
    size: r, between the number of classes with examples and the number of examples.
    budget: "proportional" to the counts, the remainders going to the largest
      fractions (CRAIG's scripts round up), or "equal" for all classes.

  Raises:
    InputError: `size` or `budget` out of range.

  >>> print(class_budgets([50, 30, 2], 8), class_budgets([50, 30, 2], 8, "equal"))
  [4 3 1] [3 3 2]
  """
  counts = np.asarray(class_counts)
  if budget not in BUDGETS:
    raise base.InputError(f"budget={budget!r}: choose one of {BUDGETS}.")
  present = int((counts > 0).sum())
  if not present <= size <= counts.sum():
    raise base.InputError(
      f"cannot choose size={size} of {counts.sum()} examples in {present} classes:"
      " it must be at least one for each class and at most all of them."
    )
  targets = size * counts / counts.sum()
  if budget == "equal":
    left, order = float(size), np.argsort(counts)
    for place, c in enumerate(order):
      targets[c] = min(counts[c], left / (len(order) - place))
      left -= targets[c]
  found = np.clip(targets.astype(int), counts > 0, counts)
  while found.sum() < size:
    found[np.argmax(np.where(found < counts, targets - found, -np.inf))] += 1
  while found.sum() > size:
    found[np.argmax(np.where(found > 1, found - targets, -np.inf))] -= 1
  return found


def select(
  proxies: base.Array,
  labels: np.ndarray,
  size: int,
  *,
  features: base.Array | None = None,
  scale: base.Array | None = None,
  budget: str = "proportional",
  greedy: str = "lazy",
  epsilon: float = 0.1,
  key: base.Array | None = None,
) -> Coreset:
  """Chooses and weighs a subset, each class on its own.

  Distances are between proxies; with `features` between the outer products of proxy
  and features, bias included, as the gradients of a last layer are. Classes are
  padded to a few sizes, so that they share compiled programs.

  Args:
    proxies: q, [n, C].
    labels: classes to choose within, [n]: integers, strings or anything that sorts.
    size: r, at least one a class and at most n.
    features: what the last layer sees, [n, d].
    scale: what coordinates of the outer products are divided by, [C, d + 1], the
      bias last; needs features.
    budget: see `class_budgets`.
    greedy: "lazy" is exact; "stochastic" looks at random candidates.
    epsilon: of the stochastic greedy's guarantee, in (0, 1).
    key: of its draws, a typed PRNG key.

  Returns:
    A `Coreset`; its weights sum to n.

  Raises:
    InputError: an argument out of range, or a proxy that is NaN or infinite.
  """
  check_greedy(greedy, epsilon)
  labels = np.asarray(labels)
  if np.ndim(proxies) != 2:
    raise base.InputError(
      f"select: proxies must be [n, C]; got shape {np.shape(proxies)}."
    )
  if labels.shape != np.shape(proxies)[:1]:
    raise base.InputError(
      f"select: labels of shape {labels.shape} do not fit proxies of shape"
      f" {np.shape(proxies)}; give one label a proxy."
    )
  if greedy == "stochastic" and key is None:
    raise base.InputError("select: greedy='stochastic' needs key=jax.random.key(seed).")
  if scale is not None and features is None:
    raise base.InputError("select: scale= is of outer products; give features= too.")
  table = [np.asarray(proxies)]
  if features is not None:
    table.append(_with_bias(features))
  for name, x in zip(("proxies", "features"), table, strict=False):
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if bad.size:
      raise base.InputError(
        f"select: {bad.size} of the {name} hold NaN or infinity, the first is of"
        f" example {bad[0]}; look at the network or lower the learning rate."
      )
  classes, counts = np.unique(labels, return_counts=True)
  sizes = class_budgets(counts.tolist(), size, budget)
  found = []
  for place, (c, class_size) in enumerate(zip(classes, sizes.tolist(), strict=True)):
    members = np.flatnonzero(labels == c)
    # The draws of a class do not depend on which other classes there are.
    is_id = np.issubdtype(classes.dtype, np.integer) and 0 <= c < 2**32
    class_key = None
    if key is not None:
      class_key = jax.random.fold_in(key, int(c) if is_id else place)
    chosen = _select_class(
      [x[members] for x in table], scale, class_size, greedy, epsilon, class_key
    )
    # All classes are under way before the first is waited for.
    found.append((members, class_size, chosen))
  rows = np.concatenate([m[np.asarray(s.rows)[:k]] for m, k, s in found])
  weights = np.concatenate([np.asarray(s.weights)[:k] for _, k, s in found])
  order = np.argsort(rows)
  return Coreset(rows[order].astype(np.int32), weights[order].astype(np.float32))


def _select_class(table, scale, size, greedy, epsilon, key):
  num_points, whole = len(table[0]), _rounded_up(len(table[0]))
  table = [np.pad(x, ((0, whole - num_points), (0, 0))) for x in table]
  if len(table) == 1:
    points: Any = distances.vectors(table[0])
  else:
    points = distances.outer_products(table[0], table[1], scale)
  given = {"capacity": _rounded_up(size), "num_points": num_points}
  if greedy == "lazy":
    return facility_location.lazy_greedy(points, size, **given)
  num_candidates = _rounded_up(facility_location.sample_size(num_points, size, epsilon))
  return facility_location.stochastic_greedy(
    key, points, size, num_candidates=num_candidates, **given
  )


def _rounded_up(size: int) -> int:
  """To four steps an octave, so that few shapes are compiled."""
  step = 1 << max(0, size.bit_length() - 3)
  return -(-size // step) * step


def _with_bias(features):
  features = np.asarray(features)
  return np.concatenate([features, np.ones((len(features), 1), features.dtype)], axis=1)


def check_greedy(greedy: str, epsilon: float) -> None:
  """Raises InputError unless `select` can be asked for this."""
  if greedy not in GREEDY:
    raise base.InputError(f"greedy={greedy!r}: choose one of {GREEDY}.")
  # Below, the stochastic greedy would look at more candidates than the exact one.
  if not _SMALLEST_EPSILON <= epsilon < 1:
    raise base.InputError(
      f"epsilon={epsilon} must lie between {_SMALLEST_EPSILON:g} and 1; with less,"
      " greedy='lazy' is exact and faster."
    )

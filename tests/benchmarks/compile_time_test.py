"""Sizes of the programs of training steps, relative to plain training.

Operations before optimization are counted; nothing is compiled.
"""

import functools

import pytest

from benchmarks import compile_time

# Limits relative to plain training, by the number of parameter arrays.
_LIMITS = {name: {50: 3.0, 200: 3.0, 800: 3.0} for name in compile_time.STEPS}
# Older versions of JAX emit more operations for the same function.
_LIMITS["clipped_gradient"] = {50: 3.0, 200: 3.1, 800: 3.2}


def _count(step, num_arrays):
  return compile_time.num_operations(compile_time.lower(step, num_arrays))


@functools.cache
def _plain(num_arrays):
  return _count(compile_time.plain, num_arrays)


@pytest.mark.ci
@pytest.mark.slow(unless=("layerwise", "meta_weight_net", "example_weights"))
@pytest.mark.parametrize("name", _LIMITS)
def test_a_program_is_at_most_a_few_times_as_large_as_plain_training(name):
  sizes = {n: _count(compile_time.STEPS[name], n) for n in (50, 200)}
  plain = {n: _plain(n) for n in sizes}
  for counts in (sizes, plain):
    # Tracing 800 arrays takes too long for a test, so the count is extrapolated from
    # the number of operations for each further array.
    counts[800] = counts[200] + (counts[200] - counts[50]) * 600 // 150
  for num_arrays, limit in _LIMITS[name].items():
    assert sizes[num_arrays] <= limit * plain[num_arrays]

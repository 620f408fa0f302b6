"""Sizes of the programs of training steps, relative to plain training.

Operations before optimization are counted; nothing is compiled.
"""

import functools

import pytest

from benchmarks import compile_time

# Relative to plain training. `example_weights` and the gradient after it are two
# separate transformations, whose common forward pass only the compiler merges. The
# layerwise engine computes the gradients of layers one after the other.
_LIMITS = dict.fromkeys(compile_time.STEPS, 3.0)
_LIMITS |= {"example_weights": 3.2, "layerwise": 3.1}


@functools.cache
def _plain(num_arrays):
  return compile_time.num_operations(compile_time.lower(compile_time.plain, num_arrays))


@pytest.mark.parametrize("num_arrays", [50, 200])
@pytest.mark.parametrize("name", _LIMITS)
def test_a_program_is_at_most_a_few_times_that_of_plain_training(name, num_arrays):
  lowered = compile_time.lower(compile_time.STEPS[name], num_arrays)
  assert compile_time.num_operations(lowered) <= _LIMITS[name] * _plain(num_arrays)

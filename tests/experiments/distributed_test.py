"""Flags for several processes that do not fit together."""

import pytest

from experiments import digits_noise
from experiments import mentornet_pretrain
from experiments.lib import distributed
from l2rw_jax import base

_ADDRESS = {"coordinator_address": "localhost:1"}


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (digits_noise.Settings(**_ADDRESS), "--num_processes and --process_id must also"),
    (
      digits_noise.Settings(**_ADDRESS, num_processes=2, process_id=2),
      "--process_id=2 must be below --num_processes=2",
    ),
    (mentornet_pretrain.Settings(distributed=True), "--distributed: this script runs"),
  ],
)
def test_wrong_flags_raise_in_one_line(settings, message):
  with pytest.raises(base.InputError, match=message) as caught:
    distributed.connect(settings)
  assert "\n" not in str(caught.value)


def test_without_flags_a_process_stays_alone():
  distributed.connect(digits_noise.Settings())
  distributed.leave(3)  # Returns.

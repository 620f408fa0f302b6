"""MentorNet: example weights from a curriculum (Jiang et al., 2018)."""

from l2rw_jax.methods.mentornet.method import CURRICULA
from l2rw_jax.methods.mentornet.method import NO_DROPOUT
from l2rw_jax.methods.mentornet.method import PRESETS
from l2rw_jax.methods.mentornet.method import Curriculum
from l2rw_jax.methods.mentornet.method import Preset
from l2rw_jax.methods.mentornet.method import Schedule
from l2rw_jax.methods.mentornet.method import check_percentile
from l2rw_jax.methods.mentornet.method import class_mismatch
from l2rw_jax.methods.mentornet.method import dropout_rates
from l2rw_jax.methods.mentornet.method import epoch_percent
from l2rw_jax.methods.mentornet.method import example_dropout
from l2rw_jax.methods.mentornet.method import focal
from l2rw_jax.methods.mentornet.method import hard
from l2rw_jax.methods.mentornet.method import mentornet
from l2rw_jax.methods.mentornet.method import moving_percentile
from l2rw_jax.methods.mentornet.method import pd_mixture
from l2rw_jax.methods.mentornet.method import preset
from l2rw_jax.methods.mentornet.method import self_paced
from l2rw_jax.methods.mentornet.method import spcl_linear
from l2rw_jax.methods.mentornet.method import uniform

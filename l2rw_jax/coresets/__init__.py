"""Coresets: small weighted subsets that represent a whole training set."""

from l2rw_jax.coresets.selection import BUDGETS
from l2rw_jax.coresets.selection import GREEDY
from l2rw_jax.coresets.selection import Coreset
from l2rw_jax.coresets.selection import check_greedy
from l2rw_jax.coresets.selection import class_budgets
from l2rw_jax.coresets.selection import select

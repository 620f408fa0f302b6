"""Detection of wrong labels: training statistics, and a ranking of the labels."""

from l2rw_jax.audit.label_issues import LabelIssues
from l2rw_jax.audit.label_issues import find_label_issues
from l2rw_jax.audit.recorded_method import recording
from l2rw_jax.audit.statistics import State
from l2rw_jax.audit.statistics import init
from l2rw_jax.audit.statistics import summarize
from l2rw_jax.audit.statistics import update

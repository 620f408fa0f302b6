"""Flax linen networks; they know nothing of weights."""

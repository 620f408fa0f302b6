"""Flax linen networks; none of them depends on example weights."""

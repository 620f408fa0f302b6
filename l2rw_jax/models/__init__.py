"""Flax linen networks; none of them uses example weights."""

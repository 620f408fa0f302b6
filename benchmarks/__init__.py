"""Benchmarks: measured times of this library, next to those of the alternatives."""

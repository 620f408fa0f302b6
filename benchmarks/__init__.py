"""Benchmarks of the speed, memory and accuracy of this library and of alternatives."""

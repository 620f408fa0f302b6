"""Conversion of rows of results to tables; run `python -m experiments.tables`."""

"""Floor 6: how rows of results become tables; `python -m experiments.tables`."""

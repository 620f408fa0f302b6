"""How rows of results become tables; `python -m experiments.tables`."""

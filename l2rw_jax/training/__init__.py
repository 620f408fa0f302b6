"""The training loop for every method: see `loop.train`."""

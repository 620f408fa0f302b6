"""The only loop, for every method: see `loop.train`."""

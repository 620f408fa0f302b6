"""Files of a run: the working directory, checkpoints and metrics."""

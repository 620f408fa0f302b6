"""Data sets: sources, a cache of decoded sources, and splits with deliberate errors."""

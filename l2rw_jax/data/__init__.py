"""Data sets: sources, a cache of decoded sources, and splits that are made wrong."""

"""Data sets in memory: sources, their decoded cache, and wrong-on-purpose splits."""

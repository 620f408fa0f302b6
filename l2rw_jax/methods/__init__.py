"""Training methods, one per file: formulas for your code, a `Method` for the loop."""

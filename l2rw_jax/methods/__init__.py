"""One published system a file: formulas for your code, a `Method` for the loop."""

"""One script a table; absl flags live only here."""

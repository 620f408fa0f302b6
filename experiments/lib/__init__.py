"""Floor 6: what the scripts share."""

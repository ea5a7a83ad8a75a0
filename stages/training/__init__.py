"""One training loop and its parts, for every model."""

"""Samples: tokens and pixels from finished models."""

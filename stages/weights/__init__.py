"""Weights of our own artifacts, and weights made elsewhere."""

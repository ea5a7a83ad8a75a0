"""Scores as maths on arrays, and the networks that give the features."""

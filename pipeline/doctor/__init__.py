"""Checks of the machine: what it is, and what will not work on it."""

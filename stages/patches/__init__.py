"""Patches: the rule, its thresholds, and what decides boundaries in samples."""

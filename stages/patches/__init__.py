"""Patches: the rule, its thresholds, and the sources of boundaries in samples."""

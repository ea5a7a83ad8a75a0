"""Limits that bound memory. Nothing here imports torch, so that a run can be planned without it."""

from __future__ import annotations

DECODED_PIXELS = 2**20  # at a time, 16 images of 256 px: VQ-16's decoder takes 2.6 KB a pixel, so 2.7 GB

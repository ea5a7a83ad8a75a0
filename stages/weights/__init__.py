"""Weights in artifacts, and pretrained weights from other projects."""

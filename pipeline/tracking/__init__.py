"""Runs recorded in MLflow: the only package that imports MLflow."""

"""The pipeline as Prefect flows: the only package that imports Prefect."""

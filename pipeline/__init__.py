"""Orchestration: graph, cache, launch, Prefect, MLflow and the command line."""

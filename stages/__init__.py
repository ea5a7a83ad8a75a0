"""The stages: plain functions from artifacts to an artifact. They know neither Prefect nor MLflow."""
